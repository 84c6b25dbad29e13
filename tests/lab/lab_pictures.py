"""The thirteen pictures as files, light and dark: `make pictures` writes docs/images/lab."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from lab_bench import STARTER
from lab_chromium import MISSING, start
from lab_page import Page, served
from PIL import Image
from playwright.sync_api import sync_playwright

from deltaw.lab.server import make_app

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images" / "lab"
SCHEMES = ("light", "dark")
STATES = {9: "step=8", 10: "adapter=lesson", 12: "ia3=true&houlsby=true", 13: "true_rank=8&rank=24&noise=0.2"}
"""What is shown of a picture that says little at its defaults."""
COLOURS = 200
"""Of a file's palette: more than the pictures have but for the edges of letters."""


def write_small(png: bytes, path: Path) -> None:
    """Write a screenshot with a palette: a third of the bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    few = image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def take(page: Page, number: int) -> bytes:
    """Picture `number` as it is looked at; 10 after it was asked."""
    page.open(f"{number}?{STATES.get(number, '')}")
    if number == 10:
        page.page.click("#ask")
        page.page.wait_for_selector("blockquote:not(:has-text('Press Ask.'))")
        page.ready()
        page.page.mouse.move(0, 0)
        page.page.evaluate("document.activeElement.blur()")
    box = page.page.locator("main").bounding_box()
    assert box is not None
    clip = {"x": 0, "y": box["y"] - 16, "width": page.page.viewport_size["width"], "height": box["height"] + 24}
    return page.page.screenshot(full_page=True, clip=clip, animations="disabled")


def main(width: int = 960, folder: Path = FOLDER) -> None:
    """Take all twenty-six, `width` pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(make_app(STARTER)) as url, sync_playwright() as playwright:
        browser = start(playwright)
        assert browser is not None, MISSING
        for scheme in SCHEMES:
            page = Page(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme)
            for number in range(1, 14):
                write_small(take(page, number), folder / f"{number}-{scheme}.png")
            assert page.wrong == [], page.wrong
        browser.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *map(Path, sys.argv[2:3]))
