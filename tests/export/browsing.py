"""A Chromium that is driven by tests: the distribution's own, headless and without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:  # the `test` extra is not installed
    webdriver = None

REASON = (
    "no Chromium browser with its driver: apt-get install chromium chromium-driver"
    if CHROMIUM is None or DRIVER is None
    else "selenium is not installed: pip install 'circuitvit[test]'"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None or webdriver is None, reason=REASON)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--window-size=1400,1000",
)


class Page:
    """A page that is open in the browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, path: Path, edges: bool = False) -> None:
        """Load a file from disk and wait until it says that everything is drawn; with all edges if asked."""
        self.browser.get(path.resolve().as_uri())
        self.wait("return document.documentElement.dataset.ready === 'true'")
        if edges:
            self.run("document.getElementById('all-edges').click()")

    def wait(self, script: str) -> None:
        """Wait until a script gives something true."""
        WebDriverWait(self.browser, 30, poll_frequency=0.05).until(lambda _: self.run(script))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns; the page's own functions and constants are in its reach."""
        return self.browser.execute_script(script, *arguments)

    def text(self, css: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", css))

    def element(self, css: str) -> Any:
        return self.browser.find_element("css selector", css)

    def counts(self) -> tuple[int, int]:
        """The numbers of edges and nodes that the page states."""
        words = self.text("#counts").replace(",", "").split()
        return int(words[0]), int(words[2])

    def visible(self) -> set[str]:
        """Names of the edges that can be seen."""
        script = "return edges.filter(e => getComputedStyle(e.element).display !== 'none').map(e => e.name)"
        return set(self.run(script))

    def with_class(self, name: str) -> set[str]:
        """Names of the nodes and edges whose elements have a class."""
        script = (
            "return [...nodes, ...edges].filter(i => i.element && i.element.classList.contains(arguments[0]))"
            ".map(i => i.name)"
        )
        return set(self.run(script, name))

    def complaints(self) -> list[str]:
        """Everything that the browser's console holds."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address that was asked for since the last call."""
        found = []
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A fresh browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()
