"""The board as others read it: Prometheus' text, and JSON for ``top`` and scripts.

Nothing is kept here and nothing is counted here: each request reads the board once. prometheus_client writes the text,
so that its form is the library's business; it is optional, and without it all but /metrics works. It takes a tenth of a
second to import, so a worker imports it before it has clients (``Exposition.load``), never while it has them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import __version__, board
from .board import Board, Histogram, Metric, Totals

PACKAGE = "python3-prometheus-client"
# A worker's loop that has not turned for so long has stopped. Milliseconds, as all times on the board.
HUNG = 10_000
_NANO = 1e9
_STATES = ("accepting", "draining", "starting", "hung")


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker, as the board knows it. Times in seconds."""

    slot: int
    pid: int
    generation: int
    state: str
    streams: int
    pending: int
    capacity: int
    resident: int
    age: float
    silent: float
    late: float


def workers(totals: Totals, now_ms: int) -> list[Worker]:
    found = []
    for number, words in totals.slots.items():
        silent = max(0, now_ms - words[board.HEARTBEAT])
        if silent > HUNG:
            state = "hung"
        elif words[board.ACCEPTING]:
            state = "accepting"
        else:
            state = "draining" if words[board.DRAINING] else "starting"
        found.append(
            Worker(
                slot=number,
                pid=words[board.PID],
                generation=words[board.GENERATION],
                state=state,
                streams=words[board.ACTIVE],
                pending=words[board.PENDING],
                capacity=words[board.CAPACITY],
                resident=words[board.RESIDENT],
                age=(now_ms - words[board.STARTED]) / 1000,
                silent=silent / 1000,
                late=words[board.LATE] / 1000,
            )
        )
    return found


def connections(totals: Totals) -> int:
    """Clients and peers that are connected, whatever they wait for."""
    return sum(totals.words[index] for index in (board.ACTIVE, board.PENDING, board.LINGERING))


def report(shared: Board) -> dict[str, object]:
    """Everything on the board, for ``top`` and for scripts. Durations in seconds."""
    totals = shared.totals()
    now = board.now_ms()
    values: dict[str, object] = {"daemon_active_connections": connections(totals)}
    values["daemon_peak_streams"] = totals.peak_streams
    for metric in board.METRICS:
        if metric.label:
            words = totals.words[metric.index : metric.index + len(metric.values)]
            values[metric.name] = dict(zip(metric.values, words, strict=True))
        elif metric.name:
            values[metric.name] = _value(metric, totals.words)
    return {
        "version": __version__,
        "time": time.time(),
        "started": totals.born,
        "workers": [{name: getattr(worker, name) for name in Worker.__slots__} for worker in workers(totals, now)],
        "values": values,
        "histograms": {each.name: _as_dict(each, totals.words) for each in board.HISTOGRAMS},
        "backends": {
            name: {
                **{each.name: words[each.index] for each in board.BACKEND_METRICS},
                **{each.name: _as_dict(each, words) for each in board.BACKEND_HISTOGRAMS},
            }
            for name, words in totals.backends.items()
        },
    }


def _as_dict(histogram: Histogram, words: Sequence[int]) -> dict[str, object]:
    row = words[histogram.index : histogram.index + histogram.words]
    return {"bounds": list(histogram.bounds), "counts": list(row[:-1]), "sum": row[-1] / _NANO}


def _value(metric: Metric, words: Sequence[int]) -> float:
    value = words[metric.index]
    return value / _NANO if metric.index == board.CPU else value


