"""The workbench in a real Chromium: a file of rows, a recipe, a training, its curves; on a tiny base."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_bench import Bench
from lab_page import Page, served

from deltaw.lab.desk import desk_in
from deltaw.lab.server import make_app
from deltaw.methods import METHODS
from deltaw.train.run import train

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROWS = [{"prompt": f"{'ab'[i % 2]}{'o' * (i % 3)}?", "completion": ["yes", "no"][i % 2]} for i in range(12)]


class Desk:
    """A workbench that is served, and its folder."""

    def __init__(self, url: str, runs: Path, base: str) -> None:
        self.url, self.runs, self.base = url, runs, base

    def recipe(self, rank: int) -> dict[str, Any]:
        return {
            "base": {"path": self.base, "dtype": "float32"},
            "adapter": {"method": "lora", "rank": rank, "alpha": 5},
            "data": {"train": str(self.runs.parent / "rows.jsonl"), "valid": str(self.runs.parent / "rows.jsonl")},
            "train": {"steps": 6, "tokens_per_step": 40, "lr": 0.01},
            "eval": {"every_steps": 3},
        }


@pytest.fixture(scope="module")
def desk(tiny: Bench, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Two runs are there, as a terminal leaves them."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with served(make_app(tiny.lab, desk=desk_in(folder / "runs"))) as url:
        one = Desk(url, folder / "runs", str(tiny_folder))
        for name, rank in (("low", 2), ("high", 4)):
            list(train(one.recipe(rank), one.runs / name))
        yield one


@pytest.fixture
def work(browser: Any, desk: Desk) -> Iterator[Page]:
    one = Page(browser, desk.url)
    yield one
    one.close()


def go(page: Page, address: str) -> Any:
    """Open a page of the workbench."""
    page.page.goto(f"{page.url}/#{address}")
    page.page.wait_for_selector("#work > div > *")
    page.ready()
    return page.page


def steps_beyond(page: Any, step: int) -> None:
    """Wait until the page of a run shows a later step."""
    page.wait_for_selector(".live dd")
    end = time.monotonic() + 90
    while int(page.inner_text(".live dd").split()[0]) <= step:
        assert time.monotonic() < end
        page.wait_for_timeout(50)


def wrong(page: Page) -> list[str]:
    """What went wrong, but for answers that a form is told: they are on the page."""
    return [text for text in page.wrong if "422" not in text]


def test_lab_work_browser_from_a_file_to_a_trained_adapter(work: Page, desk: Desk, tmp_path: Path):
    page = go(work, "train")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{\n")
    page.set_input_files("#upload", str(bad))
    page.wait_for_selector(".problem >> text=bad.jsonl line 13: bad JSON")
    page.set_input_files("#upload", str(desk.runs.parent / "rows.jsonl"))
    page.wait_for_selector("text=rows.jsonl is kept: 12 rows")
    work.ready()
    page.fill("#field-adapter-rank", "0")
    page.wait_for_selector("#field-adapter-rank-wrong >> text=must be at least 1")
    assert page.get_attribute("#field-adapter-rank", "aria-invalid") == "true"
    assert page.is_disabled("text=Start >> nth=-1")
    page.fill("#field-adapter-rank", "3")
    page.locator(".section > summary", has_text=re.compile("^Train")).click()
    page.fill("#field-train-steps", "5")
    page.fill("#field-train-tokens_per_step", "40")
    page.fill("#field-train-threads", "1")
    page.wait_for_selector("pre[aria-label='The recipe'] >> text=threads: 1")  # what was filled in last
    page.wait_for_selector(".plan .verdict >> text=It fits.")
    work.ready()
    text = page.inner_text("pre[aria-label='The recipe']")
    assert "rank: 3" in text
    assert "steps: 5" in text
    assert "alpha" not in text, "defaults are left out"
    asked = page.evaluate(
        "(recipe) => fetch('api/work/train/plan', {method: 'POST', headers: {'content-type': 'application/json'},"
        " body: JSON.stringify({recipe})}).then((r) => r.json())",
        {
            "base": {"path": desk.base},
            "adapter": {"method": "lora", "rank": 3},
            "data": {"train": str(desk.runs / "data" / "rows.jsonl")},
            "train": {"steps": 5, "tokens_per_step": 40, "threads": 1},
        },
    )
    assert f"lora trains {asked['plan']['trainable']:,} numbers" in page.inner_text(".plan")
    page.fill("#name", "mine")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_selector("h1 >> text=Run mine")
    page.wait_for_selector(".verdict >> text=done")
    page.wait_for_selector("dd >> text=5 of 5")
    page.wait_for_selector("text=Add to the registry")
    events = [json.loads(line) for line in (desk.runs / "mine" / "metrics.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "step"][-1]
    shown = dict(
        page.evaluate(
            "[...document.querySelectorAll('.live > div')].map((d) => [...d.children].map((c) => c.textContent))"
        )
    )
    assert float(shown["loss"]) == pytest.approx(last["loss"], rel=1e-3)
    assert float(shown["|dW| / |W|"].split()[0]) == pytest.approx(100 * last["growth"], rel=0.06)
    assert len(page.query_selector_all(".curve svg[role=img]")) >= 5
    assert (desk.runs / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert wrong(work) == []


def test_lab_work_browser_every_method_has_its_own_fields_and_a_plan(work: Page):
    page = go(work, "train")
    for method in METHODS:
        page.select_option("#method", method.name)
        page.wait_for_selector(f"pre >> text=method: {method.name}")
        work.ready()
        shown = page.evaluate("[...document.querySelectorAll('[name^=\"adapter.\"]')].map((e) => e.name.split('.')[1])")
        assert set(shown) == set(method.model_fields), method.name
        told = page.inner_text(".verdict")
        assert told.startswith(("It fits.", "This cannot be trained.")), (method.name, told)
    assert wrong(work) == []


def test_lab_work_browser_a_run_is_stopped_and_goes_on(work: Page, desk: Desk):
    page = go(work, "train")
    long = desk.recipe(2) | {"train": {"steps": 10_000, "tokens_per_step": 40, "threads": 1}, "eval": {}}
    begun = page.evaluate(
        "(body) => fetch('api/work/runs', {method: 'POST', headers: {'content-type': 'application/json'},"
        " body: JSON.stringify(body)}).then((r) => r.json())",
        {"name": "long", "recipe": long},
    )
    assert begun["state"] == "running"
    page = go(work, "runs/long")
    steps_beyond(page, 2)
    page.reload()
    steps_beyond(page, 5)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".verdict >> text=stopped")
    step = json.loads((desk.runs / "long" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    page.wait_for_selector(f"dd >> text={step} of 10000")
    page.get_by_role("button", name="Resume").click()
    page.wait_for_selector(".verdict >> text=running")
    steps_beyond(page, step)
    go(work, "runs")
    page.wait_for_selector("tr:has-text('long') >> text=running")
    go(work, "runs/long")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".verdict >> text=stopped")
    assert wrong(work) == []


def test_lab_work_browser_runs_are_chosen_and_compared(work: Page):
    page = go(work, "runs")
    page.check("#choose-low")
    page.check("#choose-high")
    page.get_by_role("button", name="Compare the chosen").click()
    page.wait_for_selector("h1 >> text=Compare")
    page.wait_for_selector(".curve svg")
    assert "runs=low,high" in page.evaluate("decodeURIComponent(location.hash)")
    cells = [
        row.inner_text().split("\t") for row in page.query_selector_all("table:has-text('Settings that differ') tr")
    ]
    assert cells == [["setting", "low", "high"], ["adapter.rank", "2", "4"]]
    before = page.inner_html(".curves")
    page.select_option("#by", "tokens")
    assert page.inner_html(".curves") != before
    assert "by=tokens" in page.url
    assert work.wrong == []


def test_lab_work_browser_addresses_that_are_not_there_say_so_and_pictures_come_back(work: Page):
    page = go(work, "runs/absent")
    assert page.inner_text("[role=alert]:visible") == "there is no run 'absent'."
    page.click("#list a >> nth=7")
    page.wait_for_selector("h1 >> text=8. Trainable fraction")
    assert page.is_visible("#controls")
    assert not page.is_visible("#work")
    page.get_by_role("link", name="Runs", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("h1 >> text=Runs")
    assert page.get_attribute("#work-list a[aria-current]", "href") == "#runs"
    assert not page.is_visible("#controls")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lab_work_browser_axe_finds_nothing_serious_and_360_pixels_are_enough(browser: Any, desk: Desk, scheme: str):
    one = Page(browser, desk.url, color_scheme=scheme, bypass_csp=True, viewport={"width": 360, "height": 800})
    found = []
    for address in ("train", "runs", "runs/low", "compare?runs=low,high"):
        page = go(one, address)
        for part in page.query_selector_all("#work details:not([open]) > summary"):
            part.click()
        one.ready()
        found += [(address, *barrier) for barrier in one.barriers()]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, address
        page.goto("about:blank")
    one.close()
    assert not found, found
