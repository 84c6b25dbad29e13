"""The tables that the package carries are the bench's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from desk_bench import HERE
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.lab.desk import desk_in
from deltaw.lab.server import make_app
from deltaw.lab.work_tables import TABLES, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def bench_path():
    """Where bench/*.py find each other."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield
    sys.path.remove(str(ROOT / "bench"))


def test_lab_work_tables_the_file_is_what_the_bench_makes_of_its_results():
    from lab_tables import lab_tables

    assert json.loads(TABLES.read_text(encoding="ascii")) == lab_tables(), "run: python bench/lab_tables.py"


def test_lab_work_tables_the_methods_are_those_of_the_readme():
    """Each cell of the README's table, written from the lab's numbers."""
    from bench_methods import MARKS

    marked = MARKS.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert marked
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in marked[0].splitlines() if line.startswith("|")]
    told = tables()
    assert [line[0] for line in lines[2:]] == [m["label"] for m in told["methods"]]
    for cells, m in zip(lines[2:], told["methods"], strict=True):
        exact = []
        for task in told["tasks"]:
            e = m["exact"][task]
            spread = "" if e["deviation"] is None else f" \u00b1 {e['deviation']:.3f}"
            exact.append(f"{e['mean']:.3f}{spread}")
        assert cells[2:4] == exact, m["label"]
        for name, at, form in (("general", 4, "{:.3f}"), ("wiki", 5, "{:.1f}")):
            values = [v for task in told["tasks"] if (v := m[name][task]) is not None]
            assert cells[at] == ", ".join(form.format(v) for v in values)
        if m["label"] != "base":
            assert cells[1] == f"{m['percent']:.3g} %"
            assert cells[6] == ", ".join(f"{s:.0f}" for s in m["seconds"].values())
            assert cells[7:10] == [f"{m['peak_mb']:,.0f}", f"{m['file_mb']:.3g}", m["mergeable"]]


def test_lab_work_tables_the_page_gets_them_with_machines_and_dates(tiny: Bench, tmp_path: Path):
    client = TestClient(make_app(tiny.lab, desk=desk_in(tmp_path / "runs")), base_url=HERE)
    told = client.get("/api/work/tables").json()
    assert told == tables()
    for source in ("cost_source", "quality_source", "memory_source"):
        assert told[source]["machines"]
        assert told[source]["script"].startswith("bench/bench_")
    assert told["cost_source"]["first"] <= told["cost_source"]["last"]
    assert len(told["memory"]) > 10
    assert all(sum(m["causes"].values()) == m["planned"] for m in told["memory"])
