"""The plain message, by the vectors that all implementations share."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from streaming_daemon.handoff import Handoff, HandoffError, parse_data

VECTORS = json.loads((Path(__file__).resolve().parents[2] / "tests/vectors/plain.json").read_text("utf-8"))


def message_of(vector: dict[str, Any]) -> bytes:
    message = vector["message"]
    if "base64" in message:
        return base64.b64decode(message["base64"])
    text = str(message["utf8"])
    if "pad" in message:
        assert text.count("%") == 1
        text = text.replace("%", "x" * message["pad"])
    if "nest" in message:
        assert text.count("%") == 1
        text = text.replace("%", "[" * message["nest"] + "]" * message["nest"])
    return text.encode("utf-8")


def expand(value: Any) -> Any:
    """A long value is written as ``{"length", "of"}``."""
    if isinstance(value, dict) and set(value) == {"length", "of"}:
        return value["of"] * value["length"]
    return value


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_vector(vector: dict[str, Any]) -> None:
    message = message_of(vector)
    if "error" in vector:
        with pytest.raises(HandoffError) as caught:
            parse_data(message)
        assert str(caught.value).startswith(vector["error"]["field"] + " ")
        return
    expected = asdict(Handoff())
    for name, value in vector["handoff"].items():
        expected[name] = {**expected[name], **value} if name == "demo" else expand(value)
    expected["messages"] = tuple(expected["messages"])
    parsed = asdict(parse_data(message))
    del parsed["members"], expected["members"]
    assert parsed == expected


def test_an_error_names_field_kind_and_allowed_form_but_never_the_value() -> None:
    with pytest.raises(HandoffError) as caught:
        parse_data(b'{"prompt": "secret", "max_tokens": "secret"}')
    assert str(caught.value) == "max_tokens is a string, allowed is an integer from 1 to 1000000000"


def test_messages_win_over_the_prompt() -> None:
    handoff = parse_data(b'{"prompt": "p", "messages": [{"role": "user", "content": "m"}]}')
    assert handoff.conversation() == [{"role": "user", "content": "m"}]
    assert handoff.question() == "m"


def test_a_prompt_becomes_a_conversation() -> None:
    assert parse_data(b'{"prompt": "p"}').conversation() == [{"role": "user", "content": "p"}]


def test_nothing_to_answer_is_an_error_that_says_what_is_missing() -> None:
    with pytest.raises(HandoffError, match=r"prompt is missing: .*messages"):
        Handoff().conversation()
