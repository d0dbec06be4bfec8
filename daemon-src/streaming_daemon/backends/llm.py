"""What the APIs of language models have in common: a POST of JSON, an answer of server-sent events.

``Model`` is one configured API at one server; ``ModelCall`` is one answer. An API is a subclass of each: the first
writes the request (``body``), the second reads the events (``on_event``).

Normalised output is text chunks, and for calls of tools events of the form that chat completions use for their deltas,
``{"tool_calls": [{"index", "id", "type", "function": {"name", "arguments"}}]}``, whichever API they came from. With
passthrough output every event goes on as it came; what it means is read all the same, for errors, usage and the end.
The event that ends a stream of chat completions, ``[DONE]``, is never passed on: the sink ends every stream with it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import __version__
from ..access_log import log
from ..config import ModelConfig
from ..envelope import Request
from ..handoff import Handoff, HandoffError
from ..limits import MAX_EVENT, RETRY_AFTER
from ..wheel import TimerWheel
from .base import BackendSetupError, Failure, Sink, Usage
from .http_client import Client, Exchange, Pair
from .json_codec import loads
from .sse import Event, SSEError, SSEReader

# In one answer. Every piece of the arguments looks for its call among them.
MOST_TOOL_CALLS = 256
_MAX_ERROR_BODY = 16 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_RETRY_AFTER = re.compile(rb"[0-9]{1,9}|[A-Za-z]{3}, [A-Za-z0-9: ]{20,26}")
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode

UNAVAILABLE = "The language model service cannot be reached."
OVERLOADED = "The service is busy; try again."
TIMEOUT = "The language model service did not answer in time."
BROKEN = "The language model service broke off its answer."
REFUSED = "The language model service refused the request."
STRANGE = "The language model service sent something that is not an answer."

_CONNECTION = {
    "unavailable": (502, UNAVAILABLE, None),
    "timeout": (504, TIMEOUT, None),
    "protocol": (502, STRANGE, None),
    "exhausted": (503, OVERLOADED, str(RETRY_AFTER)),
}
# The request is at fault, whoever gets it.
_THE_REQUESTS_FAULT = (400, 413, 415, 422)


def read_credential(name: str) -> str:
    """The key in the systemd credential ``name``; raises BackendSetupError, never with the key in it."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise BackendSetupError(
            f"api_key_credential names {name}, but $CREDENTIALS_DIRECTORY is not set: "
            f"add LoadCredential={name}:FILE to the unit"
        )
    try:
        key = (Path(directory) / name).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise BackendSetupError(f"credential {name} in {directory} cannot be used: {reason}") from None
    if not key or not key.isprintable() or " " in key:
        raise BackendSetupError(f"credential {name} in {directory} must be one line of printable text without spaces")
    return key


def passed_on(handoff: Handoff, names: Sequence[str]) -> dict[str, Any]:
    """The members of these names that the application sent; null is absent."""
    members = handoff.members
    return {name: value for name in names if (value := members.get(name)) is not None}


def system_text(handoff: Handoff) -> Any:
    """Member ``system``: a string, or an array of content parts where the API knows such."""
    value = handoff.members.get("system")
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(p, dict) for p in value)):
        return value or None
    raise HandoffError("system", "of another type", "a string or an array of objects")


# Members that are this daemon's own or are sent under another name; all of them stand in docs/backends.md.
_NOT_SENT = frozenset(
    {"prompt", "messages", "system", "model", "max_tokens", "temperature", "stream", "stream_options"}
    | {"user", "user_id", "request_id", "backend", "resume", "demo", "path"}
)
_MOST_TOLD = 64


class Model:
    """One API of one server; everything that its calls share."""

    # Members of the handoff data that ``body`` sends in another form.
    rewritten: Set[str] = frozenset()

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        *,
        path: str,
        headers: Callable[[str | None], str],
    ) -> None:
        """``headers`` are those of the API itself, given the key where there is one."""
        self.name = name
        self.config = config
        self.output = config.output
        self.client = Client(
            config.base_url,
            loop,
            wheel,
            connect_timeout=config.connect_timeout,
            most_idle=config.idle_connections,
        )
        # Members of the handoff data that the journal has heard of.
        self._told: set[str] = set()
        key = read_credential(config.api_key_credential) if config.api_key_credential else None
        self._head = (
            f"POST {self.client.path}{path} HTTP/1.1\r\n"
            f"Host: {self.client.authority}\r\n"
            f"User-Agent: streaming-daemon/{__version__}\r\n"
            "Accept: text/event-stream\r\n"
            "Accept-Encoding: identity\r\n"
            f"Content-Type: application/json\r\n{headers(key)}"
        ).encode("ascii")

    def variant(self, output: str) -> Model:
        """The same backend, and the same connections, with another form of output."""
        other = copy.copy(self)
        other.output = output
        return other

    def body(self, handoff: Handoff) -> Mapping[str, Any]:
        """The request as an object; raises HandoffError."""
        raise NotImplementedError

    def call(self, sink: Sink, request: bytes) -> ModelCall:
        raise NotImplementedError

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> ModelCall:
        try:
            body = self.body(handoff)
            content = _encode(body).encode("ascii")
        except RecursionError as error:
            # Reading JSON and writing it give up at different depths.
            raise HandoffError("messages", "nested too deeply", "a conversation") from error
        self._tell_of_dropped(handoff.members.keys() - body.keys() - _NOT_SENT - self.rewritten)
        return self.call(sink, b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(content), content))

    def _tell_of_dropped(self, names: Set[str]) -> None:
        """What the application sent and this backend is not sent: whoever misses an effect finds the reason."""
        for name in names - self._told:
            if len(self._told) < _MOST_TOLD and _TOKEN.fullmatch(name):
                self._told.add(name)
                log.info('backend %s is not sent member %s of the handoff data: name it in "extra"', self.name, name)

    def close(self) -> None:
        self.client.close()


