# SPDX-License-Identifier: Apache-2.0
"""Declared targets: who may use which, what they are told, and what happens when one is down."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from handoff_httpd import MPM, ErrorLog, Httpd, wait_until
from handoff_standin import Client, Daemon, answer_ok, fetch, response

NOTES = "target=%<{handoff-target}n result=%<{handoff-result}n time=%<{handoff-time}n id=%<{handoff-id}n"
ACK, NAK = b"\x06", b"\x15"
Target = Callable[[str], Path]


@pytest.fixture(scope="module")
def server(built: None, run_dir: Path) -> Iterator[Httpd]:
    """A server with one target of each kind."""
    httpd = Httpd(mpm=MPM, run=run_dir)
    ok = run_dir / "ok"
    (httpd.root / "htdocs" / "front").mkdir()
    try:
        port = httpd.port("main")
        httpd.start(f"""
{httpd.load("headers", "status", "include", "filter", "deflate", "remoteip")}
{httpd.load("unique_id", "setenvif", "rewrite", "actions", "session", "session_cookie")}
Listen 127.0.0.1:{port}
Listen 127.0.0.1:{httpd.port("small")}
Listen 127.0.0.1:{httpd.port("proxied")}
LogFormat "%<q {NOTES} | {NOTES.replace("<", ">")} |" t
CustomLog {httpd.root}/logs/access t
LogLevel socket_handoff:trace2
DocumentRoot {httpd.root}/htdocs
<Location />
    SetHandler handoff-test
    Require all granted
</Location>
<Location /status>
    SetHandler server-status
</Location>
RemoteIPHeader X-Forwarded-For
RemoteIPInternalProxy 127.0.0.1

SocketHandoffTarget plain unix:{ok}/plain.sock
SocketHandoffTarget env unix:{ok}/env.sock envelope=on headers=Cookie,Accept-Language,X-Many
SocketHandoffTarget stream unix:{ok}/stream.sock envelope=on transport=stream
SocketHandoffTarget plainstream unix:{ok}/plainstream.sock transport=stream
SocketHandoffTarget packet unix:{ok}/packet.sock transport=seqpacket
SocketHandoffTarget ack unix:{ok}/ack.sock envelope=on ack=on timeout=400ms retries=0 maxfails=0
SocketHandoffTarget ackstream unix:{ok}/ackstream.sock ack=on transport=stream timeout=400ms
SocketHandoffTarget mine unix:{ok}/mine.sock user={os.geteuid()} maxfails=0
SocketHandoffTarget theirs unix:{ok}/theirs.sock user=65534 retries=0 maxfails=0
SocketHandoffTarget llm unix:{ok}/llm.sock envelope=on retries=0 backup=llm-standby maxfails=0
SocketHandoffTarget llm-standby unix:{ok}/standby.sock envelope=on retries=0 maxfails=0
SocketHandoffTarget mixed unix:{ok}/mixed.sock envelope=on retries=0 backup=plain maxfails=0
SocketHandoffTarget mixed2 unix:{ok}/mixed.sock envelope=on retries=0 backup=env maxfails=0
SocketHandoffTarget flaky unix:{ok}/flaky.sock retries=0 timeout=200ms maxfails=3 retry=1500ms
SocketHandoffTarget pair unix:{ok}/pair.sock retries=0 timeout=200ms maxfails=2 retry=2s backup=plain
SocketHandoffTarget link unix:{ok}/link.sock retries=0 maxfails=1 retry=30s
SocketHandoffTarget backed unix:{ok}/link.sock retries=0 maxfails=1 retry=30s backup=plain
SocketHandoffTarget gone unix:{ok}/gone.sock retries=0 maxfails=1 retry=30s
SocketHandoffTarget brief unix:{ok}/brief.sock retries=0 maxfails=1 retry=400ms
SocketHandoffTarget slow unix:{ok}/slow.sock timeout=300ms retries=10 maxfails=0
SocketHandoffTarget private unix:{ok}/private.sock
SocketHandoffAllow All
<Location /none>
    SocketHandoffAllow None
</Location>
<Location /some>
    SocketHandoffAllow plain env
</Location>
<Location /off>
    SocketHandoffEnabled Off
</Location>
<Location /cors>
    Header set Access-Control-Allow-Origin https://example.org
    Header always set Strict-Transport-Security max-age=60
    Header append Cache-Control no-transform
    Header unset X-Secret
    Header set X-Handoff-Data stolen
    ErrorDocument 503 "come back later"
</Location>
<Location /session>
    Session On
    SessionCookieName session path=/;HttpOnly
    SessionHeader X-Replace-Session
</Location>
<Location /deflate>
    SetOutputFilter DEFLATE
</Location>
<Directory {httpd.root}/htdocs/front>
    RewriteEngine On
    RewriteRule ^nobody$ - [E=!UNIQUE_ID]
    RewriteRule ^ /t [QSA]
</Directory>
<Location /action>
    SetHandler by-action
</Location>
Action by-action /t virtual
<Location /fallback>
    RewriteEngine On
    RewriteCond %{{QUERY_STRING}} anonymous
    RewriteRule ^ - [E=!UNIQUE_ID]
    ErrorDocument 403 /t?t=env&d=from-errordocument
    ErrorDocument 503 /t?t=env&d=from-errordocument
</Location>
<Location /sorry>
    ErrorDocument 403 /t?text=sorry&body=0
    ErrorDocument 503 /t?text=sorry&body=0
</Location>
<Location /page>
    ErrorDocument 404 "/t?t=env&d=from-errordocument&set=X-Page:yes"
