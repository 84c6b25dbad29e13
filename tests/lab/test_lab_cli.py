"""`deltaw lab` as a program."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.errors import BadInput, DeltawError

PROGRAM = [sys.executable, "-c", "from deltaw.cli.main import main; main()", "lab"]


def begin_a_run(url: str, base: Path, rows: Path) -> None:
    """As the page does, and stay to listen to the first event."""
    rows.write_text('{"prompt": "a?", "completion": "yes"}\n')
    train = {"steps": 40, "tokens_per_step": 8, "threads": 1, "save_every_s": 0}
    recipe = {"base": str(base), "adapter": {"method": "lora"}, "data": {"train": str(rows)}, "train": train}
    asked = urllib.request.Request(
        f"{url}/api/work/runs",
        json.dumps({"name": "first", "recipe": recipe}).encode(),
        {"content-type": "application/json", "origin": url},
    )
    assert json.load(urllib.request.urlopen(asked))["state"] == "running"


def test_lab_cli_serves_the_page_on_loopback_and_its_run_outlives_it(tiny_folder: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, runs = f"http://127.0.0.1:{port}", tmp_path / "runs"
    lab = subprocess.Popen(
        [*PROGRAM, "--base", str(tiny_folder), "--port", str(port), "--runs", str(runs)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                frames = json.load(urllib.request.urlopen(f"{url}/api/pictures"))
                break
            except urllib.error.URLError:
                assert lab.poll() is None, lab.stderr and lab.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.2)
        assert frames["base"] == "tiny"
        assert len(frames["pictures"]) == 13
        begin_a_run(url, tiny_folder, tmp_path / "rows.jsonl")
        listening = urllib.request.urlopen(f"{url}/api/work/runs/first/events")
        assert b'"state": "running"' in listening.readline()
    finally:
        lab.terminate()
        said = lab.communicate(timeout=30)[1]
    assert f"the lab is at {url}/" in said
    until = time.monotonic() + 90
    while not (runs / "first" / "done.json").exists():
        assert time.monotonic() < until, (runs / "recipes" / "first.log").read_text()
        time.sleep(0.1)
    assert json.loads((runs / "first" / "done.json").read_text())["steps"] == 40


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "runs/first"], "write NAME=PATH"),
        (["--adapter", "=x"], "write NAME=PATH"),
        (["--adapter", "base=x"], "cannot be called 'base'"),
        (["--base", "no-such-base"], "no-such-base"),
    ],
)
def test_lab_cli_says_what_it_cannot_use(flags: list[str], words: str):
    done = CliRunner().invoke(app, ["lab", *flags])
    assert isinstance(done.exception, DeltawError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception)


def test_lab_cli_does_not_export_over_something(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    done = CliRunner().invoke(app, ["lab", "--export", str(tmp_path)])
    assert isinstance(done.exception, BadInput)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_lab_cli_an_address_that_is_taken_is_told_before_a_base_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        asked = CliRunner().invoke(app, ["lab", "--base", "not-looked-for", "--port", str(port)])
    assert isinstance(asked.exception, BadInput)
    assert f"Cannot listen on 127.0.0.1, port {port}: Address already in use" in str(asked.exception)
    asked = CliRunner().invoke(app, ["lab", "--base", "not-looked-for", "--host", "no.such.host.invalid"])
    assert "Cannot listen on no.such.host.invalid, port 8765" in str(asked.exception)
