# SPDX-License-Identifier: Apache-2.0
"""Whatever may not be handed off is answered completely, says why in the log, and leaks nothing."""

from __future__ import annotations

import http.server
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from handoff_httpd import ErrorLog, Httpd, wait_until
from handoff_standin import PATIENCE, Client, Daemon, answer_ok, fetch, response

Uri = Callable[..., str]


# --- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/tmp/d.sock", "is below no SocketHandoffAllowedPrefix"),
        ("/etc/passwd", "is below no SocketHandoffAllowedPrefix"),
        ("/", "names no socket"),
        ("{run}/elsewhere/d.sock", "is below no SocketHandoffAllowedPrefix"),
        ("{run}/okay.sock", "is below no SocketHandoffAllowedPrefix"),
        ("{run}/ok/../elsewhere/d.sock", 'has an empty, "." or ".." component'),
        ("{run}/ok/./d.sock", 'has an empty, "." or ".." component'),
        ("{run}/ok//d.sock", 'has an empty, "." or ".." component'),
        ("{run}/ok/", 'has an empty, "." or ".." component'),
        ("d.sock", "is not absolute"),
        ("", "names no socket"),
        ("{run}/ok/%01.sock", "contains a control byte"),
        ("{run}/ok/" + "a" * 300, "is too long"),
    ],
)
def test_a_path_that_is_not_permitted_is_403(
    httpd: Httpd, run_dir: Path, log: ErrorLog, path: str, reason: str
) -> None:
    with Daemon(run_dir / "elsewhere" / "d.sock") as other:
        answer = fetch(httpd.port("main"), f"/t?t={path.format(run=run_dir)}&d=x")
        assert answer.status == 403
        assert "retry-after" not in answer.headers
        assert b"</html>" in answer.body
        assert other.count == 0
    log.expect(f"handoff refused: the path .* {reason.replace('.', '[.]')}")


@pytest.fixture
def links(run_dir: Path) -> Iterator[Path]:
    """Symlinks in the permitted directory that lead to sockets inside and outside of it."""
    ok = run_dir / "ok"
    made = [ok / "out.sock", ok / "in.sock", ok / "dir"]
    made[0].symlink_to(run_dir / "elsewhere" / "d.sock")
    made[1].symlink_to("d.sock")
    made[2].symlink_to(run_dir / "elsewhere")
    yield ok
    for link in made:
        link.unlink()


@pytest.mark.parametrize("name", ["out.sock", "in.sock", "dir/d.sock"])
def test_a_symlink_on_the_way_is_403(
    httpd: Httpd, run_dir: Path, links: Path, daemon: Daemon, log: ErrorLog, name: str
) -> None:
    with Daemon(run_dir / "elsewhere" / "d.sock") as other:
        assert fetch(httpd.port("main"), f"/t?t={links / name}&d=x").status == 403
        assert other.count == 0
    assert daemon.count == 0
    log.expect("handoff to .* failed: a symlink lies on the way")


@pytest.mark.parametrize("name", ["file", "ok"])
def test_what_is_no_socket_is_403(httpd: Httpd, run_dir: Path, log: ErrorLog, name: str) -> None:
    path = run_dir / "ok" / name
    path.write_text("") if name == "file" else path.mkdir()
    try:
        assert fetch(httpd.port("main"), f"/t?t={path}&d=x").status == 403
    finally:
        path.unlink() if name == "file" else path.rmdir()
    log.expect("handoff to .* failed: that is not a socket")