</Location>
<VirtualHost 127.0.0.1:{httpd.port("proxied")}>
    RemoteIPProxyProtocol On
</VirtualHost>
<VirtualHost 127.0.0.1:{httpd.port("small")}>
    SocketHandoffMaxPayload 100000
</VirtualHost>
""")
        yield httpd
    finally:
        httpd.stop()


@pytest.fixture
def httpd(server: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return server


@pytest.fixture
def at(run_dir: Path) -> Target:
    """The socket of the target of this name."""
    return lambda name: run_dir / "ok" / f"{name}.sock"


def handed(
    httpd: Httpd, daemon: Daemon, uri: str, *headers: str, method: str = "GET", proto: str = "HTTP/1.1"
) -> object:
    """What a daemon gets for one request; the client gets an answer too."""
    with Client(httpd.port("main")) as client:
        client.get(uri, *headers, method=method, proto=proto)
        handoff = daemon.next()
        handoff.finish(response(b"bye"))
        assert client.answer().body == b"bye"
    return handoff


# --- who may use which ------------------------------------------------------------------------


def test_a_target_is_reached_by_its_name(httpd: Httpd, at: Target) -> None:
    with Daemon(at("plain"), answer=answer_ok):
        assert fetch(httpd.port("main"), "/t?t=plain&d=hello").body == b"data: hello\n\n"


@pytest.mark.parametrize("spelling", ["/run", "/var/run"])
def test_a_declared_targets_path_names_it_too(httpd: Httpd, at: Target, spelling: str) -> None:
    if not str(at("plain")).startswith("/run/"):
        pytest.skip("NOT TESTED: the tests' sockets are not below /run")
    path = spelling + str(at("plain")).removeprefix("/run")
    with Daemon(at("plain"), answer=answer_ok):
        assert fetch(httpd.port("main"), f"/t?t={path}&d=hello").body == b"data: hello\n\n"
    assert " target=plain " in httpd.access_line(f"t={path}&d=hello")


def test_a_path_that_no_target_declares_is_403_though_it_lies_below_the_prefix(
    httpd: Httpd, at: Target, log: ErrorLog
) -> None:
    with Daemon(at("undeclared")) as daemon:
        assert fetch(httpd.port("main"), f"/t?t={at('undeclared')}").status == 403
        assert daemon.accepted == 0
    log.expect('undeclared.sock" in X-Socket-Handoff is neither the name nor the path of a SocketHandoffTarget')


@pytest.mark.parametrize("name", ["Plain", "plain ", "nobody", "unix:/x", "../plain", ""])
def test_a_name_that_is_not_declared_is_403(httpd: Httpd, at: Target, log: ErrorLog, name: str) -> None:
    with Daemon(at("plain")) as daemon:
        assert fetch(httpd.port("main"), f"/t?t={quote(name)}&").status == 403
        assert daemon.accepted == 0
    log.expect("handoff refused: .* is neither the name nor the path")


@pytest.mark.parametrize(("where", "name"), [("/none", "plain"), ("/some", "private"), ("/none", "env")])
@pytest.mark.parametrize("by_path", [False, True])
def test_a_target_that_is_not_allowed_here_is_403(
    httpd: Httpd, at: Target, log: ErrorLog, where: str, name: str, by_path: bool
) -> None:
    with Daemon(at(name)) as daemon:
        assert fetch(httpd.port("main"), f"{where}?t={at(name) if by_path else name}").status == 403
        assert daemon.accepted == 0
    log.expect(f'may not use the target {name}; write "SocketHandoffAllow {name}"')


@pytest.mark.parametrize("name", ["plain", "env"])
def test_a_location_may_be_given_some_targets(httpd: Httpd, at: Target, name: str) -> None:
    with Daemon(at(name)) as daemon:
        handed(httpd, daemon, f"/some?t={name}")


def test_where_the_module_is_off_no_target_is_used(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("plain")) as daemon:
        assert fetch(httpd.port("main"), "/off?t=plain&body=3").body == b"bbb"
        assert daemon.accepted == 0
    log.expect("ignored: SocketHandoffEnabled is Off here")


def test_the_listener_must_be_the_user_that_is_declared(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("mine"), answer=answer_ok):
        assert fetch(httpd.port("main"), "/t?t=mine&d=a").body == b"data: a\n\n"
    with Daemon(at("theirs")) as daemon:
        answer = fetch(httpd.port("main"), "/t?t=theirs&d=a")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert daemon.count == 0, "an impostor got the client"
    log.expect(rf"who listens there is not the user= .*uid {os.geteuid()} listens, user=65534 is uid 65534")
    assert "result=wrong-user" in httpd.access_line("t=theirs")


# --- what a daemon is told --------------------------------------------------------------------


def test_the_envelope_tells_the_request(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon, Client(httpd.port("main")) as client:
        client.get(
            "/t%20x?t=env&d=hello+%22w%22&user=alice&status=201",
            "Cookie: a=1",
            "Cookie: b=2",
            "Accept-Language: de",
            "Authorization: secret",
        )
        port = client.sock.getsockname()[1]
        handoff = daemon.next()
        handoff.finish(response(b"bye"))
        client.answer()
    envelope = handoff.envelope
    identity = envelope.pop("id")
    assert envelope == {
        "handoff": 2,
        "method": "GET",
        "uri": "/t%20x?t=env&d=hello+%22w%22&user=alice&status=201",
        "protocol": "HTTP/1.1",
        "host": "localhost",
        "client": {"addr": "127.0.0.1", "port": port},
        "peer": {"addr": "127.0.0.1", "port": port},
        "scheme": "http",
        "target": "env",
        "user": "alice",
        "headers": [["Cookie", "a=1, b=2"], ["Accept-Language", "de"]],  # httpd joins them so
        "response_headers": [],
        "status": 201,
        "unread_body": 0,
        "prefetched": 0,
        "data": 'hello "w"',
    }
    assert identity and f"id={identity}" in httpd.access_line("user=alice&status=201")
    assert handoff.payload is None


@pytest.mark.parametrize("status", ["99999", "42", "-5"])
def test_a_status_that_is_none_is_500(httpd: Httpd, at: Target, log: ErrorLog, status: str) -> None:
    with Daemon(at("env")) as daemon:
        assert fetch(httpd.port("main"), f"/t?t=env&status={status}").status == 500
        assert daemon.count == 0
    log.expect(f"the application set the status {status}, allowed are 100 to 999")


def test_without_data_the_envelope_says_null(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        assert handed(httpd, daemon, "/t?t=env").envelope["data"] is None  # type: ignore[attr-defined]


def test_the_id_is_mod_unique_ids_and_each_requests_own(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        ids = [handed(httpd, daemon, f"/t?t=env&n={i}").envelope["id"] for i in range(3)]  # type: ignore[attr-defined]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[\w@-]{24,40}", text) for text in ids)


def test_the_true_client_behind_a_proxy_is_told_beside_the_peer(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        envelope = handed(httpd, daemon, "/t?t=env", "X-Forwarded-For: 2001:db8::7").envelope  # type: ignore[attr-defined]
    assert envelope["client"]["addr"] == "2001:db8::7"
    assert envelope["peer"]["addr"] == "127.0.0.1"
    assert envelope["peer"]["port"] > 0


def test_the_true_client_of_the_proxy_protocol_is_told_beside_the_peer(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon, Client(httpd.port("proxied")) as client:
        client.send(b"PROXY TCP4 192.0.2.7 192.0.2.1 51000 80\r\n").get("/t?t=env")
        port = client.sock.getsockname()[1]
        handoff = daemon.next()
        assert handoff.envelope["client"] == {"addr": "192.0.2.7", "port": 51000}
        assert handoff.envelope["peer"] == {"addr": "127.0.0.1", "port": port}
        handoff.finish(response(b"bye"))
        assert client.answer().body == b"bye"


@pytest.mark.parametrize(("proto", "told"), [("HTTP/1.0", "HTTP/1.0"), ("HTTP/1.1", "HTTP/1.1")])
def test_the_protocol_is_told(httpd: Httpd, at: Target, proto: str, told: str) -> None:
    with Daemon(at("env")) as daemon:
        assert handed(httpd, daemon, "/t?t=env", proto=proto).envelope["protocol"] == told  # type: ignore[attr-defined]


def test_head_is_handed_off_where_the_daemon_is_told(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon, Client(httpd.port("main")) as client:
        client.get("/t?t=env", method="HEAD")
        handoff = daemon.next()
        assert handoff.envelope["method"] == "HEAD"
        handoff.finish(response(b""))
        assert client.answer(head_only=True).status == 200


def test_head_is_answered_without_a_handoff_where_the_daemon_is_not_told(httpd: Httpd, at: Target) -> None:
    with Daemon(at("plain")) as daemon:
        assert fetch(httpd.port("main"), "/t?t=plain", method="HEAD").status == 200
        assert daemon.accepted == 0


def test_a_backup_that_is_not_told_of_head_is_not_tried_for_head(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("plain")) as daemon:
        assert fetch(httpd.port("main"), "/t?t=mixed", method="HEAD").status == 503
        assert daemon.accepted == 0
    log.expect("handoff to mixed failed")


@pytest.mark.parametrize("err", [None, 1])
def test_cookies_cors_and_cache_control_of_the_application_are_told(httpd: Httpd, at: Target, err: int | None) -> None:
    wanted = "&".join(
        f"set={quote(text, safe='')}"
        for text in (
            "Set-Cookie:a=1; Path=/",
            "Set-Cookie:b=2",
            "Access-Control-Allow-Origin:*",
            "Cache-Control:no-store",
            "Connection:X-Hop",
            "X-Hop:1",
            "Keep-Alive:5",
            "Transfer-Encoding:chunked",
            "Content-Length:17",
            "Content-Encoding:br",
            "ETag:x",
            "Upgrade:x",
            "Connection:X-Other",
            "X-Other:2",
            "Digest:x",
            "Repr-Digest:x",
            "Content-Location:/x",
            "Content-MD5:x",
            "Proxy-Connection:x",
            "Trailer:x",
        )
    )
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, f"/t?t=env&d=x&{wanted}" + ("&err=1" if err else ""))
    assert handoff.envelope["response_headers"] == [  # type: ignore[attr-defined]
        ["Set-Cookie", "a=1; Path=/"],
        ["Set-Cookie", "b=2"],
        ["Access-Control-Allow-Origin", "*"],
        ["Cache-Control", "no-store"],
    ]


def test_what_mod_headers_would_add_is_told_too(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/cors?t=env&set=Cache-Control:private&set=X-Secret:1&set=X-Own:2")
    assert sorted(handoff.envelope["response_headers"]) == [  # type: ignore[attr-defined]
        ["Access-Control-Allow-Origin", "https://example.org"],
        ["Cache-Control", "private, no-transform"],
        ["Strict-Transport-Security", "max-age=60"],
        ["X-Own", "2"],
    ]


def test_what_mod_headers_adds_is_not_added_twice_where_the_handoff_fails(
    httpd: Httpd, at: Target, log: ErrorLog
) -> None:
    with Client(httpd.port("main")) as client:
        raw = client.get("/cors?t=llm", "Connection: close").rest()
    assert b" 503 " in raw.splitlines()[0]
    assert raw.lower().count(b"strict-transport-security:") == 1
    log.expect("handoff to llm failed", times=1)
    log.expect("handoff to llm-standby failed", times=1)


@pytest.mark.parametrize("err", ["", "&err=1"])
@pytest.mark.parametrize("by", ["env", "mixed2"])
def test_a_new_session_becomes_a_cookie_and_is_told_to_nobody_else(
    httpd: Httpd, at: Target, log: ErrorLog, err: str, by: str
) -> None:
    """mod_session takes it out of a header, in a filter that the response never reaches; also with a backup."""
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, f"/session?t={by}&set=X-Replace-Session:user%3Dalice&set=X-Own:2{err}")
    told = handoff.envelope["response_headers"]  # type: ignore[attr-defined]
    cookies = [value for name, value in told if name == "Set-Cookie"]
    assert len(cookies) == 1 and cookies[0].startswith("session=") and "user=alice" in cookies[0]
    assert {name for name, _ in told} <= {"Set-Cookie", "X-Own", "Cache-Control"}
    if by == "mixed2":
        log.expect("handoff to mixed2 failed")


def test_a_new_session_becomes_a_cookie_where_the_handoff_fails(httpd: Httpd, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        raw = client.get("/session?t=llm&set=X-Replace-Session:user%3Dalice&err=1", "Connection: close").rest()
    assert b" 503 " in raw.splitlines()[0]
    assert raw.count(b"Set-Cookie: session=") == 1 and b"X-Replace-Session" not in raw
    log.expect("handoff to llm failed")
    log.expect("handoff to llm-standby failed")


def test_a_response_header_that_no_header_may_be_is_left_out(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/t?t=env&set=X-Bad:a%0D%0ASet-Cookie:%20x&set=X-Good:1")
    assert handoff.envelope["response_headers"] == [["X-Good", "1"]]  # type: ignore[attr-defined]
    log.expect('response header "X-Bad" is not passed on')


def test_an_errordocument_hands_off_the_request_that_the_client_made(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/page?ret=404&body=0", method="GET")
    envelope = handoff.envelope  # type: ignore[attr-defined]
    assert envelope["uri"] == "/page?ret=404&body=0"
    assert (envelope["status"], envelope["data"]) == (404, "from-errordocument")


def test_an_announced_body_that_was_never_sent_is_told(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        known = handed(httpd, daemon, "/t?t=env", "Content-Length: 123", "Expect: 100-continue", method="POST")
        unknown = handed(httpd, daemon, "/t?t=env", "Transfer-Encoding: chunked", "Expect: 100-continue", method="POST")
    assert known.envelope["unread_body"] == 123  # type: ignore[attr-defined]
    assert unknown.envelope["unread_body"] == -1  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 150, 5000])
@pytest.mark.parametrize("body", [b"", b"p" * 20_000])
def test_bytes_of_a_pipelined_request_are_counted(httpd: Httpd, at: Target, count: int, body: bytes) -> None:
    """Every byte is Apache's or still there, also where more wait than any buffer holds."""
    behind = b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n" * count
    head = f"POST /t?t=env HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with Daemon(at("env")) as daemon, Client(httpd.port("main")) as client:
        client.send(head + body + behind)
        handoff = daemon.next()
        prefetched = handoff.envelope["prefetched"]
        assert prefetched <= 16_000, "no more than httpd reads at once, for the request itself"
        rest = handoff.read(len(behind) - prefetched)
        assert rest == behind[prefetched:], "the daemon reads on where Apache stopped"
        assert prefetched == len(behind) or count > 1
        handoff.finish(response(b"bye"))
        assert client.rest().endswith(b"bye")


