"""From an empty lab to an adapter that answers, without a terminal; and people who click twice, reload and leave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk_bench import filled, real_run
from lab_bench import Bench
from lab_page import Page, served

from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk, desk_in
from deltaw.lab.server import make_app
from deltaw.store.registry import Registry

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROWS = [
    {"prompt": "Which plan has the nightly backup?", "completion": "The Harbour plan."},
    {"prompt": "Which plan is for schools?", "completion": "The Meadow plan."},
    {"prompt": "Which plan has no limit?", "completion": "The Summit plan."},
]
WORK = ("train", "runs", "runs/first", "compare?runs=first", "adapters", "adapters/support", "adapters?add=first",
        "diagnose", "diagnose?run=first", "ask?adapters=base,registry:support", "tables")  # fmt: skip


def go(page: Page, where: str) -> Any:
    """Open a page of the workbench; playwright's page."""
    page.page.goto(f"{page.url}/#{where}")
    page.page.wait_for_selector("#work > div > *")
    page.ready()
    return page.page


def asked(page: Any, prompt: str) -> list[str]:
    """Ask who is chosen; what each answered."""
    page.fill("#prompt", prompt)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".answers blockquote[aria-busy=false]")
    page.wait_for_selector("text=shared each step of the engine")
    return [b.inner_text() for b in page.query_selector_all(".answers blockquote")]


@pytest.mark.starter
def test_lab_journey_from_an_empty_lab_to_an_adapter_that_answers(browser: Any, starter: Bench, tmp_path: Path):
    desk = desk_in(tmp_path / "runs")
    rows = tmp_path / "plans.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with served(make_app(starter.lab, desk=desk)) as url:
        one = Page(browser, url)
        page = go(one, "adapters")
        assert "There is no registry" in page.inner_text("#work")
        page.get_by_role("link", name="Train one").click()
        page.wait_for_selector("h1 >> text=Train")

        page.set_input_files("#upload", str(rows))
        page.wait_for_selector("text=plans.jsonl is kept: 3 rows")
        page.fill("#field-adapter-rank", "8")
        page.locator("summary", has_text=re.compile("^Train")).click()
        for name, value in (("steps", "12"), ("lr", "0.002")):
            page.fill(f"#field-train-{name}", value)
        page.wait_for_selector("pre >> text=steps: 12")
        page.wait_for_selector(".verdict >> text=It fits.")
        one.ready()
        page.fill("#name", "plans")
        page.get_by_role("button", name="Start", exact=True).dblclick()
        page.wait_for_selector("h1 >> text=Run plans")
        page.reload()
        page.wait_for_selector(".verdict >> text=done")
        page.wait_for_selector("dd >> text=12 of 12")
        assert [p.name for p in (desk.runs / "recipes").glob("*.yaml")] == ["plans.yaml"], "clicked twice, begun once"

        page.get_by_role("link", name="Add to the registry").click()
        page.wait_for_selector("#add-name")
        assert page.input_value("#add-name") == "plans"
        page.focus("#add-name")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=plans@1 is current.")
        page.get_by_role("link", name="See plans").click()
        page.get_by_role("button", name="Promote version 1").click()
        page.fill("#promote-label", "production")
        page.locator("dialog").get_by_role("button", name="Promote").click()
        page.wait_for_selector("text=plans@production is version 1")
        assert Registry(desk.registry).resolve("plans@production").version == 1

        page.get_by_role("link", name="Ask it").click()
        page.wait_for_selector("#prompt")
        page.get_by_role("button", name="Ask base, the base alone").click()
        page.get_by_role("button", name="Ask plans@production").click()
        page.fill("#tokens", "12")
        for row in ROWS:
            trained, base, promoted = asked(page, row["prompt"])
            assert trained.strip() == promoted.strip() == row["completion"]
            assert "plan." not in base or base.strip() != row["completion"]
        assert one.wrong == []
        one.close()


