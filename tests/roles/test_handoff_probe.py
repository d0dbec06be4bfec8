"""The probe believes nothing: a server that is wrong in one point makes it fail and say in which."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

EVENTS = ['data: {"content": "Grüße"}\n\n', ": ping\n\n", 'data: {"content": " there"}\n\n', "data: [DONE]\n\n"]
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}


@dataclass
class Behaviour:
    """What the server does; every test changes one thing."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(SSE))
    body: list[bytes] = field(default_factory=lambda: [event.encode() for event in EVENTS])
    page_headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False
    stall: threading.Event | None = None
    pause: float = 0.0  # seconds before every piece
    pause_at_end: float = 0.0  # seconds before the last piece
    chunked: bool = False
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The URLs of the reference application."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send an ordinary page."""
        self.send_response(status)
        for name, value in {**headers, **self.behaviour.page_headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Note the request and route it."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.behaviour.seen.append((self.command, self.path, dict(self.headers), body))
        path = urlsplit(self.path).path
        logged_in = "session=in" in self.headers.get("Cookie", "")
        if path == "/session.php":
            session = {"user": "demo" if logged_in else None, "csrf": "in" if logged_in else "out"}
            self.answer(200, {} if logged_in else {"Set-Cookie": "session=new; HttpOnly"}, json.dumps(session).encode())
        elif path == "/login.php":
            form = parse_qs(body.decode())
            good = form == {"user": ["demo"], "password": ["geheim & süß"], "csrf": ["out"]}
            self.answer(
                303 if good else 401, {"Location": "/", "Set-Cookie": "session=in; HttpOnly"} if good else {}, b""
            )
        else:
            self.stream()

    do_POST = do_GET

    def stream(self) -> None:
        """Do what the daemon does, with the one thing wrong that the test asks for."""
        behaviour = self.behaviour
        self.close_connection = True
        self.send_response(behaviour.status)
        for name, value in behaviour.headers.items():
            self.send_header(name, value)
        if behaviour.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in behaviour.body:
            # Being slow is what this server is for.
            time.sleep(behaviour.pause + (behaviour.pause_at_end if piece is behaviour.body[-1] else 0.0))
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if behaviour.chunked else piece)
            self.wfile.flush()
        if behaviour.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if behaviour.stall is not None:
            behaviour.stall.wait(30)
        if behaviour.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def url(behaviour: Behaviour) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"behaviour": behaviour}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    if behaviour.stall is not None:
        behaviour.stall.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_complete_answer_is_counted_to_the_last_byte(run_module, url):
    report = run_module("handoff_probe", url=url)
    assert "failed" not in report, report
    assert report["changed"] is False
    assert report["events"] == 2
    assert report["bytes"] == len("".join(EVENTS).encode())
    assert report["text"] == "Grüße there"
    assert 0 <= report["time_to_first_event"] <= report["duration"]


def test_a_chunked_answer_is_read_like_any_other(run_module, url, behaviour):
    behaviour.chunked = True
    assert run_module("handoff_probe", url=url)["events"] == 2


def test_events_cut_anywhere_are_put_together_again(run_module, url, behaviour):
    behaviour.body = [bytes([byte]) for byte in "".join(EVENTS).encode()]
    assert run_module("handoff_probe", url=url)["text"] == "Grüße there"


def test_a_login_comes_first_and_its_cookie_and_token_go_along(run_module, url, behaviour):
    report = run_module(
        "handoff_probe", url=url, user="demo", password="geheim & süß", host_header="chat.example.com", tokens=7
    )
    assert "failed" not in report, report
    method, path, headers, body = behaviour.seen[-1]
    assert (method, path) == ("POST", "/stream.php")
    assert headers["Cookie"] == "session=in"
    assert headers["X-CSRF-Token"] == "in"
    assert json.loads(body) == {"prompt": "Are you there?", "tokens": 7}
    assert {headers["Host"] for _, _, headers, _ in behaviour.seen} == {"chat.example.com"}


def test_the_password_is_in_no_part_of_the_report(run_module, url):
    report = run_module("handoff_probe", url=url, user="demo", password="geheim & süß")
    assert "geheim" not in json.dumps(report, ensure_ascii=False)


