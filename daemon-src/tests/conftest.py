from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_harness import Daemon
from llm_server import FakeLLM, Script

MakeDaemon = Callable[..., Daemon]
MakeLLM = Callable[..., FakeLLM]


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Start daemons of a test's own; every process of theirs is gone afterwards."""
    daemons: list[Daemon] = []

    def make(config: str = "", **options: Any) -> Daemon:
        directory = tmp_path / f"d{len(daemons)}"
        directory.mkdir()
        daemon = Daemon(directory, config, **options)
        daemons.append(daemon)
        return daemon

    make.daemons = daemons  # type: ignore[attr-defined]
    yield make
    for daemon in daemons:
        daemon.close()


@pytest.fixture(scope="session", params=["seqpacket", "stream"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A demo daemon that many tests share, once for each type of socket."""
    daemon = Daemon(tmp_path_factory.mktemp(request.param), kind=request.param).start()
    yield daemon
    daemon.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A demo daemon that many tests share."""
    daemon = Daemon(tmp_path_factory.mktemp("demo")).start()
    yield daemon
    daemon.close()


@pytest.fixture
def make_llm() -> Iterator[MakeLLM]:
    servers: list[FakeLLM] = []

    def make(script: Script, **options: Any) -> FakeLLM:
        servers.append(FakeLLM(script, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 and localhost, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", f"{path}.key", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("a") as file:
        file.write(Path(f"{path}.key").read_text())
    return path


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what its daemons logged."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed and call.when == "call":
        arguments = getattr(item, "funcargs", {})
        daemons = [value for value in arguments.values() if isinstance(value, Daemon)]
        daemons += getattr(arguments.get("make_daemon"), "daemons", [])
        for daemon in daemons:
            report.sections.append((f"log of the daemon in {daemon.directory}", daemon.log()[-8000:]))
