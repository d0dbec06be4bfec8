"""One worker process: an event loop with all its streams.

A worker is a fresh interpreter that the supervisor starts. The agreement between the two outlives releases, because a
supervisor stays while the workers of newer releases come and go, and those of an older one when a release is taken
back. It is kept small, and only ever extended; each side ignores what it does not know:

    arguments          --worker --config FILE --channel FD --listen FD [--listen FD ...]
                       --board FD --slot N (see board), --roster FD (see roster), --metrics FD (a listening socket)
    channel to us      "GO" (accept handoffs now); SIGTERM (accept no more, finish, leave); end of file (the supervisor
                       is gone: see handover, then the same); SIGINT (end the streams now and leave). A worker that is
                       told to leave before "GO" simply leaves.
    channel from us    "READY workers=N" (could serve; N workers are configured), "ERROR text" (cannot serve),
                       "NOTE text" (before READY: what of the configuration needs more than a reload),
                       "DRAINING" (accepts no more)
    memory             HEARTBEAT of the slot, written once a second: the loop turns

Lines end in LF. Nothing is accepted before "GO", so a release that is refused has never had a client.

    SIGTERM             accept no more, finish within drain_timeout, leave
    PDEATHSIG (SIGTERM) the supervisor is gone: the same, after the handover
    SIGINT              end the streams now and leave
    SIGHUP              ignored, so that signalling the whole group harms nobody
    SIGALRM             the kernel's, for a worker whose loop has stopped while it was to leave: it dies
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import resource
import signal
import socket
from dataclasses import dataclass, field
from types import ModuleType

from . import access_log, board, descriptors, handover, siblings
from .access_log import AccessLog, log
from .backends.base import BackendSetupError
from .backends.routing import Router
from .balance import Balance
from .board import Board
from .config import Config, load
from .ledger import Ledger
from .listener import Listener
from .metrics import PACKAGE, Exposition
from .metrics_server import MetricsServer
from .metrics_socket import needs_restart
from .notify import ListenSocketError, listening_socket
from .roster import Roster
from .streams import Streams
from .toml_table import ConfigError
from .tracing import Tracing
from .wheel import Timed, TimerWheel

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
# Descriptors besides those of streams; and a stream of a relaying backend needs two.
_SPARE_FDS = 128
_FDS_PER_STREAM = 2
# After the drain: for the last events to be written and the lingering closes.
_GRACE = 2.0
# Only a draining worker polls; an idle one has nothing to wake up for.
_POLL = 0.05
_BEAT = 1.0
# A loop that has not turned for so long says in the journal where it is. Before the supervisor ends it.
_STUCK = 10.0
# How much longer than it has time to leave may a worker take before the kernel ends it.
_LAST_RESORT = 30.0
# Streams come and go without cycles. With the default the collector looks at the youngest every 700 objects, and now
# and then at all 24,000 that the modules have made: 11 ms in which nobody is served, and nothing once they are frozen.
# (malloc's arenas and thresholds were tried too; they change nothing here.)
_GC_THRESHOLDS = (10_000, 20, 50)
# A megabyte of the kernel's; beyond that the table may grow while streams are there.
_LARGEST_TABLE = 131_072


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors that the supervisor passed. Those of a supervisor older than this release may be missing."""

    channel: int
    listen: list[int] = field(default_factory=list)
    board: int | None = None
    slot: int | None = None
    roster: int | None = None
    metrics: int | None = None


def run(config_path: str, inherited: Inherited) -> int:
    """Run a worker until it is told to leave; returns the exit status."""
    # Until the loop has its own handlers: these must never end a worker that has clients, or start it off wrongly.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Inherited over exec, and meant for nobody else: a program of an exec backend could take handoffs by them. asyncio
    # closes them in its children, uvloop does not.
    for fd in (inherited.channel, *inherited.listen, inherited.board, inherited.metrics):
        if fd is not None:
            os.set_inheritable(fd, False)
    channel = socket.socket(fileno=inherited.channel)
    try:
        config = load(config_path)
        access_log.setup(config.log.level)
        listening = [listening_socket(fd) for fd in inherited.listen]
        uvloop = _uvloop()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            return runner.run(_Worker(config, channel, listening, inherited).serve())
    except (ConfigError, BackendSetupError, ListenSocketError) as error:
        text = "; ".join(str(error).splitlines())
        with contextlib.suppress(OSError):
            channel.sendall(f"ERROR {text}\n".encode("utf-8", "replace"))
        return EXIT_CONFIG


