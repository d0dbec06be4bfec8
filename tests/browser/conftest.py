"""A real Chromium in front of a real chain.

The chain is named from outside, so that the same tests run against a container, a staging host, or `script/demo`:

    HANDOFF_BASE_URL        e.g. http://127.0.0.1:8080
    HANDOFF_USER, HANDOFF_PASSWORD
    HANDOFF_STOP_DAEMON     shell command: new handoffs fail from now on (stops the socket unit too)
    HANDOFF_KILL_DAEMON     shell command: streams that run now break off
    HANDOFF_START_DAEMON    shell command: back to normal after either
    HANDOFF_SCREENSHOTS     directory for pictures of the page, light and dark; optional

The backend has to take at least two seconds for an answer, as the demo backend does with its default pace.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import start_chromium
from page import Page
from selenium import webdriver

Run = Callable[[str], None]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"NOT RUN: {reason}", yellow=True, bold=True)


def setting(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        pytest.skip(f"{name} is not set; see tests/browser/conftest.py")
    return value


@pytest.fixture(scope="session")
def base_url() -> str:
    return setting("HANDOFF_BASE_URL").rstrip("/")


@pytest.fixture(scope="session")
def driver(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser with a profile of its own; the pages in it are fresh for each test."""
    browser = start_chromium(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture
def visitor(driver: webdriver.Chrome, base_url: str) -> Iterator[Page]:
    """Somebody who is not signed in, in a window of desktop size."""
    driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.set_window_size(1180, 860)
    page = Page(driver, base_url, setting("HANDOFF_USER"), setting("HANDOFF_PASSWORD"))
    page.requests()  # forget those of the test before
    page.console()
    page.open()
    yield page
    driver.get("about:blank")  # ends the streams that still run


@pytest.fixture
def page(visitor: Page) -> Page:
    """Somebody who is signed in and can ask."""
    visitor.sign_in()
    return visitor


@pytest.fixture(params=["fetch", "eventsource"])
def asking_page(page: Page, request: pytest.FixtureRequest) -> Page:
    """The same, once for each way of reading the stream."""
    page.choose(request.param)
    return page


def run_hook(name: str) -> None:
    result = subprocess.run(setting(name), shell=True, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{name} failed: {result}"


@pytest.fixture
def hook() -> Iterator[Run]:
    """Runs HANDOFF_STOP_DAEMON and the like; whatever was broken is repaired in the end."""
    setting("HANDOFF_START_DAEMON")
    used: list[str] = []

    def run(name: str) -> None:
        setting(name)
        used.append(name)
        run_hook(name)

    yield run
    if used and used[-1] != "HANDOFF_START_DAEMON":
        run_hook("HANDOFF_START_DAEMON")


@pytest.fixture
def screenshots() -> Path:
    path = Path(setting("HANDOFF_SCREENSHOTS"))
    path.mkdir(parents=True, exist_ok=True)
    return path
