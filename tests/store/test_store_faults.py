"""Processes are killed while they change a registry: it stays sound, and nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("campaign.py")


def run_campaign(*arguments: str) -> dict:
    """A process of its own, because it forks: this one has threads."""
    done = subprocess.run([sys.executable, CAMPAIGN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_store_faults_three_processes_killed_at_random_lose_nothing():
    told = run_campaign("--rounds", "10", "--seed", "1")["crowd"]
    assert (told["killed"], told["verified"]) == (30, 10)
    assert told["killed in an operation"] >= 15, "most kills should strike"
    assert told["add"] >= 5


def test_store_faults_an_operation_killed_at_a_line_can_be_done_again():
    told = run_campaign("--rounds", "0", "--every", "150", "--seed", "67")["lines"]
    assert set(told) == {"create", "add", "mend", "promote", "rollback", "remove", "gc", "folder"}
    assert all(n >= 1 for n in told.values()), told
