"""The application's data, as an object. No I/O here: bytes in, ``Handoff`` or ``HandoffError`` out.

The data is a JSON object, or nothing (also written as one NUL byte) for "no data"; it is the whole of a plain message,
and in an envelope (``envelope``) one member of many. What this daemon reads from it is listed in ``Handoff``; other
members are the application's own business and ignored. A member that is JSON null counts as absent, since PHP
applications encode unset options so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .strict_json import StrictError, decode

# JSON values in it, names of members not counted: 50 ms of parsing at most. A long conversation has some thousands.
MAX_VALUES = 100_000
MAX_ID = 128
# Numbers of events are counted from 1. What a double holds exactly, since JavaScript passes them on.
MAX_EVENT_NUMBER = 2**53 - 1
_RESUME_ID = re.compile(r"[A-Za-z0-9._~-]{16,128}")
# Members that say which answer is meant and for whom; anything else may be a question to some backend.
_ONLY_CONTINUES = frozenset({"resume", "user", "user_id", "request_id"})


class HandoffError(ValueError):
    """The message is not usable. The text is for the client's eyes: it names the field, never its value."""

    status = 400

    def __init__(self, field: str, kind: str, allowed: str, hint: str = "") -> None:
        """``hint`` is for the journal alone."""
        super().__init__(f"{field} is {kind}, allowed is {allowed}" if kind else f"{field} {allowed}")
        self.field = field
        self.hint = hint


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Member ``demo``: how the demo backend shapes its answer (for tests and benchmarks)."""

    tokens: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class ResumeOptions:
    """Member ``resume``: the answer may be continued by a later handoff with the same ``id`` of the same user.

    ``after``: the number of the last event that the client has; None where the application leaves that to the
    client's ``Last-Event-ID``.
    """

    id: str
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the application asks for. ``messages`` wins over ``prompt`` where it sends both.

    ``backend`` is the name of the backend it would like. ``members`` is the whole object as it came, for backends that
    pass some of it on.
    """

    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    user: str | None = None
    request_id: str | None = None
    demo: DemoOptions = DemoOptions()
    resume: ResumeOptions | None = None
    backend: str | None = None
    members: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages to answer; raises HandoffError where there is nothing to answer."""
        if self.messages:
            return list(self.messages)
        if not self.prompt:
            raise HandoffError("prompt", "", "is missing: this backend needs prompt (a string) or messages (an array)")
        return [{"role": "user", "content": self.prompt}]

    @property
    def asks_nothing(self) -> bool:
        """Only names an answer, the event behind which it is wanted, and who wants it: none begins by that."""
        members = {name for name, value in self.members.items() if value is not None}
        return self.resume is not None and self.resume.after is not None and members <= _ONLY_CONTINUES

    def question(self) -> str:
        """The text of the last thing the user said, empty where there is none."""
        for message in reversed(self.messages):
            content = message.get("content")
            if message["role"] == "user" and isinstance(content, str):
                return content
        return self.prompt


def parse_data(data: bytes | str) -> Handoff:
    """Read what the application sent; raises HandoffError."""
    try:
        text = (data if isinstance(data, str) else data.decode("utf-8")).strip("\0 \t\r\n")
        if not text:
            return Handoff()
        value = decode(text, MAX_VALUES)
    except StrictError as error:
        raise HandoffError("the handoff data", error.kind, error.allowed) from error
    except UnicodeDecodeError as error:
        raise HandoffError("the handoff data", "not valid UTF-8", "a JSON object") from error
    except (ValueError, RecursionError) as error:
        raise HandoffError("the handoff data", "not valid JSON", "a JSON object") from error
    if not isinstance(value, dict):
        raise HandoffError("the handoff data", kind_of(value), "a JSON object")
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
        resume=_resume(value.get("resume")),
        backend=fields.text("backend"),
        members=value,
    )


def _messages(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise HandoffError("messages", kind_of(value), 'an array of {"role", "content"} objects')
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise HandoffError(f"messages[{index}]", kind_of(message), 'an object with "role" and "content"')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise HandoffError(f"messages[{index}].role", kind_of(role), "a string")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            continue
        if content is None and message.get("tool_calls"):
            # What the model said when it called a tool, given back to it.
            continue
        if not isinstance(content, str):
            raise HandoffError(f"messages[{index}].content", kind_of(content), "a string or an array of objects")
    return tuple(value)


def _user_id(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise HandoffError("user_id", kind_of(value), "a string or an integer")


def _request_id(value: str | None) -> str | None:
    if value is None or (0 < len(value) <= MAX_ID and value.isascii() and value.isprintable()):
        return value
    raise HandoffError("request_id", "a string of another form", f"1 to {MAX_ID} printable ASCII characters")


def _demo(value: object) -> DemoOptions:
    if value is None:
        return DemoOptions()
    if not isinstance(value, dict):
        raise HandoffError("demo", kind_of(value), 'an object with "tokens" and "tokens_per_second"')
    fields = _Fields(value, "demo.")
    return DemoOptions(fields.integer("tokens", 1, 100_000), fields.number("tokens_per_second", 0.1, 10_000))


def _resume(value: object) -> ResumeOptions | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise HandoffError("resume", kind_of(value), 'an object with "id"')
    fields = _Fields(value, "resume.")
    name = fields.text("id")
    if name is None or not _RESUME_ID.fullmatch(name):
        kind = "missing or null" if name is None else "a string of another form"
        raise HandoffError("resume.id", kind, "16 to 128 letters, digits, '-', '.', '_' and '~', impossible to guess")
    return ResumeOptions(name, fields.integer("after", 0, MAX_EVENT_NUMBER))


class _Fields:
    """Typed access to the members of one JSON object; null is absent."""

    def __init__(self, value: dict[str, Any], prefix: str = "") -> None:
        self._value = value
        self._prefix = prefix

    def text(self, name: str) -> str | None:
        value = self._value.get(name)
        if value is None or isinstance(value, str):
            return value
        raise HandoffError(self._prefix + name, kind_of(value), "a string")

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._value.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise HandoffError(self._prefix + name, kind_of(value), f"an integer from {low} to {high}")
        if low <= value <= high:
            return value
        raise HandoffError(self._prefix + name, "an integer out of range", f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._value.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise HandoffError(self._prefix + name, kind_of(value), f"a number from {low:g} to {high:g}")
        # Compared before any conversion: an integer of hundreds of digits is JSON, but no float.
        if low <= value <= high and math.isfinite(value):
            return float(value)
        raise HandoffError(self._prefix + name, "a number out of range", f"a number from {low:g} to {high:g}")


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]
