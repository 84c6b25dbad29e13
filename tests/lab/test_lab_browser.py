"""The lab in a real Chromium: `make browser`. Numbers read from the page are the library's."""

from __future__ import annotations

import functools
import http.server
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import uvicorn
from lab_bench import Bench, texts

from deltaw.lab.controls import drawn
from deltaw.lab.export import write_site
from deltaw.lab.server import make_app, shown

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "build" / "axe" / "package" / "axe.min.js"
READY = "body[aria-busy=false]"
EVERY = range(1, 14)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium as the system has it. Fails, and says so, where there is none."""
    from playwright.sync_api import sync_playwright

    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    assert found, "no Chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="module")
def url(starter: Bench) -> Iterator[str]:
    """The lab on the real starter, served as `deltaw lab` serves it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(starter.lab), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


class Page:
    """A page of the lab, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.page = browser.new_context(**{"viewport": {"width": 1180, "height": 900}, **context}).new_page()
        self.page.set_default_timeout(90_000)
        self.url = url
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: self.wrong.append(r.url) if not r.url.startswith((url, "data:")) else None)

    def open(self, address: str) -> None:
        self.page.goto(f"{self.url}/#{address}")
        self.page.wait_for_selector("#numbers dd")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_timeout(60)
        self.page.wait_for_selector(READY)

    def numbers(self) -> dict[str, str]:
        boxes = self.page.query_selector_all("#numbers > div")
        return {b.get_attribute("data-key"): b.query_selector("dd").inner_text() for b in boxes}

    def seen(self) -> tuple[Any, ...]:
        """Everything that is drawn: numbers, text and shapes, pixels."""
        pixels = self.page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()")
        return self.numbers(), self.page.inner_html("#drawing"), pixels


def said(starter: Bench, number: int, **state: Any) -> dict[str, Any]:
    """What the library says; of 11 what it said when it was asked, since this process grows in the meantime."""
    return shown(starter.lab, starter.pictures[number], state) if number == 11 else starter(number, **state)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    one = Page(browser, url)
    yield one
    one.page.context.close()


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


def move(page: Page, control: dict[str, Any]) -> Any:
    """Change a control by the keyboard; what its new value is."""
    box = page.page.locator(f"#control-{control['name']}")
    box.focus()
    if control["kind"] == "switch":
        page.page.keyboard.press("Space")
        return not control["default"]
    if control["kind"] == "choice":
        at = control["options"].index(control["default"])
        page.page.keyboard.press("ArrowDown" if at == 0 else "ArrowUp")
        return control["options"][1 if at == 0 else at - 1]
    if control["kind"] == "steps":
        at = control["options"].index(control["default"])
        page.page.keyboard.press("ArrowLeft")
        return control["options"][at - 1]
    page.page.keyboard.press("ArrowRight")
    return round(control["default"] + control["step"], 6)


@pytest.mark.parametrize("number", [n for n in EVERY if n != 10])
def test_lab_browser_each_control_changes_what_is_seen_to_what_the_library_says(
    page: Page, starter: Bench, number: int
):
    for control in drawn(starter.pictures[number].controls):
        page.open(str(number))
        before = page.seen()
        value = move(page, control)
        page.ready()
        state = {control["name"]: value}
        wanted = starter.act(number, **state) if number == 9 else said(starter, number, **state)
        assert page.numbers() == texts(wanted), control["name"]
        if (number, control["name"]) != (9, "rank") and (number, control["name"]) != (9, "rate"):
            assert page.seen() != before, control["name"]
        assert f"{control['name']}={str(value).lower() if isinstance(value, bool) else value}" in unquote(page.page.url)
        page.page.goto("about:blank")
    assert page.wrong == [] or page.wrong == ["about:blank"] * len(page.wrong)


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
    assert AXE.is_file(), "axe-core is not there: make browser fetches it with npm"
    one = Page(browser, url, color_scheme=scheme, bypass_csp=True)
    found = []
    for number in EVERY:
        one.open(str(number))
        one.page.click("summary")
        one.page.add_script_tag(path=str(AXE))
        for v in one.page.evaluate("axe.run().then((r) => r.violations)"):
            if v["impact"] in ("serious", "critical"):
                found.append((number, v["id"], [n["target"] for n in v["nodes"]][:3]))
        one.page.goto("about:blank")
    one.page.context.close()
    assert not found, found


@pytest.mark.parametrize("width", [360, 1920])
def test_lab_browser_no_width_scrolls_sideways(browser: Any, url: str, width: int):
    one = Page(browser, url, viewport={"width": width, "height": 800})
    for number in EVERY:
        one.open(str(number))
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width, number
    one.page.context.close()


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
        one.page.context.close()
        server.shutdown()
