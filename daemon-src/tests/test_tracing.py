"""Spans: what a collector gets of a stream, and what a stream notices of a collector, which is nothing.

Those with a collector need opentelemetry-sdk and its OTLP/HTTP exporter, which are among the tests' tools.
"""

from __future__ import annotations

import http.server
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import SOURCE, Daemon, envelope, shaped, wait_for
from streaming_daemon.access_log import NO_TRACE, StreamRecord, Visit
from streaming_daemon.config import TracingConfig, loads
from streaming_daemon.toml_table import ConfigError
from streaming_daemon.tracing import Tracing, attributes_of

PARENT = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
UNSAMPLED = ("traceparent", "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00")


class Collector:
    """Takes what the exporter sends. ``hangs``: takes it and never answers."""

    def __init__(self, hangs: bool = False) -> None:
        self.resources: list[Any] = []
        self.asked = threading.Event()
        self.over = threading.Event()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.set()
                if hangs:
                    collector.over.wait(30)
                    return
                collector.take(body, self.headers.get("Content-Encoding"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes, encoding: str | None) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert encoding in (None, "identity")
        self.resources += ExportTraceServiceRequest.FromString(body).resource_spans

    @property
    def spans(self) -> list[Any]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    made = Collector()
    yield made
    made.close()


def values(span: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def traced(endpoint: str, ratio: float = 1.0) -> str:
    return f'[server]\nworkers = 1\n[tracing]\nendpoint = "{endpoint}"\nratio = {ratio}\n'


def leave(daemon: Daemon) -> None:
    """The last batch of a worker is sent when it leaves."""
    daemon.signal(signal.SIGTERM)
    wait_for(lambda: not daemon.workers(), "the workers to leave")


def test_a_stream_is_one_span_of_its_callers_trace(make_daemon: MakeDaemon, collector: Collector) -> None:
    daemon = make_daemon(traced(collector.endpoint)).start()
    begin = time.time_ns()
    message = envelope(shaped(3), headers=[[*PARENT], ["Tracestate", "a=b"], ["User-Agent", "curl/8"]])
    assert daemon.hand(message).finish().complete
    end = time.time_ns()
    leave(daemon)
    (span,) = collector.spans
    assert span.trace_id.hex() == PARENT[1].split("-")[1]
    assert span.parent_span_id.hex() == PARENT[1].split("-")[2]
    assert span.trace_state == "a=b"
    # uvloop's clock counts milliseconds and stands still during a callback: a beginning may be as much too early.
    assert begin - 2_000_000 <= span.start_time_unix_nano <= span.end_time_unix_nano <= end + 3_000_000_000
    (event,) = span.events
    assert event.name == "first event"
    assert span.start_time_unix_nano <= event.time_unix_nano <= span.end_time_unix_nano
    seen = values(span)
    assert seen["http.response.status_code"] == 200
    assert (seen["handoff.outcome"], seen["handoff.backend"], seen["handoff.events"]) == ("done", "demo", 3)
    assert seen["user_agent.original"] == "curl/8"
    resource = {pair.key: pair.value.string_value for pair in collector.resources[0].resource.attributes}
    assert resource["service.name"] == "streaming-daemon"


def test_what_the_caller_decided_holds_and_the_ratio_is_for_the_others(
    make_daemon: MakeDaemon, collector: Collector
) -> None:
    daemon = make_daemon(traced(collector.endpoint, ratio=0)).start()
    for headers in ([[*UNSAMPLED]], [], [["traceparent", "nonsense\t"]], [[*PARENT]]):
        assert daemon.hand(envelope(shaped(1), headers=headers)).finish().complete
    leave(daemon)
    assert [span.trace_id.hex() for span in collector.spans] == [PARENT[1].split("-")[1]]


def test_a_collector_that_hangs_delays_neither_streams_nor_the_end_of_a_worker(make_daemon: MakeDaemon) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    collector = Collector(hangs=True)
    try:
        daemon = make_daemon(traced(collector.endpoint)).start()
        # More than a batch, so that the exporter is at it while streams run.
        clients = [daemon.hand(shaped(1)) for _ in range(600)]
        assert all(client.finish().complete for client in clients)
        wait_for(collector.asked.is_set, "the exporter to ask")
        assert daemon.hand(shaped(2)).finish().complete
        leave(daemon)
    finally:
        collector.close()


def test_where_the_library_is_missing_streams_go_on_and_the_journal_says_what_to_install() -> None:
    """In a Python that sees no site-packages, as on a host of ours."""
    program = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout, format='%(message)s');"
        "from streaming_daemon.tracing import Tracing; from streaming_daemon.config import TracingConfig;"
        "print(Tracing.start(TracingConfig('http://127.0.0.1:9/v1/traces')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "None"
    assert "streams are not traced to http://127.0.0.1:9/v1/traces: No module named 'opentelemetry'" in done.stdout
    assert "install opentelemetry-sdk" in done.stdout


def test_nothing_is_traced_without_an_endpoint() -> None:
    assert Tracing.start(TracingConfig()) is None


def test_attributes_name_neither_the_user_nor_what_is_not_known() -> None:
    known: dict[str, Any] = {"id": "i", "request_id": "", "client": "192.0.2.1:1", "user": "alice", "method": "GET"}
    known |= {"path": "/s", "backend": "b", "outcome": "done", "status": 0, "events": 0, "bytes": 0}
    known |= {"first_event": None, "duration": 0.1, "visit": Visit("HTTP/1.1", "r", "a"), "prompt_tokens": 4}
    record = StreamRecord(**known, completion_tokens=None, trace=NO_TRACE)
    found = attributes_of(record)
    assert "alice" not in map(str, found.values())
    assert found["gen_ai.usage.input_tokens"] == 4
    assert not {"gen_ai.usage.output_tokens", "http.response.status_code", "handoff.limit"} & set(found)


@pytest.mark.parametrize("value", ["unix:/run/x.sock:/v1", "collector:4318", "ftp://x/", "http://u:p@x/"])
def test_a_collector_is_reached_over_http(value: str) -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint.*or an empty string for none") as caught:
        loads(f'[tracing]\nendpoint = "{value}"\n', "f")
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize("value", ["-0.1", "1.5", '"all"'])
def test_the_ratio_is_a_part_of_one(value: str) -> None:
    with pytest.raises(ConfigError, match=r"tracing\.ratio = .*allowed is a number from 0 to 1"):
        loads(f"[tracing]\nratio = {value}\n", "f")
