"""The way to ask a running supervisor for a reload and to learn what became of it.

A signal cannot answer, and ``systemctl reload`` must fail where a release was refused. So the supervisor listens on
``control.sock`` in its runtime directory: the client sends one line ("reload"), the answer is one line, "ok TEXT" or
"error TEXT". Both sides may be of different releases: extend it, do not change it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

NAME = "control.sock"
MAX_REQUEST = 64


class ControlError(Exception):
    """The supervisor cannot be asked; the text says what to do."""


def default_path(environ: Mapping[str, str]) -> str | None:
    """Where the socket is for a service with a RuntimeDirectory; None without one."""
    directory = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return os.path.join(directory, NAME) if directory else None


def request(path: str, command: str, wait: bool) -> str:
    """Send ``command``; with ``wait``, return the answer's text. Raises ControlError, also for an answer "error"."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
            sock.sendall(command.encode() + b"\n")
            if not wait:
                return f"{command} requested"
            answer = b""
            while chunk := sock.recv(4096):
                answer += chunk
        except OSError as error:
            raise ControlError(f"no supervisor at {path}: {error.strerror}: is the service running?") from error
    status, _, text = answer.decode("utf-8", "replace").strip().partition(" ")
    if status == "ok":
        return text
    raise ControlError(text if status == "error" else "the supervisor went away without an answer")


def reload(path: str | None, wait: bool) -> int:
    """Command line ``--reload``; returns the exit status."""
    if path is None:
        print("--reload needs --control PATH or $RUNTIME_DIRECTORY (RuntimeDirectory= in the unit)", file=sys.stderr)
        return 2
    try:
        print(request(path, "reload", wait))
    except ControlError as error:
        print(f"reload failed: {error}", file=sys.stderr)
        return 1
    return 0
