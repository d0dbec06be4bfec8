"""What somebody at the browser sees, from the login to a daemon that dies in the middle of an answer."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Run
from page import Page
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

NUMBERS = re.compile(r"(\d+) events · first token (\d+\.\d+) s · (\d+\.\d+) s")
# Chromium's EventSource asks again after 3 seconds when a connection ends.
RECONNECT = 3.0


# Signing in and out ---------------------------------------------------------------------------------------------------


def test_a_wrong_password_is_said_and_the_right_one_opens_the_page(visitor: Page) -> None:
    visitor.sign_in("certainly not " + visitor.password)
    visitor.wait_for_page("[role=alert]")
    assert visitor.find("[role=alert]").text == "User name or password is wrong."
    assert visitor.find("#user").get_attribute("value") == visitor.user
    assert visitor.driver.switch_to.active_element.get_attribute("id") == "password"
    visitor.sign_in()
    assert visitor.find(".user").text == visitor.user


def test_signing_out_shows_the_form_and_going_back_does_not_help(page: Page) -> None:
    page.find("form[action='/logout.php'] button").click()
    page.wait_for_page("#password")
    page.open()
    assert page.all("#password")


def test_a_link_from_another_site_finds_the_user_signed_in(page: Page) -> None:
    if not page.script("return isSecureContext"):
        pytest.skip("over plain HTTP to a name other than localhost, browsers do not say where a request comes from")
    page.driver.get(f"data:text/html,<a href='{page.base_url}/'>a link</a>")
    page.find("a").click()
    page.wait_for_page("#prompt")


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_answer_is_painted_as_it_arrives(asking_page: Page) -> None:
    page = asking_page
    page.watch_frames()
    page.ask()
    page.wait_for_text()
    early = page.driver.get_screenshot_as_png()
    page.wait_for_text(len(page.answer) + 40)
    later = page.driver.get_screenshot_as_png()
    assert page.state == "streaming"
    page.wait_until("done")

    assert early != later
    paints = page.paints
    assert len(paints) >= 10, paints
    assert paints[-1].at - paints[0].at >= 1.0, paints
    largest_step = max(after.length - before.length for before, after in pairwise(paints))
    assert largest_step < paints[-1].length / 2, paints
    assert page.find("#stop").is_displayed() is False
    assert page.console() == []


def test_the_whole_answer_arrives_and_is_asked_for_once(asking_page: Page) -> None:
    page = asking_page
    page.ask()
    page.wait_until("done")
    answer = page.answer
    assert len(answer) > 100
    # The daemon has closed the connection. Nothing may be asked again, also not when EventSource would.
    time.sleep(RECONNECT + 1)  # that something does not happen can only be waited for
    assert page.requests().count("/stream.php") == 1
    assert page.answer == answer
    assert page.state == "done"


def test_the_status_line_counts_events_and_times(asking_page: Page) -> None:
    page = asking_page
    assert page.find("#status").text == "Ready"
    page.ask()
    page.wait_until("streaming")
    page.wait_for(lambda: NUMBERS.search(page.find("#numbers").text), "numbers while the answer arrives")
    page.wait_until("done")
    numbers = NUMBERS.search(page.find("#numbers").text)
    assert numbers
    assert int(numbers[1]) >= 10
    assert float(numbers[2]) < float(numbers[3])
    assert page.find("#status").text == "Done"
    assert numbers[0] in page.find(".meta").text


def test_an_ordinary_page_answers_while_an_answer_is_written(page: Page) -> None:
    page.ask()
    page.wait_for_text()
    page.find("#ping").click()
    result = page.wait_for(lambda: page.find("#ping-result").text, "an answer from Apache", 10)
    assert page.state == "streaming"
    assert re.fullmatch(r"\d+ ms", result)


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_stops_and_keeps_what_has_arrived(asking_page: Page, how: str) -> None:
    page = asking_page
    page.watch_frames()
    page.ask()
    page.wait_for_text(10)
    if how == "button":
        page.find("#stop").click()
    else:
        page.press(Keys.ESCAPE)
    page.wait_until("stopped")
    kept = page.answer
    frames = page.script("return window.frames_seen.length")
    page.wait_for(lambda: page.script("return window.frames_seen.length") > frames + 30, "half a second of frames")
    assert page.answer == kept
    assert len(kept) >= 10
    assert page.all(".problem")[-1].text == ""
    assert page.find("#status").text == "Stopped"
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
    page.ask("And now?")
    page.wait_for_text()
    assert page.state == "streaming"


def test_enter_sends_and_shift_enter_makes_a_line(page: Page) -> None:
    page.type("first", Keys.SHIFT + Keys.ENTER + Keys.NULL, "second")
    assert page.all("#turns article") == []
    page.type(Keys.ENTER)
    page.wait_for_text()
    assert page.find(".question [data-slot]").text == "first\nsecond"
    assert page.find("#prompt").get_attribute("value") == ""


def test_an_empty_question_is_not_sent_and_a_second_waits_for_the_first(page: Page) -> None:
    page.ask("  ")
    assert page.all("#turns article") == []
    page.find("#prompt").clear()
    page.ask("first")
    page.wait_for_text()
    page.ask("second")
    assert len(page.all("#turns article")) == 1
    assert page.find("#prompt").get_attribute("value") == "second"


def test_a_suggestion_asks(page: Page) -> None:
    idea = page.find(".ideas button")
    text = idea.text
    idea.click()
    page.wait_for_text()
    assert page.find(".question [data-slot]").text == text
    assert not page.find("#welcome").is_displayed()


def test_a_question_is_shown_as_text_whatever_it_says(asking_page: Page) -> None:
    page = asking_page
    question = "<img src=x onerror=\"document.title='owned'\"> & naïve 日本語 🎉"
    page.ask(question)
    page.wait_until("done")
    assert page.find(".question [data-slot]").text == question
    assert page.all("#turns img") == []
    assert page.driver.title == "Handoff"


def test_a_screen_reader_gets_the_answer_whole_and_the_status_at_once(page: Page) -> None:
    page.ask()
    page.wait_for_text()
    turn = page.find("#turns article")
    assert turn.get_attribute("aria-busy") == "true"
    page.wait_until("done")
    assert turn.get_attribute("aria-busy") is None
    assert page.find("#status").get_attribute("role") == "status"
    assert page.find("#turns").get_attribute("role") == "log"
    for control in page.all("textarea, input:not([type=hidden]), button"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_session_that_has_ended_is_said_and_the_question_kept(asking_page: Page) -> None:
    page = asking_page
    page.driver.delete_all_cookies()
    page.ask("Do you know me?")
    page.wait_until("failed")
    assert "Your session has ended" in page.problem
    page.find(".problem button").click()
    page.wait_for_page("#password")
    page.sign_in()
    assert page.find("#prompt").get_attribute("value") == "Do you know me?"


def test_a_page_from_before_the_last_login_is_told_to_reload(page: Page) -> None:
    page.script("document.querySelector('#ask [name=csrf]').value = 'old'")
    page.ask()
    page.wait_until("failed")
    assert "X-CSRF-Token" in page.problem
    assert page.find(".problem button").text == "Reload the page"


def test_too_long_a_question_is_said_with_its_limit_and_given_back(page: Page) -> None:
    page.put("x" * 4_200_000)
    page.type(Keys.ENTER)
    page.wait_until("failed")
    assert "too long" in page.problem
    assert "4194304" in page.problem
    assert page.find("#prompt").get_attribute("value") == "x" * 4_200_000


def test_a_daemon_that_is_down_is_said_and_asking_again_works(asking_page: Page, hook: Run) -> None:
    page = asking_page
    hook("HANDOFF_STOP_DAEMON")
    page.ask()
    page.wait_until("failed")
    assert "The answer service is not available" in page.problem
    assert page.answer == ""
    hook("HANDOFF_START_DAEMON")
    page.find(".problem button").click()
    page.wait_until("done")
    assert len(page.answer) > 100
    assert page.requests().count("/stream.php") == 2


def test_a_daemon_that_dies_in_the_middle_is_said_and_nothing_is_asked_again(asking_page: Page, hook: Run) -> None:
    page = asking_page
    page.ask()
    page.wait_for_text(20)
    hook("HANDOFF_KILL_DAEMON")
    page.wait_until("failed")
    assert "The answer broke off" in page.problem
    assert len(page.answer) >= 20
    time.sleep(RECONNECT + 1)
    assert page.requests().count("/stream.php") == 1


@pytest.mark.parametrize(
    ("body", "title", "text"),
    [
        (
            'event: error\ndata: {"error":{"type":"backend","message":"The model is overloaded."}}\n\n',
            "The answer could not be finished",
            "The model is overloaded.",
        ),
        ("", "The answer broke off", "before the answer was complete"),
        ("data: {}\n\n", "Something unexpected arrived", "not in the expected format"),
    ],
    ids=["error event", "no end", "not our format"],
)
def test_an_answer_that_goes_wrong_is_said_and_kept(page: Page, body: str, title: str, text: str) -> None:
    # A healthy chain does not do this on request, so the response is made up; the page is real.
    stream = 'data: {"content":"Half an answer"}\n\n' + body
    page.script(
        "const body = arguments[0]; window.fetch = async () =>"
        " new Response(body, { headers: { 'Content-Type': 'text/event-stream' } });",
        stream,
    )
    page.ask()
    page.wait_until("failed")
    assert title in page.problem
    assert text in page.problem
    assert page.answer == "Half an answer"


def test_a_server_that_cannot_be_reached_is_said(asking_page: Page) -> None:
    page = asking_page
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.ask()
        page.wait_until("failed")
        assert "The server cannot be reached" in page.problem
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})


# Looks ----------------------------------------------------------------------------------------------------------------


def test_light_and_dark_follow_the_users_preference(page: Page) -> None:
    def brightness() -> int:
        colour = page.script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", str(colour))[:3]))

    page.prefer("light")
    light = brightness()
    page.prefer("dark")
    assert brightness() < 200 < 600 < light


@pytest.mark.parametrize("width", [320, 390, 768, 1180])
def test_nothing_is_cut_off_at_any_width(page: Page, width: int) -> None:
    page.resize(width, 700)
    page.find("#ping").click()
    page.wait_for(lambda: page.find("#ping-result").text, "an answer from Apache", 10)
    page.ask("a" * 200 + " and a few words")
    page.wait_for_text()
    assert page.script("return document.documentElement.scrollWidth") == width
    for element in page.driver.find_elements(By.CSS_SELECTOR, "header button, #stop, #prompt, .transport"):
        box = element.rect
        assert box["x"] >= 0, element.get_attribute("outerHTML")
        assert box["x"] + box["width"] <= width, element.get_attribute("outerHTML")


def test_the_newest_words_stay_in_sight_unless_the_reader_scrolls_up(page: Page) -> None:
    page.resize(390, 500)
    below = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    page.ask()
    page.wait_for(lambda: page.script("return scrollY") > 100, "the page to follow the answer")
    page.script("scrollTo(0, 0)")
    page.wait_until("done")
    assert page.script("return scrollY") == 0
    page.ask()
    page.wait_until("done")
    assert page.script(below) <= 2


@pytest.mark.parametrize(("width", "height", "device"), [(1180, 780, "desktop"), (390, 780, "mobile")])
def test_pictures_for_the_readme(page: Page, screenshots: Path, width: int, height: int, device: str) -> None:
    page.resize(width, height)
    page.ask("What happens to my request when PHP hands it off?")
    page.wait_for_text(300)
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        path = screenshots / f"page-{device}-{scheme}.png"
        assert page.driver.save_screenshot(str(path))
