# SPDX-License-Identifier: Apache-2.0
"""A private httpd: Debian's binary and Debian's default modules, its own ServerRoot, one loopback port.

Its processes and threads are all there from the start and none is added or ended, so that their CPU time can be read.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchlib.cpu import children
from benchlib.tools import BUILD, PATIENCE, BenchmarkError, accepts, spawn, wait_until

WORKERS = 32
PROCESSES = 2  # of a threaded MPM

DEFAULT_MODULES = (
    "access_compat",
    "alias",
    "auth_basic",
    "authn_core",
    "authn_file",
    "authz_core",
    "authz_host",
    "authz_user",
    "autoindex",
    "deflate",
    "dir",
    "env",
    "filter",
    "mime",
    "negotiation",
    "reqtimeout",
    "setenvif",
    "status",
)
"""What `apt install apache2` enables, without the MPM."""

COMPRESSION = "AddOutputFilterByType DEFLATE text/html text/plain text/xml text/css"
"""The first lines of Debian's deflate.conf: a filter of contents in the way of nearly every response."""


@functools.cache
def apxs(name: str) -> str:
    tool = os.environ.get("APXS", "apxs")
    return subprocess.run([tool, "-q", name], check=True, capture_output=True, text=True).stdout.strip()


def binary() -> str:
    return f"{apxs('sbindir')}/{apxs('PROGNAME')}"


def version() -> str:
    text = subprocess.run([binary(), "-v"], check=True, capture_output=True, text=True).stdout
    return text.splitlines()[0].partition("Apache/")[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_directory() -> Path:
    """A directory of our own below /run, where alone sockets for handoffs may be."""
    for parent in (Path("/run"), Path(f"/run/user/{os.geteuid()}")):
        if os.access(parent, os.W_OK):
            path = Path(tempfile.mkdtemp(prefix="handoff-bench-", dir=parent))
            path.chmod(0o755)
            return path
    raise BenchmarkError("neither /run nor /run/user/<uid> is writable; run this as root")


@dataclass(slots=True)
class Apache:
    """One server. `root` is its ServerRoot (made here), `config` what is added to the common part."""

    mpm: str
    root: Path
    cores: set[int]
    config: str
    port: int = field(default_factory=free_port)
    # How many processes and workers, and LoadModule lines of what is under test; "" for the benchmarks of the handoff
    # itself: WORKERS that are all there from the start, and their application.
    sizes: str = ""
    modules: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        for name in ("htdocs", "logs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        if os.geteuid() == 0:
            shutil.chown(self.root / "logs", "www-data", "www-data")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[int]:
        return children(self.pid)

    def _configuration(self) -> str:
        root = self.root
        sizes = (
            self.sizes
            or (
                f"StartServers {WORKERS}\nMinSpareServers 1\nMaxSpareServers {WORKERS}\nServerLimit {WORKERS}\n"
                if self.mpm == "prefork"
                else f"StartServers {PROCESSES}\nServerLimit {PROCESSES}\nThreadsPerChild {WORKERS // PROCESSES}\n"
                f"MinSpareThreads 1\nMaxSpareThreads {WORKERS}\n"
            )
            + f"MaxRequestWorkers {WORKERS}\nMaxConnectionsPerChild 0\nMaxKeepAliveRequests 0\n"
        )
        tested = self.modules or f"LoadModule bench_module {BUILD}/mod_bench.so"
        modules = "\n".join(
            f"LoadModule {name}_module {apxs('LIBEXECDIR')}/mod_{name}.so"
            for name in (f"mpm_{self.mpm}", *DEFAULT_MODULES)
        )
        return (
            f"ServerRoot {root}\nServerName localhost\nPidFile {root}/logs/pid\nDefaultRuntimeDir {root}/logs\n"
            f"Mutex file:{root}/logs default\nErrorLog {root}/logs/error\nLogLevel warn\n"
            f"{modules}\n{tested}\n{sizes}"
            f"{'User www-data' if os.geteuid() == 0 else ''}\n{'Group www-data' if os.geteuid() == 0 else ''}\n"
            f"Listen 127.0.0.1:{self.port}\nDocumentRoot {root}/htdocs\nTypesConfig /etc/mime.types\n"
            'LogFormat "%h %l %u %t \\"%r\\" %>s %O \\"%{Referer}i\\" \\"%{User-Agent}i\\"" combined\n'
            f"CustomLog {root}/logs/access combined\n"
            f"{COMPRESSION}\n<Directory />\nAllowOverride None\nRequire all denied\n</Directory>\n"
            f"<Directory {root}/htdocs>\nRequire all granted\n</Directory>\n"
            f"{self.config}"
        )

    def start(self, *, under: tuple[str, ...] = ()) -> None:
        """`under` is a program that runs httpd as one process (-X), or nothing."""
        path = self.root / "httpd.conf"
        path.write_text(self._configuration())
        with (self.root / "logs" / "stderr").open("wb") as stderr:
            self._process = spawn(
                [*under, binary(), "-X" if under else "-DFOREGROUND", "-f", str(path)],
                self.cores,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # prefork stops its children by a signal to its group
            )
        expected = 0 if under else 1 if self.sizes else WORKERS if self.mpm == "prefork" else PROCESSES
        try:
            wait_until(
                self._process,
                lambda: accepts(self.port) and len(self.workers()) >= expected,
                lambda: f"httpd ({self.mpm}) did not start:\n{self.complaints()}",
            )
        except BenchmarkError:
            self.stop()
            raise

    def complaints(self) -> str:
        """The ends of what it wrote to its error log and to standard error."""
        texts = (self.root / "logs" / name for name in ("error", "stderr"))
        return "\n".join(text.read_text(errors="replace")[-3000:] for text in texts if text.exists())

    def stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(PATIENCE)