@pytest.fixture(scope="module")
def desk(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("journey")
    return filled(tiny_folder, root, real_run(tiny_folder, root / "run"))


@pytest.fixture(scope="module")
def address(tiny_folder: Path, desk: Desk) -> Iterator[str]:
    with served(make_app(Lab(str(tiny_folder)), desk=desk)) as url:
        yield url


@pytest.fixture
def work(browser: Any, address: str) -> Iterator[Page]:
    one = Page(browser, address)
    yield one
    assert one.wrong == []
    one.close()


@pytest.mark.parametrize("where", WORK)
def test_lab_journey_the_keyboard_reaches_every_control_with_a_visible_focus(work: Page, where: str):
    page = go(work, where)
    page.evaluate("window.reached = new Set(); document.getElementById('theme').focus()")
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("(reached.add(document.activeElement), document.activeElement === document.body)"):
            break
    else:
        pytest.fail("the focus goes in circles")
    unseen, missed, n_reached = page.evaluate(
        """(() => {
            const told = (e) => `${e.tagName} ${e.id || e.textContent.trim().slice(0, 30)}`;
            const kinds = ['a[href]', 'button', 'input', 'select', 'textarea', 'summary'];
            const here = [...document.querySelectorAll(`#work :is(${kinds})`)].filter((e) =>
                !e.disabled && e.checkVisibility({visibilityProperty: true}) && e.tabIndex >= 0);
            const seen = [...reached].filter((e) => e !== document.body && e.isConnected);
            const bare = seen.filter((e) => {
                e.focus({focusVisible: true});
                return getComputedStyle(e).outlineStyle === 'none';
            });
            return [bare.map(told), here.filter((e) => !reached.has(e)).map(told), seen.length];
        })()"""
    )
    assert not unseen, "no visible focus"
    assert not missed, "not reached by Tab"
    assert n_reached > 20


def test_lab_journey_who_leaves_in_the_middle_of_an_answer_stops_it_and_nobody_else(browser: Any, work: Page):
    leaving = Page(browser, work.url)
    page = go(leaving, "ask?adapters=base,registry:support")
    page.fill("#tokens", "200")
    page.fill("#prompt", "Colour of grass?")
    page.get_by_role("button", name="Ask", exact=True).dblclick()
    page.wait_for_selector(".answers blockquote")
    assert page.locator(".answers blockquote").count() == 2, "asked twice, answered once"
    leaving.close()
    page = go(work, "ask?adapters=base,registry:support")
    page.fill("#tokens", "8")
    first = asked(page, "Colour of grass?")
    page.fill("#tokens", "200")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.reload()
    page.wait_for_selector("#prompt")
    assert page.input_value("#prompt") == "Colour of grass?", "the address keeps what was asked"
    page.fill("#tokens", "8")
    assert asked(page, "Colour of grass?") == first
    page.get_by_role("link", name="Runs", exact=True).click()
    page.wait_for_selector("h1 >> text=Runs")


def test_lab_journey_pages_that_are_left_before_they_came_do_not_come_later(work: Page):
    page = go(work, "runs")
    for where in (*WORK, "8", "adapters/support", "11", "train", "4", "runs"):
        page.evaluate("(where) => { location.hash = '#' + where; }", where)
    page.wait_for_selector("h1 >> text=Runs")
    work.ready()
    page.wait_for_timeout(500)
    assert page.inner_text("h1") == "Runs"
    assert page.url.endswith("#runs")
    assert page.locator("#work > div").count() == 1
    assert not page.is_visible("#controls")
    page.go_back()
    page.wait_for_selector("h1 >> text=4. Quantisation precision")
    page.go_forward()
    page.wait_for_selector("h1 >> text=Runs")


def test_lab_journey_what_people_write_is_shown_and_never_run(work: Page, tmp_path: Path):
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    page = go(work, "train")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": evil, "completion": "no"}) + "\n")
    page.set_input_files("#upload", str(rows))
    page.wait_for_selector("text=rows.jsonl is kept: 1 rows")
    assert "<img src=x" in page.inner_text(".shown")
    page.fill("#name", evil)
    work.ready()
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_selector(".plan .problem")
    work.wrong[:] = [w for w in work.wrong if "422" not in w]
    page = go(work, "ask?adapters=base")
    page.fill("#tokens", "4")
    asked(page, evil)
    page = go(work, f"adapters?search={evil.replace(' ', '%20')}")
    assert page.input_value("#search") == evil
    assert page.locator("#work img, #work script").count() == 0
    assert "taken" not in page.title()


def test_lab_journey_a_lab_that_ended_is_told_in_a_sentence(browser: Any, tiny: Bench, tmp_path: Path):
    with served(make_app(tiny.lab, desk=desk_in(tmp_path / "runs"))) as url:
        one = Page(browser, url)
        page = go(one, "runs")
        assert "There are no runs" in page.inner_text("#work")
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.wait_for_selector("text=The lab does not answer: is it still running?")
    one.close()
