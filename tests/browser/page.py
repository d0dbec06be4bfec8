"""The page as somebody uses it: every method is something that is done or seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")

# Notes, once per frame that the browser draws, how long the newest answer is.
WATCH_FRAMES = """
window.frames_seen = [];
const look = () => {
  const answer = [...document.querySelectorAll('.answer')].at(-1);
  window.frames_seen.push([performance.now(), answer ? answer.textContent.length : 0]);
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


@dataclass(frozen=True)
class Paint:
    """A frame in which the answer was longer than in the one before."""

    at: float  # seconds
    length: int  # characters


class Page:
    def __init__(self, driver: webdriver.Chrome, base_url: str, user: str, password: str) -> None:
        self.driver = driver
        self.base_url = base_url
        self.user = user
        self.password = password

    # Doing

    def open(self) -> None:
        self.driver.get(f"{self.base_url}/")

    def sign_in(self, password: str | None = None) -> None:
        name = self.find("#user")
        name.clear()
        name.send_keys(self.user)
        self.find("#password").send_keys((self.password if password is None else password) + Keys.ENTER)
        if password is None:
            self.wait_for_page("#prompt")

    def choose(self, transport: str) -> None:
        self.find(f"input[value={transport}]").click()
        assert self.find(f"input[value={transport}]").is_selected()

    def type(self, *keys: str) -> None:
        self.find("#prompt").send_keys(*keys)

    def ask(self, question: str = "How does a handoff work?") -> None:
        self.type(question, Keys.ENTER)

    def put(self, question: str) -> None:
        """Fills in a long question at once."""
        self.script("document.getElementById('prompt').value = arguments[0]", question)

    def press(self, key: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def watch_frames(self) -> None:
        self.script(WATCH_FRAMES)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    # Seeing

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    @property
    def state(self) -> str:
        return str(self.find("#status").get_attribute("data-state"))

    @property
    def answer(self) -> str:
        text = self.script("return [...document.querySelectorAll('.answer')].at(-1)?.textContent ?? ''")
        return str(text)

    @property
    def problem(self) -> str:
        """Title and text of the newest answer's error."""
        return self.all(".problem")[-1].text

    @property
    def paints(self) -> list[Paint]:
        lengths = [(at / 1000, length) for at, length in self.script("return window.frames_seen")]
        return [Paint(at, length) for (_, before), (at, length) in pairwise(lengths) if length > before]

    def wait_for(self, condition: Callable[[], T], what: str, seconds: float = 60) -> T:
        # While one page replaces another, what was found a moment ago may be gone.
        wait = WebDriverWait(self.driver, seconds, 0.02, [StaleElementReferenceException])
        try:
            return wait.until(lambda _: condition())
        except TimeoutException:
            text = self.find("body").text
        raise AssertionError(f"not within {seconds:g} s: {what}. The page says:\n{text}")

    def wait_for_page(self, css: str) -> None:
        """The page that has this element, with its scripts run."""
        ready = "return document.readyState === 'complete' && document.querySelector(arguments[0]) !== null"
        self.wait_for(lambda: self.script(ready, css), f"a page with {css}")

    def wait_until(self, state: str) -> None:
        self.wait_for(lambda: self.state == state, f"state {state}")

    def wait_for_text(self, length: int = 1) -> None:
        self.wait_for(lambda: len(self.answer) >= length, f"{length} characters of an answer")

    def requests(self) -> list[str]:
        """Paths that the browser asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url.removeprefix(self.base_url).partition("?")[0] for url in urls]

    def console(self) -> list[str]:
        """What the browser complained about since the last call, apart from statuses of responses."""
        messages = [str(entry["message"]) for entry in self.log("browser")]
        return [message for message in messages if "Failed to load resource" not in message]

    def log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return entries
