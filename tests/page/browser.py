"""The page in headless Chromium, as a person uses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from ..waiting import wait_until as _wait_until

wait_until = partial(_wait_until, deadline=30.0)

DRIVER = "chromedriver"
_FLAGS = (
    *("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    # Chromium refuses to run as root with its sandbox.
    "--no-sandbox",
)
_AUDIT = Path(__file__).with_name("audit.js").read_text()
_RECORD_VIOLATIONS = """
    window.violations = [];
    addEventListener("securitypolicyviolation", event => violations.push(event.violatedDirective));
"""


@contextmanager
def chromium() -> Iterator[Chrome]:
    options = ChromeOptions()
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With the path of the driver, selenium looks for none on the internet.
    chrome = Chrome(options, Service(f"/usr/bin/{DRIVER}"))
    try:
        chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _RECORD_VIOLATIONS})
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The page of one router in an empty profile."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome = chrome
        self.url = url
        #: URLs of all requests so far.
        self.requests: list[str] = []
        self.resize(1440, 900)
        self.prefer("light")
        self.read_requests()
        self.requests.clear()
        self.chrome.get_log("browser")
        self.load()

    def load(self) -> None:
        self.chrome.get(f"{self.url}/")

    def close(self) -> None:
        """Leave the page, and fail if it violated its policy, logged an error or asked another server."""
        violations = self.run("return window.violations")
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.chrome.get("about:blank")
        assert violations == []
        # Browsers log each response with an error status.
        errors = [entry for entry in self.chrome.get_log("browser") if entry["source"] != "network"]
        assert errors == []
        self.read_requests()
        assert [url for url in self.requests if not url.startswith((f"{self.url}/", "data:", "about:"))] == []

    def read_requests(self) -> None:
        for entry in self.chrome.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: object) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.innerText)"
        return [str(text) for text in self.run(script, selector)]

    def states(self) -> dict[str, str]:
        """Return the state of each replica in the table."""
        script = """return [...document.querySelectorAll("#rows tr")].map(
            row => [row.querySelector("th").innerText, row.querySelector(".state").innerText])"""
        return dict(self.run(script))

    def shows(self, expected: str, selector: str = "#log") -> str:
        """Wait until the text is there, and return the whole text of the element."""
        wait_until(lambda: expected in self.text(selector), f"{selector} shows {expected!r}")
        return self.text(selector)

    def shows_states(self, expected: Callable[[dict[str, str]], bool], what: str) -> None:
        wait_until(lambda: expected(self.states()), what)

    def click(self, selector: str) -> None:
        self.chrome.find_element(By.CSS_SELECTOR, selector).click()

    def press(self, *keys: str) -> None:
        """Press keys, whatever has the focus. A modifier is held until the end."""
        self.chrome.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """Return the id of the element with the focus, or its tag."""
        return str(self.run("return document.activeElement.id || document.activeElement.tagName"))

    def send(self, text: str) -> None:
        self.run("document.getElementById('prompt').focus()")
        self.press(text, "\ue007")

    def problems(self) -> list[str]:
        """Return what makes the page hard to read or to use at its size and in its colours."""
        found: list[str] = self.run(_AUDIT)
        return found
