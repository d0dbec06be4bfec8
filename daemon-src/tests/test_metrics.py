"""What Prometheus, a health check and ``top`` are told, by whichever worker they happen to ask."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_harness import SOURCE, Response
from streaming_daemon import board as b
from streaming_daemon import metrics, metrics_server
from streaming_daemon.board import Board, backend_block, observe
from streaming_daemon.metrics_server import MetricsServer
from streaming_daemon.metrics_socket import location, needs_restart, open_listener
from streaming_daemon.notify import ListenSocketError
from streaming_daemon.wheel import TimerWheel

EXPOSITION = metrics.Exposition.load()
# What dashboards for this kind of daemon ask for.
EXPECTED = {
    "daemon_active_connections": "gauge",
    "daemon_active_streams": "gauge",
    "daemon_peak_streams": "gauge",
    "daemon_connections": "counter",
    "daemon_connections_rejected": "counter",
    "daemon_handoffs": "counter",
    "daemon_handoff_errors": "counter",
    "daemon_stream_errors": "counter",
    "daemon_bytes_sent": "counter",
    "daemon_chunks_sent": "counter",
    "daemon_backend_requests": "counter",
    "daemon_backend_errors": "counter",
    "daemon_handoff_duration_seconds": "histogram",
    "daemon_stream_duration_seconds": "histogram",
    "daemon_backend_duration_seconds": "histogram",
    "daemon_backend_ttfb_seconds": "histogram",
    "daemon_time_to_first_token_seconds": "histogram",
    "daemon_tokens": "counter",
    "daemon_generation": "gauge",
    "daemon_workers": "gauge",
    "daemon_slow_client_disconnects": "counter",
    "daemon_limits_refused": "counter",
    "daemon_replays": "counter",
}


class Server:
    """The metrics server of one worker, on a loop in a thread of its own."""

    def __init__(self, path: Path, shared: Board, exposition: metrics.Exposition | None = EXPOSITION) -> None:
        self.path = path
        self._shared = shared
        self._exposition = exposition
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = asyncio.Event()
        sock = open_listener(f"unix:{path}", {})
        assert sock is not None
        self._sock = sock
        self._thread.start()

    def _run(self) -> None:
        async def serve() -> None:
            slot = self._shared.slot(1)
            wheel = TimerWheel(self._loop)
            self.server = MetricsServer(
                self._loop, wheel, self._sock, shared=self._shared, slot=slot, exposition=self._exposition
            )
            self.server.start()
            await self._stopped.wait()
            self.server.stop()

        self._loop.run_until_complete(serve())
        self._loop.close()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock

    def get(self, path: str, *headers: str, method: str = "GET") -> Response:
        return self.send("\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())

    def send(self, request: bytes) -> Response:
        with self.connect() as sock:
            sock.sendall(request)
            return read(sock)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)


def read(sock: socket.socket) -> Response:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return Response(data)


@pytest.fixture
def shared() -> Board:
    """Two workers of generation 2 that serve, one of generation 1 that drains."""
    board = Board.create(8)
    for generation, streams in ((1, 3), (2, 4), (2, 5)):
        number = board.allocate(generation)
        assert number is not None
        slot = board.slot(number)
        slot[b.PID] = 1000 + number
        slot[b.ACTIVE] = streams
        slot[b.ACCEPTING] = 1
        slot[b.CAPACITY] = 10
        slot[b.EVENTS] = 100
        slot[b.CPU] = 1_500_000_000
        slot[b.STREAM_ERRORS["timeout"]] = 1
        observe(slot, b.STREAM_DURATION, 0.03)
        block = backend_block(slot, "openai")
        slot[block + b.BACKEND_REQUESTS] = 7
        slot[block + b.TOKENS_COMPLETION] = 30
        observe(slot, b.BACKEND_TTFB, 0.25, block)
    board.slot(1)[b.ACCEPTING] = 0
    board.slot(1)[b.DRAINING] = 1
    return board


@pytest.fixture
def server(tmp_path: Path, shared: Board) -> Iterator[Server]:
    server = Server(tmp_path / "m.sock", shared)
    yield server
    server.close()


def families(text: str) -> dict[str, Any]:
    parser = pytest.importorskip("prometheus_client.parser")
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def sample(found: dict[str, Any], name: str, **labels: str) -> float:
    values = [
        float(each.value)
        for family in found.values()
        for each in family.samples
        if each.name == name and each.labels == labels
    ]
    assert len(values) == 1, (name, labels, values)
    return values[0]


def test_the_metrics_are_valid_and_have_the_names_that_dashboards_know(server: Server) -> None:
    response = server.get("/metrics")
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = families(response.body.decode())
    assert {name: found[name].type for name in EXPECTED} == EXPECTED
    assert all(family.documentation for family in found.values())
    names = [(each.name, tuple(sorted(each.labels.items()))) for family in found.values() for each in family.samples]
    assert len(names) == len(set(names))


def test_the_metrics_are_sums_over_all_workers_and_generations(server: Server) -> None:
    found = families(server.get("/metrics").body.decode())
    assert sample(found, "daemon_active_streams") == 12
    assert sample(found, "daemon_chunks_sent_total") == 300
    assert sample(found, "daemon_stream_errors_total", reason="timeout") == 3
    assert sample(found, "daemon_cpu_seconds_total") == 4.5
    assert sample(found, "daemon_backend_requests_total", backend="openai") == 21
    assert sample(found, "daemon_tokens_total", backend="openai", kind="completion") == 90
    assert sample(found, "daemon_workers", state="accepting") == 2
    assert sample(found, "daemon_workers", state="draining") == 1
    assert sample(found, "daemon_generation") == 2
    assert sample(found, "daemon_draining_streams") == 3


def test_histograms_are_cumulative_and_complete(server: Server) -> None:
    found = families(server.get("/metrics").body.decode())
    for family in found.values():
        if family.type != "histogram":
            continue
        by_labels: dict[tuple[str, ...], list[float]] = {}
        for each in family.samples:
            if each.name.endswith("_bucket"):
                labels = tuple(value for name, value in each.labels.items() if name != "le")
                by_labels.setdefault(labels, []).append(each.value)
        for values in by_labels.values():
            assert values == sorted(values)
            assert len(values) == 16
    assert sample(found, "daemon_stream_duration_seconds_bucket", le="0.02") == 0
    assert sample(found, "daemon_stream_duration_seconds_bucket", le="0.04") == 3
    assert sample(found, "daemon_stream_duration_seconds_bucket", le="+Inf") == 3
    assert sample(found, "daemon_stream_duration_seconds_count") == 3
    assert sample(found, "daemon_stream_duration_seconds_sum") == pytest.approx(0.09)
    assert sample(found, "daemon_backend_ttfb_seconds_sum", backend="openai") == pytest.approx(0.75)


def test_no_total_goes_back_when_workers_die_between_scrapes(server: Server, shared: Board) -> None:
    def counters() -> dict[tuple[Any, ...], float]:
        return {
            (each.name, *each.labels.items()): each.value
            for family in families(server.get("/metrics").body.decode()).values()
            if family.type in ("counter", "histogram")
            for each in family.samples
        }

    before = counters()
    for number in (3, 1, 2):
        shared.fold(number)
        after = counters()
        assert {name for name, value in before.items() if after[name] < value} == set()
        before = after
    assert before[("daemon_streams_lost_total",)] == 12


def test_openmetrics_is_spoken_to_those_who_ask_for_it(server: Server) -> None:
    response = server.get("/metrics", "Accept: application/openmetrics-text; version=1.0.0")
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    assert {family.name for family in parser.text_string_to_metric_families(response.body.decode())} >= set(EXPECTED)


def test_without_the_library_metrics_name_the_package_and_nothing_else_suffers(tmp_path: Path, shared: Board) -> None:
    server = Server(tmp_path / "m.sock", shared, None)
    try:
        response = server.get("/metrics")
        assert response.status == 503
        assert b"python3-prometheus-client" in response.body
        assert server.get("/healthz").status == 200
        assert server.get("/status").json["values"]["daemon_chunks_sent_total"] == 300
    finally:
        server.close()


def test_a_missing_library_is_no_exposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert metrics.Exposition.load() is None


def test_healthz_says_what_the_service_is_doing(server: Server) -> None:
    response = server.get("/healthz")
    assert response.status == 200
    assert response.json == {
        "status": "ok",
        "active_streams": 12,
        "active_connections": 12,
        "workers": 3,
        "hung": [],
    }


def test_healthz_fails_while_the_loop_of_a_worker_stands_still(server: Server, shared: Board) -> None:
    shared.slot(2)[b.HEARTBEAT] -= metrics.HUNG + 1
    response = server.get("/healthz")
    assert (response.status, response.json["hung"]) == (503, [1002])
    shared.beat(2)
    assert server.get("/healthz").status == 200


def test_readyz_fails_when_no_worker_has_room_or_none_accepts(server: Server, shared: Board) -> None:
    assert server.get("/readyz").json == {"status": "ready", "workers": 2, "room": 11}
    for number in (2, 3):
        shared.slot(number)[b.ACTIVE] = 10
    response = server.get("/readyz")
    assert (response.status, response.json["status"]) == (503, "full")
    for number in (2, 3):
        shared.slot(number)[b.ACCEPTING] = 0
    response = server.get("/readyz")
    assert (response.status, response.json["status"]) == (503, "not accepting")


def test_status_has_every_number_as_json(server: Server) -> None:
    status = server.get("/status").json
    assert [worker["state"] for worker in status["workers"]] == ["draining", "accepting", "accepting"]
    assert status["values"]["daemon_stream_errors_total"]["timeout"] == 3
    assert sum(status["histograms"]["daemon_stream_duration_seconds"]["counts"]) == 3
    assert status["backends"]["openai"]["daemon_backend_requests_total"] == 21


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000, 431),
    ],
)
def test_a_request_that_is_none_gets_an_answer_all_the_same(server: Server, request_: bytes, status: int) -> None:
    assert server.send(request_).status == status


def test_head_has_the_head_of_get(server: Server) -> None:
    response = server.get("/healthz", method="HEAD")
    assert (response.status, response.body) == (200, b"")
    assert int(response.headers["content-length"]) == len(server.get("/healthz").body)


def test_a_request_in_pieces_is_understood(server: Server) -> None:
    with server.connect() as sock:
        for piece in (b"GET /heal", b"thz HTTP/1.1\r\nHos", b"t: x\r\n\r", b"\n"):
            sock.sendall(piece)
        assert read(sock).status == 200


def test_silent_clients_are_dropped_and_keep_nobody_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_TIMEOUT", 0.3)
    silent = [server.connect() for _ in range(metrics_server._MAX_PEERS + 5)]
    for sock in silent:
        with sock:
            assert sock.recv(1) == b""
    assert server.get("/healthz").status == 200


def test_a_client_that_does_not_read_holds_up_nobody(server: Server) -> None:
    with server.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert server.get("/metrics").status == 200
        assert read(slow).body.endswith(b"\n")


def test_a_path_is_taken_over_from_a_supervisor_that_was_killed(tmp_path: Path, shared: Board) -> None:
    one = Server(tmp_path / "m.sock", shared)
    one._loop.call_soon_threadsafe(one._stopped.set)
    one._thread.join(10)
    # The socket of the first is closed; a second listener takes over its path, as after a restart.
    two = Server(tmp_path / "m.sock", shared)
    try:
        assert two.get("/healthz").status == 200
    finally:
        two.close()


@pytest.mark.parametrize(
    ("address", "environ", "where"),
    [
        ("off", {}, None),
        ("unix:metrics.sock", {}, None),
        ("unix:metrics.sock", {"RUNTIME_DIRECTORY": "/run/a:/run/b"}, "/run/a/metrics.sock"),
        ("unix:/run/m.sock", {}, "/run/m.sock"),
        ("127.0.0.1:9464", {}, ("127.0.0.1", 9464)),
        ("[::1]:9464", {}, ("::1", 9464)),
    ],
)
def test_where_the_metrics_are(address: str, environ: dict[str, str], where: object) -> None:
    assert location(address, environ) == where


def test_a_loopback_port_is_served_and_taken_over_from_workers_that_are_leaving() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = open_listener(f"127.0.0.1:{port}", {})
    assert first is not None
    threading.Timer(0.3, first.close).start()
    second = open_listener(f"127.0.0.1:{port}", {})
    assert second is not None
    second.close()


@pytest.mark.parametrize("kind", ["path", "port"])
def test_another_place_than_the_one_that_is_open_needs_a_restart(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here, there = (f"unix:{tmp_path}/a", f"unix:{tmp_path}/b") if kind == "path" else (f"127.0.0.1:{port}", "[::1]:1")
    sock = open_listener(here, {})
    assert sock is not None
    with sock:
        assert not needs_restart(here, {}, sock)
        assert needs_restart(there, {}, sock)
        assert not needs_restart("off", {}, sock)
    assert needs_restart(here, {}, None)
    assert not needs_restart("unix:metrics.sock", {}, None)


def test_the_socket_is_for_the_services_group_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        sock = open_listener(f"unix:{tmp_path}/m.sock", {})
        assert sock is not None
        with sock:
            assert (tmp_path / "m.sock").stat().st_mode & 0o777 == 0o660
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


def test_a_place_that_cannot_be_listened_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(ListenSocketError, match=r"metrics\.listen = unix:/.*/none/m.sock: No such file"):
        open_listener(f"unix:{tmp_path}/none/m.sock", {})
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ListenSocketError, match="Address already in use"):
        open_listener(f"unix:{tmp_path}/file", {})
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not (SOURCE.parent / "docs").is_dir(), reason="the documents are not here")
def test_every_metric_is_explained(server: Server) -> None:
    page = (SOURCE.parent / "docs" / "observing.md").read_text()
    explained = set(re.findall(r"(?<!\w)daemon_\w+", page))
    found = families(server.get("/metrics").body.decode())
    names = {name + ("_total" if family.type == "counter" else "") for name, family in found.items()}
    assert names - explained == set()
    assert explained - names == set()
