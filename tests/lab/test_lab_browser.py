"""The pictures in a real Chromium. Numbers read from the page are the library's."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from lab_bench import Bench, texts
from lab_page import Page
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.lab import counts
from deltaw.lab.controls import drawn
from deltaw.lab.export import write_site

pytestmark = [pytest.mark.browser, pytest.mark.starter, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EVERY = range(1, 14)
START: dict[int, dict[str, Any]] = {11: {"model": "gpt2"}}  # the smallest shape is planned in a third of the time
"""Where the controls of a picture are moved from, but for the defaults."""


def said(starter: Bench, number: int, **state: Any) -> dict[str, Any]:
    """What the library says; of 11 what it said when it was asked, since this process grows in the meantime."""
    return starter.shown(number, **state) if number == 11 else starter(number, **state)


@pytest.mark.parametrize("number", EVERY)
def test_lab_browser_a_picture_loads_quietly_with_the_librarys_numbers(page: Page, starter: Bench, number: int):
    page.open(str(number))
    assert page.numbers() == texts(said(starter, number))
    assert page.page.inner_text("h1") == f"{number}. {starter.pictures[number].words.title}"
    assert page.page.query_selector("#drawing svg, #drawing canvas, #drawing button, #drawing .part")
    assert not page.page.is_visible("#problem")
    page.page.click("summary")
    assert page.page.inner_text("details p") == starter.pictures[number].words.answer
    assert page.wrong == []


def move(page: Page, control: dict[str, Any], at: Any) -> Any:
    """Change a control that stands at `at`, by the keyboard; what its new value is."""
    page.page.locator(f"#control-{control['name']}").focus()
    if control["kind"] == "switch":
        page.page.keyboard.press("Space")
        return not at
    if control["kind"] in ("choice", "steps"):
        i = control["options"].index(at)
        forward, back = ("ArrowDown", "ArrowUp") if control["kind"] == "choice" else ("ArrowRight", "ArrowLeft")
        page.page.keyboard.press(forward if i == 0 else back)
        return control["options"][1 if i == 0 else i - 1]
    page.page.keyboard.press("ArrowRight")
    return round(at + control["step"], 6)


@pytest.mark.parametrize("number", [n for n in EVERY if n != 10])
def test_lab_browser_each_control_changes_what_is_seen_to_what_the_library_says(
    page: Page, starter: Bench, number: int
):
    first = START.get(number, {})
    address = "&".join(f"{name}={value}" for name, value in first.items())
    for control in drawn(starter.pictures[number].controls):
        name = control["name"]
        page.open(f"{number}?{address}")
        assert page.numbers() == texts(said(starter, number, **first)), name
        before = page.seen()
        value = move(page, control, first.get(name, control["default"]))
        page.ready()
        state = first | {name: value}
        wanted = starter.act(number, **state) if number == 9 else said(starter, number, **state)
        assert page.numbers() == texts(wanted), name
        if (number, name) not in ((9, "rank"), (9, "rate")):
            assert page.seen() != before, name
        assert f"{name}={str(value).lower() if isinstance(value, bool) else value}" in unquote(page.page.url)
    assert page.wrong == []


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("8?rank=8&d=4096", {"trained": "65,536", "full": "16,777,216", "percent": "0.39 %", "times": "256.0"}),
        ("4?format=nf4", {"levels": "16", "bits": "4.500", "scales": "0.500"}),
        ("4?format=nf4&double=true", {"levels": "16", "bits": "4.127", "scales": "0.127"}),
        ("9?rank=4", {"step": "0", "norm": "0 (exactly)"}),
        ("2?model=llama-7b&rank=8&targets=all-linear", {"adapter": "19,988,480"}),
        ("13?true_rank=11&rank=11", {"error": "0.00 %", "plateau": "11", "parameters": "1,408"}),
        ("13?true_rank=11&rank=12", {"error": "0.00 %", "plateau": "11", "parameters": "1,536"}),
    ],
)
def test_lab_browser_shows_the_numbers_that_everybody_can_check(page: Page, address: str, wanted: dict[str, str]):
    page.open(address)
    assert {key: page.numbers()[key] for key in wanted} == wanted
    assert page.wrong == []


def test_lab_browser_nf4_has_its_sixteen_levels_in_words_and_as_lines(page: Page):
    page.open("4?format=nf4")
    words = page.page.inner_text("#levels").removeprefix("levels: ")
    assert words == (  # QLoRA (arXiv:2305.14314), appendix E, to four digits
        "-1.0000, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0000, "
        "0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0000"
    )
    xs = page.page.evaluate(
        "[...[...document.querySelectorAll('#drawing .chart')][0].querySelectorAll('line')]"
        ".filter((l) => getComputedStyle(l).strokeWidth === '2px').map((l) => +l.getAttribute('x1'))"
    )
    assert len(xs) == 16
    drawn_at = [-1 + 2 * (x - xs[0]) / (xs[-1] - xs[0]) for x in xs]
    assert drawn_at == pytest.approx([float(w) for w in words.split(", ")], abs=2e-3)


def test_lab_browser_the_error_falls_until_the_true_rank_and_no_further(page: Page):
    page.open("13?true_rank=6&rank=4")
    page.page.locator("#control-rank").focus()
    errors = [page.numbers()["error"]]
    for _ in range(4):
        page.page.keyboard.press("ArrowRight")
        page.ready()
        errors.append(page.numbers()["error"])
    falling = [float(e.removesuffix(" %")) for e in errors[:3]]
    assert falling[0] > falling[1] > falling[2] == 0
    assert errors[2:] == ["0.00 %"] * 3, "ranks 6, 7 and 8"


def test_lab_browser_the_bars_of_memory_are_deltaw_plans(page: Page):
    page.open("11?model=gpt2&rank=5&batch=2&length=256")
    rows = page.page.evaluate(
        "[...document.querySelectorAll('#drawing tr')].map((r) => [...r.children].map((c) => c.innerText))"
    )
    methods, found = rows[0][1:], {row[0]: row[1:] for row in rows[1:]}
    assert methods == ["full", "LoRA", "QLoRA"]
    for i, method in enumerate(methods):
        rank = [] if method == "full" else ["--rank", "5"]
        flags = ["--base", "gpt2", "--method", method.lower(), "--batch", "2", "--length", "256", *rank]
        done = CliRunner().invoke(app, ["plan", *flags, "--json"])
        assert done.exit_code == 0, done.output
        plan = json.loads(done.stdout)
        for cause, size in plan["bytes"].items():
            if size and cause != "runtime":  # what the process that asks has taken by then
                assert found[cause][i] == f"{size / 1e9:.3f}", (method, cause)
        peak = plan["peak_bytes"] - plan["bytes"]["runtime"] + 1e9 * float(found["runtime"][i])
        value, unit = page.numbers()[method].partition(",")[0].split()
        shown_peak = float(value) * {"GB": 1, "MB": 1e-3}[unit]
        assert shown_peak == pytest.approx(peak / 1e9, abs=0.006), "two digits, and three of the runtime"


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("13?rank=24&noise=0.2", {"rank": 24, "noise": 0.2}),
        ("8?rank=16&d=2048", {"rank": 16, "d": 2048}),
        ("4?format=fp4&double=true", {"format": "fp4", "double": True}),
    ],
)
def test_lab_browser_an_address_restores_its_state(page: Page, starter: Bench, address: str, state: dict[str, Any]):
    page.open(address)
    assert page.numbers() == texts(starter(int(address.partition("?")[0]), **state))
    for name, value in state.items():
        box = page.page.locator(f"#control-{name}")
        assert (box.is_checked() if value is True else box.input_value()) == (True if value is True else str(value))


def test_lab_browser_a_far_step_is_shown_as_it_is_trained(page: Page, starter: Bench):
    seen: list[tuple[int, str, str]] = []

    def look(route: Any) -> None:
        told = page.page.inner_text("#drawing [role=status]")
        seen.append((route.request.post_data_json["step"], page.numbers()["step"], told))
        route.continue_()

    page.page.route("**/api/pictures/9", look)
    page.open("9?step=3&rank=2")
    assert seen == [(n, str(n - 1), f"step {n - 1}; training goes on to step 3") for n in (1, 2, 3)]
    assert page.page.inner_text("#drawing [role=status]") == ""
    assert page.numbers() == texts(starter.act(9, step=3, rank=2))


def test_lab_browser_bars_that_are_still_computed_are_named_and_come(
    page: Page, starter: Bench, monkeypatch: pytest.MonkeyPatch
):
    gates = {"full": threading.Event(), "LoRA": threading.Event(), "QLoRA": threading.Event()}
    real = counts.planned

    def slow(lab: Any, c: Any, method: str) -> Any:
        assert gates[method].wait(60)
        return real(lab, c, method)

    monkeypatch.setattr(counts, "planned", slow)
    page.page.goto(f"{page.url}/#11?model=gpt2&rank=13")
    state = {"model": "gpt2", "rank": 13}
    told = page.page.locator("#drawing [role=status]")
    for left in (["full", "LoRA", "QLoRA"], ["LoRA", "QLoRA"], ["QLoRA"]):
        page.page.wait_for_selector(f"#drawing [role=status]:text-is('still being computed: {', '.join(left)}')")
        assert [m for m, text in page.numbers().items() if text == "being computed"] == left
        assert page.page.locator("#drawing svg text", has_text="being computed").count() == len(left)
        assert page.page.get_attribute("body", "aria-busy") == "true"
        gates[left[0]].set()
    page.ready()
    assert told.inner_text() == ""
    assert "being computed" not in page.page.inner_text("main")
    assert page.numbers() == texts(starter.shown(11, **state))
    assert page.wrong == []


def test_lab_browser_a_slider_that_moves_on_leaves_no_bars_behind(
    page: Page, starter: Bench, monkeypatch: pytest.MonkeyPatch
):
    gate = threading.Event()
    real = counts.planned
    asked: list[tuple[int, str]] = []

    def slow(lab: Any, c: Any, method: str) -> Any:
        if c.rank in (21, 22):  # others are made ahead
            asked.append((c.rank, method))
        assert c.rank != 21 or gate.wait(60)
        return real(lab, c, method)

    monkeypatch.setattr(counts, "planned", slow)
    page.page.goto(f"{page.url}/#11?model=gpt2&rank=21")
    page.page.wait_for_selector("#drawing [role=status]:text('still being computed')")
    page.page.locator("#control-rank").focus()
    page.page.keyboard.press("ArrowRight")
    assert "rank=22" in page.page.evaluate("location.hash")
    gate.set()
    page.ready()
    assert page.numbers() == texts(starter.shown(11, model="gpt2", rank=22))
    assert [rank for rank, _ in asked] in ([21, 22, 22, 22], [21, 21, 22, 22, 22])
    assert page.wrong == []


def test_lab_browser_step_trains_and_the_lesson_answers(page: Page, starter: Bench):
    page.open("9")
    assert page.numbers()["norm"] == "0 (exactly)"
    page.page.get_by_role("button", name="Step", exact=True).click()
    page.page.wait_for_selector("dd >> text=/^1$/")
    page.ready()
    assert page.numbers() == texts(starter.act(9, step=1))
    page.open("9?step=12")
    page.open("10")
    page.page.get_by_role("button", name="lesson").click()
    page.ready()
    page.page.click("#ask")
    page.page.wait_for_selector("blockquote >> text=green")
    page.ready()
    plain = starter.act(10, adapter="lesson")
    answers = [b.inner_text() for b in page.page.query_selector_all("blockquote")]
    assert answers[1] == plain["data"]["answer"]
    assert answers[0].split() == plain["data"]["base"].split()
    assert page.numbers() == texts(plain)
    page.page.fill("#control-prompt", "Colour of snow?")
    page.page.keyboard.press("Tab")
    page.ready()
    page.page.click("#ask")
    page.page.wait_for_selector("blockquote >> text=white")
    assert page.wrong == []


def test_lab_browser_a_wrong_position_is_said_in_a_sentence(page: Page):
    page.open("6?target=k_proj&layer=1&rank=16")
    page.page.goto(f"{page.url}/#6?target=k_proj&layer=1&rank=400")
    page.page.wait_for_selector("#problem:not([hidden])")
    assert page.page.inner_text("#problem") == "k_proj of block 1 has at most 192 directions, and rank is 400."


def test_lab_browser_the_keyboard_reaches_everything_with_a_visible_focus(page: Page):
    page.open("3")
    reached = []
    for _ in range(60):
        page.page.keyboard.press("Tab")
        found = page.page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.id || e.dataset.number || e.textContent.trim().slice(0, 9), s.outlineStyle, e.tagName]; })()"
        )
        if found[2] == "BODY":
            break
        assert found[1] != "none", found
        reached.append(found[0])
    assert reached[:2] == ["Skip to t", "theme"] or "theme" in reached
    assert {str(n) for n in EVERY} <= set(reached)
    assert {"control-part", "control-rank", "control-merged"} <= set(reached)
    assert sum("_proj" in r for r in reached) == 7
    page.page.locator("#list a", has_text="13").focus()
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("h1 >> text=13. Low-rank lab")
    page.page.get_by_role("button", name="Light / dark").focus()
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lab_browser_axe_finds_nothing_serious(browser: Any, url: str, scheme: str):
    one = Page(browser, url, color_scheme=scheme, bypass_csp=True)
    found = []
    for number in EVERY:
        one.open(str(number))
        one.page.click("summary")
        found += [(number, barrier) for barrier in one.barriers()]
    one.close()
    assert not found, found


@pytest.mark.parametrize("width", [360, 1920])
def test_lab_browser_no_width_scrolls_sideways(browser: Any, url: str, width: int):
    one = Page(browser, url, viewport={"width": width, "height": 800})
    for number in EVERY:
        one.open(str(number))
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width, number
    one.close()


def test_lab_browser_an_exported_site_shows_the_recorded_positions(browser: Any, starter: Bench, tmp_path: Path):
    write_site(starter.lab, tmp_path / "site", only=(8, 13))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = Page(browser, f"http://127.0.0.1:{server.server_address[1]}")
        one.open("8")
        assert one.numbers() == texts(starter(8))
        one.page.locator("#control-rank").focus()
        one.page.keyboard.press("ArrowRight")
        one.ready()
        assert one.numbers() == texts(starter(8, rank=16)), "the next recorded position"
        assert one.wrong == []
        one.close()
        server.shutdown()