class Exposition:
    """Writes the board in Prometheus' format."""

    def __init__(self, library: ModuleType) -> None:
        self._core = library.core
        self._registry = library.CollectorRegistry(auto_describe=False)
        self._choose = library.exposition.choose_encoder
        self._shared: Board | None = None
        self._registry.register(self)

    @classmethod
    def load(cls) -> Exposition | None:
        """None where the library is missing."""
        try:
            import prometheus_client  # noqa: PLC0415
            import prometheus_client.core  # noqa: PLC0415
            import prometheus_client.exposition  # noqa: PLC0415
        except ImportError:
            return None
        return cls(prometheus_client)

    def render(self, shared: Board, accept: str) -> tuple[bytes, str]:
        """The text, and its content type as the client accepts it."""
        self._shared = shared
        encode, content_type = self._choose(accept)
        text: bytes = encode(self._registry)
        return text, str(content_type)

    def describe(self) -> Iterable[Any]:
        """For the registry: nothing to tell before the first scrape."""
        return []

    def collect(self) -> Iterable[Any]:
        if self._shared is None:
            return
        core = self._core
        totals = self._shared.totals()
        now = board.now_ms()
        gauge, counter = core.GaugeMetricFamily, core.CounterMetricFamily
        yield core.InfoMetricFamily("daemon", "The release that answers this request.", {"version": __version__})
        yield gauge("daemon_start_time_seconds", "When the supervisor started.", totals.born)
        yield from self._workers(totals, now)
        yield gauge("daemon_active_connections", "Clients and peers that are connected.", connections(totals))
        yield gauge("daemon_peak_streams", "Most streams that ran at once.", totals.peak_streams)
        for metric in board.METRICS:
            family = counter if metric.kind == "counter" else gauge
            if metric.label:
                rows = family(metric.name, metric.help, labels=[metric.label])
                for offset, value in enumerate(metric.values):
                    rows.add_metric([value], totals.words[metric.index + offset])
                yield rows
            elif metric.name:
                yield family(metric.name, metric.help, _value(metric, totals.words))
        for histogram in board.HISTOGRAMS:
            family = core.HistogramMetricFamily(histogram.name, histogram.help)
            _add(family, [], histogram, totals.words)
            yield family
        yield from self._backends(totals)

    def _workers(self, totals: Totals, now: int) -> Iterable[Any]:
        core = self._core
        found = workers(totals, now)
        states = core.GaugeMetricFamily("daemon_workers", "Workers, by what they do.", labels=["state"])
        for state in _STATES:
            states.add_metric([state], sum(worker.state == state for worker in found))
        yield states
        current = max((worker.generation for worker in found if worker.state == "accepting"), default=0)
        yield core.GaugeMetricFamily("daemon_generation", "Number of the generation that takes handoffs.", current)
        old = sum(worker.streams for worker in found if worker.generation != current)
        yield core.GaugeMetricFamily("daemon_draining_streams", "Streams that older generations are finishing.", old)
        late = max((worker.late for worker in found), default=0)
        yield core.GaugeMetricFamily("daemon_loop_lag_seconds", "How late the busiest worker's clock was.", late)

    def _backends(self, totals: Totals) -> Iterable[Any]:
        core = self._core
        tokens = core.CounterMetricFamily(
            "daemon_tokens_total", "Tokens, as the backends report them.", labels=["backend", "kind"]
        )
        for name, words in totals.backends.items():
            tokens.add_metric([name, "prompt"], words[board.TOKENS_PROMPT])
            tokens.add_metric([name, "completion"], words[board.TOKENS_COMPLETION])
        yield tokens
        for metric in board.BACKEND_METRICS:
            if metric.index in (board.TOKENS_PROMPT, board.TOKENS_COMPLETION):
                continue
            family = core.CounterMetricFamily(metric.name, metric.help, labels=["backend"])
            for name, words in totals.backends.items():
                family.add_metric([name], words[metric.index])
            yield family
        for histogram in board.BACKEND_HISTOGRAMS:
            family = core.HistogramMetricFamily(histogram.name, histogram.help, labels=["backend"])
            for name, words in totals.backends.items():
                _add(family, [name], histogram, words)
            yield family


def _add(family: Any, labels: list[str], histogram: Histogram, words: Sequence[int]) -> None:
    """Add one histogram to a family: cumulative buckets, as Prometheus wants them."""
    row = words[histogram.index : histogram.index + histogram.words]
    buckets = []
    count = 0
    for bound, within in zip((*map(repr, histogram.bounds), "+Inf"), row, strict=False):
        count += within
        buckets.append((bound, count))
    family.add_metric(labels, buckets, sum_value=row[-1] / _NANO)