def test_a_symlink_swapped_in_during_requests_never_gets_a_client(httpd: Httpd, run_dir: Path, log: ErrorLog) -> None:
    """The name is now a good socket, now a symlink to another one; only the good one is used."""
    ok, name = run_dir / "ok", run_dir / "ok" / "swap.sock"
    stop = False

    def swap() -> None:
        turn = 1  # rename(2) of one inode onto itself does nothing, so begin with the link
        while not stop:
            spare = ok / f"spare{turn % 2}"
            if turn % 2:
                spare.symlink_to(run_dir / "elsewhere" / "d.sock")
            else:
                os.link(ok / "good.sock", spare)
            spare.rename(name)
            turn += 1

    with (
        Daemon(run_dir / "elsewhere" / "d.sock", answer=answer_ok) as evil,
        Daemon(ok / "good.sock", answer=answer_ok) as good,
    ):
        os.link(ok / "good.sock", name)
        swapper = Thread(target=swap)
        swapper.start()
        try:
            seen: list[int] = []
            while len(seen) < 1000 and (len(seen) < 150 or set(seen) != {200, 403}):
                seen.append(fetch(httpd.port("main"), f"/t?t={name}&d=x").status)
        finally:
            stop = True
            swapper.join()
            for left in (name, ok / "spare0", ok / "spare1"):
                left.unlink(missing_ok=True)
        assert set(seen) == {200, 403}, "both sides of the race were seen"
        assert evil.count == 0
        assert good.count == seen.count(200)
    log.expect("a symlink lies on the way", times=seen.count(403))


def test_a_connection_goes_on_after_a_refused_path(httpd: Httpd, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        assert client.get("/t?t=/tmp/x").answer().status == 403
        assert client.get("/t").answer().body == b"bb"
    log.expect("handoff refused: the path")


def test_a_virtual_host_may_narrow_the_prefix_to_one_socket(
    httpd: Httpd, run_dir: Path, daemon: Daemon, uri: Uri, log: ErrorLog
) -> None:
    with Daemon(run_dir / "ok" / "only.sock", answer=answer_ok) as only:
        assert fetch(httpd.port("narrow"), uri(t=only.path, d="x")).status == 200
        assert fetch(httpd.port("narrow"), uri(d="x")).status == 403
    log.expect("is below no SocketHandoffAllowedPrefix")
    assert daemon.count == 0


def test_a_prefix_outside_run_permits_what_it_names_and_is_warned_of(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    """As the configuration of the original module may have it."""
    place = httpd.root / "sockets"
    with Daemon(place / "d.sock", answer=answer_ok) as daemon:
        assert fetch(httpd.port("outside"), uri(t=daemon.path, d="x")).status == 200
        assert fetch(httpd.port("main"), uri(t=daemon.path, d="x")).status == 403
    log.expect("is below no SocketHandoffAllowedPrefix")
    warned = httpd.configtest(f"SocketHandoffAllowedPrefix {place}/").stderr
    assert f'SocketHandoffAllowedPrefix "{place}/": is outside /run; whoever may create a socket there' in warned
    assert "outside /run" not in httpd.configtest("SocketHandoffAllowedPrefix /run /var/run/x").stderr


# --- daemons ----------------------------------------------------------------------------------


def assert_unavailable(httpd: Httpd, uri: str, *, within: float) -> None:
    started = time.monotonic()
    with Client(httpd.port("main")) as client:
        answer = client.get(uri).answer()
        took = time.monotonic() - started
        assert answer.status == 503
        assert answer.headers["retry-after"] == "2"
        assert b"</html>" in answer.body
        assert took < within
        assert client.rest() == b"", "and nothing after it"


def test_a_missing_socket_is_503(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    assert_unavailable(httpd, uri(d="x"), within=1.0)
    log.expect("handoff to .* failed: there is no such socket; start the daemon .*3 attempts")


def test_a_dead_daemon_is_503(httpd: Httpd, target: Path, uri: Uri, log: ErrorLog) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(target))
    target.chmod(0o666)
    dead.close()
    try:
        assert_unavailable(httpd, uri(d="x"), within=1.0)
    finally:
        target.unlink()
    log.expect("Connection refused.*handoff to .* failed: nobody listens on the socket")


def test_a_daemon_that_comes_back_in_time_costs_nothing(httpd: Httpd, target: Path, uri: Uri) -> None:
    """Within the connect timeout a restarting daemon is waited for: nobody sees a 503."""
    with Client(httpd.port("patient")) as client:
        client.get(uri(d="x"))
        wait_until(lambda: httpd.busy_workers() == 1, "a worker looks for the daemon")
        with Daemon(target, answer=answer_ok):
            assert client.answer().status == 200


def test_a_full_backlog_is_503_after_the_connect_timeout(httpd: Httpd, target: Path, uri: Uri, log: ErrorLog) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(target))
    target.chmod(0o666)
    listener.listen(0)
    waiting = []
    try:
        while True:
            filler = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            waiting.append(filler)
            filler.setblocking(False)
            filler.connect(str(target))
    except BlockingIOError:
        pass
    try:
        started = time.monotonic()
        assert_unavailable(httpd, uri(d="x"), within=1.0)
        assert time.monotonic() - started >= 0.13
    finally:
        for sock in [*waiting, listener]:
            sock.close()
        target.unlink()
    log.expect("handoff to .* failed: the daemon's backlog stayed full")


def test_a_socket_that_apache_may_not_write_to_is_503(httpd: Httpd, target: Path, uri: Uri, log: ErrorLog) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: needs root, so that httpd runs as another user")
    with Daemon(target, mode=0o600):
        assert_unavailable(httpd, uri(d="x"), within=1.0)
    log.expect("handoff to .* failed: Apache's user may not write to the socket")


def test_a_datagram_socket_is_503(httpd: Httpd, target: Path, uri: Uri, log: ErrorLog) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(target))
        target.chmod(0o666)
        assert_unavailable(httpd, uri(d="x"), within=1.0)
    target.unlink()
    log.expect("handoff to .* failed: who listens there does not listen on SOCK_SEQPACKET")


