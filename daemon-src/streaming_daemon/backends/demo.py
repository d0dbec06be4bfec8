"""A backend that needs no network: a sensible answer, token by token, at a set pace."""

from __future__ import annotations

import asyncio
import re

from ..config import DemoConfig
from ..envelope import Request
from ..handoff import Handoff
from ..wheel import Timed, TimerWheel
from .base import Sink

_TOKEN = re.compile(r"\s*(?:\w+|[.,;:!?]+|[^\w\s.,;:!?]+)|\s+")
_EXCERPT = 200
# A client that was paused, or a loop that was late, gets its backlog in portions.
_MOST_AT_ONCE = 128

_OPENING = "Hello! 👋 "
_ASKED = "You asked: “"
_AFTER_PROMPT = "”. "
_ANSWER = """Here is what happened on the way to this answer.

The web server took your request as usual. The application checked who you are, wrote two response headers and was \
finished; it did not wait for this text. The server's worker then passed the network connection itself, an open file \
descriptor, over a local socket to the daemon that writes these words, and turned to the next request.

That is why a slow answer costs little. A worker is busy for a millisecond instead of a minute, and the daemon \
needs neither a thread nor a process for you, only a small object and a place on a timer wheel. Ten thousand readers \
can wait for their next word at the same time.

Every word arrives as an event of its own, as soon as it exists. Nothing is cut in the middle: not the accent of \
a café, not 日本語 or 中文, not even a whole family 👨‍👩‍👧 or a flag 🇪🇺. If you read slowly, the daemon slows down \
with you; if you hang up, it stops at once.

This answer was made up without any language model. Configure a backend of type “openai” to get real ones. 🚀
"""


def tokenize(text: str) -> list[str]:
    """Words and punctuation, each with the space before it; joined they are ``text`` again."""
    return _TOKEN.findall(text)


_HEAD = tuple(tokenize(_OPENING))
_TAIL = tuple(tokenize(_ANSWER))
_AGAIN = tuple(tokenize("\n" + _ANSWER))


class DemoBackend:
    """Type ``demo``."""

    def __init__(self, name: str, config: DemoConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        self.name = name
        self._loop = loop
        self._pace = config.tokens_per_second
        self._wheel = wheel

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> DemoCall:
        excerpt = " ".join(handoff.question().split())
        if len(excerpt) > _EXCERPT:
            excerpt = excerpt[: _EXCERPT - 1] + "…"
        prompt = tuple(tokenize(_ASKED + excerpt + _AFTER_PROMPT)) if excerpt else ()
        total = handoff.demo.tokens or len(_HEAD) + len(prompt) + len(_TAIL)
        if handoff.max_tokens is not None:
            total = min(total, handoff.max_tokens)
        call = DemoCall(self._wheel, sink, prompt, total, handoff.demo.tokens_per_second or self._pace)
        # Not by the wheel, whose next slot may be 10 ms away: the first token has nothing to wait for.
        self._loop.call_soon(call.begin)
        return call

    def close(self) -> None:
        """Nothing is kept."""


class DemoCall(Timed):
    """One answer. Only the tokens of the prompt are its own; the rest is shared by all."""

    __slots__ = ("_next", "_origin", "_pace", "_prompt", "_sink", "_total", "_wheel")

    def __init__(self, wheel: TimerWheel, sink: Sink, prompt: tuple[str, ...], total: int, pace: float) -> None:
        super().__init__()
        self._wheel = wheel
        self._sink = sink
        self._prompt = prompt
        self._total = total
        self._pace = pace
        self._next = 0
        # Token i is due at origin + i / pace.
        self._origin = wheel.now()

    def begin(self) -> None:
        if self._total:
            self.on_timer(self._wheel.now())

    def on_timer(self, now: float) -> None:
        # The addend makes up for i / pace * pace falling short of i.
        due = int((now - self._origin) * self._pace + 1e-6) + 1
        end = min(due, self._next + _MOST_AT_ONCE, self._total)
        if end > self._next:
            texts = [self._token(index) for index in range(self._next, end)]
            self._next = end
            # Set before the sink is called, which may pause or cancel.
            if end < self._total:
                self._wheel.set(self, self._origin + end / self._pace)
            last = end == self._total
            self._sink.content(texts)
            # A cancelled call has no tokens left and no sink to tell.
            if last and self._total:
                self._sink.done()
        else:
            self._wheel.set(self, self._origin + self._next / self._pace)

    def pause(self) -> None:
        self._wheel.cancel(self)

    def resume(self) -> None:
        # The pace starts anew, or everything missed would be due at once.
        self._origin = self._wheel.now() - self._next / self._pace
        self._wheel.set(self, self._wheel.now())

    def cancel(self) -> None:
        self._total = 0
        self._wheel.cancel(self)

    def _token(self, index: int) -> str:
        if index < len(_HEAD):
            return _HEAD[index]
        index -= len(_HEAD)
        if index < len(self._prompt):
            return self._prompt[index]
        index -= len(self._prompt)
        if index < len(_TAIL):
            return _TAIL[index]
        return _AGAIN[(index - len(_TAIL)) % len(_AGAIN)]