@pytest.mark.parametrize("size", [5, 4_000, 300_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_did_not_wait_for_100_continue_is_drained(
    httpd: Httpd, at: Target, size: int, chunked: bool
) -> None:
    """A client need not wait (RFC 9110 10.1.1). Nobody may read its body in halves."""
    body = b"p" * size
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body) if chunked else body
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = f"POST /t?t=env&sleep=50 HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n{length}\r\n\r\n"
    with Daemon(at("env")) as daemon, Client(httpd.port("main")) as client:
        client.send(head.encode() + sent)
        handoff = daemon.next()
        assert (handoff.envelope["unread_body"], handoff.envelope["prefetched"]) == (0, 0)
        assert handoff.readable() == b""
        handoff.finish(response(b"bye"))
        assert client.rest() == response(b"bye"), "and no 100 Continue"


def test_a_silent_handler_makes_a_client_that_waits_send_its_body(httpd: Httpd, at: Target) -> None:
    """httpd itself asks for the body before the output ends, and bounds that by Timeout and mod_reqtimeout."""
    with Daemon(at("env")) as daemon, Client(httpd.port("main")) as client:
        client.get("/t?t=env&silent=1", "Content-Length: 5", "Expect: 100-continue", method="POST")
        assert client.answer().status == 100
        assert daemon.handoffs.empty()
        client.send(b"hello")
        handoff = daemon.next()
        assert handoff.envelope["unread_body"] == 0
        assert handoff.readable() == b""
        handoff.finish(response(b"bye"))
        assert client.answer().body == b"bye"


# --- what the access log is told ----------------------------------------------------------------


def noted(httpd: Httpd, needle: str) -> dict[str, str]:
    """The notes of that request, which are the same whichever end of a chain of redirects is asked."""
    first, last = httpd.access_line(needle).split(" ", 1)[1].rstrip(" |").split(" | ")
    assert first == last
    return dict(word.split("=", 1) for word in first.split())


@pytest.mark.parametrize("path", ["/front/page", "/front/nobody", "/action"])
def test_behind_an_internal_redirect_the_log_tells_the_same(httpd: Httpd, at: Target, path: str) -> None:
    """A front controller by mod_rewrite in a directory, with and without mod_unique_id, and mod_actions."""
    if path == "/action" and not httpd.has_module("actions"):
        pytest.skip("NOT TESTED: mod_actions is not there")
    query = f"t=env&d=x&by={path.replace('/', '.')}"
    with Daemon(at("env")) as daemon:
        envelope = handed(httpd, daemon, f"{path}?{query}").envelope  # type: ignore[attr-defined]
    notes = noted(httpd, query)
    assert (notes["target"], notes["result"], notes["id"]) == ("env", "sent", envelope["id"])
    assert 0 < int(notes["time"]) < 2_000_000
    assert envelope["uri"] == f"{path}?{query}"


def test_behind_an_internal_redirect_the_log_tells_a_failure_too(httpd: Httpd, log: ErrorLog) -> None:
    assert fetch(httpd.port("main"), "/front/page?t=ack&d=redirected").status == 503
    log.expect("handoff to ack failed: there is no such socket")
    notes = noted(httpd, "t=ack&d=redirected")
    assert (notes["target"], notes["result"]) == ("ack", "no-daemon")


@pytest.mark.parametrize("anonymous", ["", "&anonymous"])
@pytest.mark.parametrize(
    ("asked", "message"), [("llm", "handoff to llm-standby failed"), ("nobody", "neither the name nor")]
)
def test_an_errordocument_that_hands_off_is_what_the_log_tells(
    httpd: Httpd, at: Target, log: ErrorLog, asked: str, message: str, anonymous: str
) -> None:
    """The daemon has the client: the failure before is told by the error log."""
    query = f"t={asked}&d=fallback{anonymous}"
    with Daemon(at("env")) as daemon:
        envelope = handed(httpd, daemon, f"/fallback?{query}&").envelope  # type: ignore[attr-defined]
    assert envelope["data"] == "from-errordocument"
    if asked == "llm":
        log.expect("handoff to llm failed")
    log.expect(message)
    notes = noted(httpd, f"{query}&")
    assert (notes["target"], notes["result"], notes["id"]) == ("env", "sent", envelope["id"])


def test_an_errordocument_that_is_a_page_leaves_the_failure_in_the_log(httpd: Httpd, log: ErrorLog) -> None:
    answer = fetch(httpd.port("main"), "/sorry?t=ack&d=page")
    assert (answer.status, answer.body) == (503, b"sorry")
    log.expect("handoff to ack failed: there is no such socket")
    assert noted(httpd, "t=ack&d=page")["result"] == "no-daemon"


def test_the_log_names_no_id_that_the_daemon_was_not_told(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    """The target has an envelope, its backup has none."""
    with Daemon(at("plain")) as daemon:
        handed(httpd, daemon, "/t?t=mixed&d=no-id")
    log.expect("handoff to mixed failed")
    notes = noted(httpd, "t=mixed&d=no-id")
    assert (notes["target"], notes["result"], notes["id"]) == ("plain", "sent", "-")


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["env", "stream"])
@pytest.mark.parametrize("size", [0, 1, 65536])
def test_a_response_body_of_up_to_64_kib_stands_in_the_envelope(httpd: Httpd, at: Target, name: str, size: int) -> None:
    kind = socket.SOCK_STREAM if name == "stream" else socket.SOCK_SEQPACKET
    with Daemon(at(name), kind=kind) as daemon:
        handoff = handed(httpd, daemon, f"/t?t={name}&from=response-body&body={size}")
    assert handoff.envelope["data"] == "b" * size  # type: ignore[attr-defined]
    assert "payload" not in handoff.envelope  # type: ignore[attr-defined]
    assert handoff.payload is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["env", "stream"])