class _Worker:
    def __init__(
        self, config: Config, channel: socket.socket, listening: list[socket.socket], inherited: Inherited
    ) -> None:
        self._config = config
        self._channel = channel
        self._listening = listening
        self._inherited = inherited
        self._inbox = b""
        self._leave = asyncio.Event()
        self._hurry = False
        self._mark_path = handover.mark_path(os.environ)
        # Which supervisor's time it is; None before "GO".
        self._mark: str | None = None
        self._listeners: list[Listener] = []
        shared, self._number, private = board.join(inherited.board, inherited.slot)
        if private and inherited.board is not None:
            log.warning("this worker counts for itself: %s", private)
        self._board = shared
        self._balance: Balance | None = None
        self._metrics_sock = None if inherited.metrics is None else socket.socket(fileno=inherited.metrics)
        self._metrics: MetricsServer | None = None

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        wheel = TimerWheel(loop)
        config = self._config
        slot = self._board.slot(self._number)
        slot[board.CAPACITY] = config.server.max_streams
        router = Router(config, loop, wheel, slot)
        roster = Roster(self._inherited.roster)
        tracing = Tracing.start(config.tracing)
        streams = Streams(
            loop,
            wheel,
            config.server,
            router,
            [AccessLog(config.access_log, slot), Ledger(slot), *([tracing] if tracing is not None else [])],
            listen=config.listen,
            limits=config.limits,
            resume=config.resume,
            meeting=siblings.directory(os.environ),
            slot=slot,
            roster=roster,
            content=config.log.content,
            traced=tracing is not None,
        )
        balance = self._balance = Balance(wheel, self._board, self._number)
        timeout = config.server.handoff_timeout
        greets = streams.limit if config.listen.ack else None
        self._listeners = [
            Listener(
                loop,
                wheel,
                sock,
                timeout,
                streams.open,
                slot=slot,
                balance=balance,
                greets=greets,
                refuser=streams.refuse,
            )
            for sock in self._listening
        ]
        loop.add_signal_handler(signal.SIGTERM, self._leave.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._told)
        for note in self._notes():
            log.warning("%s", note)
            self._tell(f"NOTE {note}")
        heart = _Heart(wheel, self._board, self._number, balance)
        heart.on_timer(wheel.now())
        metrics = self._metrics = self._open_metrics(loop, wheel)
        descriptors.make_table(min(config.server.max_streams * _FDS_PER_STREAM + _SPARE_FDS, _LARGEST_TABLE))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._tell(f"READY workers={config.server.worker_count}")
        await self._leave.wait()
        self._set_last_resort()
        slot[board.DRAINING] = 1
        if metrics is not None:
            metrics.stop()
        await self._hand_over(loop)
        balance.stop()
        for listener in self._listeners:
            listener.stop()
        self._tell("DRAINING")
        await self._drain(loop, streams)
        streams.close()
        if tracing is not None:
            tracing.close()
        faulthandler.cancel_dump_traceback_later()
        return EXIT_OK

    def _open_metrics(self, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> MetricsServer | None:
        sock = self._metrics_sock
        if sock is None:
            return None
        if self._config.metrics.listen == "off":
            sock.close()
            return None
        exposition = Exposition.load()
        if exposition is None:
            log.info("/metrics is not served: install %s", PACKAGE)
        slot = self._board.slot(self._number)
        return MetricsServer(loop, wheel, sock, shared=self._board, slot=slot, exposition=exposition)

    def _set_last_resort(self) -> None:
        """A worker without a supervisor has nobody who would notice that its loop has stopped, but for the kernel."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        server = self._config.server
        longest = server.drain_timeout + server.write_timeout + server.linger_timeout + _LAST_RESORT
        signal.setitimer(signal.ITIMER_REAL, longest)

    async def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on accepting until the next supervisor's workers do, where this one's supervisor has gone."""
        if self._mark is None or self._mark_path is None or not self._is_orphan():
            return
        deadline = loop.time() + handover.SECONDS
        while not self._hurry and loop.time() < deadline and handover.read_mark(self._mark_path) == self._mark:
            await asyncio.sleep(_POLL)

    def _is_orphan(self) -> bool:
        """Whether the supervisor's end of the channel is closed: the kernel does that before it sends PDEATHSIG."""
        try:
            return not self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def _drain(self, loop: asyncio.AbstractEventLoop, streams: Streams) -> None:
        """Let the streams finish; end them when their time is over; go, whatever is left, a little later."""

        def busy() -> bool:
            return len(streams) > 0 or any(listener.pending for listener in self._listeners)

        if busy():
            log.info("accepting no more handoffs; finishing %d streams", len(streams))
        deadline = loop.time() + self._config.server.drain_timeout
        while busy() and not self._hurry and loop.time() < deadline:
            await asyncio.sleep(_POLL)
        if not busy():
            return
        log.warning("ending %d streams: %s", len(streams), "told to" if self._hurry else "drain_timeout is over")
        streams.end_all("shutting_down", "The service is being restarted; please ask again.")
        server = self._config.server
        begin = loop.time()
        # The last event stands behind all that a slow client has not read yet. It has as long as any client has.
        while len(streams) and loop.time() < begin + server.linger_timeout + _GRACE + (
            0 if self._hurry else server.write_timeout
        ):
            await asyncio.sleep(_POLL)
        streams.drop_all()

    def _interrupt(self) -> None:
        self._hurry = True
        self._leave.set()

    def _told(self) -> None:
        """Something came over the channel."""
        try:
            data = self._channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # The supervisor is gone. The parent-death signal says the same, but only to a worker that is up already.
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._leave.set()
            return
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        if b"GO" in lines and self._balance is not None and not self._leave.is_set():
            self._mark = handover.read_mark(self._mark_path)
            self._balance.start(list(self._listeners))
            if self._metrics is not None:
                self._metrics.start()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(f"{line}\n".encode())

    def _notes(self) -> list[str]:
        """What the configuration asks for and only a restart can give, or a change of the unit."""
        notes = []
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        streams = self._config.server.max_streams
        needed = streams * _FDS_PER_STREAM + _SPARE_FDS
        if 0 < limit < needed:
            notes.append(
                f"LimitNOFILE is {limit}, max_streams = {streams} may need {needed}: raise the one in the unit and "
                "restart, or lower the other"
            )
        listen = self._config.metrics.listen
        if needs_restart(listen, os.environ, self._metrics_sock):
            notes.append(f"metrics.listen = {listen} needs a restart")
        return notes


class _Heart(Timed):
    """Shows once a second that the loop turns, and looks at what else is to be done about so often."""

    __slots__ = ("_balance", "_board", "_number", "_wheel")

    def __init__(self, wheel: TimerWheel, shared: Board, number: int, balance: Balance) -> None:
        super().__init__()
        self._wheel = wheel
        self._board = shared
        self._number = number
        self._balance = balance

    def on_timer(self, now: float) -> None:
        self._board.beat(self._number)
        self._balance.refresh()
        # The names of functions, no values. It only speaks: a process that was frozen from outside is not to blame.
        faulthandler.dump_traceback_later(_STUCK)
        self._wheel.set(self, now + _BEAT)


def _uvloop() -> ModuleType | None:
    """The faster event loop, where python3-uvloop is installed; a relay costs 10 to 40 % more without it."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    module: ModuleType = uvloop
    return module
