# SPDX-License-Identifier: Apache-2.0
"""docs/directives.md and the sources say the same; the vectors of docs/wire-protocol.md are kept."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from handoff_httpd import ROOM, Httpd
from handoff_standin import Client, Daemon, response

DOCS = ROOM.parent / "docs"
VECTORS = ROOM.parent / "tests" / "vectors" / "plain.json"

pytestmark = pytest.mark.skipif(
    not DOCS.is_dir(), reason="NOT TESTED: module-src lies here without the rest of the repository"
)


def sources() -> str:
    """All string literals as the compiler joins them."""
    text = "\n".join(path.read_text() for path in sorted(ROOM.glob("handoff_*.c")))
    for name, value in re.findall(r'#define (HANDOFF_\w+) ("[^"]+")', (ROOM / "handoff_filter.h").read_text()):
        text = re.sub(rf"\b{name}\b", value, text)
    return re.sub(r'"\s*\n?\s*"', "", text)


def rows(first: str) -> list[list[str]]:
    """The table whose first heading is this."""
    _, _, rest = (DOCS / "directives.md").read_text().partition(f"\n| {first} |")
    lines = rest.splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert table, first
    return table


def test_every_message_in_the_docs_is_in_the_sources() -> None:
    code = sources()
    missing = [cell for row in rows("message") for cell in [row[0].strip("`")] if cell not in code]
    assert missing == []


def test_every_error_line_and_advice_in_the_sources_is_in_the_docs() -> None:
    code = sources()
    known = [row[0].strip("`") for row in rows("message")]
    advice = re.findall(r'HTTP_\w+, HANDOFF_\w+,\s*"([^"]+)"', code)
    advice += re.findall(r'return "(it came from [^"]+|SocketHandoffEnabled is[^"]+)"', code)
    lines = re.findall(r"ap_log_rerror\(APLOG_MARK, APLOG_(?:ERR|CRIT|WARNING).*?\);", code, re.DOTALL)
    whole = [line for line in lines if not re.search(r"(failed|ignored): %s", line)]
    assert (len(advice), len(lines) - len(whole), len(whole)) == (26, 4, 23)
    assert [text for text in advice + whole if not any(k in text for k in known)] == []


def test_every_result_in_the_sources_is_in_the_docs_and_no_other() -> None:
    words = re.findall(r'X\(HANDOFF_\w+, +"([\w-]+)"\)', (ROOM / "handoff_result.h").read_text())
    documented = [word for row in rows("result") for word in re.findall(r"`([\w-]+)`", row[0])]
    assert len(words) == 23 and sorted(documented) == sorted(words)


def test_defaults_in_the_docs_are_the_sources() -> None:
    code = (ROOM / "handoff_config.c").read_text()
    defaults = {row[0].strip("`"): row[2].strip("`") for row in rows("directive")}
    for name, constant in {
        "SocketHandoffConnectTimeoutMs": "DEFAULT_CONNECT_TIMEOUT_MS",
        "SocketHandoffSendTimeoutMs": "DEFAULT_SEND_TIMEOUT_MS",
        "SocketHandoffMaxRetries": "DEFAULT_MAX_RETRIES",
        "SocketHandoffMaxPayload": "DEFAULT_MAX_PAYLOAD",
    }.items():
        assert re.search(rf"^#define {constant} {defaults[name]}\b", code, re.MULTILINE)


def vectors() -> list[Any]:
    """Those whose message can be a header and fits into a request line of the test handler."""
    found = []
    for vector in json.loads(VECTORS.read_text()) if VECTORS.exists() else []:
        message = vector["message"]
        if "pad" in message or "nest" in message:
            continue
        data = message["utf8"].encode() if "utf8" in message else base64.b64decode(message["base64"])
        if not re.search(rb"[\0\r\n]", data):
            found.append(pytest.param(data, id=vector["name"]))
    return found


@pytest.mark.parametrize("data", vectors())
def test_a_vectors_message_reaches_the_daemon_byte_for_byte(
    httpd: Httpd, daemon: Daemon, uri: Callable[..., str], data: bytes
) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d=quote(data, safe="")))
        handoff = daemon.next()
        handoff.finish(response(b""))
        client.rest()
    assert handoff.data == (data or b"\0")


def test_every_test_that_the_list_of_hazards_names_exists() -> None:
    sources = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    lines = [line for line in (ROOM / "tests" / "hazards.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    named = [re.findall(r"`(test_\w+)`", line) for line in lines]
    assert len(lines) == 37 and all(
        names or "module_sanitize" in line for names, line in zip(named, lines, strict=True)
    )
    assert [name for names in named for name in names if name not in defined] == []
