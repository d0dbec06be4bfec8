"""What strangers' JSON may cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streaming_daemon import strict_json
from streaming_daemon.handoff import MAX_VALUES, HandoffError, parse_data
from streaming_daemon.strict_json import MAX_DEPTH, StrictError, decode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab,[]{}":\\\n é😀'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab,[]{}"\\'), inner, max_size=4),
    max_leaves=30,
)


def size(value: Any) -> int:
    """Values in it, itself included."""
    if isinstance(value, dict):
        return 1 + sum(map(size, value.values()))
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


def depth(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
@example({"\\": ['"', '\\"', "\\\\"]}, True, None)
def test_what_is_small_enough_is_read_whatever_its_strings_hold(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    # An empty array or object is counted as two.
    assert decode(text, 2 * size(value)) == value


@given(VALUES, st.integers(1, 40))
def test_what_holds_more_values_than_allowed_is_never_read(value: Any, most: int) -> None:
    text = json.dumps(value)
    if size(value) > most:
        with pytest.raises(StrictError, match="of too many values"):
            decode(text, most)


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_depth_is_counted_exactly(pair: str) -> None:
    def nested(levels: int) -> str:
        inner = "1"
        for level in range(levels):
            inner = f'{{"a":{inner}}}' if pair == "{}" and level % 2 else f"[{inner}, 2]"
        return inner

    assert depth(decode(nested(MAX_DEPTH), 10_000)) == MAX_DEPTH
    with pytest.raises(StrictError, match="nested too deeply"):
        decode(nested(MAX_DEPTH + 1), 10_000)


def test_brackets_in_a_string_are_no_depth_and_commas_no_values() -> None:
    text = "[" * 50_000 + "," * 500_000 + '{"' * 1000
    assert parse_data(json.dumps({"prompt": text})).prompt == text


# Each would be millions of values, a list of pieces as long, or a recursion for the parser.
HOSTILE = {
    "lists": "[" + "[]," * 2_000_000 + "[]]",
    "numbers": "[" + "1," * 2_000_000 + "1]",
    "strings": "[" + '"",' * 2_000_000 + '""]',
    "objects": '{"a":' * 1_000_000,
    "opened": "[" * 4_000_000,
    "deep and wide": "[" * 40_000 + "]" * 40_000,
    "backslashes": '["' + "\\" * 4_000_000 + '"' + "[]," * 200_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_text_is_refused_before_a_value_is_made(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parser:
        def decode(self, _: str) -> Any:
            raise AssertionError("it was read")

    monkeypatch.setattr(strict_json, "_DECODER", Parser())
    with pytest.raises(HandoffError) as caught:
        parse_data(text)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(HandoffError, match="the handoff data is JSON that has a name twice in one object"):
        parse_data('{"user":"eve","prompt":"x","user":"admin"}')


def test_the_bound_on_values_is_wide_enough_for_a_long_conversation() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a, [b], {c}"}]}] * (MAX_VALUES // 9)
    assert len(parse_data(json.dumps({"messages": messages})).messages) == len(messages)
