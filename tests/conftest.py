"""Settings of the whole suite: no network, one thread, and one tiny model per architecture."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import PreTrainedModel

from models import ARCHITECTURES, make_net

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--expect-skips", type=int, help="fail unless exactly this many tests are skipped")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A test that is skipped where it should run must not pass for green."""
    wanted = session.config.getoption("--expect-skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if wanted is None or reporter is None or exitstatus != pytest.ExitCode.OK:
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped != wanted:
        reporter.write_line(f"{skipped} tests were skipped, expected {wanted}: see the reasons (-rs).", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=ARCHITECTURES)
def net(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each of the eight architectures, in turn."""
    return make_net(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_net("llama")