@pytest.mark.parametrize("by", ["d=x", "from=response-body&text=%01%01%00%01%00%08%00%00"])
def test_a_stream_socket_that_nobody_declared_gets_no_connection(
    httpd: Httpd, target: Path, uri: Uri, log: ErrorLog, by: str
) -> None:
    """What listens below /run is mostly SOCK_STREAM, and not ours: PHP's FastCGI, Docker. An application that names it
    could say anything to it in our name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
        foreign.bind(str(target))
        target.chmod(0o666)
        foreign.listen(8)
        foreign.setblocking(False)
        assert_unavailable(httpd, f"{uri()}&{by}", within=1.0)
        with pytest.raises(BlockingIOError):
            foreign.accept()
    target.unlink()
    log.expect(
        "handoff to .* failed: who listens there does not listen on SOCK_SEQPACKET, .*; "
        "if it is the daemon, write SocketHandoffTarget NAME unix:PATH transport=stream"
    )


def test_data_that_does_not_fit_is_500_and_says_how_much_does(
    httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog
) -> None:
    size = int(Path("/proc/sys/net/core/wmem_default").read_text())
    answer = fetch(httpd.port("main"), uri(dn=size))
    assert answer.status == 500
    assert b"</html>" in answer.body
    assert daemon.count == 0
    log.expect(f"the message is too large; .*has {size} bytes, a message takes {size - 32}")


# --- the client's answer ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 404, 503])
def test_an_errordocument_is_shown_with_retry_after(httpd: Httpd, uri: Uri, log: ErrorLog, status: int) -> None:
    answer = fetch(httpd.port("main"), uri("/page", d="x", status=status))
    assert (answer.status, answer.body) == (503, b"sorry page\n")
    assert answer.headers["retry-after"] == "2"
    log.expect("there is no such socket")


def test_an_errordocument_for_a_refused_path_is_shown(httpd: Httpd, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), "/page?t=/tmp/x&d=x")
    assert (answer.status, answer.body) == (403, b"refused page\n")
    log.expect("handoff refused: the path")


def test_an_errordocument_of_text_is_shown(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), uri("/text", d="x"))
    assert (answer.status, answer.body) == (503, b"come back later")
    log.expect("there is no such socket")


def test_an_errordocument_that_hands_off_and_fails_too_ends(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), uri("/loop", d="x"))
    assert answer.status == 503
    assert b"</html>" in answer.body
    log.expect("there is no such socket", times=2)


def test_the_error_does_not_carry_the_headers_of_the_bodys_encoding(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    for err in (None, 1):
        answer = fetch(httpd.port("main"), uri(d="x", enc="gzip", body=500, err=err))
        assert answer.status == 503
        assert "content-encoding" not in answer.headers
    log.expect("there is no such socket", times=2)


def test_a_range_request_gets_the_error_and_not_416(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), uri(d="x", body=500), "Range: bytes=10-20")
    assert answer.status == 503
    log.expect("there is no such socket")


def test_a_compressed_error_is_complete(httpd: Httpd, uri: Uri, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), uri("/deflate", d="x", body=500), "Accept-Encoding: gzip")
    assert answer.status == 503
    assert b"</html>" in answer.body
    log.expect("there is no such socket")


def test_the_access_log_names_the_failure_of_the_request_also_behind_an_errordocument(
    httpd: Httpd, uri: Uri, log: ErrorLog, target: Path
) -> None:
    fetch(httpd.port("main"), uri("/page", d="failed-for-the-log"))
    log.expect("there is no such socket")
    line = httpd.access_line("d=failed-for-the-log")
    assert "st=503" in line
    assert f"target={target} result=no-daemon" in line


# --- request bodies ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stalled_body_is_408_in_bounded_time(
    httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog, chunked: bool
) -> None:
    """Also where the client keeps the connection busy: one byte of a chunk's head at a time."""
    started = time.monotonic()
    with Client(httpd.port("main")) as client:
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 5000"
        client.get(uri(d="x", flush=1, body=10), length, method="POST").send(b"1;")
        client.sock.settimeout(0.1)
        data = b""
        while b"\r\n\r\n" not in data:
            assert time.monotonic() - started < PATIENCE
            try:
                data += client.sock.recv(65536)
            except TimeoutError:
                client.send(b"x")
        assert data.startswith(b"HTTP/1.1 408 ")
    assert 2.9 < time.monotonic() - started < 4.5
    assert daemon.count == 0
    log.expect("handoff refused: .* bytes of a request body that the application did not read")


