"""Clients handed to a real daemon with the demo backend: what they get, and what one can do to another."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time

import pytest

from conftest import MakeDaemon
from daemon_harness import KINDS, Client, Daemon, send_message, shaped, socket_pair, tcp_pair, wait_for

HEAD = [
    "HTTP/1.1 200 OK",
    "Content-Type: text/event-stream; charset=utf-8",
    "Cache-Control: no-cache",
    "Connection: close",
    "X-Accel-Buffering: no",
]


def fields(line: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line))


def test_a_client_gets_head_events_and_the_end_in_order(either: Daemon) -> None:
    response = either.ask(shaped(150, prompt="Why is the sky blue? 🌍"))
    assert [line for line in response.head.split("\r\n") if not line.startswith("Date: ")] == HEAD
    assert response.complete
    assert len(response.texts) == 150
    assert response.text.startswith("Hello! 👋 You asked: “Why is the sky blue? 🌍”. Here is")
    assert response.events.count("data: [DONE]") == 1


@pytest.mark.parametrize("data", [b"\0", b"{}"])
def test_a_handoff_without_data_is_answered(either: Daemon, data: bytes) -> None:
    client = either.hand(data)
    assert client.read_until(b"\n\n").endswith(b'data: {"content":"Hello"}\n\n')
    client.close()


def test_an_empty_packet_is_a_handoff_without_data(demo: Daemon) -> None:
    # Only a packet can be empty: a stream cannot carry a descriptor without a byte, which is why there is the NUL.
    client = demo.hand(b"")
    client.read_until(b"Hello")
    client.close()


@pytest.mark.parametrize("size", [100, 200])
def test_a_large_message_arrives_whole(either: Daemon, size: int) -> None:
    response = either.ask(shaped(5, prompt="x" * size * 1024))
    assert response.complete


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"prompt":"a"}]', "the handoff data is an array, allowed is a JSON object"),
        (b'{"prompt":', "the handoff data is not valid JSON, allowed is a JSON object"),
        (b'{"prompt":7}', "prompt is a number, allowed is a string"),
    ],
)
def test_bad_data_is_told_to_the_client(either: Daemon, data: bytes, message: str) -> None:
    response = either.ask(data)
    assert response.status == 400
    assert response.headers["content-type"].startswith("application/json")
    assert len(response.body) == int(response.headers["content-length"])
    assert response.json == {"error": {"type": "invalid_request", "message": message}}
    either.wait_log("outcome=bad_request status=400")


def test_a_tcp_client_is_named_in_the_journal_and_its_prompt_is_not(either: Daemon) -> None:
    client = either.hand(shaped(3, prompt="s3cr3t", user="al ice", request_id=f"tcp-{either.kind}"), pair=tcp_pair)
    port = client.sock.getsockname()[1]
    assert client.finish().complete
    line = fields(either.wait_log(f"stream id=tcp-{either.kind} "))
    assert line["client"] == f"127.0.0.1:{port}"
    assert line["user"] == '"al ice"'
    assert (line["backend"], line["outcome"], line["status"], line["events"]) == ("demo", "done", "200", "3")
    assert int(line["bytes"]) == len(client.received)
    assert float(line["first_event_ms"]) <= float(line["duration_ms"]) + 1
    assert "s3cr3t" not in either.log()


def test_the_pace_is_kept(demo: Daemon) -> None:
    begin = time.monotonic()
    assert demo.ask(shaped(50, 100)).complete
    assert 0.48 <= time.monotonic() - begin < 1.5


def test_max_tokens_bounds_the_answer(demo: Daemon) -> None:
    assert len(demo.ask({**shaped(100), "max_tokens": 7}).texts) == 7


def test_of_several_descriptors_the_first_is_served_and_the_rest_is_closed(either: Daemon) -> None:
    pairs = [socket_pair() for _ in range(3)]
    send_message(either.socket, either.kind, b'{"demo":{"tokens":5}}', [theirs.fileno() for _, theirs in pairs])
    for _, theirs in pairs:
        theirs.close()
    served, *others = [Client(ours) for ours, _ in pairs]
    assert served.finish().complete
    assert [client.finish().raw for client in others] == [b"", b""]
    either.wait_log("a handoff carried 3 descriptors")


def test_a_message_without_descriptor_is_refused(either: Daemon) -> None:
    send_message(either.socket, either.kind, b"{}", [])
    either.wait_log("handoff refused: it carries no descriptor")
    assert either.ask(shaped(1)).complete


def test_what_is_no_connected_stream_socket_is_closed(either: Daemon) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listening, tempfile.TemporaryFile() as file:
        for fd in (theirs.fileno(), listening.fileno(), file.fileno()):
            send_message(either.socket, either.kind, b"{}", [fd])
    wait_for(lambda: either.log().count("its descriptor is no connected stream socket") >= 2, "two refusals")
    either.wait_log("handoff refused: its descriptor is no socket")
    assert either.ask(shaped(1)).complete


def test_a_peer_that_closes_without_a_message_harms_nobody(either: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, KINDS[either.kind]) as peer:
        peer.connect(str(either.socket))
    either.wait_log("the peer closed without sending a message")
    assert either.ask(shaped(1)).complete


def test_a_message_beyond_all_bounds_is_refused_and_its_client_closed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(kind="stream").start()
    ours, theirs = socket_pair()
    with theirs, pytest.raises(OSError, match=r"Broken pipe|reset"):
        send_message(daemon.socket, "stream", b"x" * (4 << 20), [theirs.fileno()])
    assert Client(ours).finish().raw == b""
    daemon.wait_log("handoff refused: it is longer than")


def test_a_stream_message_in_pieces_is_one_message(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(kind="stream").start()
    ours, theirs = socket_pair()
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(daemon.socket))
        socket.send_fds(peer, [b'{"demo":'], [theirs.fileno()])
        # The daemon has taken the first piece once its descriptor has left the queue of the socket.
        wait_for(lambda: socket_queue_is_empty(peer), "first piece taken")
        peer.sendall(b'{"tokens":4,')
        peer.sendall(b'"tokens_per_second":10000}}')
    assert len(Client(ours).finish().texts) == 4


def socket_queue_is_empty(sock: socket.socket) -> bool:
    import array
    import fcntl
    import termios

    queued = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, queued)
    return queued[0] == 0


@pytest.mark.parametrize("kind", ["seqpacket", "stream"])
def test_600_silent_peers_do_not_delay_a_handoff_and_are_dropped(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon("[server]\nhandoff_timeout = 1.0", kind=kind).start()
    peers = [socket.socket(socket.AF_UNIX, KINDS[kind]) for _ in range(600)]
    for peer in peers:
        peer.connect(str(daemon.socket))
    begin = time.monotonic()
    assert daemon.ask(shaped(1)).complete
    assert time.monotonic() - begin < 0.9
    for peer in peers:
        peer.settimeout(5)
        assert peer.recv(1) == b""
        peer.close()
    assert "no complete message within 1 s" in daemon.log()


def test_a_client_that_does_not_read_delays_nobody_and_is_dropped(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nwrite_timeout = 1.0").start()
    stuck = daemon.hand(shaped(100_000, request_id="stuck"))
    begin = time.monotonic()
    for _ in range(20):
        assert daemon.ask(shaped(5)).complete
    assert time.monotonic() - begin < 0.9
    line = fields(daemon.wait_log("stream id=stuck "))
    assert line["outcome"] == "write_timeout"
    # What the kernel held, not what the demo could have produced.
    assert int(line["bytes"]) < 1_000_000
    stuck.close()


def test_a_slow_reader_gets_every_byte_in_order(demo: Daemon) -> None:
    client = demo.hand(shaped(8_000, request_id="slow"), pair=tcp_pair)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while len(client.received) < 100_000:
        client.received += client.sock.recv(997)
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 8_000
    again = "".join(response.texts[200:])
    assert again.count("Here is what happened on the way to this answer.") > 20


def test_unread_bytes_of_the_client_do_not_destroy_the_end_of_its_answer(demo: Daemon) -> None:
    for _ in range(3):
        client = demo.hand(shaped(3000), pair=tcp_pair)
        client.sock.sendall(b"GET /pipelined HTTP/1.1\r\n\r\n" * 100)
        # The daemon is done long before the client reads: a bare close would have sent RST by now.
        response = client.finish()
        assert not response.reset
        assert response.complete
        assert len(response.texts) == 3000


def test_a_client_that_keeps_sending_is_not_listened_to_for_ever(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nlinger_timeout = 0.3").start()
    client = daemon.hand(shaped(1), pair=tcp_pair)
    client.read_until(b"[DONE]")
    begin = time.monotonic()
    wait_for(lambda: not can_send(client.sock), "the daemon to close")
    assert time.monotonic() - begin < 2


def can_send(sock: socket.socket) -> bool:
    try:
        sock.send(b"more\r\n")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("pair", [socket_pair, tcp_pair])
def test_a_client_that_hangs_up_is_noticed_within_a_second(demo: Daemon, pair: object) -> None:
    name = f"gone-{pair.__name__}"  # type: ignore[attr-defined]
    client = demo.hand(shaped(100, 0.1, request_id=name), pair=pair)  # type: ignore[arg-type]
    client.read_until(b"Hello")
    begin = time.monotonic()
    client.close()
    line = fields(demo.wait_log(f"stream id={name} "))
    assert time.monotonic() - begin < 1
    assert line["outcome"] == "client_gone"


@pytest.mark.parametrize("pair", [socket_pair, tcp_pair])
def test_a_client_that_only_stops_sending_gets_its_whole_answer(demo: Daemon, pair: object) -> None:
    client = demo.hand(shaped(20, 100), pair=pair)  # type: ignore[arg-type]
    client.sock.shutdown(socket.SHUT_WR)
    response = client.finish()
    assert response.complete
    assert len(response.texts) == 20


def test_one_stream_too_many_is_asked_to_come_back(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nmax_streams = 2").start()
    running = [daemon.hand(shaped(1000, 1, request_id=f"r{number}")) for number in range(2)]
    for client in running:
        client.read_until(b"Hello")
    refused = daemon.ask(shaped(1))
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json["error"]["type"] == "overloaded"
    daemon.wait_log("outcome=overloaded status=503")
    running[0].close()
    daemon.wait_log("id=r0 .*outcome=client_gone")
    assert daemon.ask(shaped(1)).complete
    running[1].close()


def test_silence_is_filled_with_comments(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nheartbeat = 0.1").start()
    client = daemon.hand(shaped(2, 1))
    response = client.finish()
    assert response.complete
    assert 5 <= response.body.count(b": ping\n\n") <= 10


def test_400_streams_at_once_all_end_well(demo: Daemon) -> None:
    clients = [demo.hand(shaped(6, 20)) for _ in range(400)]
    responses = [client.finish() for client in clients]
    assert all(response.complete and len(response.texts) == 6 for response in responses)


def test_no_descriptor_is_left_when_all_streams_are_over(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nlinger_timeout = 0.2").start()
    [worker] = daemon.workers()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{worker}/fd"))

    before = descriptors()
    for pair in (socket_pair, tcp_pair):
        assert daemon.hand(shaped(3), pair=pair).finish().complete
        daemon.hand(b"[]", pair=pair).finish()
        gone = daemon.hand(shaped(100, 1), pair=pair)
        gone.read_until(b"Hello")
        gone.close()
    send_message(daemon.socket, daemon.kind, b"{}", [])
    wait_for(lambda: descriptors() == before, f"{before} descriptors again")