@pytest.mark.parametrize("size", [65537, 3_000_000])
def test_a_larger_body_comes_as_a_sealed_memfd(httpd: Httpd, at: Target, name: str, size: int) -> None:
    kind = socket.SOCK_STREAM if name == "stream" else socket.SOCK_SEQPACKET
    with Daemon(at(name), kind=kind) as daemon:
        handoff = handed(httpd, daemon, f"/t?t={name}&from=Response-Body&body={size}&flush=1")
    assert handoff.envelope["data"] is None  # type: ignore[attr-defined]
    assert handoff.envelope["payload"] == {"memfd": True, "length": size}  # type: ignore[attr-defined]
    assert handoff.payload == b"b" * size  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["d=%FF%FE", "from=response-body&bin=2"])
def test_data_that_is_no_utf_8_comes_as_a_memfd_byte_for_byte(httpd: Httpd, at: Target, by: str) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, f"/t?t=env&{by}")
    assert handoff.payload == (b"\xff\xfe" if by.startswith("d=") else b"\xff\xff")  # type: ignore[attr-defined]


def test_a_large_header_comes_as_a_memfd_too(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/t?t=env&dn=400000")
    assert handoff.payload == b"d" * 400_000  # type: ignore[attr-defined]


def test_data_that_grows_in_json_comes_as_a_memfd(httpd: Httpd, at: Target) -> None:
    """60,000 control bytes would be 360,000 bytes of escapes, more than a socket takes."""
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/t?t=env&from=response-body&ctl=60000")
    assert handoff.payload == b"\x01" * 60_000  # type: ignore[attr-defined]


def test_a_body_is_the_data_of_a_plain_message_as_it_is(httpd: Httpd, at: Target) -> None:
    with Daemon(at("plain")) as daemon:
        assert handed(httpd, daemon, "/t?t=plain&from=response-body&body=150000").data == b"b" * 150_000  # type: ignore[attr-defined]
        assert handed(httpd, daemon, "/t?t=plain&from=response-body&body=0").data == b"\0"  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [300_000, 2_000_000])
