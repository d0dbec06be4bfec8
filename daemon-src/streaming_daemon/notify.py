"""What a service says to systemd and what systemd gives it: sd_notify, the watchdog and socket activation.

Written out because it is a screenful and the protocol is stable; see sd_notify(3) and sd_listen_fds(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import MutableMapping

_FIRST_FD = 3
_STATES = frozenset(("READY", "RELOADING", "STOPPING"))
_PATIENCE = 2.0
# struct timeval. The shortest that the kernel knows, which makes one tick of it.
_AT_ONCE = struct.pack("@ll", 0, 1)
# Children must not believe that these speak of them.
VARIABLES = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


class ListenSocketError(Exception):
    """There is nothing to listen on; the text says what is expected."""


class Notifier:
    """Sends state to $NOTIFY_SOCKET, where there is one. Never raises: a deaf manager is no reason to die.

    A manager that is busy has a full queue (ten messages by default, net.unix.max_dgram_qlen). A change of state is
    worth waiting for, since the manager would wait for it for ever; what is sent again in a moment is not.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]

    def send(self, **fields: str) -> None:
        """One message, fields in the order given: ``send(READY="1", STATUS="serving")``."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE if _STATES & fields.keys() else 0)
            sock.sendto(message.encode(), self._address)

    def reloading(self) -> None:
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))


def watchdog_interval(environ: MutableMapping[str, str]) -> float | None:
    """Seconds between pings, a third of what the manager tolerates; None where it asks for none."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 3_000_000 or None


def listen_fds(environ: MutableMapping[str, str]) -> list[int]:
    """The descriptors that the manager passed to this very process."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "0")
    return list(range(_FIRST_FD, _FIRST_FD + int(count))) if count.isdigit() else []


def listening_socket(fd: int) -> socket.socket:
    """Wrap a listening AF_UNIX descriptor; raises ListenSocketError.

    Accepting from it never waits for longer than a tick of the kernel, whatever becomes of O_NONBLOCK. All processes
    share that flag, and systemd clears it when it starts a service without NonBlocking=yes (systemd.service(5)): the
    workers of the supervisor before, who still accept then, would stand still in accept(2) with all their streams.
    SO_RCVTIMEO (socket(7)) is the socket's own, and counts where the flag is not set.
    """
    expected = "expected is a listening AF_UNIX socket (ListenSequentialPacket= or ListenStream= with a path)"
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenSocketError(f"descriptor {fd} is no socket ({error.strerror}): {expected}") from error
    if (
        sock.family != socket.AF_UNIX
        or sock.type not in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM)
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        sock.detach()
        raise ListenSocketError(f"descriptor {fd} is another kind of socket: {expected}")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _AT_ONCE)
    sock.setblocking(False)
    return sock
