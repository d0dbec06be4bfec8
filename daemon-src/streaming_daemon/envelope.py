"""The envelope: the message in which Apache also tells who asked, what, and what the application answered.

No I/O here: bytes in, ``Parcel`` or ``HandoffError`` out. Both messages of the wire contract may come over one socket.
Which one it is lies in its first bytes alone: ``{"handoff":`` and an integer begin an envelope, everything else is
plain. So what begins like an envelope and is none is refused, and never taken for the application's data. Where only
envelopes are allowed, the order of the members means nothing, as in any JSON object.

Nothing in an envelope that could end a header line gets past here, whoever wrote it. Members that this version does
not know are ignored.

What is made here is made for every stream: named tuples, because a frozen dataclass of fifteen fields takes five times
as long.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .handoff import HandoffError, kind_of
from .strict_json import StrictError, decode

VERSION = 2
# JSON values in an envelope, and headers in each of its two lists. Apache takes 100 headers of a client by default.
MAX_VALUES = 10_000
MAX_HEADERS = 1000

_ENVELOPE = re.compile(rb'\{"handoff":[ \t\r\n]*-?[0-9]+[ \t\r\n]*[,}]')
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LINE_END = re.compile(r"[\r\n\0]")
_HEADERS = f'an array of at most {MAX_HEADERS} ["name", "value"] pairs'

Header = tuple[str, str]


class Endpoint(NamedTuple):
    """One end of a connection, as text ``address:port``; port 0 is an unknown one."""

    addr: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return self.addr
        return f"[{self.addr}]:{self.port}" if ":" in self.addr else f"{self.addr}:{self.port}"


class Request(NamedTuple):
    """What was asked. ``client`` is the true client behind trusted proxies, ``peer`` the other end of the connection.

    ``headers``: those of the client's request that the target is configured to get. ``response_headers`` and
    ``status``: what the application set. ``unread_body``: bytes of the request's body that Apache did not read, -1
    where it does not know how many. ``prefetched``: bytes behind the request that it did read, and that are lost.
    """

    id: str
    method: str
    uri: str
    protocol: str
    host: str | None
    client: Endpoint
    peer: Endpoint
    scheme: str
    target: str
    user: str | None
    headers: tuple[Header, ...]
    response_headers: tuple[Header, ...]
    status: int
    unread_body: int
    prefetched: int


class Parcel(NamedTuple):
    """A message taken apart. ``request`` is None for a plain one; ``payload`` is the length of the data where it is
    not in ``data`` but in the second descriptor."""

    request: Request | None
    data: bytes | str
    payload: int | None = None


def unpack(message: bytes, form: str = "auto") -> Parcel:
    """Take one message apart; ``form`` is ``listen.message`` of the configuration. Raises HandoffError."""
    if form == "plain" or (form == "auto" and not _ENVELOPE.match(message)):
        return Parcel(None, message)
    try:
        value = decode(message.decode("utf-8"), MAX_VALUES)
    except StrictError as error:
        raise HandoffError("the message", error.kind, error.allowed) from error
    except UnicodeDecodeError as error:
        raise HandoffError("the message", "not valid UTF-8", "a JSON object") from error
    except (ValueError, RecursionError) as error:
        raise HandoffError("the message", "not valid JSON", "a JSON object") from error
    members = _Members(value, "")
    if members.integer("handoff", 0) != VERSION:
        raise HandoffError("handoff", "an unknown version", f"the integer {VERSION}")
    return Parcel(_request(members), *_data(members))


def _request(members: _Members) -> Request:
    text = members.text
    # In the order of the fields, because names take as long as everything else about a tuple.
    return Request(
        text("id"),
        members.token("method"),
        text("uri"),
        text("protocol"),
        members.text_or_null("host"),
        _endpoint(members.table("client")),
        _endpoint(members.table("peer")),
        text("scheme"),
        text("target"),
        text("user") if members.has("user") else None,
        members.headers("headers"),
        members.headers("response_headers"),
        members.integer("status", 100, 999),
        members.integer("unread_body", -1),
        members.integer("prefetched", 0),
    )


def _endpoint(members: _Members) -> Endpoint:
    return Endpoint(members.text("addr"), members.integer("port", 0, 65535))


def _data(members: _Members) -> tuple[str, int | None]:
    data = members.text_or_null("data")
    if not members.has("payload"):
        return data or "", None
    payload = members.table("payload")
    if data is not None:
        raise HandoffError("payload", "there beside data", "one of the two")
    if payload.get("memfd") is not True:
        raise HandoffError("payload.memfd", kind_of(payload.get("memfd")), "true")
    return "", payload.integer("length", 0)


class _Members:
    """Typed access to the members of one JSON object. Unlike an application's, an envelope's are all there."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise HandoffError(path.rstrip(".") or "the message", kind_of(value), "an object")
        self._value = value
        self._path = path

    def has(self, name: str) -> bool:
        return name in self._value

    def get(self, name: str) -> object:
        return self._value.get(name)

    def table(self, name: str) -> _Members:
        return _Members(self._value.get(name), f"{self._path}{name}.")

    def text(self, name: str) -> str:
        value = self._value.get(name)
        if isinstance(value, str):
            return value
        raise HandoffError(self._path + name, kind_of(value), "a string")

    def text_or_null(self, name: str) -> str | None:
        if self.has(name) and self._value[name] is None:
            return None
        return self.text(name)

    def token(self, name: str) -> str:
        value = self.text(name)
        if _TOKEN.fullmatch(value):
            return value
        raise HandoffError(self._path + name, "a string of another form", "a token of HTTP")

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int:
        value = self._value.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise HandoffError(self._path + name, kind_of(value), "an integer")
        if low <= value <= high:
            return value
        raise HandoffError(self._path + name, "an integer out of range", f"an integer from {low} to {high}")

    def headers(self, name: str) -> tuple[Header, ...]:
        pairs = self._value.get(name)
        if not isinstance(pairs, list):
            raise HandoffError(name, kind_of(pairs), _HEADERS)
        if len(pairs) > MAX_HEADERS:
            raise HandoffError(name, f"an array of {len(pairs)}", _HEADERS)
        result = []
        for index, pair in enumerate(pairs):
            if (
                type(pair) is list
                and len(pair) == 2
                and type(pair[0]) is type(pair[1]) is str
                and _TOKEN.fullmatch(pair[0])
                and not _LINE_END.search(pair[1])
            ):
                result.append((pair[0], pair[1]))
                continue
            # What is wrong with it?
            where = f"{name}[{index}]"
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is type(pair[1]) is str):
                raise HandoffError(where, "something else" if isinstance(pair, list) else kind_of(pair), _HEADERS)
            if not _TOKEN.fullmatch(pair[0]):
                raise HandoffError(where, "a pair with another name", "the name of a header")
            raise HandoffError(where, "a value of more than one line", "a value without CR, LF and NUL")
        return tuple(result)
