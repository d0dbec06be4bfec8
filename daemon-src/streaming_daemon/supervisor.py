"""The process that systemd knows: starts, watches and retires workers, and never touches a client.

A *generation* is the workers of one release. A reload starts a new one from where ``current`` points by then, and only
when every worker of it is ready does it take over: the new ones get "GO", the old ones SIGTERM. If one of them is not,
all of the new generation is killed, which costs nobody anything, and the old one goes on. A worker that dies is
replaced within its generation, from that generation's own release directory. Of whatever ends a worker, the streams
that it had are named in the journal, and its numbers go into the board's past.

    SIGHUP              reload
    SIGTERM             leave at once; the workers notice, take handoffs until a new supervisor's do (handover) and
                        finish their streams on their own
    SIGINT, SIGQUIT     end all streams now, wait for the workers, leave
    SIGCHLD             a worker has ended: name the streams it lost, and replace it unless it was told to leave
    SIGKILL, a crash    cannot be seen here: the workers do, and go on as after SIGTERM

A worker *hangs* when its loop has not turned for ``_HUNG_AFTER`` looks in a row, one a second; after ``_KILL_AFTER`` it
is killed. systemd's watchdog is only fed while a worker serves and none hangs.

What is said between supervisor and worker stands in ``worker``. The configuration is the workers' business alone: one
that a newer release understands may be Greek to a supervisor that has been running for a year.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from . import access_log, board, control, handover, roster
from .access_log import log, quote
from .board import Board
from .notify import VARIABLES, Notifier, watchdog_interval

_PACKAGE = __package__ or "streaming_daemon"
_PR_SET_PDEATHSIG = 1
# From start to READY; a cold interpreter on a busy small machine needs a few seconds.
_START_TIMEOUT = 30.0
_QUICK_DEATH = 10.0
_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 10.0
_WAIT_FOR_WORKERS = 10.0
_MAX_LINE = 4096
_MAX_NOTES = 20
# Looks are counted and not seconds, so that a stop of everything (a frozen host) is not held against the workers.
_LOOK = 1.0
_HUNG_AFTER = 3
# With WatchdogSec=30s: late enough for a loaded machine, and early enough for the watchdog to see the replacement.
_KILL_AFTER = 15
# The supervisor's own modules: where they differ in a new release, only a restart makes them count.
_OWN = (
    "__main__",
    "access_log",
    "board",
    "control",
    "handover",
    "journal",
    "metrics_socket",
    "notify",
    "roster",
    "service",
    "supervisor",
)


@dataclass(slots=True, eq=False)
class _Generation:
    number: int
    root: Path
    wanted: int = 1
    workers: list[_Worker] = field(default_factory=list)
    waiting: list[socket.socket] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Worker:
    generation: _Generation
    process: subprocess.Popen[bytes]
    channel: socket.socket
    started: float
    slot: int | None
    roster: int
    inbox: bytes = b""
    ready: bool = False
    serving: bool = False
    error: str = ""
    beat: int = 0
    # Looks in a row at which the loop had not turned since the last one.
    missed: int = 0

    @property
    def hangs(self) -> bool:
        return self.missed >= _HUNG_AFTER


class Supervisor:
    """``listening`` and ``metrics`` are descriptors to hand to every worker; they stay open here."""

    def __init__(
        self,
        config: str,
        listening: list[int],
        control_path: str | None,
        environ: MutableMapping[str, str],
        metrics: int | None = None,
    ) -> None:
        self._config = config
        self._listening = listening
        self._metrics = metrics
        self._board = Board.create()
        self._past = self._board.slot(board.PAST)
        self._own = own_code(Path(__file__).resolve().parent)
        self._control_path = control_path
        self._environ = environ
        self._code_root = code_root(environ)
        self._notifier = Notifier(environ)
        self._watchdog = watchdog_interval(environ)
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._wakeup, self._wakeup_end = socket.socketpair()
        self._control: socket.socket | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._current: _Generation | None = None
        self._incoming: _Generation | None = None
        self._retiring: list[_Worker] = []
        self._again: list[socket.socket] | None = None
        self._count = 0
        self._backoff = _FIRST_BACKOFF
        self._announced = False
        self._exit: int | None = None

    def run(self) -> int:
        """Serve until told to leave; returns the exit status."""
        access_log.setup("info")
        self._take_signals()
        self._open_control()
        if self._watchdog is not None:
            self._ping()
        self._after(_LOOK, self._look)
        self._start_generation([])
        try:
            while self._exit is None:
                self._turn()
        finally:
            self._close_control()
        return self._exit

    def _turn(self) -> None:
        timeout = max(0.0, min(when for when, _ in self._timers) - time.monotonic()) if self._timers else None
        for key, _ in self._selector.select(timeout):
            key.data()
        now = time.monotonic()
        due = [entry for entry in self._timers if entry[0] <= now]
        for entry in due:
            self._timers.remove(entry)
            entry[1]()

    def _after(self, delay: float, action: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + delay, action))

    # Generations

    def _reload(self, waiting: list[socket.socket]) -> None:
        if self._incoming is not None:
            # What is being started may have been read before the change that this reload is about.
            self._again = (self._again or []) + waiting
            return
        self._notifier.reloading()
        self._start_generation(waiting)

    def _start_generation(self, waiting: list[socket.socket]) -> None:
        self._count += 1
        # Not Path.resolve(), which raises on a loop of links; a worker started there is refused like any that fails.
        root = Path(os.path.realpath(self._code_root))
        generation = self._incoming = _Generation(self._count, root, waiting=waiting)
        log.info("starting generation %d from %s", generation.number, root)
        self._after(_START_TIMEOUT, lambda: self._overdue(generation))
        # One worker first: it knows how many there are to be, and most faults show in it.
        self._spawn(generation)

    def _overdue(self, generation: _Generation) -> None:
        if self._incoming is generation:
            self._refuse(f"not ready within {_START_TIMEOUT:g} s")

    def _advance(self, generation: _Generation) -> None:
        """A worker of the incoming generation is ready: start those missing, or take over."""
        while len(generation.workers) < generation.wanted and self._incoming is generation:
            self._spawn(generation)
        if self._incoming is not generation or not all(worker.ready for worker in generation.workers):
            return
        old, self._current, self._incoming = self._current, generation, None
        for worker in generation.workers:
            if not worker.serving:
                self._go(worker)
        if old is not None:
            self._retire(old.workers)
        self._backoff = _FIRST_BACKOFF
        self._past[board.RELOADS] += 1
        text = f"generation {generation.number}: {len(generation.workers)} workers from {generation.root}"
        log.info("serving with %s", text)
        if own_code(generation.root / _PACKAGE) != self._own:
            generation.notes.append("the supervisor runs an older release than its workers")
        if generation.notes:
            text += f"; needs a restart, which loses no stream: {'; '.join(generation.notes)}"
        self._settled(generation, f"ok {text}")

    def _refuse(self, reason: str) -> None:
        """The incoming generation is no good: away with it."""
        generation, self._incoming = self._incoming, None
        if generation is None:
            return
        for worker in generation.workers:
            # The first generation of all may have clients already.
            worker.process.send_signal(signal.SIGTERM if worker.serving else signal.SIGKILL)
        self._retiring += generation.workers
        generation.workers = []
        if self._current is None:
            log.error("cannot start: %s", reason)
            self._notifier.send(STATUS=f"cannot start: {reason}")
            self._exit = 1
            return
        self._past[board.RELOADS_REFUSED] += 1
        log.error("generation %d refused, generation %d goes on: %s", generation.number, self._current.number, reason)
        self._settled(generation, f"error generation {generation.number} refused, the old one goes on: {reason}")

    def _settled(self, generation: _Generation, answer: str) -> None:
        # READY before the answer: the reload command must not end while systemd still sees the reload going on.
        self._notifier.send(READY="1", STATUS=self._status() + (f"; {answer}" if answer.startswith("error") else ""))
        for client in generation.waiting:
            with contextlib.suppress(OSError):
                client.sendall(answer.encode("utf-8", "replace") + b"\n")
            client.close()
        generation.waiting = []
        again, self._again = self._again, None
        if again is not None:
            self._reload(again)

    def _status(self) -> str:
        current = self._current
        if current is None:
            return "starting"
        text = f"generation {current.number}, {len(current.workers)} workers"
        if hung := [str(worker.process.pid) for worker in self._everybody() if worker.hangs]:
            text += f", HUNG: {' '.join(hung)}"
        return text + (f", {len(self._retiring)} retired ones finishing" if self._retiring else "")

    # Workers

    def _spawn(self, generation: _Generation) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        command = [sys.executable, "-m", _PACKAGE, "--worker", "--config", self._config]
        command += ["--channel", str(theirs.fileno())]
        for fd in self._listening:
            command += ["--listen", str(fd)]
        names = roster.create()
        slot = self._board.allocate(generation.number)
        passed = [theirs.fileno(), names, *self._listening]
        command += ["--roster", str(names)]
        if slot is not None:
            command += ["--board", str(self._board.fd), "--slot", str(slot)]
            passed.append(self._board.fd)
        if self._metrics is not None:
            command += ["--metrics", str(self._metrics)]
            passed.append(self._metrics)
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
                command,
                cwd=generation.root,
                env=self._child_environment(generation.root),
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                # Safe here: this process has one thread, which also is the one whose death the signal is about.
                preexec_fn=self._die_with_me(os.getpid()),  # noqa: PLW1509
            )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            os.close(names)
            if slot is not None:
                self._board.fold(slot)
            self._failed_start(generation, f"cannot start a worker in {generation.root}: {error}")
            return
        finally:
            theirs.close()
        worker = _Worker(generation, process, ours, time.monotonic(), slot, names)
        generation.workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._heard(worker))
        if generation is self._current:
            self._after(_START_TIMEOUT, lambda: self._not_started(worker))

    def _not_started(self, worker: _Worker) -> None:
        """The time of a replacement is over; that of a whole generation is looked after in ``_overdue``."""
        if not worker.ready and worker in worker.generation.workers:
            worker.error = f"not ready within {_START_TIMEOUT:g} s"
            worker.process.kill()

    def _die_with_me(self, parent: int) -> Callable[[], None]:
        def in_child() -> None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        return in_child

    def _child_environment(self, root: Path) -> dict[str, str]:
        environment = {name: value for name, value in self._environ.items() if name not in VARIABLES}
        # A replacement must run what the rest of its generation runs, wherever ``current`` points by then.
        others = [entry for entry in _search_path(self._environ) if entry != str(self._code_root)]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *others])
        return environment

    def _go(self, worker: _Worker) -> None:
        worker.serving = True
        with contextlib.suppress(OSError):
            worker.channel.send(b"GO\n")

    def _announce(self) -> None:
        """The last supervisor's workers, should there be any left, may stop now."""
        if not self._announced:
            self._announced = True
            try:
                handover.announce(handover.mark_path(self._environ))
            except OSError as error:
                log.warning("workers of the last supervisor take handoffs for a while yet: %s", error)

    def _retire(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.terminate()
        self._retiring += workers
        workers.clear()

    def _heard(self, worker: _Worker) -> None:
        if worker.channel.fileno() < 0:
            # Reaped and read to its end earlier in this turn.
            return
        try:
            data = worker.channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(worker.channel)
            worker.channel.close()
            return
        *lines, worker.inbox = (worker.inbox + data)[-_MAX_LINE:].split(b"\n")
        for line in lines:
            word, _, rest = line.decode("utf-8", "replace").partition(" ")
            if word == "READY":
                self._ready(worker, rest)
            elif word == "ERROR":
                worker.error = rest
            elif word == "NOTE" and rest not in worker.generation.notes and len(worker.generation.notes) < _MAX_NOTES:
                worker.generation.notes.append(rest)
            elif word == "DRAINING" and worker.serving and worker in worker.generation.workers:
                log.warning("worker %d was told to leave by somebody else; starting another", worker.process.pid)
                worker.generation.workers.remove(worker)
                self._retiring.append(worker)
                self._replace(worker.generation)

    def _ready(self, worker: _Worker, rest: str) -> None:
        generation = worker.generation
        worker.ready = True
        if generation is self._incoming:
            wanted = rest.removeprefix("workers=")
            generation.wanted = int(wanted) if wanted.isdigit() else 1
            if self._current is None:
                # Clients may be waiting since the last supervisor's end.
                self._announce()
                self._go(worker)
            self._advance(generation)
        elif generation is self._current:
            self._go(worker)
            self._notifier.send(STATUS=self._status())

    def _reap(self) -> None:
        generations = [generation for generation in (self._current, self._incoming) if generation is not None]
        for worker in [worker for generation in generations for worker in generation.workers]:
            if worker.process.poll() is not None:
                self._died(worker)
        for worker in [worker for worker in self._retiring if worker.process.poll() is not None]:
            self._retiring.remove(worker)
            self._bury(worker)
        if self._current is not None and self._exit is None:
            self._notifier.send(STATUS=self._status())

    def _died(self, worker: _Worker) -> None:
        # Its last words may still be in the channel.
        self._heard(worker)
        generation = worker.generation
        if worker not in generation.workers:
            return
        generation.workers.remove(worker)
        self._past[board.WORKERS_DIED] += 1
        self._bury(worker)
        reason = worker.error or f"worker {_describe(worker.process.returncode)}; the journal has its last words"
        if not worker.serving or generation is self._incoming:
            self._failed_start(generation, reason)
            return
        if time.monotonic() - worker.started >= _QUICK_DEATH:
            self._backoff = _FIRST_BACKOFF
        self._replace(generation)

    def _bury(self, worker: _Worker) -> None:
        """The process has ended: name the streams that ended with it, keep its numbers."""
        lost = roster.unfinished(worker.roster)
        os.close(worker.roster)
        if worker.slot is not None:
            self._board.fold(worker.slot)
        if lost or (worker.serving and worker.process.returncode):
            how = _describe(worker.process.returncode)
            log.error("worker %d %s: its streams are lost: %d", worker.process.pid, how, len(lost))
        for name in lost:
            log.error("stream id=%s outcome=lost worker=%d", quote(name), worker.process.pid)

    # Health

    def _look(self) -> None:
        """Once a second: does every worker's loop turn?"""
        self._after(_LOOK, self._look)
        before = self._status()
        for worker in self._everybody():
            slot = None if worker.slot is None else self._board.slot(worker.slot)
            # One of a release without heartbeats, or with a board of its own, cannot be judged.
            if slot is None or slot[board.PID] != worker.process.pid:
                continue
            worker.missed = worker.missed + 1 if slot[board.HEARTBEAT] == worker.beat else 0
            worker.beat = slot[board.HEARTBEAT]
            if worker.missed == _HUNG_AFTER:
                log.error("worker %d hangs; it has %d streams", worker.process.pid, slot[board.ACTIVE])
            elif worker.missed == _KILL_AFTER:
                log.error("worker %d hangs for %d s: killed", worker.process.pid, _KILL_AFTER)
                self._past[board.WORKERS_HUNG] += 1
                worker.process.kill()
        if self._current is not None and self._status() != before:
            self._notifier.send(STATUS=self._status())

    def _healthy(self) -> bool:
        if self._current is None:
            return True
        serving = [worker for worker in self._current.workers if worker.serving]
        return bool(serving) and not any(worker.hangs for worker in serving)

    def _failed_start(self, generation: _Generation, reason: str) -> None:
        if generation is self._incoming:
            self._refuse(reason)
        elif generation is self._current:
            log.error("a replacement worker did not start: %s", reason)
            self._replace(generation)

    def _replace(self, generation: _Generation) -> None:
        def spawn() -> None:
            if generation is self._current and len(generation.workers) < generation.wanted:
                self._spawn(generation)

        self._after(self._backoff, spawn)
        self._backoff = min(self._backoff * 2, _LAST_BACKOFF)

    # Signals

    def _take_signals(self) -> None:
        self._wakeup.setblocking(False)
        self._wakeup_end.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._signalled)
        signal.set_wakeup_fd(self._wakeup_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
            # The number arrives over the wakeup descriptor; a handler of Python's own is what makes it do so.
            signal.signal(number, lambda *_: None)

    def _signalled(self) -> None:
        numbers = set(self._wakeup.recv(4096))
        if signal.SIGCHLD in numbers:
            self._reap()
        if signal.SIGINT in numbers or signal.SIGQUIT in numbers:
            self._stop_now()
        elif signal.SIGTERM in numbers:
            self._stop()
        elif signal.SIGHUP in numbers and self._exit is None:
            self._reload([])

    def _everybody(self) -> list[_Worker]:
        generations = [generation for generation in (self._current, self._incoming) if generation is not None]
        return [worker for generation in generations for worker in generation.workers] + self._retiring

    def _stop(self) -> None:
        self._notifier.send(STOPPING="1", STATUS="leaving; workers finish their streams")
        log.info("leaving; workers finish their streams on their own")
        # They are told by the end of this process, from which they know that it was no order to stop at once.
        self._exit = 0

    def _stop_now(self) -> None:
        self._notifier.send(STOPPING="1", STATUS="ending all streams")
        log.info("ending all streams and leaving")
        workers = self._everybody()
        for worker in workers:
            worker.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _WAIT_FOR_WORKERS
        for worker in workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
        self._exit = 0

    def _ping(self) -> None:
        if self._healthy():
            self._notifier.send(WATCHDOG="1")
        if self._watchdog is not None:
            self._after(self._watchdog, self._ping)

    # Control socket

    def _open_control(self) -> None:
        if self._control_path is None:
            return
        path = Path(self._control_path)
        # Left by a supervisor that was killed. Two live ones would have to share a runtime directory.
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(16)
        sock.setblocking(False)
        self._control = sock
        self._selector.register(sock, selectors.EVENT_READ, self._asked)

    def _close_control(self) -> None:
        if self._control is not None and self._control_path is not None:
            self._control.close()
            Path(self._control_path).unlink(missing_ok=True)

    def _asked(self) -> None:
        if self._control is None:
            return
        try:
            client, _ = self._control.accept()
        except OSError:
            return
        client.setblocking(False)
        inbox = bytearray()
        self._selector.register(client, selectors.EVENT_READ, lambda: self._request(client, inbox))

    def _request(self, client: socket.socket, inbox: bytearray) -> None:
        try:
            data = client.recv(control.MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        inbox += data
        if data and b"\n" not in inbox and len(inbox) < control.MAX_REQUEST:
            return
        self._selector.unregister(client)
        if inbox.strip() == b"reload":
            self._reload([client])
            return
        with contextlib.suppress(OSError):
            client.sendall(b'error unknown request, allowed is "reload"\n')
        client.close()


def code_root(environ: MutableMapping[str, str]) -> Path:
    """The directory to run new workers from: the first of $PYTHONPATH that has the package, links unresolved.

    A working directory would not do: the kernel resolves ``current`` when it is entered, not when it is used.
    """
    for entry in _search_path(environ):
        if (Path(entry) / _PACKAGE).is_dir():
            return Path(entry)
    return Path(__file__).resolve().parent.parent


def own_code(package: Path) -> dict[str, bytes]:
    """The text of the modules that a supervisor consists of; those that are missing are left out."""
    found = {}
    for name in _OWN:
        with contextlib.suppress(OSError):
            found[name] = (package / f"{name}.py").read_bytes()
    return found


def _search_path(environ: MutableMapping[str, str]) -> list[str]:
    return [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
