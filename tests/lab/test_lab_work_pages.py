"""Registry, diagnosis, playground and tables in a real Chromium, on a tiny base with real runs and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk_bench import copied, exact_lab, filled, real_run
from lab_page import Page, served
from test_lab_work_ask import alone, whole
from test_lab_work_diagnose import plain

from deltaw.diagnose.diagnose import diagnose
from deltaw.lab.desk import Desk
from deltaw.lab.server import make_app
from deltaw.lab.work_tables import tables
from deltaw.store.registry import Registry

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPT = "Colour of snow?"
EVERY = (
    "adapters", "adapters?search=nothing", "adapters/support", "adapters?add=first", "diagnose", "diagnose?run=first",
    "diagnose?adapter=support@2", "ask?adapters=base,registry:support", "tables?cost=memory",
)  # fmt: skip


@pytest.fixture(scope="module")
def still(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("pages")
    return filled(tiny_folder, root, real_run(tiny_folder, root / "run"))


@pytest.fixture(scope="module")
def desk(still: Desk, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return copied(still, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def address(tiny_folder: Path, desk: Desk) -> Iterator[str]:
    with served(make_app(exact_lab(tiny_folder), desk=desk)) as url:
        yield url


@pytest.fixture
def work(browser: Any, address: str) -> Iterator[Page]:
    one = Page(browser, address)
    yield one
    one.close()
    assert one.wrong == []


def go(page: Page, where: str) -> Any:
    """Open a page of the workbench; playwright's page."""
    page.page.goto("about:blank")
    page.wrong[:] = [w for w in page.wrong if w != "about:blank"]
    page.page.goto(f"{page.url}/#{where}")
    page.page.wait_for_selector("#work > div > *")
    page.ready()
    return page.page


def test_lab_work_pages_search_promote_and_roll_back(work: Page, desk: Desk):
    registry = Registry(desk.registry)
    page = go(work, "adapters")
    assert [a.inner_text() for a in page.query_selector_all("tbody td:first-child a")] == ["child", "far", "support"]
    page.fill("#search", "supp")
    page.wait_for_selector("text=1 of 3 names")
    assert page.url.endswith("#adapters?search=supp")
    page.click("tbody a >> text=support")
    page.wait_for_selector("text=Version 1 is current")
    assert page.inner_text("h1") == "Adapters"
    page.get_by_role("button", name="Promote version 2").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "promote-label"
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert registry.resolve("support").version == 1, "Escape changes nothing"
    page.get_by_role("button", name="Promote version 2").click()
    page.locator("dialog").get_by_role("button", name="Promote").click()
    page.wait_for_selector("text=support@current is version 2 (was 1).")
    assert registry.resolve("support").version == 2
    assert "promote: current to version 2, from version 1" in page.inner_text(".trail")
    page.get_by_role("button", name="Roll current back").click()
    page.locator("dialog").get_by_role("button", name="Cancel").click()
    assert registry.resolve("support").version == 2, "it asks first"
    page.get_by_role("button", name="Roll current back").click()
    page.locator("dialog").get_by_role("button", name="Roll back").click()
    page.wait_for_selector("text=support@current is version 1 (was 2).")
    assert registry.resolve("support").version == 1


def test_lab_work_pages_lineage_and_differences(work: Page, desk: Desk):
    page = go(work, "adapters/support")
    assert page.inner_text(".plain").splitlines() == [
        "far@1 was re-adapted from support@2",
        "child@1 was made from support@1",
    ]
    assert page.locator("svg[role=img]").get_attribute("aria-label").startswith("far@1 was re-adapted from")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("text=Tensors:")
    found = Registry(desk.registry).diff("support@1", "support@2")
    assert f"Tensors: {found['tensors']['changed']} differ, 0 are the same" in page.inner_text("#work")
    page = go(work, "adapters/nobody")
    assert "No adapter is called 'nobody'" in page.inner_text("[role=alert]")
    assert [w for w in work.wrong if "404" not in w] == []
    work.wrong.clear()


def test_lab_work_pages_a_runs_adapter_is_added(work: Page, desk: Desk):
    page = go(work, "adapters?add=first")
    assert page.input_value("#add-run") == "first"
    page.fill("#add-name", "../keys")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=is no adapter's name")
    work.wrong.clear()  # the answer 422
    page.fill("#add-name", "keys")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=keys@1 is current.")
    assert Registry(desk.registry).show("keys@1")["metrics"]["step"] == 20