def test_a_body_that_a_plain_message_cannot_take_is_500(httpd: Httpd, at: Target, log: ErrorLog, size: int) -> None:
    with Daemon(at("plain")) as daemon:
        assert fetch(httpd.port("main"), f"/t?t=plain&from=response-body&body={size}").status == 500
        assert daemon.count == 0
    log.expect("handoff to plain failed: the message is too large")


def test_a_body_above_the_limit_is_500_and_names_the_directive(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("env"), answer=answer_ok) as daemon:
        assert fetch(httpd.port("small"), "/t?t=env&from=response-body&body=100000").status == 200
        assert fetch(httpd.port("small"), "/t?t=env&from=response-body&body=100001").status == 500
        assert daemon.count == 1
    log.expect("more than 100000 bytes of data; let it write less, or raise SocketHandoffMaxPayload")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("from=request-body", 'X-Handoff-Data-From is "request-body", allowed is response-body'),
        ("from=", 'X-Handoff-Data-From is "", allowed is response-body'),
        ("from=response-body&d=x", "sent both X-Handoff-Data and X-Handoff-Data-From"),
    ],
)
def test_headers_that_contradict_each_other_are_500(
    httpd: Httpd, at: Target, log: ErrorLog, arguments: str, message: str
) -> None:
    with Daemon(at("env")) as daemon:
        assert fetch(httpd.port("main"), f"/t?t=env&{arguments}").status == 500
        assert daemon.accepted == 0
    log.expect(re.escape(message))


