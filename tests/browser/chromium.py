"""A real Chromium without a screen, from Debian's packages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is too small for a renderer
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def start_chromium(directory: Path, *flags: str) -> webdriver.Chrome:
    """With its profile and log in ``directory``. The test that asks fails where there is none, and says why."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.fail("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, *flags, f"--user-data-dir={directory / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    log = directory / "chromedriver.log"
    try:
        browser = webdriver.Chrome(options, webdriver.ChromeService(chromedriver, log_output=str(log)))
    except WebDriverException as error:
        pytest.fail(f"chromium does not start: {error}\n{log.read_text()[-3000:]}")
    browser.set_page_load_timeout(30)
    browser.set_script_timeout(30)
    return browser
