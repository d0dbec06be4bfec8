"""The numbers of all workers, in memory that they share: one memfd, one slot of 64-bit words per worker.

The rules of this room: a worker adds to words of its own slot and to nobody else's, in place and without a system call
(``slot[BYTES_SENT] += n``); the supervisor owns slot 0, the *past*, and nothing else. When a worker is gone, whatever
the reason, the supervisor folds its slot into the past and frees it, so that no total ever goes back: what a killed
worker had counted was in memory that did not die with it. Whoever reads sums the past and all slots.

A slot has four regions whose bounds are fixed for good:

    state     what is so now; zero when the worker is gone
    peaks     highest values; the highest of all slots counts
    counters  added up; the buckets of histograms too
    backends  blocks of a name and counters, one for each backend the worker has used; added up by name

Each release may give meaning to words that were unused before, at the end of a region, and must not move any: workers
of different releases share a board while one takes over from the other. If that rule ever has to be broken, VERSION is
raised, and a worker that finds another version counts on a board of its own.

Durations are kept in nanoseconds, times in milliseconds of the monotonic clock, all else in what the name says.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

VERSION = 1
PAST = 0
MAX_SLOTS = 256
SLOT_WORDS = 4096
MAX_BACKENDS = 32
_MAGIC = 0x73646B626F617264
_WORD = 8
_HEADER_WORDS = 512
_MAGIC_AT, _VERSION_AT, _SLOTS_AT, _SEQUENCE_AT = range(4)
_REGIONS = {"state": (0, 64), "peak": (64, 96), "counter": (96, 1024)}
_BACKENDS_AT, _BACKEND_WORDS = 1024, 96
_NAME_WORDS = 8
_LABEL_WORDS = 16
_OTHER = "other"
_READ_TRIES = 100
_NANO = 1_000_000_000
_PAGE = os.sysconf("SC_PAGESIZE")
# The interval of Board.beat.
BEAT_MS = 1000

Slot = memoryview
T = TypeVar("T")


class BoardError(Exception):
    """The descriptor is no board that this release understands."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What one word, or a row of them, means to the outside. ``values`` of ``label`` name the words of a row."""

    name: str
    help: str
    kind: str
    index: int
    label: str = ""
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Histogram:
    """A row of words: one per bucket, one for those above the last bound, one for the sum in nanoseconds."""

    name: str
    help: str
    index: int
    bounds: tuple[float, ...]

    @property
    def words(self) -> int:
        return len(self.bounds) + 2


class _Layout:
    """Gives out the words of a slot in the order in which they are asked for."""

    def __init__(self, regions: Mapping[str, tuple[int, int]]) -> None:
        self._next = {name: first for name, (first, _) in regions.items()}
        self._end = {name: end for name, (_, end) in regions.items()}
        self.metrics: list[Metric] = []
        self.histograms: list[Histogram] = []

    def state(self, name: str = "", text: str = "") -> int:
        return self._metric(name, text, "state")

    def peak(self, name: str, text: str) -> int:
        return self._metric(name, text, "peak")

    def counter(self, name: str, text: str) -> int:
        return self._metric(name, text, "counter")

    def counters(self, name: str, text: str, label: str, values: tuple[str, ...]) -> Mapping[str, int]:
        """One counter per value of a label, the first of which stands for values unknown; there is room for more."""
        index = self._take("counter", _LABEL_WORDS)
        self.metrics.append(Metric(name, text, "counter", index, label, values))
        return {value: index + offset for offset, value in enumerate(values)}

    def histogram(self, name: str, text: str, first: float, count: int = 15) -> Histogram:
        """Bounds double from ``first`` on."""
        bounds = tuple(first * 2**step for step in range(count))
        histogram = Histogram(name, text, self._take("counter", count + 2), bounds)
        self.histograms.append(histogram)
        return histogram

    def _metric(self, name: str, text: str, kind: str) -> int:
        index = self._take(kind, 1)
        if name:
            self.metrics.append(Metric(name, text, kind, index))
        return index

    def _take(self, region: str, words: int) -> int:
        index = self._next[region]
        self._next[region] += words
        if self._next[region] > self._end[region]:
            raise AssertionError(f"region {region} of the board is full")
        return index


# The table. Append to it; see above.
_slot = _Layout(_REGIONS)