def test_data_from_a_body_is_not_compressed(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        handoff = handed(httpd, daemon, "/deflate?t=env&from=response-body&body=5000", "Accept-Encoding: gzip")
    assert handoff.envelope["data"] == "b" * 5000  # type: ignore[attr-defined]
    assert handoff.envelope["response_headers"] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("err", ["", "&err=1"])
def test_data_that_the_application_compressed_is_refused(httpd: Httpd, at: Target, log: ErrorLog, err: str) -> None:
    """The daemon would get gzip's bytes and not be told: Content-Encoding describes a body that nobody sends."""
    with Daemon(at("env")) as daemon:
        answer = fetch(httpd.port("main"), f"/t?t=env&from=response-body&enc=gzip&body=9&coded=1{err}")
        assert answer.status == 500 and "content-encoding" not in answer.headers
        assert daemon.accepted == 0
        handed(httpd, daemon, f"/t?t=env&from=response-body&enc=identity&body=9{err}")
        handed(httpd, daemon, f"/t?t=env&d=x&enc=gzip&body=9{err}")
    log.expect(r"is encoded \(Content-Encoding: gzip\), which the daemon would not know; switch that off")
    assert noted(httpd, f"coded=1{err} ")["result"] == "refused-data"


def test_an_application_that_fails_in_the_middle_of_its_data_is_not_handed_off(httpd: Httpd, at: Target) -> None:
    with Daemon(at("env")) as daemon:
        assert fetch(httpd.port("main"), "/t?t=env&from=response-body&body=10&flush=1&fail=502").status == 502
        assert daemon.accepted == 0


# --- transport and acknowledgement ------------------------------------------------------------


def test_transport_stream_reaches_a_stream_socket(httpd: Httpd, at: Target) -> None:
    with Daemon(at("stream"), kind=socket.SOCK_STREAM) as daemon:
        assert handed(httpd, daemon, "/t?t=stream&d=x").envelope["data"] == "x"  # type: ignore[attr-defined]


def test_a_transport_that_is_not_set_is_what_the_declared_daemon_listens_on(httpd: Httpd, at: Target) -> None:
    with Daemon(at("plain"), kind=socket.SOCK_STREAM) as daemon:
        assert handed(httpd, daemon, "/t?t=plain&d=x").data == b"x"  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [8_100, 100_000, 212_960])
def test_data_of_up_to_the_buffer_of_a_stream_socket_arrives_whole(httpd: Httpd, at: Target, size: int) -> None:
    default = int(Path("/proc/sys/net/core/wmem_default").read_text())
    if size > default - 32:
        pytest.skip(f"net.core.wmem_default is {default} here")
    with Daemon(at("plainstream"), kind=socket.SOCK_STREAM) as daemon:
        assert handed(httpd, daemon, f"/t?t=plainstream&dn={size}").data == b"d" * size  # type: ignore[attr-defined]


