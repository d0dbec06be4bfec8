"""Another backend answers where the first one fails in time."""

from __future__ import annotations

import threading

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import TIMEOUT, Daemon
from llm_server import SSE_HEAD, Request, error

pytest.importorskip("httptools")

QUESTION = {"prompt": "p", "request_id": "r1", "demo": {"tokens": 3, "tokens_per_second": 1000}}


def daemon_before(make_daemon: MakeDaemon, url: str, more: str = "") -> Daemon:
    text = (
        f'[backend]\ndefault = "first"\n[backends.first]\ntype = "openai"\nbase_url = "{url}"\nfallback = ["second"]\n'
    )
    return make_daemon(f'{text}{more}\n[backends.second]\ntype = "demo"\n').start()


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_refusal_of_the_first_is_answered_by_the_second(
    make_daemon: MakeDaemon, make_llm: MakeLLM, status: int
) -> None:
    llm = make_llm(lambda request: request.send(error(status, "x")))
    daemon = daemon_before(make_daemon, llm.url)
    response = daemon.ask(QUESTION)
    assert response.complete
    assert len(response.texts) == 3
    daemon.wait_log("stream id=r1 .*backend=second outcome=done")


def test_a_refused_connection_is_answered_by_the_second(make_daemon: MakeDaemon) -> None:
    assert daemon_before(make_daemon, "http://127.0.0.1:1").ask(QUESTION).complete


def test_silence_is_answered_by_the_second(make_daemon: MakeDaemon, make_llm: MakeLLM) -> None:
    llm = make_llm(lambda request: request.wait_closed())
    assert daemon_before(make_daemon, llm.url, "first_event_timeout = 0.3").ask(QUESTION).complete


def test_a_bad_question_is_not_asked_again(make_daemon: MakeDaemon, make_llm: MakeLLM) -> None:
    llm = make_llm(lambda request: request.send(error(400, "bad")))
    assert daemon_before(make_daemon, llm.url).ask(QUESTION).status == 502


def test_an_answer_that_has_begun_is_nobody_elses(make_daemon: MakeDaemon, make_llm: MakeLLM) -> None:
    relayed = threading.Event()

    def script(request: Request) -> None:
        request.send(SSE_HEAD)
        request.event("a")
        relayed.wait(TIMEOUT)
        request.reset()

    llm = make_llm(script)
    client = daemon_before(make_daemon, llm.url).hand(QUESTION)
    client.read_until(b'"a"')
    relayed.set()
    response = client.finish()
    assert response.texts == ["a"]
    assert response.error["type"] == "backend_aborted"
