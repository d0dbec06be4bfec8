"""A local program that writes the answer to its standard output.

Which program and which arguments is the configuration's to say, and no shell ever sees them. What the application sent
arrives on standard input, as one JSON object, and nowhere else: not in the arguments, not in the environment.

The program leads a process group of its own. Whoever cancels the call sends it SIGTERM, and SIGKILL when it is still
there after ``KILL_AFTER``; whatever of the group outlives the program itself is killed at once. A worker that dies can
do none of this: the kernel ends the program then (PR_SET_PDEATHSIG), but not what that has started.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import os
import signal
from typing import cast

from .. import descriptors
from ..access_log import log, quote
from ..config import ExecConfig
from ..envelope import Request
from ..handoff import Handoff, HandoffError
from ..limits import MAX_EVENT, RETRY_AFTER
from ..wheel import Timed, TimerWheel
from .base import BackendSetupError, Failure, Sink
from .sse import SSEError, SSEReader

KILL_AFTER = 2.0
# What a program may say to the journal about one answer.
_STDERR_LINES = 20
_STDERR_LINE = 200
# What starting a program takes: both ends of three pipes, of the one over which it is known that it runs, and one more
# where its end is awaited by a pidfd. Three of them stay.
_FDS_TO_START = 9
_STDIN, _STDOUT, _STDERR = 0, 1, 2
# Becomes the program, and has it killed with its parent. Of util-linux, which every Debian has; to do the same between
# fork and exec would be to run Python in the child of a process with threads.
_TIE = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
# S108: /tmp is the unit's own (PrivateTmp=), and nothing here writes to it.
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/", "TMPDIR": "/tmp"}  # noqa: S108

_BUSY = "Too many answers are being made at the moment; try again."
_MESSAGES = {
    "unavailable": (502, "The program that answers cannot be started."),
    "exhausted": (503, _BUSY),
    "timeout": (504, "The program that answers did not do so in time."),
    "error": (502, "The program that answers has failed."),
    "protocol": (502, "The program that answers wrote something that is not an answer."),
}


class ExecBackend:
    """Type ``exec``."""

    def __init__(self, name: str, config: ExecConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        if not os.access(config.command[0], os.X_OK):
            raise BackendSetupError(f"backends.{name}.command: {config.command[0]} is no program that can be run")
        self.name = name
        self.config = config
        self.loop = loop
        self.wheel = wheel
        self.command = (*_TIE, *config.command)
        self.ceiling = descriptors.ceiling()
        self.environment = {**_ENVIRONMENT, **config.environment}
        # Those that were cancelled and are still dying count too: they are processes.
        self.running: set[ExecCall] = set()

    def start(self, handoff: Handoff, request: Request | None, sink: Sink) -> ExecCall:
        try:
            data = json.dumps(handoff.members, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        except RecursionError as error:
            raise HandoffError("the handoff data", "nested too deeply", "a JSON object") from error
        return ExecCall(self, sink, data)

    def close(self) -> None:
        for call in list(self.running):
            call.kill()


class ExecCall(Timed, asyncio.SubprocessProtocol):
    """One run of the program."""

    __slots__ = (
        "_answered",
        "_backend",
        "_cut",
        "_data",
        "_decode",
        "_dying",
        "_last",
        "_lines",
        "_paused",
        "_pid",
        "_rest",
        "_said",
        "_sink",
        "_sse",
        "_status",
        "_task",
        "_transport",
    )

    def __init__(self, backend: ExecBackend, sink: Sink, data: bytes) -> None:
        super().__init__()
        self._backend = backend
        self._sink: Sink | None = sink
        self._data = data
        self._transport: asyncio.SubprocessTransport | None = None
        self._pid = 0
        self._answered = False
        self._paused = False
        self._dying = False
        self._status: int | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        # Of format "lines": the line that is not complete yet. Of standard error: likewise.
        self._rest = ""
        self._cut = b""
        self._said = 0
        self._sse = SSEReader(MAX_EVENT, raw=True) if backend.config.format == "sse" else None
        self._lines = backend.config.format == "lines"
        self._last = backend.wheel.now()
        self._task: asyncio.Task[None] | None = backend.loop.create_task(self._spawn())

    # Call

    def pause(self) -> None:
        pipe = self._pipe(_STDOUT)
        if pipe is not None and not self._paused and not pipe.is_closing():
            self._paused = True
            cast(asyncio.ReadTransport, pipe).pause_reading()
            self._backend.wheel.cancel(self)

    def resume(self) -> None:
        pipe = self._pipe(_STDOUT)
        if pipe is not None and self._paused and not pipe.is_closing():
            cast(asyncio.ReadTransport, pipe).resume_reading()
        self._paused = False
        self._alive()

    def cancel(self) -> None:
        self._sink = None
        self._backend.wheel.cancel(self)
        if self._transport is None:
            # Not started yet: the task ends it as soon as it is.
            return
        self._end()

    def kill(self) -> None:
        """End it without asking."""
        self._sink = None
        self._signal(signal.SIGKILL)

    # Inside

    async def _spawn(self) -> None:
        backend = self._backend
        config = backend.config
        if len(backend.running) >= config.max_processes:
            detail = f"{config.max_processes} are running"
            self._fail(Failure(503, "backend_busy", _BUSY, detail, str(RETRY_AFTER), retryable=True))
            return
        backend.running.add(self)
        try:
            # Some of what starts a program says ENOENT, or nothing, when it runs out of them half way.
            descriptors.Reservation(_FDS_TO_START, backend.ceiling).release()
            await backend.loop.subprocess_exec(
                lambda: self,
                *backend.command,
                env=backend.environment,
                cwd="/",
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            backend.running.discard(self)
            lack = isinstance(error, OSError) and error.errno in descriptors.LACK
            self._broken("exhausted" if lack else "unavailable", f"cannot run {config.command[0]}: {error}")
            return
        finally:
            self._task = None
        if self._sink is None:
            self._end()
            return
        stdin = self._pipe(_STDIN)
        if stdin is not None:
            # A program may have closed it, or have ended, without reading; uvloop says so by RuntimeError.
            with contextlib.suppress(RuntimeError, OSError):
                cast(asyncio.WriteTransport, stdin).write(self._data)
                cast(asyncio.WriteTransport, stdin).write_eof()
        self._data = b""
        self._alive()

    def _pipe(self, fd: int) -> asyncio.BaseTransport | None:
        return self._transport.get_pipe_transport(fd) if self._transport is not None else None

    def _alive(self) -> None:
        """Something has happened: the next silence counts from here."""
        config = self._backend.config
        self._last = self._backend.wheel.now()
        if self._sink is not None and not self._paused:
            timeout = config.idle_timeout if self._answered else config.first_event_timeout
            self._backend.wheel.set(self, self._last + timeout)

    def on_timer(self, now: float) -> None:
        config = self._backend.config
        if self._dying:
            self._signal(signal.SIGKILL)
        elif self._answered:
            self._broken("timeout", f"silent for {config.idle_timeout:g} s in mid-answer")
        else:
            self._broken("timeout", f"no output within {config.first_event_timeout:g} s")

    def _end(self) -> None:
        """Ask the program to go, and have it killed when it does not."""
        if self._status is not None:
            # It has ended, but somebody outside of its group holds the pipes: nothing more is waited for.
            self._backend.running.discard(self)
            if self._transport is not None:
                self._transport.close()
            return
        if self._dying:
            return
        self._dying = True
        self._signal(signal.SIGTERM)
        # A program that is blocked on a full pipe would never get to its end.
        for fd in (_STDIN, _STDOUT):
            pipe = self._pipe(fd)
            if pipe is not None:
                pipe.close()
        self._backend.wheel.set(self, self._backend.wheel.now() + KILL_AFTER)

    def _signal(self, number: int) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, number)

    def _broken(self, kind: str, detail: str) -> None:
        status, message = _MESSAGES[kind]
        after = str(RETRY_AFTER) if status == 503 else None
        self._fail(Failure(status, f"backend_{kind}", message, detail, after, retryable=not self._answered))

    def _fail(self, failure: Failure) -> None:
        sink = self._sink
        self.cancel()
        if sink is not None:
            sink.failed(failure)

    def _give(self, data: bytes, *, last: bool = False) -> None:
        """Pass on what came from standard output."""
        if self._sse is not None:
            self._give_events(data)
            return
        text = self._decode.decode(data, last)
        if self._lines:
            *lines, self._rest = (self._rest + text).split("\n")
            texts = [line + "\n" for line in lines]
            if last and self._rest:
                texts.append(self._rest)
                self._rest = ""
            if len(self._rest) > MAX_EVENT:
                self._broken("protocol", f"a line is longer than {MAX_EVENT} characters")
                return
        else:
            texts = [text] if text else []
        if texts and self._sink is not None:
            self._answered = True
            self._sink.content(texts)

    def _give_events(self, data: bytes) -> None:
        assert self._sse is not None  # noqa: S101 - of the caller
        try:
            events = self._sse.feed(data)
        except SSEError as error:
            self._broken("protocol", str(error))
            return
        # The sink says itself when the answer is complete.
        raw = [event.raw for event in events if event.data != "[DONE]"]
        if raw and self._sink is not None:
            self._answered = True
            self._sink.events(raw)

    # asyncio.SubprocessProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self._pid = self._transport.get_pid() or 0

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == _STDERR:
            self._complain(data)
        elif self._sink is not None:
            self._give(data)
            if self._sink is not None:
                self._alive()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == _STDERR and self._cut:
            self._complain(b"\n")

    def process_exited(self) -> None:
        if self._transport is not None:
            self._status = self._transport.get_returncode()
        # Children that it has left behind hold the pipes, and nobody waits for them.
        self._signal(signal.SIGKILL)

    def connection_lost(self, exc: Exception | None) -> None:
        """The program has ended and everything that it wrote is here."""
        self._backend.running.discard(self)
        self._backend.wheel.cancel(self)
        self._pid = 0
        if self._sink is not None:
            self._give(b"", last=True)
        sink = self._sink
        if sink is not None and self._status:
            how = f"exit status {self._status}" if self._status > 0 else f"signal {-self._status}"
            self._broken("error", f"{self._backend.config.command[0]} ended with {how}")
        elif sink is not None:
            self._sink = None
            sink.done()

    def _complain(self, data: bytes) -> None:
        *lines, self._cut = (self._cut + data).split(b"\n")
        if len(self._cut) > _STDERR_LINE:
            lines.append(self._cut)
            self._cut = b""
        for line in lines:
            self._said += 1
            if self._said <= _STDERR_LINES and line:
                text = line[:_STDERR_LINE].decode("utf-8", "replace")
                log.warning("backend=%s pid=%d stderr: %s", quote(self._backend.name), self._pid, quote(text))
            elif self._said == _STDERR_LINES + 1:
                log.warning("backend=%s pid=%d stderr: more is left out", quote(self._backend.name), self._pid)