class ModelCall(Exchange):
    """One answer."""

    __slots__ = (
        "_announced",
        "_error",
        "_error_body",
        "_finished",
        "_mixed",
        "_out",
        "_raw",
        "_relayed",
        "_retry_after",
        "_saw_done",
        "_sink",
        "_sse",
        "_status",
        "_tools",
        "_usage",
    )

    def __init__(self, model: Model, sink: Sink, request: bytes) -> None:
        config = model.config
        super().__init__(model.client, request, config.first_event_timeout, config.idle_timeout)
        self._sink: Sink | None = sink
        self._raw = model.output == "passthrough"
        # None: the response is no event stream, and its body is an error's.
        self._sse: SSEReader | None = None
        self._status = 0
        self._retry_after: str | None = None
        self._error_body: bytearray | None = None
        # What this portion of bytes brought: texts, and events as bytes.
        self._out: list[str | bytes] = []
        self._mixed = False
        # The sink knows that the answer has begun, if only by its first words.
        self._announced = False
        # Something of the answer has gone to the sink.
        self._relayed = False
        # The model said why it stopped, or the stream said that it is complete: what ends now ends in order.
        self._finished = False
        # Nothing more will come.
        self._saw_done = False
        self._error: Failure | None = None
        self._usage: Usage | None = None
        # Calls of tools in the order of their appearance, by whatever the API numbers them with.
        self._tools: list[Any] | None = None

    # For the APIs: what an event means

    def on_event(self, name: str, value: dict[str, Any]) -> None:
        """One event, its data a JSON object. Within the parser."""
        raise NotImplementedError

    def say(self, text: object) -> None:
        """A chunk of text."""
        if isinstance(text, str) and text and not self._raw:
            self._out.append(text)

    def say_event(self, value: Mapping[str, Any]) -> None:
        """An event of the normalised output."""
        if not self._raw:
            self._mixed = True
            # Escaped where it is not ASCII: that can hold whatever a model may say.
            self._out.append(b"data: " + _encode(value).encode("ascii") + b"\n\n")

    def call_tool(self, key: Any, call_id: object, name: object, arguments: object = "") -> None:
        """A call of a tool begins."""
        if self._tools is None:
            self._tools = []
        if len(self._tools) >= MOST_TOOL_CALLS:
            self._error = self._strange(f"more than {MOST_TOOL_CALLS} calls of tools")
            return
        self._tools.append(key)
        function = {"name": name, "arguments": arguments}
        index = len(self._tools) - 1
        self.say_event({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]})

    def go_on_with_tool(self, key: Any, arguments: object) -> None:
        """More of the arguments of a call that has begun."""
        if self._tools and key in self._tools and arguments:
            index = self._tools.index(key)
            self.say_event({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})

    def finish(self, *, done: bool = False) -> None:
        """The answer is complete; ``done``: and so is the stream."""
        self.answered()
        self._finished = True
        self._saw_done = self._saw_done or done

    def spent(self, prompt: object, completion: object, total: object = None) -> None:
        """What the answer cost so far."""
        first, second, both = count(prompt), count(completion), count(total)
        if both is None and first is not None and second is not None:
            both = first + second
        if (first, second, both) != (None, None, None):
            self._usage = Usage(first, second, both)

    def reject(self, code: object) -> None:
        """The server reports an error in mid-stream."""
        self._error = self._failure(502, "error", BROKEN, f"error in the stream: {error_code(code)}", retryable=True)

    # Call

    def cancel(self) -> None:
        self._sink = None
        self.abandon()

    # From the exchange

    def on_head(self, status: int, headers: list[Pair]) -> None:
        self._status = status
        kind = b""
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value.split(b";")[0].strip().lower()
            elif lower == b"retry-after" and _RETRY_AFTER.fullmatch(value):
                self._retry_after = value.decode("ascii")
        if 200 <= status < 300 and kind in (b"", b"text/event-stream"):
            self._sse = SSEReader(MAX_EVENT, raw=self._raw)
        else:
            self._error_body = bytearray()

    def on_body(self, chunk: bytes) -> None:
        if self._sse is None:
            if self._error_body is not None and len(self._error_body) < _MAX_ERROR_BODY:
                self._error_body += chunk
            return
        if self._saw_done or self._error is not None:
            return
        try:
            events = self._sse.feed(chunk)
        except SSEError as error:
            self._error = self._strange(str(error))
            return
        if events:
            self.progressed()
        for event in events:
            self._read(event)
            if self._saw_done or self._error is not None:
                return

    def on_portion(self) -> None:
        if self._flush() and self._saw_done:
            self._succeed()

    def on_end(self, reason: str) -> None:
        if not self._flush():
            return
        refusal = self._refusal()
        if refusal is not None:
            self._fail(refusal)
        elif self._finished:
            self._succeed()
        else:
            detail = "the response ended before the answer did" + (f" ({reason})" if reason else "")
            self._fail(self._failure(502, "aborted", BROKEN, detail, retryable=True))

    def on_failure(self, kind: str, detail: str) -> None:
        status, message, after = _CONNECTION[kind]
        refusal = self._refusal() if kind == "timeout" else None
        if self._flush():
            self._fail(refusal or self._failure(status, kind, message, detail, after, retryable=True))

    # Inside

    def _read(self, event: Event) -> None:
        data = event.data
        if data == "[DONE]":
            self.finish(done=True)
            return
        try:
            value = loads(data)
        except (ValueError, RecursionError):
            self._error = self._strange("an event is not valid JSON")
            return
        if not isinstance(value, dict):
            self._error = self._strange("an event is not a JSON object")
            return
        if event.name == "error" or value.get("error"):
            self.reject(value)
            return
        self.on_event(event.name, value)
        if self._raw and self._error is None:
            self._mixed = True
            self._out.append(event.raw)

    def _flush(self) -> bool:
        """Pass on what has come; true where the call is still wanted and well."""
        sink = self._sink
        if sink is None:
            return False
        if self._out:
            self.answered()
            self._announced = self._relayed = True
            out, self._out = self._out, []
            if not self._mixed:
                sink.content(out)  # type: ignore[arg-type] # only texts in it, which is what not mixed means
            else:
                self._mixed = False
                for kind, run in groupby(out, type):
                    if self._sink is None:
                        return False
                    if kind is str:
                        sink.content(list(run))  # type: ignore[arg-type]
                    else:
                        sink.events(list(run))  # type: ignore[arg-type]
        elif self._answered and not self._announced and self._error is None:
            self._announced = True
            sink.content([])
        if self._sink is not None and self._error is not None:
            self._fail(self._error)
        return self._sink is not None

    def _refusal(self) -> Failure | None:
        """What a response that is not an event stream means for the client; None where it is one, or none is here."""
        status = self._status
        if not status or self._sse is not None:
            return None
        if 200 <= status < 300:
            return self._strange(f"status {status} with a body that is not text/event-stream")
        try:
            code = error_code(json.loads(bytes(self._error_body or b"")))
        except (ValueError, RecursionError):
            code = error_code(None)
        detail = f"status {status} {code}"
        after = self._retry_after
        if status == 429:
            message = "The language model service is over its limit; try again later."
            return self._failure(429, "rate_limited", message, detail, after, retryable=True)
        if status in (408, 504):
            return self._failure(504, "timeout", TIMEOUT, detail, retryable=True)
        # 529: overloaded, as Anthropic says it.
        kind, message = ("unavailable", UNAVAILABLE) if status in (503, 529) else ("error", REFUSED)
        return self._failure(502, kind, message, detail, after, retryable=status not in _THE_REQUESTS_FAULT)

    def _failure(
        self, status: int, kind: str, message: str, detail: str, retry_after: str | None = None, *, retryable: bool
    ) -> Failure:
        retryable = retryable and not self._relayed and not self._out
        return Failure(status, f"backend_{kind}", message, detail, retry_after, retryable)

    def _strange(self, detail: str) -> Failure:
        return self._failure(502, "protocol", STRANGE, detail, retryable=True)

    def _fail(self, failure: Failure) -> None:
        sink = self._sink
        self.cancel()
        if sink is not None:
            sink.failed(failure)

    def _succeed(self) -> None:
        sink, self._sink = self._sink, None
        self.release()
        if sink is not None:
            if self._usage is not None:
                sink.usage(self._usage)
            sink.done()


# Above that it is a fault of the server's, such as an unsigned -1, and no count.
_MOST_TOKENS = 1 << 40


def count(value: object) -> int | None:
    """A number of tokens, None for whatever is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS else None


def error_code(value: object) -> str:
    """The short name of an error as the APIs give it. Its message is left out: it may quote the key."""
    if isinstance(value, dict):
        inner = value.get("error")
        for holder in (inner, value):
            if isinstance(holder, dict):
                for name in ("code", "type"):
                    code = str(holder.get(name) or "")
                    if _TOKEN.fullmatch(code):
                        return code
    return "(no error code)"
