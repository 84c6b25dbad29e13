"""The program tells OpenMP to sleep early, before torch loads it, unless the user said how to wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

CODE = "import sys, deltaw.cli; assert 'torch' not in sys.modules; import deltaw.cli.main, torch"


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_openmp_spins_for_so_long(said: dict[str, str], spins: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env={**kept, **said, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "GOMP_CPU_AFFINITY" not in done.stderr:
        pytest.fail("torch brings another OpenMP than GNU's: look at how long its threads spin")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[0] == spins
