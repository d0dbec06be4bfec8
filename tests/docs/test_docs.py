"""The documents keep their word: links lead somewhere, code blocks run, tables say what the sources say."""

from __future__ import annotations

import ast
import base64
import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
DOCUMENTS = sorted(
    ROOT / line for line in subprocess.run(LISTED, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
)
README = ROOT / "README.md"


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_playbooks_named_in_code_exist(document: Path) -> None:
    rooms = "script|playbooks|examples|docs|roles|tests"
    named = set(re.findall(rf"(?<![\w./-])((?:{rooms})/[\w./-]*\w)", document.read_text()))
    bases = (ROOT, document.parent)
    missing = [name for name in sorted(named) if not any((base / name).exists() for base in bases)]
    assert missing == []


def module_directives() -> set[str]:
    sources = "".join(path.read_text() for path in (ROOT / "module-src").glob("*.c"))
    found = set(re.findall(r'AP_INIT_\w+\(\s*"(SocketHandoff\w+)"', sources))
    assert found, "no directive found in the module's sources: has the way they are declared changed?"
    return found


@pytest.mark.parametrize("document", [README, ROOT / "docs" / "directives.md"], ids=lambda path: path.name)
def test_directive_tables_name_exactly_the_modules_directives(document: Path) -> None:
    table = set(re.findall(r"^\| *`(SocketHandoff\w+)", document.read_text(), re.MULTILINE))
    assert table == module_directives()


AskPhp = Callable[[bytes, str], tuple[dict[str, str], str]]


@pytest.fixture
def readmes_php(tmp_path: Path) -> AskPhp:
    """Ask README's snippet, run by PHP itself, with the body of a form and a cookie: its headers and body. The cookie
    PHPSESSID=docs is that of a user who is logged in."""
    php = shutil.which("php-cgi")
    assert php, "php-cgi is missing: apt install php-cgi"
    (snippet,) = code_blocks(README, "php")
    page = tmp_path / "stream.php"
    page.write_text(snippet)
    login = tmp_path / "login.php"
    login.write_text("<?php session_id('docs'); session_start(); $_SESSION['user'] = 'ada';")
    options = ["-d", f"session.save_path={tmp_path}"]
    subprocess.run(["php", *options, str(login)], env={"HOME": str(tmp_path)}, check=True, capture_output=True)

    def ask(body: bytes, cookie: str) -> tuple[dict[str, str], str]:
        environment = {
            "REDIRECT_STATUS": "1",
            "GATEWAY_INTERFACE": "CGI/1.1",
            "REQUEST_METHOD": "POST",
            "SCRIPT_FILENAME": str(page),
            "CONTENT_TYPE": "application/x-www-form-urlencoded",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_COOKIE": cookie,
        }
        output = subprocess.run([php, *options], input=body, env=environment, capture_output=True, check=True).stdout
        head, _, rest = output.decode().partition("\r\n\r\n")
        return dict(line.split(": ", 1) for line in head.split("\r\n")), rest

    return ask


def test_readmes_php_snippet_sets_the_two_headers_and_nothing_else(readmes_php: AskPhp) -> None:
    question = b"prompt=Hello+%22world%22%0AX-Evil%3A+1"
    headers, body = readmes_php(question, "PHPSESSID=docs")
    assert headers["X-Socket-Handoff"] == "llm"
    assert headers["X-Handoff-Data"] == '{"prompt":"Hello \\"world\\"\\nX-Evil: 1","user":"ada"}'
    assert "X-Evil" not in headers
    assert body == ""
    headers, body = readmes_php(question, "")
    assert headers["Status"].startswith("401") and "X-Socket-Handoff" not in headers
    assert body == ""


@pytest.mark.parametrize("body", [b"", b"prompt[]=x", b"prompt=%C0%80", b"prompt=" + b"x" * 1001])
def test_readmes_php_snippet_hands_off_nothing_that_is_no_question(readmes_php: AskPhp, body: bytes) -> None:
    headers, _ = readmes_php(body, "PHPSESSID=docs")
    assert headers.get("Status", "200 OK").startswith("422") and "X-Socket-Handoff" not in headers


def test_readmes_longest_question_is_a_line_that_apache_takes(readmes_php: AskPhp) -> None:
    headers, _ = readmes_php(b"prompt=" + b"%01" * 1000, "PHPSESSID=docs")
    assert 6000 < len(headers["X-Handoff-Data"]) < 8000, "mod_proxy_fcgi reads a line of headers into 8192 bytes"


PLAIN, ENVELOPE = code_blocks(ROOT / "docs" / "wire-protocol.md", "python")
VECTORS = json.loads((ROOT / "tests" / "vectors" / "envelope.json").read_text())


@contextlib.contextmanager
def running(sketch: str, directory: Path) -> Iterator[Path]:
    """The path on which a sketch of a daemon listens."""
    path = directory / "sketch.sock"
    program = directory / "sketch.py"
    program.write_text(sketch.replace("/run/example.sock", str(path)))
    assert str(path) in program.read_text(), "the sketch no longer listens on /run/example.sock"
    process = subprocess.Popen([sys.executable, str(program)], stderr=subprocess.PIPE)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        while True:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.connect(str(path))
                break
            time.sleep(0.05)
        yield path
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def hand_off(path: Path, message: bytes, others: Sequence[int] = (), *, ack: bool = False) -> bytes:
    """Do as Apache does with a real TCP connection, and return what its client gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    server.setblocking(False)
    with listener, client, server, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(20)
        peer.connect(str(path))
        assert not ack or peer.recv(2) == b"\x06"
        socket.send_fds(peer, [message], [server.fileno(), *others])
        server.close()
        peer.close()
        client.settimeout(20)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


@contextlib.contextmanager
def payload_of(vector: dict[str, Any]) -> Iterator[list[int]]:
    """The descriptors behind the client's (tests/vectors/README.md)."""
    if vector["descriptors"] != 2:
        yield []
        return
    seals = 0 if "without" in vector.get("second", "") else fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    memfd = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(memfd, bytes_of(vector["payload"]))
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
        yield [memfd]
    finally:
        os.close(memfd)


def bytes_of(value: str | dict[str, Any] | None) -> bytes:
    if not isinstance(value, dict):
        return (value or "").encode()
    if "base64" in value:
        return base64.b64decode(value["base64"])
    return str(value["utf8"]).replace("%", "x" * value["pad"] if "pad" in value else "%").encode()


def test_the_receiver_in_the_wire_protocol_page_receives(tmp_path: Path) -> None:
    with running(PLAIN, tmp_path) as path:
        received = hand_off(path, b'{"prompt": "hello"}')
    assert received.startswith(b"HTTP/1.1 200"), received
    assert received.endswith(b"data: 19 bytes\n\ndata: [DONE]\n\n"), received


def test_the_envelopes_receiver_takes_everything_that_the_module_sends(tmp_path: Path) -> None:
    with running(ENVELOPE, tmp_path) as path:
        for vector in VECTORS["sent"] + VECTORS["accepted"]:
            with payload_of(vector) as others:
                received = hand_off(path, bytes_of(vector["message"]), others, ack=True)
            head, _, body = received.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), (vector["name"], received)
            for name, value in vector["envelope"]["response_headers"]:
                if isinstance(value, str):
                    assert f"\r\n{name}: {value}".encode() in head, (vector["name"], received)
            size = len(bytes_of(vector.get("payload", vector["envelope"]["data"])))
            expected = b"" if vector["envelope"]["method"] == "HEAD" else b"data: %d bytes\n\ndata: [DONE]\n\n" % size
            assert body == expected, vector["name"]