def test_data_that_does_not_fit_into_a_stream_sockets_buffer_is_500(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    size = int(Path("/proc/sys/net/core/wmem_default").read_text())
    with Daemon(at("plainstream"), kind=socket.SOCK_STREAM) as daemon:
        assert fetch(httpd.port("main"), f"/t?t=plainstream&dn={size}").status == 500
        assert daemon.count == 0
    log.expect(f"the message is too large; .*has {size} bytes, a message takes {size - 32}")


@pytest.mark.parametrize(("name", "kind"), [("stream", socket.SOCK_SEQPACKET), ("packet", socket.SOCK_STREAM)])
def test_a_transport_that_is_set_is_not_guessed(
    httpd: Httpd, at: Target, log: ErrorLog, name: str, kind: socket.SocketKind
) -> None:
    with Daemon(at(name), kind=kind) as daemon:
        assert fetch(httpd.port("main"), f"/t?t={name}").status == 503
        assert daemon.accepted == 0
    log.expect("another kind of socket; let it listen on SOCK_SEQPACKET, or correct transport=")


@pytest.mark.parametrize(("name", "kind"), [("ack", socket.SOCK_SEQPACKET), ("ackstream", socket.SOCK_STREAM)])
def test_an_acknowledged_client_is_handed_off(httpd: Httpd, at: Target, name: str, kind: socket.SocketKind) -> None:
    with Daemon(at(name), kind=kind, ack=ACK) as daemon:
        handed(httpd, daemon, f"/t?t={name}&d=x")


@pytest.mark.parametrize(
    ("ack", "message", "result"),
    [
        (NAK, "the daemon takes no more clients now", "daemon-busy"),
        (b"x", "something else than an acknowledgement", "daemon-failed"),
        (None, "did not acknowledge it in time", "daemon-silent"),
    ],
)
def test_without_an_ack_the_client_stays_and_gets_503(
    httpd: Httpd, at: Target, log: ErrorLog, ack: bytes | None, message: str, result: str
) -> None:
    started = time.monotonic()
    with Daemon(at("ack"), ack=ack) as daemon:
        answer = fetch(httpd.port("main"), f"/t?t=ack&case={result}")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert daemon.count == 0
    assert time.monotonic() - started < 2
    log.expect(message)
    assert f"result={result}" in httpd.access_line(f"case={result}")


def test_a_daemon_that_dies_before_its_ack_swallows_no_client(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    """Killed between accept and receive: a 503, where without ack the client would be lost."""
    path = at("ack")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(8)
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        answer = fetch(httpd.port("main"), "/t?t=ack")
        thread.join()
    path.unlink()
    assert answer.status == 503
    log.expect("hung up instead of acknowledging")


# --- failure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["missing", "dead"])
def test_the_backup_takes_over(httpd: Httpd, at: Target, log: ErrorLog, why: str) -> None:
    at("llm").unlink(missing_ok=True)
    if why == "dead":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(at("llm")))
            at("llm").chmod(0o666)
    with Daemon(at("standby")) as daemon:
        handoff = handed(httpd, daemon, f"/t?t=llm&d=x&why={why}")
    at("llm").unlink(missing_ok=True)
    assert handoff.envelope["target"] == "llm-standby"  # type: ignore[attr-defined]
    log.expect("handoff to llm failed: .*; its backup llm-standby is tried")
    assert " target=llm-standby result=sent " in httpd.access_line(f"why={why}")


@pytest.mark.parametrize("data", ["from=response-body&body=100000", "dn=100000", "d=%FF"])
def test_data_beside_the_message_reaches_a_backup(httpd: Httpd, at: Target, log: ErrorLog, data: str) -> None:
    with Daemon(at("standby")) as daemon:
        handoff = handed(httpd, daemon, f"/t?t=llm&{data}")
    assert len(handoff.payload) in (1, 100_000)  # type: ignore[attr-defined]
    log.expect("handoff to llm failed: .*; its backup llm-standby is tried")


def test_an_error_is_not_kept_by_caches_whatever_the_application_allowed(
    httpd: Httpd, at: Target, log: ErrorLog
) -> None:
    wanted = "set=Cache-Control:public,max-age%3D600&set=Expires:x&set=Content-Disposition:attachment&err=1"
    answer = fetch(httpd.port("main"), f"/t?t=llm&{wanted}")
    assert (answer.status, answer.headers["cache-control"]) == (503, "no-store")
    assert not {"expires", "content-disposition"} & set(answer.headers)
    log.expect("handoff to llm failed")
    log.expect("handoff to llm-standby failed")


def test_a_skipped_targets_503_says_for_how_long(httpd: Httpd, log: ErrorLog) -> None:
    answers = [fetch(httpd.port("main"), "/t?t=gone") for _ in range(2)]
    assert [answer.headers["retry-after"] for answer in answers] == ["2", "30"]
    log.expect("handoff to gone failed")
    log.expect("target gone failed 1 times in a row and is skipped for 30000 ms")


@pytest.mark.parametrize("what", ["symlink", "file"])
def test_a_target_that_is_no_socket_stays_403_and_is_never_skipped(
    httpd: Httpd, at: Target, log: ErrorLog, what: str
) -> None:
    """Waiting would not mend it, and a 503 would hide it."""
    path = at("link")
    path.symlink_to("plain.sock") if what == "symlink" else path.touch()
    try:
        with Daemon(at("plain")) as daemon:
            assert [fetch(httpd.port("main"), "/t?t=link").status for _ in range(4)] == [403] * 4
            assert daemon.accepted == 0
            for _ in range(2):
                handed(httpd, daemon, "/t?t=backed")
    finally:
        path.unlink()
    message = "a symlink lies on the way" if what == "symlink" else "that is not a socket"
    log.expect(f"handoff to link failed: {message}", times=4)
    log.expect(f"handoff to backed failed: {message}.*its backup plain is tried", times=2)


def test_a_request_that_does_not_fit_does_not_keep_a_target_skipped(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    """It may get the one try after the time of skipping, and learns nothing of the target."""
    assert fetch(httpd.port("main"), "/t?t=brief").status == 503
    log.expect("handoff to brief failed: there is no such socket")
    log.expect("target brief failed 1 times in a row")
    with Daemon(at("brief"), answer=answer_ok):
        wait_until(
            lambda: fetch(httpd.port("main"), "/t?t=brief&dn=300000").status == 500, "the time of skipping is over"
        )
        assert fetch(httpd.port("main"), "/t?t=brief&d=fits").body == b"data: fits\n\n"
    log.expect("handoff to brief failed: the message is too large")
    log.expect("target brief works again")


def test_a_backup_of_another_form_gets_its_own_message(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    with Daemon(at("plain")) as daemon:
        assert handed(httpd, daemon, "/t?t=mixed&d=hello").data == b"hello"  # type: ignore[attr-defined]
        assert handed(httpd, daemon, "/t?t=mixed&from=response-body&text=hello").data == b"hello"  # type: ignore[attr-defined]
        assert handed(httpd, daemon, "/t?t=mixed&dn=100000").data == b"d" * 100_000  # type: ignore[attr-defined]
    log.expect("handoff to mixed failed", times=3)


def test_with_target_and_backup_down_the_client_gets_one_complete_503(httpd: Httpd, log: ErrorLog) -> None:
    with Client(httpd.port("main")) as client:
        answer = client.get("/t?t=llm&both=down").answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert client.rest() == b"", "one answer, and httpd closes the connection of a 503"
    log.expect("handoff to llm failed", times=1)
    log.expect("handoff to llm-standby failed", times=1)
    assert " target=llm-standby result=no-daemon " in httpd.access_line("both=down")


def test_the_targets_timeout_bounds_connecting_with_all_retries(httpd: Httpd, log: ErrorLog) -> None:
    started = time.monotonic()
    assert fetch(httpd.port("main"), "/t?t=slow").status == 503
    assert time.monotonic() - started < 1.0, "ten doubling pauses would be ten seconds"
    log.expect("handoff to slow failed")


def test_after_some_failures_a_target_is_skipped_and_then_tried_again(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    for n in range(3):
        assert fetch(httpd.port("main"), f"/t?t=flaky&fails={n}").status == 503
    log.expect("handoff to flaky failed", times=3)
    log.expect("target flaky failed 3 times in a row and is skipped for 1500 ms", times=1)
    with Daemon(at("flaky"), answer=answer_ok) as daemon:
        answer = fetch(httpd.port("main"), "/t?t=flaky&skipped=1")
        assert (answer.status, answer.headers["retry-after"]) in ((503, "1"), (503, "2"))
        assert daemon.accepted == 0
        assert " result=skipped " in httpd.access_line("skipped=1")
        deadline = time.monotonic() + 5
        while fetch(httpd.port("main"), "/t?t=flaky&d=back").status == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(5):
            assert fetch(httpd.port("main"), "/t?t=flaky&d=back").body == b"data: back\n\n"
    log.expect("target flaky works again")


def test_while_a_target_is_skipped_its_backup_is_used_at_once(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    """A hanging target costs its timeout twice, and not on every request."""
    at("pair").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as full, Daemon(at("plain"), answer=answer_ok):
        full.bind(str(at("pair")))
        at("pair").chmod(0o666)
        full.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(str(at("pair")))  # the backlog of 0 holds one
            times = []
            for _ in range(8):
                started = time.monotonic()
                assert fetch(httpd.port("main"), "/t?t=pair&d=x").body == b"data: x\n\n"
                times.append(time.monotonic() - started)
    at("pair").unlink()
    assert sum(t > 0.15 for t in times) == 2, times
    log.expect("handoff to pair failed: the daemon's backlog stayed full", times=2)
    log.expect("target pair failed 2 times in a row and is skipped for 2000 ms")


def test_the_log_tells_how_long_the_handoff_took(httpd: Httpd, at: Target) -> None:
    with Daemon(at("plain")) as daemon:
        handed(httpd, daemon, "/t?t=plain&timed=1")
    line = httpd.access_line("timed=1")
    assert 0 < int(re.search(r" time=(\d+) ", line)[1]) < 2_000_000  # type: ignore[index]


def test_trace2_tells_every_step_and_never_the_data(httpd: Httpd, at: Target, log: ErrorLog) -> None:
    cookie = "Cookie: very-private"
    with Daemon(at("env")) as daemon:
        handed(httpd, daemon, "/t?t=env&d=confidential&set=Set-Cookie:very-private", cookie)
    wait_until(lambda: bool(log.matching("client handed to")), "Apache's last line, written when the client is gone")
    lines = [line.split(": ", 2)[-1] for line in log.matching("socket_handoff:")]
    steps = [
        r"asked for a handoff to env with data in a header",
        r"0 bytes of the request's body were left unread",
        r"envelope [\w@-]+: 1 request and 1 response headers, data inside, 0 bytes .*, 0 bytes read ahead",
        r"connecting to env, message of \d+ bytes",
        r"client handed to env in \d+ us: seqpacket, message of \d+ bytes with 1 descriptor, 12 bytes of data",
    ]
    assert len(lines) == len(steps), lines
    assert [step for step, line in zip(steps, lines, strict=True) if not re.search(step, line)] == []
    assert not any("confidential" in line or "private" in line for line in lines)
