"""Who answers which handoff."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import envelope
from streaming_daemon.backends import routing
from streaming_daemon.backends.base import BackendSetupError
from streaming_daemon.backends.routing import Router
from streaming_daemon.config import loads
from streaming_daemon.envelope import unpack
from streaming_daemon.handoff import HandoffError, parse_data
from streaming_daemon.wheel import TimerWheel

BACKENDS = """
[backends.a]
type = "demo"
fallback = ["b", "c"]
[backends.b]
type = "demo"
fallback = ["d"]
[backends.c]
type = "demo"
[backends.d]
type = "demo"
"""


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def router(loop: asyncio.AbstractEventLoop, text: str) -> Router:
    return Router(loads(text, "c.toml"), loop, TimerWheel(loop))


def chosen(made: Router, data: dict[str, Any], **request: Any) -> str:
    """The names of the candidates, as one word."""
    parsed = unpack(envelope(**request)).request if request else None
    return "".join(backend.name for backend in made.choose(parse_data(json.dumps(data).encode()), parsed))


def test_the_default_comes_with_its_own_fallbacks_and_not_with_theirs(loop: asyncio.AbstractEventLoop) -> None:
    assert chosen(router(loop, '[backend]\ndefault = "a"' + BACKENDS), {}) == "abc"


def test_the_application_may_ask_for_what_is_allowed_and_for_nothing_else(loop: asyncio.AbstractEventLoop) -> None:
    made = router(loop, '[backend]\ndefault = "a"\nallow_choice = ["b", "c"]' + BACKENDS)
    assert chosen(made, {"backend": "b"}) == "bd"
    assert chosen(made, {"backend": "c"}) == "c"
    for name in ("d", "a", "nobody", ""):
        with pytest.raises(
            HandoffError, match=r"^backend is a name that is not to be chosen, allowed is one that is$"
        ) as no:
            chosen(made, {"backend": name})
        assert no.value.hint == f"asked for is {name or '-'}, backend.allow_choice has b, c"


def test_where_there_is_no_choice_the_member_is_the_applications_own(loop: asyncio.AbstractEventLoop) -> None:
    assert chosen(router(loop, '[backend]\ndefault = "c"' + BACKENDS), {"backend": "langgraph"}) == "c"


ROUTES = """
[[routes]]
backend = "b"
target = "llm"
path = ["/chat/", "/talk/"]
[[routes]]
backend = "c"
model = ["gpt-*", "exact"]
user = ["alice", "bob"]
[[routes]]
backend = "d"
model = "gpt-*"
"""


@pytest.mark.parametrize(
    ("data", "request_", "expected"),
    [
        ({}, {"uri": "/chat/x?y", "target": "llm"}, "bd"),
        ({}, {"uri": "/talk/", "target": "llm"}, "bd"),
        ({}, {"uri": "/chat", "target": "llm"}, "abc"),
        ({}, {"uri": "/x?/chat/", "target": "llm"}, "abc"),
        ({}, {"uri": "/chat/", "target": "other"}, "abc"),
        ({}, {}, "abc"),
        ({"model": "gpt-4", "user": "alice"}, {}, "c"),
        ({"model": "gpt-4"}, {"user": "bob"}, "c"),
        ({"model": "exact", "user": "bob"}, {}, "c"),
        ({"model": "exactly", "user": "bob"}, {}, "abc"),
        ({"model": "gpt-4", "user": "eve"}, {}, "d"),
        ({"model": "gpt-4"}, {"uri": "/chat/"}, "bd"),
    ],
)
def test_the_first_route_that_fits_in_everything_wins(
    loop: asyncio.AbstractEventLoop, data: dict[str, Any], request_: dict[str, Any], expected: str
) -> None:
    made = router(loop, '[backend]\ndefault = "a"' + BACKENDS + ROUTES)
    assert chosen(made, data, **request_) == expected


def test_a_choice_of_the_application_goes_before_the_routes(loop: asyncio.AbstractEventLoop) -> None:
    made = router(loop, '[backend]\ndefault = "a"\nallow_choice = ["c"]' + BACKENDS + ROUTES)
    assert chosen(made, {"model": "gpt-4", "backend": "c"}) == "c"
    assert chosen(made, {"model": "gpt-4"}) == "d"


def test_what_nothing_leads_to_is_not_built(loop: asyncio.AbstractEventLoop) -> None:
    text = '[backend]\ndefault = "c"\n[backends.e]\ntype = "exec"\ncommand = ["/no/such/program"]' + BACKENDS
    assert set(router(loop, text).backends) == {"c"}
    with pytest.raises(BackendSetupError, match=r"backends\.e\.command: /no/such/program is no program"):
        router(loop, text + '[[routes]]\nbackend = "e"\n')


def test_a_route_has_its_own_output_on_the_same_connections(loop: asyncio.AbstractEventLoop) -> None:
    pytest.importorskip("httptools")
    text = '[[routes]]\nbackend = "m"\nmodel = "raw"\noutput = "passthrough"\n[backends.m]\ntype = "openai"\n'
    made = router(loop, text)
    [usual] = made.choose(parse_data(b"{}"), None)
    [raw] = made.choose(parse_data(b'{"model":"raw"}'), None)
    assert (usual.output, raw.output, raw.name) == ("normalised", "passthrough", "m")  # type: ignore[attr-defined]
    assert usual.client is raw.client  # type: ignore[attr-defined]
    assert routing._with_output(made.backends["m"], "normalised") is not usual


def test_the_names_that_are_allowed_are_for_the_journal_and_not_for_the_client(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon('[backend]\nallow_choice = ["b", "c"]\ndefault = "a"\n' + BACKENDS).start()
    response = daemon.ask({"backend": "s3cr3t\n", "request_id": "r1"})
    assert response.status == 400
    assert response.json["error"]["message"] == "backend is a name that is not to be chosen, allowed is one that is"
    line = daemon.wait_log("id=r1 bad handoff")
    assert r'(asked for is "s3cr3t\n", backend.allow_choice has b, c): correct what was sent' in line