def test_the_envelopes_receiver_answers_400_to_what_it_cannot_trust(tmp_path: Path) -> None:
    wrong = ("version ", "truncated JSON", "a memfd ", "second descriptor", "payload.length is ", "data is missing")
    vectors = [
        vector
        for vector in VECTORS["refused"]
        if any(word in vector["name"] for word in wrong) and vector.get("second", "memfd").startswith("memfd")
    ]
    assert len(vectors) >= 10
    with running(ENVELOPE, tmp_path) as path:
        for vector in vectors:
            with payload_of(vector) as others:
                received = hand_off(path, bytes_of(vector["message"]), others, ack=True)
            assert received.startswith(b"HTTP/1.1 400"), (vector["name"], received)


def constant_texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a Python source, those written over several lines put together."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def said_in_the_code() -> str:
    """Everything that playbooks, roles and plugins may say."""
    sources = [path for room in ("playbooks", "roles") for path in (ROOT / room).rglob("*.yml")]
    texts = [" ".join(path.read_text().split()) for path in sources if not path.name.endswith(".meta.yml")]
    for path in (*(ROOT / "plugins").rglob("*.py"), ROOT / "roles/release_puller/files/pull-release"):
        texts += constant_texts(ast.parse(path.read_text()))
    return "\n".join(texts)


def first_cells(document: Path, head: str) -> list[str]:
    """The code in the first cells of the table with this head."""
    table = document.read_text().partition(f"\n| {head} |")[2].partition("\n\n")[0]
    return re.findall(r"(?m)^\| `(.+?)` \|", table)


@pytest.mark.parametrize(("page", "head"), [("operations", "message"), ("operations", "state"), ("pull", "message")])
def test_what_an_operator_looks_up_is_what_the_code_says(page: str, head: str) -> None:
    code, looked_up = said_in_the_code(), first_cells(ROOT / f"docs/{page}.md", head)
    assert len(looked_up) > 5
    # One state is made of two: LOST, and what was before.
    parts = [
        part for text in looked_up for part in text.removesuffix("…").replace("LOST, was ", "LOST, was |").split("|")
    ]
    assert [part for part in parts if part not in code] == []


def test_the_readme_names_every_lane_that_runs_only_when_it_is_named() -> None:
    (lanes,) = re.findall(r"(?m)^named_lanes=\((.*)\)$", (ROOT / "script/lanes").read_text())
    assert first_cells(README, "`script/test …`") == lanes.split()


def test_every_variable_that_the_page_on_pulling_names_is_one() -> None:
    named = set(re.findall(r"\b((?:rollout|release_puller)_[a-z_]+)\b", (ROOT / "docs/pull.md").read_text()))
    specs = (ROOT / "playbooks/pull.meta.yml", ROOT / "roles/release_puller/meta/argument_specs.yml")
    assert named - set(re.findall(r"(?m)^      (\w+):$", "".join(path.read_text() for path in specs))) == set()


def test_every_variable_that_operations_names_is_one() -> None:
    named = set(
        re.findall(r"\b((?:rollout|rollback)_[a-z_]+|status_file)\b", (ROOT / "docs/operations.md").read_text())
    )
    metas = "".join((ROOT / f"playbooks/{name}.meta.yml").read_text() for name in ("rollout", "rollback", "status"))
    assert named - set(re.findall(r"(?m)^      (\w+):$", metas)) == set()
