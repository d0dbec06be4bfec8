"""JSON that somebody sent us: read in a time that its sender cannot stretch, and in one way only.

A parser's time and memory go by the values in a text and not by its length: 8 MB of ``[[],[],…`` become 200 MB of lists
in a loop that serves nobody meanwhile, where 8 MB of prose are one string. So the values are counted before any is
made, and how deep they lie; both without reading the text as JSON, in a few passes that run at the speed of memory.
What is counted is what a parser would have made of it, or more.

A name that an object has twice is refused: which of the two counts is decided differently from parser to parser, and
who checked the one must not be served the other. NaN and Infinity are no JSON; Python would read them, and write them
back into a backend's request.
"""

from __future__ import annotations

import json
from typing import Any

# Arrays and objects inside one another; schemas of tools have a dozen.
MAX_DEPTH = 100
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ROUND = bytes.maketrans(b"{}", b"[]")


class StrictError(ValueError):
    """Well-formed or not, it is not read. ``kind`` and ``allowed`` as in HandoffError."""

    def __init__(self, kind: str, allowed: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.allowed = allowed


def decode(text: str, most: int) -> Any:
    """A text with at most ``most`` values; raises StrictError, and ValueError or RecursionError for what is no JSON."""
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark")
    _check(text, most)
    return _DECODER.decode(text)


def _check(text: str, most: int) -> None:
    brackets = text.count("[") + text.count("{")
    if brackets <= MAX_DEPTH and brackets + text.count(",") < most:
        # Even if none of them were in a string.
        return
    outside = _outside_of_strings(text, most)
    # Every value but the first stands behind a comma or is the first of an array or object.
    if outside.count("[") + outside.count("{") + outside.count(",") >= most:
        raise _too_many(most)
    _check_depth(outside, most)


def _outside_of_strings(text: str, most: int) -> str:
    bare = text.replace("\\\\", "").replace('\\"', "")
    # Each value may be a string and have a string for a name; counted before a list is made of them.
    if bare.count('"') > 4 * most:
        raise _too_many(most)
    return "".join(bare.split('"')[::2])


def _check_depth(outside: str, most: int) -> None:
    left = outside.encode("utf-8", "replace").translate(_ROUND, _NOT_BRACKETS)
    if len(left) > 2 * most:
        raise _too_many(most)
    for _ in range(MAX_DEPTH):
        # Takes away the innermost, all of them.
        shorter = left.replace(b"[]", b"")
        if len(shorter) == len(left):
            # Nothing left, or brackets without their others: the parser says so, unless there are many.
            break
        left = shorter
    if b"[]" in left or len(left) > MAX_DEPTH:
        raise StrictError("nested too deeply", f"at most {MAX_DEPTH} arrays and objects inside one another")


def _too_many(most: int) -> StrictError:
    return StrictError("of too many values", f"at most {most}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise StrictError("JSON that has a name twice in one object", "each name once")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(name)


# ``json.loads`` with an option builds such a decoder for every call.
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse_constant)
