"""What the commands do before there is a supervisor: check the configuration, get something to listen on."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from . import control, metrics_socket, notify
from .config import Config, load, warnings_of
from .supervisor import Supervisor
from .toml_table import ConfigError

_TYPES = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}
# The kernel cuts it to net.core.somaxconn.
_BACKLOG = 4096


def check(path: str) -> int:
    """Command line ``--check``; returns the exit status."""
    try:
        config = load(path)
    except ConfigError as error:
        for line in error.errors:
            print(line, file=sys.stderr)
        return 2
    _warn(path, config)
    print(f"{path}: good; backend {config.default_backend}, {config.server.worker_count} workers")
    return 0


def start(config_path: str, address: str | None, control_path: str | None) -> int:
    """Run the service; returns the exit status."""
    try:
        # The workers judge the configuration. This is for the first start alone: one clear sentence, status 2.
        config = load(config_path)
        _warn(config_path, config)
        with _listening(address) as fds, _metrics(config) as metrics:
            path = control_path or control.default_path(os.environ)
            return Supervisor(os.path.abspath(config_path), fds, path, os.environ, metrics).run()
    except (ConfigError, notify.ListenSocketError) as error:
        for line in str(error).splitlines():
            print(line, file=sys.stderr)
        return 2


def _warn(path: str, config: Config) -> None:
    for warning in warnings_of(config):
        print(f"{path}: warning: {warning}", file=sys.stderr)


@contextlib.contextmanager
def _listening(address: str | None) -> Iterator[list[int]]:
    """Descriptors to listen on: systemd's, or of a socket of our own that is removed afterwards."""
    if address is None:
        fds = notify.listen_fds(os.environ)
        if not fds:
            raise notify.ListenSocketError(
                "no socket to listen on: start streaming-daemon.socket, or give --socket PATH"
            )
        for fd in fds:
            # Checked here, closed never: they are for the workers.
            notify.listening_socket(fd).detach()
            os.set_inheritable(fd, False)
        yield fds
        return
    path, _, name = address.partition(",")
    kind = _TYPES.get(name or "seqpacket")
    if kind is None:
        raise notify.ListenSocketError(f"--socket {address}: allowed types are {' and '.join(_TYPES)}")
    with socket.socket(socket.AF_UNIX, kind) as sock:
        try:
            _remove_stale(Path(path), kind)
            sock.bind(path)
        except OSError as error:
            raise notify.ListenSocketError(f"--socket {path}: {error.strerror or error}") from error
        mine = os.stat(path).st_ino
        sock.listen(_BACKLOG)
        try:
            yield [sock.fileno()]
        finally:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == mine:
                    os.unlink(path)


@contextlib.contextmanager
def _metrics(config: Config) -> Iterator[int | None]:
    """A descriptor to serve metrics on. Where there can be none, the service does without."""
    try:
        sock = metrics_socket.open_listener(config.metrics.listen, os.environ)
    except notify.ListenSocketError as error:
        # Before the log is set up, and of the same form as all that is said before that.
        print(error, file=sys.stderr)
        sock = None
    try:
        yield None if sock is None else sock.fileno()
    finally:
        if sock is not None:
            sock.close()


def _remove_stale(path: Path, kind: int) -> None:
    """Remove a socket that nobody listens on any more; leave everything else to fail in bind."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError:
            # EPROTOTYPE, EAGAIN: somebody lives there.
            return
