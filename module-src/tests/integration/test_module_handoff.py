# SPDX-License-Identifier: Apache-2.0
"""A permitted handoff: every byte arrives, nothing of anybody else's is lost, Apache lets go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from handoff_httpd import WORKERS, Httpd, wait_until
from handoff_standin import Client, Daemon, Handoff, fetch, response

Uri = Callable[..., str]


@pytest.mark.parametrize("proto", ["HTTP/1.0", "HTTP/1.1"])
def test_the_daemons_answer_reaches_the_client_whole(httpd: Httpd, answering: Daemon, uri: Uri, proto: str) -> None:
    with Client(httpd.port("main")) as client:
        everything = client.get(uri(d="hello"), proto=proto).rest()
    assert everything == response(b"data: hello\n\n")


def test_without_data_the_message_is_one_nul(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri())
        handoff = daemon.next()
        handoff.finish(response(b""))
        client.rest()
    assert handoff.data == b"\0"


def test_the_socket_arrives_in_the_documented_state(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x"))
        handoff = daemon.next()
        assert handoff.nonblocking
        assert handoff.options == {"nodelay": 1, "cork": 0, "keepalive": 1, "linger": (0, 0)}
        assert handoff.client.getpeername() == client.sock.getsockname()
        handoff.finish(response(b""))
        client.rest()


def test_a_later_request_of_a_keep_alive_connection_is_handed_off(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        assert client.get("/plain.html").answer().body == b"plain page\n"
        assert client.get("/t").answer().body == b"bb"
        assert client.get(uri(d="third")).rest() == response(b"data: third\n\n")


@pytest.mark.parametrize("name", ["big.bin", "sent.bin"])
def test_a_large_file_before_the_handoff_is_complete(httpd: Httpd, answering: Daemon, uri: Uri, name: str) -> None:
    """Read by httpd, and sent by the kernel (EnableSendfile On)."""
    with Client(httpd.port("main")) as client:
        big = client.get(f"/{name}").answer()
        assert big.body == bytes(range(256)) * 12_000
        assert client.get(uri(d="after")).rest() == response(b"data: after\n\n")


def test_five_megabytes_reach_a_slow_reader_in_order(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    body = b"".join(b"%09d\n" % n for n in range(500_000))
    with Client(httpd.port("main"), rcvbuf=16_384) as client:
        client.get(uri(d="x"))
        handoff = daemon.next()
        sender = Thread(target=handoff.finish, args=(response(body),))
        sender.start()
        everything = client.rest(step=4096)
        client.sock.close()
        sender.join()
    assert everything == response(body)


def test_late_bytes_from_the_client_cost_nothing_when_the_daemon_lingers(
    httpd: Httpd, daemon: Daemon, uri: Uri
) -> None:
    body = b"x" * 5_000_000
    with Client(httpd.port("main"), rcvbuf=16_384) as client:
        client.get(uri(d="x"))
        handoff = daemon.next()
        client.send(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
        sender = Thread(target=handoff.finish, args=(response(body),))
        sender.start()
        everything = client.rest()
        client.sock.close()
        sender.join()
    assert everything == response(body)


def test_twelve_streams_on_four_workers_leave_the_server_free(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    clients = [Client(httpd.port("main")).get(uri(d=n)) for n in range(3 * WORKERS)]
    handoffs = [daemon.next() for _ in clients]
    started = time.monotonic()
    assert fetch(httpd.port("main"), "/plain.html").body == b"plain page\n"
    took = time.monotonic() - started
    wait_until(lambda: httpd.busy_workers() == 0, "only the status request is busy")
    for handoff in handoffs:
        handoff.finish(response(b"done " + handoff.data))
    for n, client in enumerate(clients):
        assert client.rest() == response(b"done %d" % n)
        client.sock.close()
    assert took < 0.5


# --- pipelining -----------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["/t?body=5", "/plain.html", "/t?status=404&body=5"])
@pytest.mark.parametrize("count", [1, 3])
def test_pipelined_responses_before_the_handoff_are_not_lost(
    httpd: Httpd, answering: Daemon, uri: Uri, earlier: str, count: int
) -> None:
    with Client(httpd.port("main")) as client:
        request = f"GET {earlier} HTTP/1.1\r\nHost: x\r\n\r\n" * count
        client.send(request.encode()).get(uri(d="last"))
        for _ in range(count):
            assert client.answer().body in (b"bbbbb", b"plain page\n")
        assert client.rest() == response(b"data: last\n\n")


def test_a_request_pipelined_after_the_handoff_is_not_answered(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        both = f"GET {uri(d='first')} HTTP/1.1\r\nHost: x\r\n\r\nGET /t HTTP/1.1\r\nHost: x\r\n\r\n"
        assert client.send(both.encode()).rest() == response(b"data: first\n\n")


# --- request bodies -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4_000, 300_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_the_application_left_unread_is_drained_before_the_handoff(
    httpd: Httpd, daemon: Daemon, uri: Uri, size: int, chunked: bool
) -> None:
    """Neither Apache and the daemon, nor two of them, may read one body in halves."""
    with Client(httpd.port("main")) as client:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        client.get(uri(d="x", flush=1, body=10), length, method="POST")
        assert fetch(httpd.port("main"), "/plain.html").status == 200
        assert daemon.handoffs.empty(), "handed off before the body was read"
        body = b"p" * size
        client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (size, body) if chunked else body)
        handoff = daemon.next()
        assert handoff.readable() == b""
        handoff.finish(response(b"got it"))
        assert client.rest() == response(b"got it")


def test_a_body_that_the_application_read_changes_nothing(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.post(uri(d="x", read=1), b"p" * 1_500_000)
        assert client.rest() == response(b"data: x\n\n")


def test_a_silent_handler_is_handed_off_after_httpd_read_its_body(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.post(uri(d="x", silent=1), b"p" * 1_500_000)
        assert client.rest() == response(b"data: x\n\n")


def test_a_client_that_waits_for_100_continue_is_handed_off_at_once(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x"), "Content-Length: 5", "Expect: 100-continue", method="POST")
        assert client.rest() == response(b"data: x\n\n")


# --- what the application does --------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 302, 304, 404, 500, 503])
def test_whatever_status_the_application_sets_the_client_is_handed_off(
    httpd: Httpd, answering: Daemon, uri: Uri, status: int
) -> None:
    with Client(httpd.port("main")) as client:
        assert client.get(uri(d="x", status=status)).rest() == response(b"data: x\n\n")
    mark = f"t={answering.path}&d=x&status={status} "
    assert f"st={status}" in httpd.access_line(mark)


@pytest.mark.parametrize(
    "arguments",
    [
        {"err": 1},
        {"silent": 1},
        {"body": 200_000, "flush": 1},
        {"body": 9, "sleep": 20},
    ],
)
def test_however_the_application_asks_its_body_is_thrown_away(
    httpd: Httpd, answering: Daemon, uri: Uri, arguments: dict[str, int]
) -> None:
    with Client(httpd.port("main")) as client:
        assert client.get(uri(d="x", **arguments)).rest() == response(b"data: x\n\n")


def test_the_daemon_gets_the_client_only_when_the_application_has_finished(
    httpd: Httpd, daemon: Daemon, uri: Uri
) -> None:
    with Client(httpd.port("main")) as client:
        started = time.monotonic()
        client.get(uri(d="x", body=10, flush=1, sleep=150))
        handoff = daemon.next()
        assert time.monotonic() - started >= 0.15
        handoff.finish(response(b""))
        client.rest()


def test_an_errordocument_may_hand_off(httpd: Httpd, answering: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get("/missing")
        assert client.rest() == response(b"data: from-errordocument\n\n")


@pytest.mark.parametrize("size", [8_100, 100_000, 212_960])
def test_data_of_up_to_the_socket_buffer_arrives_whole(httpd: Httpd, daemon: Daemon, uri: Uri, size: int) -> None:
    default = int(Path("/proc/sys/net/core/wmem_default").read_text())
    if size > default - 32:
        pytest.skip(f"net.core.wmem_default is {default} here")
    with Client(httpd.port("main")) as client:
        client.get(uri(dn=size))
        handoff = daemon.next()
        assert handoff.data == b"d" * size
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")


def test_both_spellings_of_run_name_the_same_socket(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        path = "/var" + str(answering.path)
        assert client.get(uri(t=path, d="x")).rest() == response(b"data: x\n\n")


# --- other modules --------------------------------------------------------------------------


def test_compression_does_not_touch_a_handoff(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri("/deflate", d="x", body=5000), "Accept-Encoding: gzip")
        assert client.rest() == response(b"data: x\n\n")


def test_a_client_behind_the_proxy_protocol_is_handed_off(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("proxy")) as client:
        client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n").get(uri(d="x"))
        assert client.rest() == response(b"data: x\n\n")


def test_the_access_log_tells_target_and_result_and_no_bytes(httpd: Httpd, answering: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="for-the-log", body=9000, flush=1)).rest()
    line = httpd.access_line("d=for-the-log")
    assert "st=200 b=- X=- O=0 " in line
    assert f"target={answering.path} result=sent" in line


# --- a client that leaves -------------------------------------------------------------------


def test_a_client_that_left_meanwhile_harms_nobody(httpd: Httpd, daemon: Daemon, uri: Uri) -> None:
    with Client(httpd.port("main")) as client:
        client.get(uri(d="x", sleep=60, body=10))
    handoff: Handoff = daemon.next()
    handoff.finish(response(b"nobody reads this"))
    assert fetch(httpd.port("main"), "/plain.html").status == 200