def test_mod_reqtimeout_ends_the_wait_for_an_unread_body_sooner(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    """And the answer is one complete response, not a second one behind a handoff."""
    started = time.monotonic()
    with Client(httpd.port("hasty")) as client:
        client.get(uri(d="x", flush=1, body=10), "Content-Length: 5000", method="POST").send(b"12345")
        assert client.answer().status in (400, 408)
        client.expect_reset_or_fin()
    assert 0.9 < time.monotonic() - started < 2.5
    assert daemon.count == 0


def test_a_huge_unread_body_is_413(httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x"), "Content-Length: 3000000", method="POST")
        client.send(b"p" * 1_200_000)
        assert client.answer().status == 413
    assert daemon.count == 0
    log.expect("handoff refused: the application left more than 1048576 bytes")


def test_a_malformed_body_is_400(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x"), "Transfer-Encoding: chunked", method="POST").send(b"zzz\r\n")
        assert client.answer().status == 400
    assert daemon.count == 0


# --- who may ask ------------------------------------------------------------------------------


def test_head_is_answered_as_the_application_did(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    answer = fetch(httpd.port("main"), uri(d="x", status=201, body=10), method="HEAD")
    assert answer.status == 201
    assert daemon.count == 0


def test_where_the_module_is_off_the_headers_are_removed(httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog) -> None:
    for err in (None, 1):
        answer = fetch(httpd.port("main"), uri("/off", d="x", body=3, err=err))
        assert (answer.status, answer.body) == (200, b"bbb")
    assert daemon.count == 0
    log.expect("X-Socket-Handoff is ignored: SocketHandoffEnabled is Off here", times=2)


@pytest.mark.parametrize("path", ["/t", "/off"])
@pytest.mark.parametrize("err", [None, 1])
@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_an_error_that_the_handler_returns_carries_no_header_of_ours(
    httpd: Httpd, daemon: Daemon, uri: Uri, path: str, err: int | None, status: int
) -> None:
    answer = fetch(httpd.port("main"), uri(path, d="x", err=err, ret=status))
    assert answer.status == status
    assert daemon.count == 0


@pytest.mark.parametrize("err", [None, 1])
def test_an_errordocument_does_not_inherit_the_failed_handlers_wish(
    httpd: Httpd, daemon: Daemon, uri: Uri, err: int | None
) -> None:
    answer = fetch(httpd.port("main"), uri("/page", d="x", err=err, ret=404))
    assert (answer.status, answer.body) == (404, b"sorry page\n")
    assert daemon.count == 0


def test_a_handler_that_is_told_of_no_error_answers_nothing_twice(httpd: Httpd, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        everything = client.get("/t?t=/tmp/x", "Connection: close").rest()
    assert everything.count(b"HTTP/1.1 ") == 1
    log.expect("handoff refused: the path")


def test_a_handler_that_fails_after_asking_is_not_handed_off(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    answer = fetch(httpd.port("main"), uri(d="x", body=100, flush=1, fail=502))
    assert answer.status == 502
    assert b"</html>" in answer.body
    assert fetch(httpd.port("main"), uri(d="x", body=9, flush=1, ret=500)).status == 500
    assert daemon.count == 0


def test_data_without_a_target_is_removed(httpd: Httpd) -> None:
    assert fetch(httpd.port("main"), "/t?d=x&body=3").body == b"bbb"


def test_a_subrequest_cannot_hand_off(httpd: Httpd, daemon: Daemon, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), "/page.shtml")
    assert (answer.status, answer.body) == (200, b"before bbb after\n")
    assert daemon.count == 0
    log.expect("X-Socket-Handoff is ignored: it came from a subrequest")


def test_headers_from_htaccess_are_removed_and_hand_off_nothing(httpd: Httpd, daemon: Daemon) -> None:
    answer = fetch(httpd.port("main"), "/owner/file.txt")
    assert (answer.status, answer.body) == (200, b"static\n")
    assert daemon.count == 0


def test_mod_headers_cannot_hand_off_nor_leak(httpd: Httpd, daemon: Daemon) -> None:
    for query in ("body=3", "body=3&ret=404"):
        assert fetch(httpd.port("main"), f"/always?{query}").status in (200, 404)
    assert daemon.count == 0


def test_htaccess_cannot_switch_the_module_on(httpd: Httpd, log: ErrorLog) -> None:
    assert fetch(httpd.port("main"), "/enabling/file.txt").status == 500
    log.expect("SocketHandoffEnabled not allowed here")


@pytest.mark.parametrize("by", ["asis", "asistype"])
def test_a_file_sent_as_is_cannot_hand_off(httpd: Httpd, daemon: Daemon, log: ErrorLog, by: str) -> None:
    """Whether its handler or its type says so."""
    answer = fetch(httpd.port("main"), f"/{by}/file.txt")
    assert (answer.status, answer.body) == (200, b"as it is\n")
    assert daemon.count == 0
    log.expect("X-Socket-Handoff is ignored: it came from a file")


def test_a_client_cannot_hand_itself_off_through_mod_reflector(httpd: Httpd, daemon: Daemon, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        client.post("/reflect", b"body", f"X-Foo: {daemon.path}", "X-Bar: stolen", "Connection: close")
        assert client.answer().body == b"body"
    assert daemon.count == 0
    log.expect("X-Socket-Handoff is ignored: it came from the client")


def test_what_a_cache_keeps_carries_no_header_of_ours(httpd: Httpd, daemon: Daemon) -> None:
    """The client's reader looks at every byte; both are only removed on their way into the cache."""
    answers = [fetch(httpd.port("main"), "/cached/file.txt") for _ in range(3)]
    assert {answer.body for answer in answers} == {b"static\n"}
    assert "HIT" in answers[-1].headers["x-cache"]
    assert daemon.count == 0


@pytest.mark.parametrize(
    ("name", "status", "header"), [("file.txt", "HIT", "X: y"), ("again.txt", "REVALIDATE", "Cache-Control: max-age=0")]
)
def test_what_a_cache_kept_before_the_module_was_loaded_loses_its_headers(
    httpd: Httpd, daemon: Daemon, name: str, status: str, header: str
) -> None:
    """The cache sends it in the handler's place, past every filter that its own is put before."""
    uri = f"/kept/{name}"

    def kept() -> list[Path]:
        files = (httpd.root / "logs").rglob("*.header")
        return [path for path in files if uri.encode() in path.read_bytes()]

    fetch(httpd.port("main"), uri)
    wait_until(lambda: len(kept()) == 1, "it is kept")
    path = kept()[0]
    text = path.read_bytes()
    ours = f"X-Socket-Handoff: {daemon.path}\r\nX-Handoff-Data: old\r\nLast-Modified: ".encode()
    assert text.count(b"Last-Modified: ") == 1
    path.write_bytes(text.replace(b"Last-Modified: ", ours))
    answer = fetch(httpd.port("main"), uri, header)
    assert (answer.status, answer.body) == (200, b"static\n")
    assert answer.headers["x-cache"].startswith(status)
    assert daemon.count == 0


def test_a_client_is_handed_off_once_though_the_handler_fails_afterwards(
    httpd: Httpd, daemon: Daemon, target: Path
) -> None:
    """As mod_proxy_fcgi does where the application dies after its output; the ErrorDocument would hand off too."""
    with Client(httpd.port("main")) as client:
        client.get(f"/dying?t={target}&d=once&after=500")
        daemon.next().finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    assert " result=sent" in httpd.access_line("d=once&after=500")
    assert daemon.count == 1


@contextmanager
def http_backend(port: int, target: Path) -> Iterator[list[dict[str, str]]]:
    """Somebody else's server behind ProxyPass that tries to hand off; yields what it was asked."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({k.lower(): v for k, v in self.headers.items()})
            self.send_response(200)
            self.send_header("X-Socket-Handoff", str(target))
            self.send_header("X-Handoff-Data", '{"user_id": "spoofed"}')
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(b"backend\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("path", ["/backend", "/balanced", "/backend/x.php"])
def test_a_proxied_backend_cannot_hand_off(httpd: Httpd, daemon: Daemon, log: ErrorLog, path: str) -> None:
    with http_backend(httpd.backend, daemon.path) as seen:
        answer = fetch(httpd.port("main"), path, "X-Socket-Handoff: /run/x", "X-Handoff-Data: y")
    assert (answer.status, answer.body) == (200, b"backend\n")
    assert daemon.count == 0
    assert len(seen) == 1
    assert not {"x-socket-handoff", "x-handoff-data"} & seen[0].keys(), "passed on from the client"
    log.expect("X-Socket-Handoff is ignored: it came from a proxied backend")


@pytest.mark.parametrize("name", ["X-Socket-Handoff", "x-handoff-data"])
def test_the_clients_own_headers_never_reach_the_application(httpd: Httpd, name: str) -> None:
    assert fetch(httpd.port("main"), f"/t?rh={name}", f"{name}: /run/x").body == b"[]"
    assert fetch(httpd.port("main"), "/t?rh=x-other", "x-other: y").body == b"[y]"


# --- connections that cannot be given away ----------------------------------------------------


def test_http_0_9_is_refused(httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        everything = client.send(f"GET {uri(d='x')}\r\n".encode()).rest()
    assert b"505" in everything
    assert daemon.count == 0
    log.expect("handoff refused: the client speaks HTTP/0.9")


def test_an_unknown_connection_filter_is_refused(httpd: Httpd, daemon: Daemon, uri: Uri, log: ErrorLog) -> None:
    assert fetch(httpd.port("dumpio"), uri(d="x")).status == 500
    assert daemon.count == 0
    log.expect('handoff refused: the connection filter "dumpio_out" would be bypassed')


class Tls:
    """A TLS client that keeps the raw bytes which the server sent."""

    def __init__(self, port: int, *, alpn: list[str] | None = None) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if alpn is not None:
            context.set_alpn_protocols(alpn)
        self.raw = b""
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self._pump(self.tls.do_handshake)

    def _pump(self, step: Callable[[], object]) -> object:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                result = None
                wanted = True
            else:
                wanted = False
            if pending := self._out.read():
                self._sock.sendall(pending)
            if not wanted:
                return result
            part = self._sock.recv(65536)
            self.raw += part
            self._in.write(part) if part else self._in.write_eof()

    def sendall(self, data: bytes) -> None:
        self._pump(lambda: self.tls.write(data))

    def recv(self, size: int) -> bytes:
        try:
            data = self._pump(lambda: self.tls.read(size))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""
        assert isinstance(data, bytes)
        return data

    def close(self) -> None:
        self._sock.close()


def test_a_tls_client_gets_an_encrypted_500_and_never_plain_text(
    httpd: Httpd, target: Path, uri: Uri, log: ErrorLog
) -> None:
    with Daemon(target, answer=answer_ok) as daemon:
        tls = Tls(httpd.port("tls"))
        tls.sendall(f"GET {uri(d='secret')} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while part := tls.recv(65536):
            data += part
        tls.close()
        assert data.startswith(b"HTTP/1.1 500 ")
        assert b"</html>" in data
        assert b"HTTP/1." not in tls.raw
        assert daemon.count == 0
    log.expect("handoff refused: the client speaks TLS")


# HTTP/2, by hand: enough to send one request and read the status of its response.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing; lengths below 127, or in two continuation bytes."""

    def text(data: bytes) -> bytes:
        if len(data) < 127:
            return bytes([len(data)]) + data
        rest = len(data) - 127
        assert rest < 128 * 128
        return bytes([127, rest % 128 | 128, rest // 128]) + data

    return b"\x00" + text(name) + text(value)


def http2_status(sock: socket.socket | Tls, start: bytes, stream: int = 1) -> int:
    """Sends `start` and returns the status of that stream's response."""
    sock.sendall(start)
    data = b""
    while True:
        while len(data) < 9 or len(data) < 9 + int.from_bytes(data[:3], "big"):
            part = sock.recv(65536)
            assert part, "the connection ended without a response"
            data += part
        length = int.from_bytes(data[:3], "big")
        kind, _flags, number = struct.unpack(">BBI", data[3:9])
        payload, data = data[9 : 9 + length], data[9 + length :]
        if kind == 7:
            raise AssertionError(f"GOAWAY {payload!r}")
        if kind == 1 and number == stream:
            indexed = {0x88: 200, 0x8E: 500, 0x8D: 404}
            assert payload[0] in indexed, payload[:10]
            return indexed[payload[0]]


def http2_request(path: str) -> bytes:
    block = (
        literal(b":method", b"GET")
        + literal(b":scheme", b"http")
        + literal(b":authority", b"localhost")
        + literal(b":path", path.encode())
    )
    return PREFACE + frame(4, 0, 0, b"") + frame(1, 0x5, 1, block)


@pytest.fixture
def http2(httpd: Httpd) -> None:
    if httpd.mpm == "prefork" or not httpd.has_module("http2"):
        pytest.skip("NOT TESTED: mod_http2 does not run under prefork")


@pytest.mark.parametrize("how", ["h2c", "upgrade", "h2"])
def test_an_http2_client_gets_a_500(
    httpd: Httpd, http2: None, daemon: Daemon, uri: Uri, log: ErrorLog, how: str
) -> None:
    sock: socket.socket | Tls
    if how == "h2":
        sock = Tls(httpd.port("tls"), alpn=["h2"])
        assert sock.tls.selected_alpn_protocol() == "h2"
        status = http2_status(sock, http2_request(uri(d="x")))
    else:
        sock = socket.create_connection(("127.0.0.1", httpd.port("h2c")), timeout=PATIENCE)
        if how == "upgrade":
            sock.sendall(
                f"GET {uri(d='x')} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, "
                "HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n".encode()
            )
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            assert head.startswith(b"HTTP/1.1 101 ")
            status = http2_status(sock, PREFACE + frame(4, 0, 0, b""))
        else:
            status = http2_status(sock, http2_request(uri(d="x")))
    sock.close()
    assert status == 500
    assert daemon.count == 0
    log.expect("handoff refused: the client speaks HTTP/2")


def test_http2_without_a_handoff_is_served(httpd: Httpd, http2: None) -> None:
    with socket.create_connection(("127.0.0.1", httpd.port("h2c")), timeout=PATIENCE) as sock:
        assert http2_status(sock, http2_request("/t")) == 200