def test_a_prompt_can_go_in_the_query_as_eventsource_sends_it(run_module, url, behaviour):
    run_module("handoff_probe", url=url, method="GET", prompt="a&b c", pace=2.5)
    method, path, _, body = behaviour.seen[-1]
    assert (method, body) == ("GET", b"")
    assert parse_qs(urlsplit(path).query) == {"prompt": ["a&b c"], "pace": ["2.5"]}


def test_check_mode_asks_nobody(run_module, url, behaviour):
    report = run_module("handoff_probe", check=True, url=url)
    assert report["skipped"] is True
    assert behaviour.seen == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (EVENTS[:-1], "ends after 2 events without the final [DONE]"),
        ([EVENTS[0], 'data: {"content": "br'], "ends inside an event, after 1 whole"),
        ([EVENTS[0], "data: {}\n\n", EVENTS[-1]], 'event 2 carries no JSON object with "content"'),
        (["data: [1]\n\n"], 'event 1 carries no JSON object with "content"'),
        (['data: {"content": 7}\n\n'], '"content" is not a string'),
        (["HTTP/1.1 200 OK\n\n"], "event 1 has a line that is no event field"),
        ([*EVENTS, EVENTS[0]], "something follows the final [DONE]"),
        (
            [EVENTS[0], 'event: error\ndata: {"error": {"type": "backend", "message": "gone"}}\n\n'],
            "reports an error after 1 events",
        ),
        ([b"data: \xff\n\n"], "event 1 is not UTF-8"),
        ([EVENTS[-1]], "0 events arrived, expected at least 1"),
    ],
)
def test_a_faulty_body_is_refused_by_name(run_module, url, behaviour, body, complaint):
    behaviour.body = [piece if isinstance(piece, bytes) else piece.encode() for piece in body]
    report = run_module("handoff_probe", url=url)
    assert report["failed"] is True
    assert complaint in report["msg"]


@pytest.mark.parametrize("name", ["X-Socket-Handoff", "x-handoff-data", "X-Handoff-Data-From"])
def test_a_handoff_header_in_the_stream_is_refused(run_module, url, behaviour, name):
    behaviour.headers[name] = "/run/streaming-daemon.sock"
    report = run_module("handoff_probe", url=url)
    assert report["failed"] is True
    assert f"shows the client the header {name}" in report["msg"]


def test_a_handoff_header_on_an_ordinary_page_is_refused(run_module, url, behaviour):
    behaviour.page_headers["X-Handoff-Data"] = "{}"
    report = run_module("handoff_probe", url=url, user="demo", password="geheim & süß")
    assert "GET /session.php answered 200 and shows the client the header X-Handoff-Data" in report["msg"]


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "handoff_app_password"),
        (403, "SocketHandoffAllow"),
        (500, "error log"),
        (503, "streaming-daemon.socket"),
    ],
)
def test_a_wrong_status_comes_with_advice_and_the_answer(run_module, url, behaviour, status, advice):
    behaviour.status, behaviour.body = status, [b'{"error": {"type": "x"}}']
    report = run_module("handoff_probe", url=url)
    assert f"POST /stream.php answered {status}, expected 200" in report["msg"]
    assert advice in report["msg"]
    assert '"type": "x"' in report["msg"]


def test_a_wrong_password_is_named_as_such(run_module, url):
    report = run_module("handoff_probe", url=url, user="demo", password="wrong password")
    assert "POST /login.php answered 401, expected 303" in report["msg"]


def test_an_answer_of_another_type_is_refused(run_module, url, behaviour):
    behaviour.headers["Content-Type"] = "text/html"
    assert "expected text/event-stream" in run_module("handoff_probe", url=url)["msg"]


def test_a_reset_at_the_end_is_a_failure_even_after_done(run_module, url, behaviour):
    behaviour.reset = True
    report = run_module("handoff_probe", url=url)
    assert report["failed"] is True
    assert "the connection broke after" in report["msg"]


def test_silence_ends_with_the_time_limit(run_module, url, behaviour):
    behaviour.body, behaviour.stall = [EVENTS[0].encode()], threading.Event()
    report = run_module("handoff_probe", url=url, timeout=0.5)
    assert "not finished after 0.5 s, 1 events so far" in report["msg"]


def test_nobody_listening_is_said_plainly(run_module):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        report = run_module("handoff_probe", url=f"http://127.0.0.1:{reserved.getsockname()[1]}")
    assert "Is Apache running?" in report["msg"]


