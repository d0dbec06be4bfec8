# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Server-sent events of a streamed answer, checked byte by byte. No input or output here."""

from __future__ import annotations

import json

DONE = "[DONE]"


class BadStream(Exception):
    """The bytes are not a complete, valid answer; the text says what is wrong and where."""


class AnswerReader:
    """Reads the bytes of one answer and keeps account of it.

    The rules: events end with an empty line; an event carries ``data: {"content": "…"}``; comments are allowed; the
    last event is ``data: [DONE]`` and nothing follows it; ``event: error`` ends the answer as a failure.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.events = 0
        self.comments = 0
        self.done = False
        self._text: list[str] = []
        self._rest = b""
        self._data: list[str] = []
        self._kind = "message"

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere. Raises BadStream."""
        self.bytes += len(chunk)
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            self._line(line.removesuffix(b"\r"))

    def finish(self) -> None:
        """The peer has closed the connection. Raises BadStream unless the answer is complete."""
        if self._rest or self._data:
            raise BadStream(
                f"the stream ends inside an event, after {self.events} whole ones: {(self._rest or self._data)!r}"
            )
        if not self.done:
            raise BadStream(f"the stream ends after {self.events} events without the final {DONE}")

    def _line(self, raw: bytes) -> None:
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise BadStream(f"event {self.events + 1} is not UTF-8: {raw[:80]!r}") from error
        if self.done and line:
            raise BadStream(f"something follows the final {DONE}: {line[:80]!r}")
        if line.startswith(":"):
            self.comments += 1
            return
        if line:
            name, separator, value = line.partition(":")
            value = value.removeprefix(" ")
            if not separator or name not in ("data", "event", "id", "retry"):
                raise BadStream(f"event {self.events + 1} has a line that is no event field: {line[:80]!r}")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._kind = value
            return
        if self._data:
            data, kind = "\n".join(self._data), self._kind
            self._data, self._kind = [], "message"
            self._event(kind, data)

    def _event(self, kind: str, data: str) -> None:
        if kind == "error":
            raise BadStream(f"the daemon reports an error after {self.events} events: {data[:400]}")
        if data == DONE:
            self.done = True
            return
        try:
            content = json.loads(data)["content"]
        except (ValueError, TypeError, KeyError) as error:
            raise BadStream(f'event {self.events + 1} carries no JSON object with "content": {data[:80]!r}') from error
        if not isinstance(content, str):
            raise BadStream(f'event {self.events + 1}: "content" is not a string: {data[:80]!r}')
        self.events += 1
        self._text.append(content)