# 1 from the moment the supervisor gives the slot away until it is folded.
TAKEN: Final = _slot.state()
PID: Final = _slot.state()
GENERATION: Final = _slot.state()
# Milliseconds of the monotonic clock: when the worker started, when its loop last turned.
STARTED: Final = _slot.state()
HEARTBEAT: Final = _slot.state()
# Not 0 while the worker takes handoffs off the listening socket; see balance.
ACCEPTING: Final = _slot.state()
ACTIVE: Final = _slot.state("daemon_active_streams", "Streams running now.")
PENDING: Final = _slot.state("daemon_pending_handoffs", "Peers that have connected and not yet sent their message.")
LINGERING: Final = _slot.state("daemon_lingering_connections", "Connections whose answer is sent, being closed.")
BUFFERED: Final = _slot.state("daemon_buffered_bytes", "Bytes kept for clients that read slowly.")
REPLAY_BYTES: Final = _slot.state("daemon_replay_bytes", "Bytes kept for clients that come back for the rest.")
# Streams that the worker takes at most: its max_streams.
CAPACITY: Final = _slot.state("daemon_streams_capacity", "Streams that all workers take at most.")
RESIDENT: Final = _slot.state("daemon_resident_memory_bytes", "Memory of all workers.")
# Milliseconds by which the last beat came late: how long the loop was busy with something else.
LATE: Final = _slot.state()
# 1 once the worker takes no more handoffs.
DRAINING: Final = _slot.state()
# Seconds since 1970; in the past alone: when the board was made.
BORN: Final = _slot.state()

# Of one worker, exactly; and of all workers together, looked at once a second.
PEAK: Final = _slot.peak("", "")
PEAK_TOTAL: Final = _slot.peak("", "")

ACCEPTED: Final = _slot.counter("daemon_connections_total", "Connections accepted on the handoff socket.")
REJECTED: Final = _slot.counter("daemon_connections_rejected_total", "Clients turned away because of a limit.")
HANDOFFS: Final = _slot.counter("daemon_handoffs_total", "Handoffs received: a message and a client.")
HANDOFF_ERRORS: Final = _slot.counters(
    "daemon_handoff_errors_total",
    "Handoffs that came to nothing.",
    "reason",
    ("other", "timeout", "network", "invalid", "descriptors", "too_large", "overloaded"),
)
STREAM_ERRORS: Final = _slot.counters(
    "daemon_stream_errors_total",
    "Streams that ended before their answer was complete.",
    "reason",
    ("other", "timeout", "client_disconnected", "network", "canceled", "backend", "slow_client"),
)
STREAMS: Final = _slot.counters(
    "daemon_streams_total",
    "Streams ended, by outcome.",
    "outcome",
    (
        "other",
        "done",
        "client_gone",
        "write_timeout",
        "backend_error",
        "drained",
        "bad_request",
        "overloaded",
        "timeout",
        "buffer_full",
        "resumed",
    ),
)
LIMITED: Final = _slot.counters(
    "daemon_limits_refused_total",
    "Streams refused by a limit, by its kind.",
    "limit",
    ("other", "streams", "user", "address", "rate", "payload", "memory", "descriptors"),
)
BYTES_SENT: Final = _slot.counter("daemon_bytes_sent_total", "Bytes written to clients.")
EVENTS: Final = _slot.counter("daemon_chunks_sent_total", "Events sent to clients.")
HEARTBEATS: Final = _slot.counter("daemon_heartbeats_sent_total", "Comments sent because a stream was silent.")
SLOW_CLIENTS: Final = _slot.counter(
    "daemon_slow_client_disconnects_total", "Clients dropped because they stopped reading."
)
PAUSES: Final = _slot.counter("daemon_backpressure_pauses_total", "Times a backend was paused for a slow client.")
RETRIES: Final = _slot.counter("daemon_backend_retries_total", "Streams passed to another backend before their start.")
REPLAYS: Final = _slot.counter("daemon_replays_total", "Clients that came back and were given the rest.")
REPLAY_MISSES: Final = _slot.counter("daemon_replay_misses_total", "Clients that came back for what was not kept.")
LOG_ERRORS: Final = _slot.counter("daemon_access_log_errors_total", "Lines that the access log could not take.")
SCRAPES: Final = _slot.counter("daemon_metrics_requests_total", "Requests on the metrics socket.")
# Nanoseconds of processor time.
CPU: Final = _slot.counter("daemon_cpu_seconds_total", "Processor time of all workers.")
# The supervisor's, in the past.
RELOADS: Final = _slot.counter("daemon_generations_total", "Generations of workers that took over.")
RELOADS_REFUSED: Final = _slot.counter("daemon_generations_refused_total", "Generations that did not start.")
WORKERS_DIED: Final = _slot.counter("daemon_workers_died_total", "Workers that ended by themselves.")
WORKERS_HUNG: Final = _slot.counter("daemon_workers_hung_total", "Workers killed because their loop had stopped.")
STREAMS_LOST: Final = _slot.counter("daemon_streams_lost_total", "Streams that were cut by the death of a worker.")
HANDOFF_DURATION: Final = _slot.histogram(
    "daemon_handoff_duration_seconds", "From accepting a handoff to starting its backend.", 0.0001
)
STREAM_DURATION: Final = _slot.histogram("daemon_stream_duration_seconds", "From handoff to end of stream.", 0.01)
FIRST_EVENT: Final = _slot.histogram(
    "daemon_time_to_first_token_seconds", "From handoff to the first event for the client.", 0.001
)

