"""The wire message of Apache's module, as an object. No I/O here: bytes in, ``Handoff`` or ``HandoffError`` out.

A *plain* message is the value of the X-Handoff-Data header: a JSON object, or nothing (also written as one NUL byte)
for "no data". What this daemon reads from the object is listed in ``Handoff``; other members are the application's own
business and ignored. A member that is JSON null counts as absent, since PHP applications encode unset options so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

MAX_ID = 128


class HandoffError(ValueError):
    """The message is not usable. The text is for the client's eyes: it names the field, never its value."""

    def __init__(self, field: str, kind: str, allowed: str) -> None:
        super().__init__(f"{field} is {kind}, allowed is {allowed}" if kind else f"{field} {allowed}")
        self.field = field


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Member ``demo``: how the demo backend shapes its answer (for tests and benchmarks)."""

    tokens: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the application asks for. ``messages`` wins over ``prompt`` where it sends both."""

    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    user: str | None = None
    request_id: str | None = None
    demo: DemoOptions = DemoOptions()

    def conversation(self) -> list[dict[str, Any]]:
        """The messages to answer; raises HandoffError where there is nothing to answer."""
        if self.messages:
            return list(self.messages)
        if not self.prompt:
            raise HandoffError("prompt", "", "is missing: this backend needs prompt (a string) or messages (an array)")
        return [{"role": "user", "content": self.prompt}]

    def question(self) -> str:
        """The text of the last thing the user said, empty where there is none."""
        for message in reversed(self.messages):
            content = message["content"]
            if message["role"] == "user" and isinstance(content, str):
                return content
        return self.prompt


def parse_plain(message: bytes) -> Handoff:
    """Read one plain message; raises HandoffError."""
    data = message.strip(b"\0 \t\r\n")
    if not data:
        return Handoff()
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise HandoffError("the handoff data", "not valid UTF-8", "a JSON object") from error
    except (ValueError, RecursionError) as error:
        raise HandoffError("the handoff data", "not valid JSON", "a JSON object") from error
    if not isinstance(value, dict):
        raise HandoffError("the handoff data", _kind(value), "a JSON object")
    fields = _Fields(value)
    user = fields.text("user")
    return Handoff(
        prompt=fields.text("prompt") or "",
        messages=_messages(value.get("messages")),
        model=fields.text("model"),
        max_tokens=fields.integer("max_tokens", 1, 1_000_000_000),
        temperature=fields.number("temperature", 0, 2),
        user=user if user is not None else _user_id(value.get("user_id")),
        request_id=_request_id(fields.text("request_id")),
        demo=_demo(value.get("demo")),
    )


def _messages(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise HandoffError("messages", _kind(value), 'an array of {"role", "content"} objects')
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise HandoffError(f"messages[{index}]", _kind(message), 'an object with "role" and "content"')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise HandoffError(f"messages[{index}].role", _kind(role), "a string")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            continue
        if not isinstance(content, str):
            raise HandoffError(f"messages[{index}].content", _kind(content), "a string or an array of objects")
    return tuple(value)


def _user_id(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise HandoffError("user_id", _kind(value), "a string or an integer")


def _request_id(value: str | None) -> str | None:
    if value is None or (0 < len(value) <= MAX_ID and value.isascii() and value.isprintable()):
        return value
    raise HandoffError("request_id", "a string of another form", f"1 to {MAX_ID} printable ASCII characters")


def _demo(value: object) -> DemoOptions:
    if value is None:
        return DemoOptions()
    if not isinstance(value, dict):
        raise HandoffError("demo", _kind(value), 'an object with "tokens" and "tokens_per_second"')
    fields = _Fields(value, "demo.")
    return DemoOptions(fields.integer("tokens", 1, 100_000), fields.number("tokens_per_second", 0.1, 10_000))


class _Fields:
    """Typed access to the members of one JSON object; null is absent."""

    def __init__(self, value: dict[str, Any], prefix: str = "") -> None:
        self._value = value
        self._prefix = prefix

    def text(self, name: str) -> str | None:
        value = self._value.get(name)
        if value is None or isinstance(value, str):
            return value
        raise HandoffError(self._prefix + name, _kind(value), "a string")

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._value.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise HandoffError(self._prefix + name, _kind(value), f"an integer from {low} to {high}")
        if low <= value <= high:
            return value
        raise HandoffError(self._prefix + name, "an integer out of range", f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._value.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise HandoffError(self._prefix + name, _kind(value), f"a number from {low:g} to {high:g}")
        # Compared before any conversion: an integer of hundreds of digits is JSON, but no float.
        if low <= value <= high and math.isfinite(value):
            return float(value)
        raise HandoffError(self._prefix + name, "a number out of range", f"a number from {low:g} to {high:g}")


def _kind(value: object) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]


def _refuse_constant(name: str) -> object:
    # Python would read NaN and Infinity, and write them back into the backend's request, where they are no JSON.
    raise ValueError(name)
