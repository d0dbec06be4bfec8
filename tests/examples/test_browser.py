"""examples/js in a real Chromium, through HAProxy with TLS and HTTP/2, Apache, PHP-FPM, the module and the daemon."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

import pytest
from chain import ROOT, Chain, wait_for_daemon
from conftest import HELPER, SNIPPETS
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(ROOT / "tests" / "browser"))
from chromium import start_chromium

T = TypeVar("T")
JS = ROOT / "examples" / "js"
APP = ROOT / "examples" / "php-app"
# How long the answer is, and what the page says of it, once per frame that the browser draws.
WATCH_FRAMES = """
window.frames = [];
const look = () => {
  const [length, status] = ['answer', 'status'].map((id) => document.getElementById(id).textContent);
  window.frames.push([performance.now(), length.length, status]);
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


@pytest.fixture(scope="module")
def pages(site: Chain) -> Chain:
    """The pages and what they ask, where the daemon answers slowly, and where it does not come to an end."""
    for directory in ("slow", "endless"):
        site.install(*JS.glob("*.html"), *JS.glob("*.js"), *SNIPPETS.glob("*.php"), HELPER, under=directory)
        (site.docroot / directory / "enter.php").write_text("<?php session_start(); $_SESSION['user'] = 'ada';")
    (site.docroot / "favicon.ico").touch()  # every browser asks for it
    (site.docroot / "plain.php").write_text("<?php echo '<p id=plain>An ordinary page</p>';")
    # eventsource.html asks the reference application, which has a login of its own.
    app = site.docroot / "slow" / "app"
    app.mkdir()
    for path in ("lib.php", "page.php", "handoff.php"):
        (app / path).write_text((APP / path).read_text())
    site.install(APP / "public", JS / "eventsource.html", under="slow/app")
    (app / "eventsource.html").rename(app / "public" / "eventsource.html")
    (app / "public" / "enter.php").write_text("<?php require '../lib.php'; open_session(); log_in('demo', 'pass');")
    (site.state / "app.php").write_text(
        # The hash of "pass"; with another one every session would be over.
        "<?php return ['target' => 'llm', 'user' => 'demo', 'password_hash' =>"
        " '$5$examples$BZudOLO7q0G26WlOf20caadk19LRsOiOgo0lgL4cuB5'];"
    )
    return site


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    # The certificate of this site is its own.
    browser = start_chromium(tmp_path_factory.mktemp("browser"), "--ignore-certificate-errors")
    yield browser
    browser.quit()


@pytest.fixture
def window(driver: webdriver.Chrome, pages: Chain) -> Iterator[Window]:
    window = Window(driver, f"{pages.https}/slow")
    driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    driver.get(f"{window.base}/enter.php")
    driver.get_log("browser")  # type: ignore[no-untyped-call]  # forget what the test before said
    yield window
    for handle in driver.window_handles[1:]:
        driver.switch_to.window(handle)
        driver.close()
    driver.switch_to.window(driver.window_handles[0])
    driver.get("about:blank")  # ends the streams that still run


class Window:
    """What somebody does and sees; each tab has one of the example pages."""

    def __init__(self, driver: webdriver.Chrome, base: str) -> None:
        self.driver = driver
        self.base = base

    def open(self, page: str) -> None:
        self.driver.get(f"{self.base}/{page}")
        self.driver.execute_script(WATCH_FRAMES)

    def ask(self, question: str = "How does a handoff work?") -> None:
        self.driver.find_element(By.ID, "prompt").send_keys(question + Keys.ENTER)

    def text(self, name: str) -> str:
        return str(self.driver.execute_script("return document.getElementById(arguments[0]).textContent", name))

    @property
    def answer(self) -> str:
        return self.text("answer")

    @property
    def status(self) -> str:
        return self.text("status")

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        waiting = WebDriverWait(self.driver, 60, 0.02)
        return waiting.until(lambda _: condition(), f"{what}; the page says {self.status!r}, {self.answer[-200:]!r}")

    def wait_for_text(self, length: int = 1) -> None:
        self.wait_for(lambda: len(self.answer) >= length, f"{length} characters")

    def wait_until(self, status: str) -> None:
        self.wait_for(lambda: self.status.startswith(status), f"status {status}")

    def wait_for_no_worker(self, site: Chain) -> None:
        """Until Apache has done with the page that was just opened, and with everything else."""
        waiting = WebDriverWait(self.driver, 60, 0.02)
        waiting.until(lambda _: site.httpd.busy_workers() == 0, "some of Apache's workers are busy with the streams")

    def assert_painted_as_it_came(self) -> None:
        seen = self.driver.execute_script("return window.frames")
        # The frame that would show "Done" may not be drawn yet.
        assert {status for _, length, status in seen if length > 0} - {"Done"} == {"Answering"}
        frames = [(at, length) for at, length, _ in seen]
        paints = [(at, after) for (_, before), (at, after) in pairwise(frames) if after > before]
        # On a machine with time for it there are a hundred; what comes at once is one.
        assert len(paints) >= 3, paints


PAGES = ["page.html", "app/public/eventsource.html", "resume.html"]


@pytest.fixture(params=PAGES)
def page(window: Window, request: pytest.FixtureRequest) -> Window:
    """Each of the three pages."""
    if "app/" in request.param:
        window.driver.get(f"{window.base}/app/public/enter.php")
    window.open(request.param)
    return window


def test_an_answer_is_painted_as_it_arrives(page: Window) -> None:
    page.ask()
    page.wait_until("Done")
    page.assert_painted_as_it_came()
    assert len(page.answer) > 100
    assert page.driver.get_log("browser") == []  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("page", PAGES[:2], indirect=True)
def test_stop_stops_at_once_and_another_question_is_answered(page: Window) -> None:
    page.ask()
    page.wait_for_text(20)
    page.driver.find_element(By.ID, "stop").click()
    page.wait_until("Stopped")
    stopped = page.answer
    page.ask(" And then?")
    page.wait_for(lambda: page.answer != stopped, "the new answer")
    page.wait_until("Done")
    assert len(page.answer) > len(stopped)


def test_a_second_question_ends_the_first_and_is_the_only_one_answered(page: Window, site: Chain) -> None:
    site.install(HELPER)
    (site.docroot / "expected.php").write_text(
        "<?php require 'SocketHandoff.php';"
        "SocketHandoff\\SocketHandoff::to('llm')->with(['prompt' => 'Why? And how?'])->send();"
    )
    expected = site.client().get("/expected.php").answer
    page.ask("Why?")
    page.wait_for_text(60)
    page.ask(" And how?")
    page.wait_for(lambda: "And how?" in page.answer, "the second answer")
    page.wait_until("Done")
    assert page.answer == expected


def test_two_tabs_have_each_its_own_answer_after_a_reload(window: Window) -> None:
    driver = window.driver
    tabs = {}
    for question in ("Which tyre?", "Which saddle?"):
        driver.switch_to.new_window("tab")
        tabs[driver.current_window_handle] = question
        window.open("resume.html")
        window.ask(question)
        window.wait_for_text(60)
    for tab, question in tabs.items():
        driver.switch_to.window(tab)
        driver.refresh()
        window.wait_until("Done")
        assert f"You asked: “{question}”" in window.answer


def test_a_question_that_was_refused_is_not_asked_for_after_a_reload(window: Window) -> None:
    window.open("resume.html")
    window.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    window.ask()
    window.wait_until("Failed: Sign in first.")
    window.driver.refresh()
    assert window.status == ""
    window.driver.get_log("browser")  # type: ignore[no-untyped-call]  # which says that there was a 401


@pytest.mark.parametrize("page", PAGES[:2], indirect=True)
@pytest.mark.breaks
def test_a_daemon_that_dies_in_the_middle_is_said_and_the_next_question_answered(page: Window, site: Chain) -> None:
    page.ask()
    page.wait_for_text(20)
    site.kill_streams()
    page.wait_until("Failed: ")
    # With HTTP/2, HAProxy makes an orderly end of it; that the answer is not complete is noticed all the same.
    assert re.search("connection (broke|ended before the answer was complete)", page.status)
    assert len(page.answer) >= 20, "what has arrived stays"
    wait_for_daemon(site)
    page.ask(" And now?")
    page.wait_until("Done")


def kept_answer(window: Window) -> str:
    """The same answer from its first event, as the daemon has kept it."""
    kept = window.driver.execute_async_script(
        "const question = performance.getEntriesByType('resource').map((one) => new URL(one.name).searchParams)"
        ".find((query) => query.has('question')).get('question');"
        "fetch(`resume.php?question=${question}&after=0`)"
        ".then((reply) => reply.text()).then(arguments[arguments.length - 1])"
    )
    events = [line[6:] for line in kept.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["content"] for event in events[:-1])


def test_an_answer_goes_on_after_a_reload(window: Window) -> None:
    window.open("resume.html")
    window.ask()
    window.wait_for_text(30)
    window.driver.refresh()
    window.wait_until("Done")
    assert window.answer == kept_answer(window)
    window.driver.refresh()
    assert window.status == "", "a complete answer is not asked for again"


def test_an_answer_goes_on_when_its_connection_breaks(window: Window, site: Chain) -> None:
    assert site.balancer is not None
    window.open("resume.html")
    window.ask()
    window.wait_for_text(30)
    site.balancer.kill()
    site.balancer.start()
    window.wait_until("Done")
    names = window.driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert sum("resume.php" in name for name in names) >= 2, "the connection did not break"
    assert window.answer == kept_answer(window)


def test_twenty_tabs_stream_while_an_ordinary_page_is_opened(window: Window, site: Chain) -> None:
    driver = window.driver
    tabs = []
    for _ in range(20):
        driver.switch_to.new_window("tab")
        tabs.append(driver.current_window_handle)
        driver.get(f"{site.https}/endless/page.html")
        window.ask()
    for tab in tabs:
        driver.switch_to.window(tab)
        window.wait_for_text()
    driver.switch_to.new_window("tab")
    driver.get(f"{site.https}/plain.php")
    assert driver.find_element(By.ID, "plain").text == "An ordinary page"
    window.wait_for_no_worker(site)
    # What was asked last is there, and of what was asked before nothing is over: nobody has waited for anybody.
    for tab in tabs:
        driver.switch_to.window(tab)
        assert window.status == "Answering"
