"""Runs the application under `php -S`.

Nothing here needs Apache or the daemon: what PHP decides, and the bytes of the two headers, is all visible before them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from php_server import APP, Server, StartServer


def pytest_configure() -> None:
    if shutil.which("php") is None:
        raise pytest.UsageError("php is missing: apt-get install php-cli")


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts the app (or another document root); `prepend` is PHP code that runs before each script."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(prepend: str = "", root: Path = APP / "public", ini: dict[str, str] | None = None) -> Server:
        directory = tmp_path_factory.mktemp("app")
        sessions = directory / "sessions"
        sessions.mkdir()
        settings = {
            "session.save_path": str(sessions),
            "error_log": "",
            "log_errors": "1",
            "display_errors": "1",  # what the application must not depend on
            "expose_php": "1",
        } | (ini or {})
        if prepend:
            (directory / "prepend.php").write_text(f"<?php {prepend}")
            settings["auto_prepend_file"] = str(directory / "prepend.php")
        arguments = [part for key, value in settings.items() for part in ("-d", f"{key}={value}")]
        log = directory / "php.log"
        for _ in range(5):  # between choosing a port and PHP's bind, somebody else may take it
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    ["php", *arguments, "-S", f"127.0.0.1:{port}", "-t", str(root)],
                    env=os.environ | {"HANDOFF_APP_CONFIG": str(directory / "config.php")},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            processes.append(process)
            if accepts(port, process):
                break
        else:
            pytest.fail(f"php -S does not start: {log.read_text()}")
        server = Server(port, directory / "config.php", sessions, log, process.pid)
        server.write_config()
        return server

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=10)


def accepts(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return True
    return False


@pytest.fixture(scope="session")
def app(start_server: StartServer) -> Server:
    return start_server()


@pytest.fixture
def own_app(start_server: StartServer) -> Server:
    """A server for tests that change its configuration or look at its files."""
    return start_server()