def test_lab_work_pages_a_diagnosis_grows_with_its_slow_checks(work: Page, desk: Desk):
    page = go(work, "diagnose")
    page.click("text=first")
    page.wait_for_selector("text=Loss over the run.")
    assert "the base was left out" in page.inner_text("#work")
    assert page.locator("text=Update norm over weight norm, by layer").count() == 0
    page.fill("#try-rank", "2")
    page.get_by_role("button", name="Try another rank").click()
    page.get_by_role("button", name="Stop: try another rank").click()
    page.wait_for_selector("text=Stopped.")
    page.get_by_role("button", name="Measure against the base").click()
    page.wait_for_selector("text=Done: what it found is below.")
    page.wait_for_selector("text=Update norm over weight norm, by layer")
    told = page.request.get(f"{work.url}/api/work/diagnose?run=first").json()["slow"]["base"]["result"]
    wanted = plain(diagnose(desk.runs / "first").as_dict())
    assert {k: told[k] for k in ("places", "findings", "merge", "bands")} == {
        k: wanted[k] for k in ("places", "findings", "merge", "bands")
    }
    kinds = [t for f in wanted["findings"] for t in [f["kind"]]]
    assert [t.inner_text() for t in page.query_selector_all(".finding .tag")] == kinds
    assert len(wanted["bands"]) == 4 == page.locator("svg[aria-label*='usual is']").count()
    page.select_option("#spectra-kind", "q_proj")
    page.click("summary")
    page.wait_for_selector("caption >> text=One row a linear map")
    rows = page.locator("details tbody tr")
    assert rows.count() == len(wanted["places"])
    first = wanted["places"][0]
    assert rows.first.inner_text().split("\t")[:4] == [
        first["name"], str(first["rank"]), str(first["spectrum"]["rank_90"]), str(first["spectrum"]["rank_99"]),
    ]  # fmt: skip


def test_lab_work_pages_two_browsers_ask_at_once(browser: Any, work: Page, desk: Desk, tiny_folder: Path):
    registry = Registry(desk.registry)
    other = Page(browser, work.url)
    pages = [go(one, "ask?adapters=base&tokens=12") for one in (work, other)]
    for page, name in zip(pages, ("support", "child"), strict=True):
        page.fill("#prompt", PROMPT)
        page.fill("#who", name)
        page.wait_for_selector(".choices button >> text=far", state="detached")
        page.get_by_role("button", name=f"Ask {name}, current").click()
    for page in pages:
        page.get_by_role("button", name="Ask", exact=True).click()
    for page, name in zip(pages, ("support@1", "child@1"), strict=True):
        page.wait_for_selector("text=shared each step of the engine")
        texts = [whole(b.text_content()) for b in page.query_selector_all("blockquote")]
        assert texts == [alone(tiny_folder, None), alone(tiny_folder, registry.folder(name))]
        assert page.inner_text("#work").count(name) == 1
    other.close()


def test_lab_work_pages_a_refused_column_and_stop(work: Page):
    page = go(work, "ask?adapters=base,registry:far&tokens=200&temperature=1&prompt=x%3F")
    assert page.input_value("#prompt") == "x?"
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".answers .problem")
    assert "The adapter was trained on another base." in page.inner_text(".answers .problem")
    page.locator("blockquote").first.wait_for()
    if page.get_by_role("button", name="Stop").is_enabled():
        page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("text=/Stopped|shared each step/")
    assert page.get_by_role("button", name="Ask", exact=True).is_enabled()


def test_lab_work_pages_tables_sort_and_hold_the_benchs_numbers(work: Page):
    page = go(work, "tables")
    methods = tables()["methods"]
    table = page.locator("table").first
    heads = [h.inner_text() for h in table.locator("thead th").all()]
    assert [r.inner_text() for r in table.locator("tbody th").all()] == [m["label"] for m in methods]
    table.get_by_role("button", name="peak memory").click()
    by_memory = sorted((m for m in methods if "peak_mb" in m), key=lambda m: -m["peak_mb"])
    assert [r.inner_text() for r in table.locator("tbody th").all()][:-1] == [m["label"] for m in by_memory]
    cell = table.locator("tbody tr").first.locator("td").nth(heads.index("peak memory") - 1)
    assert cell.inner_text() == f"{by_memory[0]['peak_mb']:,.0f} MB"
    assert table.locator("th[aria-sort=descending]").inner_text() == "peak memory"
    page.select_option("#cost", "seconds")
    assert page.url.endswith("cost=seconds")
    assert "seconds of the training" in page.locator("svg[role=img]").first.text_content()
    for source in ("cost_source", "quality_source", "memory_source"):
        assert tables()[source]["machines"][0] in page.inner_text("#work")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1180), ("dark", 1180), ("light", 360)])
def test_lab_work_pages_are_quiet_and_open_to_all(browser: Any, address: str, scheme: str, width: int):
    one = Page(browser, address, color_scheme=scheme, bypass_csp=True, viewport={"width": width, "height": 800})
    for where in EVERY:
        page = go(one, where)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
        assert one.barriers() == [], where
    assert one.wrong == []
    one.close()