@pytest.mark.parametrize(
    "bad", ["ftp://127.0.0.1", "http://127.0.0.1/stream.php", "127.0.0.1", "https://127.0.0.1:99999"]
)
def test_an_address_that_cannot_be_probed_is_refused_with_the_allowed_form(run_module, bad):
    report = run_module("handoff_probe", url=bad)
    assert report["failed"] is True
    assert bad in report["msg"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for chat.example.com, with its key."""
    place = tmp_path_factory.mktemp("tls") / "chat.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-noenc",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=chat.example.com", "-addext", "subjectAltName=DNS:chat.example.com"]
    subprocess.run([*made, *names, "-keyout", str(place), "-out", f"{place}.crt"], check=True, capture_output=True)
    place.write_text(place.read_text() + Path(f"{place}.crt").read_text())
    return place


@pytest.fixture
def tls_url(behaviour: Behaviour, certificate: Path) -> Iterator[str]:
    """The same server behind TLS, as behind a load balancer."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"behaviour": behaviour}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_front_door_with_tls_is_gone_through_like_any_other(run_module, tls_url, certificate):
    report = run_module(
        "handoff_probe",
        url=tls_url,
        server_name="chat.example.com",
        ca_file=f"{certificate}.crt",
        user="demo",
        password="geheim & süß",
    )
    assert "failed" not in report, report
    assert report["text"] == "Grüße there"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server_name": "chat.example.com"}, "certificate verify failed"),
        ({"ca_file": True}, "certificate verify failed"),
        ({"ca_file": True, "server_name": "evil.example.com"}, "certificate verify failed"),
        ({"ca_file": "/nowhere.pem"}, "ca_file is '/nowhere.pem'"),
    ],
    ids=["unknown authority", "address is not in it", "another name", "no such file"],
)
def test_a_certificate_that_is_not_good_ends_the_probe(run_module, tls_url, certificate, given, said):
    if given.get("ca_file") is True:
        given = {**given, "ca_file": f"{certificate}.crt"}
    report = run_module("handoff_probe", url=tls_url, **given)
    assert report["failed"] is True
    assert said in report["msg"]


def test_a_certificate_is_not_looked_at_where_told_so(run_module, tls_url):
    assert "failed" not in run_module("handoff_probe", url=tls_url, validate_certs=False)


def test_plain_http_at_a_port_that_speaks_tls_is_a_failure_and_no_hang(run_module, tls_url):
    report = run_module("handoff_probe", url=tls_url.replace("https", "http"), timeout=10)
    assert report["failed"] is True


@pytest.mark.parametrize("expect", ["^Grüße", "there$", "e t"])
def test_an_answer_may_have_to_contain_something(run_module, url, expect):
    assert "failed" not in run_module("handoff_probe", url=url, expect=expect)


def test_an_answer_that_does_not_is_refused_with_its_beginning(run_module, url):
    report = run_module("handoff_probe", url=url, expect="Wort [0-9]+")
    assert "does not contain what expect says, 'Wort [0-9]+'. It begins: 'Grüße there'" in report["msg"]


def test_what_is_no_regular_expression_is_refused_before_anybody_is_asked(run_module, url, behaviour):
    report = run_module("handoff_probe", url=url, expect="(")
    assert "allowed is a regular expression" in report["msg"]
    assert behaviour.seen == []


def test_the_first_event_may_have_to_come_soon(run_module, url, behaviour):
    behaviour.pause = 0.3
    report = run_module("handoff_probe", url=url, maximum_first_event=0.1)
    assert "too slow: the first event came after 0." in report["msg"]
    assert "maximum_first_event permits 0.1 s" in report["msg"]


def test_no_two_events_may_be_far_apart(run_module, url, behaviour):
    behaviour.pause = 0.3
    report = run_module("handoff_probe", url=url, maximum_gap=0.1)
    assert "too slow: between two events were 0." in report["msg"]
    assert run_module("handoff_probe", url=url)["longest_gap"] >= 0.3


def test_the_end_may_be_no_further_from_the_last_event(run_module, url, behaviour):
    behaviour.pause_at_end = 0.3
    report = run_module("handoff_probe", url=url, maximum_gap=0.2)
    assert "too slow: between two events were 0." in report["msg"]
    assert run_module("handoff_probe", url=url)["longest_gap"] >= 0.3
