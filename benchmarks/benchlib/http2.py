# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 between host and provider, by HAProxy: what docs/backends.md offers to operators, and its other end.

daemon ── HTTP/1.1, Unix socket ──▶ egress ── HTTP/2, TLS ──▶ provider ── HTTP/1.1 ──▶ src/llm.c
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchlib.tools import BenchmarkError, accepts, spawn, wait_until

_COMMON = """
global
    maxconn 9000
    nbthread 1
defaults
    mode http
    timeout connect 10s
    timeout client 1h
    timeout server 1h
"""
_PROVIDER = """
frontend provider
    bind 127.0.0.1:{port} ssl crt {pem} alpn h2
    default_backend model
backend model
    server model 127.0.0.1:{model}
"""
_EGRESS = """
listen egress
    bind unix@{path}
    http-reuse always
    default-server ssl verify required ca-file {certificate} verifyhost localhost sni str(localhost) alpn h2
    server provider 127.0.0.1:{port}
"""


@contextmanager
def provider(directory: Path, cores: set[int], port: int, model: int, certificate: Path, key: Path) -> Iterator[None]:
    """Takes HTTP/2 over TLS at ``port`` for what listens at ``model``."""
    pem = directory / "provider.pem"
    pem.write_bytes(certificate.read_bytes() + key.read_bytes())
    sections = _PROVIDER.format(port=port, pem=pem, model=model)
    with _haproxy(directory, "provider", cores, sections, lambda: accepts(port)):
        yield


@contextmanager
def egress(directory: Path, cores: set[int], port: int, certificate: Path) -> Iterator[tuple[Path, int]]:
    """The Unix socket that leads to the provider, and the process behind it."""
    path = directory / "egress.sock"
    sections = _EGRESS.format(path=path, port=port, certificate=certificate)
    with _haproxy(directory, "egress", cores, sections, path.exists) as pid:
        yield path, pid


@contextmanager
def _haproxy(directory: Path, name: str, cores: set[int], sections: str, listens: Callable[[], bool]) -> Iterator[int]:
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise BenchmarkError("haproxy is missing: apt install haproxy")
    config = directory / f"{name}.cfg"
    config.write_text(_COMMON + sections)
    log = directory / f"{name}.log"
    with log.open("wb") as out:
        process = spawn([program, "-db", "-f", str(config)], cores, stdout=out, stderr=out)
    try:
        wait_until(process, listens, lambda: f"HAProxy did not start: {log.read_text().strip()}")
        yield process.pid
    finally:
        process.kill()
        process.wait()