# A backend's block, behind its name. Indexes count from the block's start: slot[block + BACKEND_REQUESTS] += 1
_block = _Layout({"counter": (_NAME_WORDS, _BACKEND_WORDS)})
BACKEND_REQUESTS: Final = _block.counter("daemon_backend_requests_total", "Requests to backends.")
BACKEND_ERRORS: Final = _block.counter("daemon_backend_errors_total", "Requests that failed.")
TOKENS_PROMPT: Final = _block.counter("daemon_prompt_tokens_total", "Tokens of questions, where the backend says.")
TOKENS_COMPLETION: Final = _block.counter("daemon_completion_tokens_total", "Tokens of answers, where it says.")
BACKEND_EVENTS: Final = _block.counter("daemon_backend_events_total", "Events received from backends.")
BACKEND_DURATION: Final = _block.histogram("daemon_backend_duration_seconds", "From request to end of answer.", 0.01)
BACKEND_TTFB: Final = _block.histogram("daemon_backend_ttfb_seconds", "From request to the first of the answer.", 0.001)

METRICS: Final = tuple(_slot.metrics)
HISTOGRAMS: Final = tuple(_slot.histograms)
BACKEND_METRICS: Final = tuple(_block.metrics)
BACKEND_HISTOGRAMS: Final = tuple(_block.histograms)


def observe(slot: Slot, histogram: Histogram, seconds: float, block: int = 0) -> None:
    """Count one duration; for a backend's histogram ``block`` is where its block starts."""
    first = block + histogram.index
    slot[first + bisect_left(histogram.bounds, seconds)] += 1
    slot[first + len(histogram.bounds) + 1] += int(seconds * _NANO)


def backend_block(slot: Slot, name: str) -> int:
    """Where the block of the backend ``name`` starts, made if need be; the last block is for those without room."""
    wanted = name.encode()[: _NAME_WORDS * _WORD]
    for number in range(MAX_BACKENDS):
        block = _BACKENDS_AT + number * _BACKEND_WORDS
        if number == MAX_BACKENDS - 1:
            wanted = _OTHER.encode()
        found = _name_at(slot, block)
        if found == wanted:
            return block
        if not found:
            words = memoryview(wanted.ljust(_NAME_WORDS * _WORD, b"\0")).cast("q")
            slot[block : block + _NAME_WORDS] = words
            return block
    return block


def backend_blocks(slot: Slot) -> Iterator[tuple[str, int]]:
    """Name and block of every backend in a slot."""
    for number in range(MAX_BACKENDS):
        block = _BACKENDS_AT + number * _BACKEND_WORDS
        name = _name_at(slot, block)
        if not name:
            return
        yield name.decode("utf-8", "replace"), block


def _name_at(slot: Slot, block: int) -> bytes:
    return slot[block : block + _NAME_WORDS].tobytes().rstrip(b"\0") if slot[block] else b""


