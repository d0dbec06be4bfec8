"""The socket that /metrics is answered on: where it is, and how the supervisor opens it.

Apart from ``metrics_server`` because a supervisor has no use for an event loop, and clients wait while it starts.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from .notify import ListenSocketError

_BACKLOG = 64
# The workers of the last supervisor close their copies within moments of its end.
_BIND_TRIES, _BIND_PAUSE = 40, 0.05


def location(address: str, environ: Mapping[str, str]) -> str | tuple[str, int] | None:
    """Where ``metrics.listen`` is: a path, or host and port; None where it is off or no directory is known for it."""
    if address == "off":
        return None
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if os.path.isabs(path):
            return path
        directory = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        return os.path.join(directory, path) if directory else None
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def open_listener(address: str, environ: Mapping[str, str]) -> socket.socket | None:
    """The socket for ``metrics.listen``, to be passed to the workers; None where there is to be none.

    Raises ListenSocketError. A caller that has clients to serve reports it and goes on without.
    """
    where = location(address, environ)
    if where is None:
        return None
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if isinstance(where, str):
            # Left by a supervisor that was killed; two live ones would have to share a runtime directory.
            if Path(where).is_socket():
                os.unlink(where)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # For the service's group too, unlike all else that it makes: who may look need not be who may steer.
        before = os.umask(0o117)
        try:
            _bind(sock, where)
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ListenSocketError(f"metrics.listen = {address}: {reason}: /metrics is not served") from error
    sock.setblocking(False)
    return sock


def needs_restart(address: str, environ: Mapping[str, str], sock: socket.socket | None) -> bool:
    """Whether ``metrics.listen`` says another place than the one that the supervisor has opened."""
    where = location(address, environ)
    if where is None or sock is None:
        return where is not None and sock is None
    name = sock.getsockname()
    return where != (name if isinstance(name, str) else tuple(name[:2]))


def _bind(sock: socket.socket, where: str | tuple[str, int]) -> None:
    for left in reversed(range(_BIND_TRIES)):
        try:
            sock.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not left or isinstance(where, str):
                raise
            time.sleep(_BIND_PAUSE)
        else:
            return
