"""A Chromium for the tests of the page. `python tests/lab/lab_chromium.py` gets one where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright
from playwright.sync_api import Error as PlaywrightError

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
MISSING = """\
No Chromium starts here, and none could be installed. The lab's tests need one: `apt-get install chromium` as root,
Chromium or Chrome from the system's own packages, or `playwright install --with-deps chromium`."""


def start(playwright: Playwright) -> Browser | None:
    """A headless Chromium: the first that starts of those on the PATH and of playwright's own; None where none does."""
    for path in [*filter(None, map(shutil.which, NAMES)), None]:
        try:  # the sandbox does not work for root, and the pages are ours
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except PlaywrightError:
            continue
    return None


def found() -> str | None:
    """The version of the Chromium that starts, or None."""
    with sync_playwright() as playwright:
        browser = start(playwright)
        return None if browser is None else browser.version


def run(*command: str, **environment: str) -> bool:
    """Run an installer, its words on stderr; did it end well?"""
    print("+", *command, file=sys.stderr)
    return not subprocess.run(command, stdout=sys.stderr, env={**os.environ, **environment}, check=False).returncode


def install() -> None:
    """Playwright's own Chromium where the internet is, else the system's package where root may install it."""
    tool = str(Path(sys.executable).with_name("playwright"))
    root = os.geteuid() == 0 and shutil.which("apt-get")
    if run(tool, "install", "--only-shell", "chromium", PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT="10000"):
        if not found() and root:
            run(tool, "install-deps", "chromium")
    elif root:
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "-qq", "update", **quiet)
        install = ("apt-get", "-qq", "install", "-y", "--no-install-recommends", "fonts-dejavu-core")
        if not run(*install, "chromium-headless-shell", **quiet):  # a quarter less work for the tests; Debian has it
            run(*install, "chromium", **quiet)


def main() -> None:
    """Exit 0 once a Chromium starts; 1 with what to install."""
    version = found()
    if version is None:
        install()
        version = found()
    sys.exit(MISSING if version is None else None)


if __name__ == "__main__":
    main()