@dataclass(frozen=True, slots=True)
class Totals:
    """All that a board knew at one moment: sums over the past and all slots, peaks as maxima, and who is alive.

    ``words`` is indexed as a slot is; ``backends`` has each backend's block by name, indexed with block offsets.
    ``slots`` has the state words of each slot that is taken, by its number; ``born`` is in seconds since 1970.
    """

    words: list[int]
    backends: dict[str, list[int]]
    slots: dict[int, list[int]]
    born: int

    @property
    def peak_streams(self) -> int:
        return max(self.words[PEAK], self.words[PEAK_TOTAL], self.words[ACTIVE])


class Board:
    """The memory itself. ``create`` is the supervisor's, ``attach`` and ``private`` are a worker's."""

    def __init__(self, fd: int, slots: int) -> None:
        """Use ``fd``, which is a memfd of the right size and belongs to this object from now on."""
        self.fd = fd
        self.slots = slots
        self._map = mmap.mmap(fd, _size(slots), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls, slots: int = MAX_SLOTS) -> Board:
        """A new board; pages nobody has written to take no memory."""
        fd = os.memfd_create("board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _size(slots))
        # A mapping whose file shrinks is a process killed by SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        board = cls(fd, slots)
        board._words[_MAGIC_AT] = _MAGIC
        board._words[_VERSION_AT] = VERSION
        board._words[_SLOTS_AT] = slots
        board.slot(PAST)[BORN] = int(time.time())
        return board

    @classmethod
    def attach(cls, fd: int) -> Board:
        """The board behind a descriptor that the supervisor passed; raises BoardError, closes nothing then."""
        try:
            head = memoryview(os.pread(fd, 4 * _WORD, 0)).cast("q").tolist()
            size = os.fstat(fd).st_size
        except (OSError, TypeError) as error:
            raise BoardError(f"descriptor {fd} is no board: {error}") from error
        if len(head) != 4 or head[_MAGIC_AT] != _MAGIC:
            raise BoardError(f"descriptor {fd} is no board")
        if head[_VERSION_AT] != VERSION:
            raise BoardError(f"the supervisor's board has version {head[_VERSION_AT]}, this release knows {VERSION}")
        slots = head[_SLOTS_AT]
        if not 0 < slots <= MAX_SLOTS or size != _size(slots):
            raise BoardError(f"the board has {size} bytes for {slots} slots")
        return cls(fd, slots)

    @classmethod
    def private(cls) -> tuple[Board, int]:
        """A board for one process that has none to share, and the number of its slot."""
        board = cls.create(1)
        number = board.allocate(0)
        assert number is not None  # noqa: S101 - it is new and has one
        return board, number

    def slot(self, number: int) -> Slot:
        """The words of one slot: 0 is the past, 1 to ``slots`` are the workers'."""
        if not 0 <= number <= self.slots:
            raise BoardError(f"there is no slot {number}, the board has 1 to {self.slots}")
        first = _HEADER_WORDS + number * SLOT_WORDS
        return self._words[first : first + SLOT_WORDS]

    # The supervisor's

    def allocate(self, generation: int) -> int | None:
        """Take a free slot for a new worker; None where all are taken, and the worker counts for itself then."""
        for number in range(1, self.slots + 1):
            slot = self.slot(number)
            if not slot[TAKEN]:
                slot[TAKEN] = 1
                slot[GENERATION] = generation
                slot[STARTED] = slot[HEARTBEAT] = now_ms()
                return number
        return None

    def fold(self, number: int) -> int:
        """The worker of this slot is gone: keep what it counted, free the slot. Returns how many streams it had."""
        slot, past = self.slot(number), self.slot(PAST)
        lost = max(0, slot[ACTIVE])
        with self._changing():
            first, end = _REGIONS["peak"]
            for index in range(first, end):
                past[index] = max(past[index], slot[index])
            first, end = _REGIONS["counter"]
            _add(past, first, slot[first:end].tolist())
            for name, block in backend_blocks(slot):
                first, end = block + _NAME_WORDS, block + _BACKEND_WORDS
                _add(past, backend_block(past, name) + _NAME_WORDS, slot[first:end].tolist())
            past[STREAMS_LOST] += lost
            slot[:] = _EMPTY
        return lost

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """While numbers move from one slot to another the sequence is odd, and readers wait."""
        self._words[_SEQUENCE_AT] += 1
        try:
            yield
        finally:
            self._words[_SEQUENCE_AT] += 1

    # Everybody's

    def taken(self) -> list[int]:
        """The numbers of the slots that have a worker."""
        at = _HEADER_WORDS + TAKEN
        return [number for number in range(1, self.slots + 1) if self._words[at + number * SLOT_WORDS]]

    def beat(self, number: int) -> None:
        """Once a second from the worker's loop: it turns. Also the moment to look at what is too dear for every event.

        A killed worker's last second of processor time is not counted; all else is exact.
        """
        slot = self.slot(number)
        now = now_ms()
        slot[LATE] = max(0, now - slot[HEARTBEAT] - BEAT_MS)
        slot[HEARTBEAT] = now
        slot[CPU] = time.process_time_ns()
        slot[RESIDENT] = _resident()
        total = sum(self.slot(each)[ACTIVE] for each in self.taken())
        slot[PEAK_TOTAL] = max(slot[PEAK_TOTAL], total)

    def total(self, index: int) -> int:
        """The sum of one word over the past and all workers."""
        return self._consistent(lambda: sum(self.slot(number)[index] for number in (PAST, *self.taken())))

    def totals(self) -> Totals:
        """Everything at once, for a scrape; about a millisecond."""
        return self._consistent(self._totals)

    def _totals(self) -> Totals:
        words = [0] * _BACKENDS_AT
        backends: dict[str, list[int]] = {}
        slots: dict[int, list[int]] = {}
        for number in (PAST, *self.taken()):
            slot = self.slot(number)
            values = slot[:_BACKENDS_AT].tolist()
            first_peak, first_counter = _REGIONS["peak"]
            if number != PAST:
                slots[number] = values[:first_peak]
                words[:first_peak] = map(int.__add__, words, slots[number])
            words[first_peak:first_counter] = map(
                max, words[first_peak:first_counter], values[first_peak:first_counter]
            )
            words[first_counter:] = map(int.__add__, words[first_counter:], values[first_counter:])
            for name, block in backend_blocks(slot):
                counted = slot[block : block + _BACKEND_WORDS].tolist()
                counted[:_NAME_WORDS] = [0] * _NAME_WORDS
                known = backends.setdefault(name, [0] * _BACKEND_WORDS)
                backends[name] = list(map(int.__add__, known, counted))
        return Totals(words, backends, slots, self.slot(PAST)[BORN])

    def _consistent(self, read: Callable[[], T]) -> T:
        """What ``read`` returns, read while nothing moved between slots.

        Bounded: the supervisor may have been killed in the middle of it, and nobody waits for the dead.
        """
        for _ in range(_READ_TRIES):
            before = self._words[_SEQUENCE_AT]
            value = read()
            if not before % 2 and before == self._words[_SEQUENCE_AT]:
                break
        return value


def join(fd: int | None, number: int | None) -> tuple[Board, int, str]:
    """A worker's board and slot: the supervisor's, or a private one together with the reason."""
    reason = "the supervisor keeps none"
    if fd is not None and number is not None:
        try:
            board = Board.attach(fd)
            board.slot(number)
        except BoardError as error:
            reason = str(error)
        else:
            return _present(board, number), number, ""
    board, number = Board.private()
    return _present(board, number), number, reason


def _present(board: Board, number: int) -> Board:
    slot = board.slot(number)
    slot[TAKEN] = 1
    slot[PID] = os.getpid()
    slot[HEARTBEAT] = now_ms()
    return board


def _resident() -> int:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def now_ms() -> int:
    """Milliseconds of the monotonic clock, which all processes of a host share."""
    return time.monotonic_ns() // 1_000_000


_MOST = (1 << 63) - 1


def _add(slot: Slot, first: int, values: list[int]) -> None:
    for offset, value in enumerate(values):
        if value:
            # A number that a fault made huge must stop here, and not the supervisor that adds them up.
            slot[first + offset] = max(-_MOST, min(_MOST, slot[first + offset] + value))


def _size(slots: int) -> int:
    return (_HEADER_WORDS + (slots + 1) * SLOT_WORDS) * _WORD


_EMPTY = memoryview(bytes(SLOT_WORDS * _WORD)).cast("q")
