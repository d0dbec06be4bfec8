"""One OpenTelemetry span per stream, for those who trace their requests through several services.

Off unless ``[tracing] endpoint`` names a collector. The library is nobody's dependency: Debian has no package of it,
and where ``opentelemetry-sdk`` with its OTLP/HTTP exporter cannot be imported the journal says so once and streams go
on untraced.

A span is made when its stream has ended, from the same record as the line in the log, so a running stream knows nothing
of tracing but the two headers of its parent (W3C Trace Context, ``traceparent`` and ``tracestate``; the target has to
pass them on). Spans are exported by a thread of the library, in batches; a collector that is slow or gone costs spans.

Names of attributes are those of OpenTelemetry's semantic conventions, where there are such; ours begin with
``handoff.``. Neither questions nor answers nor users are among them.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from .access_log import NO_TRACE, StreamRecord, Trace, log
from .config import TracingConfig
from .envelope import Request

# How long the last spans of a worker may take to be sent; nobody's stream waits for it.
_CLOSING = 3.0
_EXPORT_TIMEOUT = 5.0
_WHAT_TO_DO = (
    "install opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http where the service's Python finds them, or "
    "remove tracing.endpoint"
)
_NANO = 1_000_000_000
# Whose end is not the service's fault.
_NO_ERROR = frozenset({"done", "client_gone", "resumed", "bad_request"})


def parent_of(request: Request) -> Trace:
    """The headers that say which span a request belongs to."""
    found = {name.lower(): value for name, value in request.headers if name.lower() in ("traceparent", "tracestate")}
    parent = found.get("traceparent")
    return (parent, found.get("tracestate", "")) if parent else NO_TRACE


class Tracing:
    """Observer that makes a span of each StreamRecord."""

    @classmethod
    def start(cls, config: TracingConfig) -> Tracing | None:
        """None where nothing is to be traced, or the library is missing."""
        if not config.endpoint:
            return None
        try:
            return cls(config)
        except ImportError as error:
            log.warning("streams are not traced to %s: %s: %s", config.endpoint, error, _WHAT_TO_DO)
            return None

    def __init__(self, config: TracingConfig) -> None:
        """Raises ImportError where the library is missing."""
        # Imported here: a worker that does not trace must not pay for it, some ten megabytes.
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider, sampling  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        from . import __version__  # noqa: PLC0415

        known = {"service.name": "streaming-daemon", "service.version": __version__}
        self._kind = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            # What the caller decided holds; the ratio is for those who come without a decision.
            sampler=sampling.ParentBased(sampling.TraceIdRatioBased(config.ratio)),
            # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of the unit are stronger.
            resource=Resource.create(known).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=_EXPORT_TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("streaming_daemon", __version__)

    def finished(self, record: StreamRecord) -> None:
        end = time.time_ns()
        begin = end - int(record.duration * _NANO)
        parent, state = record.trace
        carrier = {"traceparent": parent, "tracestate": state} if parent else {}
        span = self._tracer.start_span(
            f"{record.method} {record.path}" if record.method else "stream",
            context=self._propagator.extract(carrier),
            kind=self._kind,
            attributes=attributes_of(record),
            start_time=begin,
        )
        if record.first_event is not None:
            span.add_event("first event", timestamp=begin + int(record.first_event * _NANO))
        if record.outcome not in _NO_ERROR:
            span.set_status(self._error)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what there is, as far as there is time for it."""
        # Not by the library's own time limit, which begins anew with every attempt.
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_CLOSING)


def attributes_of(record: StreamRecord) -> dict[str, str | int | float]:
    """A record as attributes of its span; what is unknown is left out."""
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "client.address": record.client,
        "user_agent.original": record.visit.agent,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "handoff.id": record.id,
        "handoff.request_id": record.request_id,
        "handoff.backend": record.backend,
        "handoff.outcome": record.outcome,
        "handoff.limit": record.limit,
        "handoff.replay": record.replay,
    }
    known = {name: value for name, value in attributes.items() if value not in (None, "", 0)}
    return {**known, "handoff.tries": record.tries, "handoff.events": record.events, "handoff.bytes": record.bytes}
