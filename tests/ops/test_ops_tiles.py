"""Products by tiles (AMX): tests of a path, on that of tiles, which computes in memory as Intel's manual says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from emulated_tiles import EMULATED

from deltaw.ops.native import build, library

TESTS = Path(__file__).resolve().parents[1]
FILES = ("ops/test_ops_wide.py", "ops/test_ops_blockwise.py", "ops/test_ops_paged.py", "serve/test_serve_fast.py")


def test_ops_tiles_every_test_of_a_path_passes_on_that_of_tiles(tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return
    made = build.build(tmp_path / "libdeltaw.so", extra=EMULATED)
    env = {**os.environ, "DELTAW_TEST_LIBRARY": str(made)}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS / "ops"), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_tiles", "-p", "no:cacheprovider"]
    command += ["-k", "amx or any_number"]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in FILES)], env=env, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed > (60 if "avx512_bf16" in library.paths() else 0)  # tiles stand beside the vectors of that path
