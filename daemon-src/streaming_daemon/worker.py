"""One worker process: an event loop with all its streams.

A worker is a fresh interpreter that the supervisor starts. The agreement between the two outlives releases, because a
supervisor stays while the workers of newer releases come and go. It is kept small, and only ever extended:

    arguments          --worker --config FILE --channel FD --listen FD [--listen FD ...]
    channel to us      "GO" (accept handoffs now); end of file or SIGTERM (accept no more, finish, leave); SIGINT (end
                       the streams now and leave). A worker that is told to leave before "GO" simply leaves.
    channel from us    "READY workers=N" (could serve; N workers are configured), "ERROR text" (cannot serve),
                       "DRAINING" (accepts no more)

Lines end in LF. Nothing is accepted before "GO", so a release that is refused has never had a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from types import ModuleType

from . import access_log, backends
from .access_log import AccessLog, log
from .backends.base import BackendSetupError
from .config import Config, ConfigError, load
from .listener import Listener
from .notify import ListenSocketError, listening_socket
from .session import Streams
from .wheel import TimerWheel

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
# Descriptors besides those of streams; and a stream of a relaying backend needs two.
_SPARE_FDS = 64
_FDS_PER_STREAM = 2
# After the drain: for the last events to be written and the lingering closes.
_GRACE = 2.0
# Only a draining worker polls; an idle one has nothing to wake up for.
_POLL = 0.05


def run(config_path: str, channel_fd: int, listen_fds: list[int]) -> int:
    """Run a worker until it is told to leave; returns the exit status."""
    # Until the loop has its own handlers: these must never end a worker that has clients, or start it off wrongly.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    channel = socket.socket(fileno=channel_fd)
    try:
        config = load(config_path)
        access_log.setup(config.log_level)
        listening = [listening_socket(fd) for fd in listen_fds]
        uvloop = _uvloop()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            return runner.run(_Worker(config, channel, listening).serve())
    except (ConfigError, BackendSetupError, ListenSocketError) as error:
        text = "; ".join(str(error).splitlines())
        with contextlib.suppress(OSError):
            channel.sendall(f"ERROR {text}\n".encode("utf-8", "replace"))
        return EXIT_CONFIG


class _Worker:
    def __init__(self, config: Config, channel: socket.socket, listening: list[socket.socket]) -> None:
        self._config = config
        self._channel = channel
        self._listening = listening
        self._inbox = b""
        self._leave = asyncio.Event()
        self._hurry = False
        self._listeners: list[Listener] = []

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        wheel = TimerWheel(loop)
        config = self._config
        name = config.default_backend
        backend = backends.create(name, config.backends[name], loop, wheel)
        streams = Streams(loop, wheel, config.server, backend, [AccessLog()])
        timeout = config.server.handoff_timeout
        self._listeners = [Listener(loop, wheel, sock, timeout, streams.open) for sock in self._listening]
        loop.add_signal_handler(signal.SIGTERM, self._leave.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._told)
        self._check_descriptor_limit()
        self._tell(f"READY workers={config.server.worker_count}")
        await self._leave.wait()
        for listener in self._listeners:
            listener.stop()
        self._tell("DRAINING")
        await self._drain(loop, streams)
        streams.close()
        return EXIT_OK

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
        deadline = loop.time() + self._config.server.linger_timeout + _GRACE
        while len(streams) and loop.time() < deadline:
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
        if b"GO" in lines and not self._leave.is_set():
            for listener in self._listeners:
                listener.start()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(f"{line}\n".encode())

    def _check_descriptor_limit(self) -> None:
        limit = os.sysconf("SC_OPEN_MAX")
        streams = self._config.server.max_streams
        needed = streams * _FDS_PER_STREAM + _SPARE_FDS
        if 0 < limit < needed:
            log.warning(
                "LimitNOFILE is %d, max_streams = %d may need %d: raise the one or lower the other",
                limit,
                streams,
                needed,
            )


def _uvloop() -> ModuleType | None:
    """The faster event loop, where python3-uvloop is installed; a relay costs 10 to 40 % more without it."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    module: ModuleType = uvloop
    return module
