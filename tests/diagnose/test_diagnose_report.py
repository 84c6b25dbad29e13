"""The report's folder and page, and the command: exit codes, --json, --strict, --out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from diagnosed_runs import rows, run, save_base
from typer.testing import CliRunner

import deltaw
from deltaw.cli.main import app
from deltaw.diagnose.plots import drawn, pictures
from deltaw.diagnose.report import page, write_report
from deltaw.errors import NotFound, RunError


def test_diagnose_report_is_one_page_with_its_pictures(healthy, tmp_path):
    found = deltaw.diagnose(healthy)
    out = write_report(found, tmp_path / "new" / "report")
    names = {"loss", "spectra", "norms", "ranks"}
    wanted = {f"{n}.{kind}" for n in names for kind in ("png", "svg")} | {"report.html", "diagnosis.json"}
    assert {p.name for p in out.iterdir()} == wanted
    text = (out / "report.html").read_text()
    assert "None of the known failures was found" in text
    assert "prefers-color-scheme:dark" in text
    remote = [u for u in re.findall(r"(?:https?:)?//[\w.-]+", text) if "www.w3.org" not in u and "purl.org" not in u]
    assert [u for u in remote if "matplotlib.org" not in u and "creativecommons.org" not in u] == []  # names, not links
    assert not re.search(r"<(script|link|img|iframe)\b|@import|src=", text)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    assert all("currentColor" in svg for svg in svgs)
    ids = [e.get("id") for svg in svgs for e in ElementTree.fromstring(svg).iter() if e.get("id")]
    assert len(ids) == len(set(ids)) > 40
    assert text.count("<tr><td>model.layers.") == len(found.rows) == 14
    assert json.loads((out / "diagnosis.json").read_text())["findings"] == []
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_diagnose_report_says_what_is_wrong_and_escapes_names(healthy, tmp_path):
    other = save_base(tmp_path / "other", seed=3)
    found = replace(deltaw.diagnose(healthy, other), path="runs/<b>&c")
    text = page(found, {})
    assert "The adapter belongs to another base" in text
    assert "What to do:" in text
    assert "&lt;b&gt;&amp;c" in text
    assert "<b>&c" not in text
    assert "Checks that were not made" in text


def test_diagnose_report_draws_what_there_is(healthy, tmp_path, base):
    found = deltaw.diagnose(healthy)
    assert set(pictures(found)) == {"loss", "spectra", "norms", "ranks"}
    assert set(pictures(replace(found, log=None, curve=None))) == {"spectra", "norms", "ranks"}
    assert pictures(replace(found, log=None, curve=None, rows=[])) == {}
    one = run(base, tmp_path / "one", data=rows(8, 2), adapter={"method": "lora", "rank": 1, "alpha": 3}, steps=8)
    assert set(pictures(deltaw.diagnose(one))) == {"loss", "norms"}
    svg = drawn(pictures(found)["loss"], "svg").decode()
    for words in ("optimizer step", "loss (nats a target token)", "validation rows"):
        assert words in svg
    assert svg == drawn(pictures(found)["loss"], "svg").decode()


def test_diagnose_report_is_written_into_new_folders_only(healthy, tmp_path):
    found = deltaw.diagnose(healthy)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="new folder"):
        write_report(found, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_diagnose_report_command(healthy, base, tmp_path):
    runner = CliRunner()
    quiet = runner.invoke(app, ["diagnose", str(healthy), "--json", "--out", str(tmp_path / "out"), "--strict"])
    assert quiet.exit_code == 0
    plain = json.loads(quiet.stdout)
    assert plain["findings"] == []
    assert len(plain["places"]) == 14
    assert (tmp_path / "out" / "report.html").is_file()
    other = str(save_base(tmp_path / "other", seed=2))
    loud = runner.invoke(app, ["diagnose", str(healthy), "--base", other])
    assert loud.exit_code == 0
    assert "[base_mismatch]" in loud.stdout
    assert "What to do:" in loud.stdout
    assert "not checked: forgetting" in loud.stdout
    assert runner.invoke(app, ["diagnose", str(healthy), "--base", other, "--strict"]).exit_code == 1
    used = runner.invoke(app, ["diagnose", str(healthy), "--out", str(base)])
    assert isinstance(used.exception, RunError)
    missing = runner.invoke(app, ["diagnose", str(tmp_path / "none")])
    assert isinstance(missing.exception, NotFound)
    assert missing.exception.exit_code == 2
