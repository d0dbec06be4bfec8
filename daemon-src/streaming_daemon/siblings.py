"""The workers of a host, for each other: whose an answer is, and a way to give its owner a client.

A directory that only this service can enter, made in its runtime directory, holds for each worker a socket and for each
answer that may be continued a symbolic link, named after the answer, to the socket of its worker. A client who comes
back may be handed to any worker; that one follows the link and hands the client on, in the way Apache does it: one
connection, the message as it came, the same descriptors. So the owner needs nothing but one more listening socket, and
nobody waits for an answer. Workers of an older generation, which finish their streams, are found in the same way.

What a killed worker leaves behind, the next one that starts tidies up. All calls are on a file system in memory and
take some microseconds.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

from .access_log import log
from .limits import MAX_MESSAGE

_DIRECTORY = "answers"
_SOCKET = "worker-"
_BACKLOG = 1024


def directory(environ: Mapping[str, str]) -> Path | None:
    """Where workers of a service with a RuntimeDirectory meet; None without one."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(runtime) / _DIRECTORY if runtime else None


class Passed(Enum):
    """What became of a client whose answer may be in another worker."""

    YES = 1
    # No other worker has such an answer, or its worker is dead.
    NOBODY = 2
    # Its worker lives and takes nobody now.
    BUSY = 3


class Siblings:
    """This worker's place among the others. ``sock`` is listening, for clients whose answer is here."""

    def __init__(self, place: Path) -> None:
        """Raises OSError."""
        self._name = f"{_SOCKET}{os.getpid()}"
        place.mkdir(mode=0o700, exist_ok=True)
        # By the descriptor, because the address of a socket has room for 108 bytes.
        self._fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if os.fstat(self._fd).st_uid != os.geteuid():
                raise PermissionError(f"{place} belongs to another user")
            os.fchmod(self._fd, 0o700)
            self._tidy()
            self.sock.setblocking(False)
            # Under its name only when it listens: otherwise another one that tidies up could take it for a dead one's.
            fresh = f".{self._name}"
            self._remove(fresh)
            self.sock.bind(self._address(fresh))
            self.sock.listen(_BACKLOG)
            os.rename(fresh, self._name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self.sock.close()
            os.close(self._fd)
            raise

    def claim(self, key: str) -> None:
        """Tell the others that the answer is here."""
        self._remove(key)
        try:
            os.symlink(self._name, key, dir_fd=self._fd)
        except OSError as error:
            log.warning("an answer can be continued in this worker only: %s", error)

    def release(self, key: str) -> None:
        # Another worker may have begun an answer of that name since.
        if self._owner(key) == self._name:
            self._remove(key)

    def pass_on(self, key: str, message: bytes, fds: Sequence[int]) -> Passed:
        """Give a client to the worker that has the answer. The descriptors stay the caller's."""
        owner = self._owner(key)
        if owner is None or owner == self._name:
            return Passed.NOBODY
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.setblocking(False)
                # As much as its first sender's buffer may have taken.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
                sock.connect(self._address(owner))
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sock.sendmsg([message or b"\0"], ancillary, socket.MSG_NOSIGNAL)
        except (ConnectionRefusedError, FileNotFoundError):
            return Passed.NOBODY
        except OSError as error:
            log.warning("a client's answer is in another worker (%s), which cannot take it: %s", owner, error)
            return Passed.BUSY
        return Passed.YES

    def close(self) -> None:
        """The socket belongs to whoever listens on it."""
        self._remove(self._name)
        os.close(self._fd)

    def _owner(self, key: str) -> str | None:
        try:
            return os.readlink(key, dir_fd=self._fd)
        except OSError:
            return None

    def _address(self, name: str) -> str:
        return f"/proc/self/fd/{self._fd}/{name}"

    def _tidy(self) -> None:
        """Remove sockets that nobody listens on, one of this process's own name among them, and links to no socket."""
        names = os.listdir(self._fd)
        for name in names:
            if name.startswith(_SOCKET) and (name == self._name or not self._lives(name)):
                self._remove(name)
        for name in names:
            owner = self._owner(name)
            if owner is not None and not os.path.exists(self._address(owner)):
                self._remove(name)

    def _lives(self, name: str) -> bool:
        """Whether anybody has this socket, without knocking: who asks for a connection of another type is told that it
        is of this one (EPROTOTYPE, connect(2)), and its owner learns nothing."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(self._address(name))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            except OSError:
                return True
            return True

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)
