# SPDX-License-Identifier: Apache-2.0
"""A private httpd for the integration tests: own ServerRoot, loopback ports, four workers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from handoff_standin import PATIENCE, fetch

ROOM = Path(__file__).resolve().parents[2]
BUILD = ROOM / os.environ.get("HANDOFF_BUILD", "build")
SANITIZED = "HANDOFF_SANITIZED" in os.environ
"""Whether httpd and the module were built with sanitizers (make sanitize): slower, and memory grows."""
WORKERS = 4
MPM = os.environ.get("MPM", "event")

PROBLEM = re.compile(
    r":(warn|error|crit|alert|emerg)\b(?!.*AH(00161|00287|00484|10159):)"
    r"|AH0005[01234]:|exit signal"  # a child that crashed, which httpd merely notices
    # UBSan. Not ours: memcpy of 0 bytes from nowhere, when a client hangs up before it has sent a line.
    r"|^(?!(mod_remoteip|buckets/apr_brigade)\.c:\d+:\d+: runtime error: null pointer passed).*: runtime error: "
)
"""Log lines that no test may cause, but for "server (nearly) reached MaxRequestWorkers": four is few."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls until the condition holds; fails the test when it does not within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s in vain: {what}")
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def apxs(name: str) -> str:
    tool = os.environ.get("APXS", "apxs")
    return subprocess.run([tool, "-q", name], check=True, capture_output=True, text=True).stdout.strip()


def writable_run() -> Path | None:
    """A directory below /run that this user may write to."""
    candidates = [Path("/run"), Path(f"/run/user/{os.geteuid()}")]
    return next((c for c in candidates if c.is_dir() and os.access(c, os.W_OK)), None)


@dataclass(slots=True)
class Httpd:
    """A server and what is around it. Paths: `root` ServerRoot, `run` the sockets' directory."""

    mpm: str
    run: Path
    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="handoff-httpd-")))
    ports: dict[str, int] = field(default_factory=dict)
    backend: int = field(default_factory=free_port)  # proxied to; a test may listen there
    binary: str = field(default_factory=lambda: f"{apxs('sbindir')}/{apxs('PROGNAME')}")
    modules: Path = field(default_factory=lambda: Path(apxs("LIBEXECDIR")))
    extra_environment: dict[str, str] = field(default_factory=dict)
    open_files: int = 0  # RLIMIT_NOFILE, 0: as many as the tests
    _process: subprocess.Popen[bytes] | None = None
    _read: int = 0

    def __post_init__(self) -> None:
        self.root.chmod(0o755)
        for name in ("htdocs", "logs", "conf", "reports"):
            (self.root / name).mkdir()
        self.chown(self.root / "logs")
        self.chown(self.root / "reports")

    @staticmethod
    def chown(path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, "www-data", "www-data")

    def port(self, name: str) -> int:
        return self.ports.setdefault(name, free_port())

    def has_module(self, name: str) -> bool:
        return (self.modules / f"mod_{name}.so").exists()

    def load(self, *names: str) -> str:
        return "\n".join(
            f"LoadModule {name}_module {self.modules}/mod_{name}.so" for name in names if self.has_module(name)
        )

    def base_config(self) -> str:
        mpm = (
            f"StartServers {WORKERS}\nMinSpareServers {WORKERS}\nMaxSpareServers {WORKERS}\n"
            if self.mpm == "prefork"
            else f"StartServers 1\nServerLimit 1\nThreadsPerChild {WORKERS}\n"
            f"MinSpareThreads 1\nMaxSpareThreads {WORKERS}\n"
        )
        user = "User www-data\nGroup www-data\n" if os.geteuid() == 0 else ""
        return (
            f"ServerRoot {self.root}\nServerName localhost\nPidFile {self.root}/logs/pid\n"
            f"DefaultRuntimeDir {self.root}/logs\nMutex file:{self.root}/logs default\n"
            f"ErrorLog {self.root}/logs/error\n"
            'ErrorLogFormat "%-m:%-l pid %P: %-E: %M"\n'
            "LogLevel warn socket_handoff:debug\n"
            f"{self.load(f'mpm_{self.mpm}')}\n{mpm}MaxRequestWorkers {WORKERS}\n{user}"
            f"{self.load('authz_core', 'alias', 'mime', 'dir')}\n"
            f"LoadModule socket_handoff_module {BUILD}/mod_socket_handoff.so\n"
            f"LoadModule handoff_test_module {BUILD}/mod_handoff_test.so\n"
            "TypesConfig /dev/null\nTimeout 20\nKeepAliveTimeout 10\n"
        )

    def write_config(self, config: str, name: str = "httpd.conf") -> Path:
        path = self.root / "conf" / name
        path.write_text(self.base_config() + config)
        return path

    def configtest(self, config: str) -> subprocess.CompletedProcess[str]:
        """What `apache2ctl configtest` would say of this configuration."""
        path = self.write_config(f"Listen 127.0.0.1:{free_port()}\n{config}", "test.conf")
        return subprocess.run(
            [self.binary, "-t", "-f", str(path)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        """For a build with sanitizers: reports go where the server's User can write. No search for leaks, because
        what lies in a pool at exit is no leak, and the search would need ptrace."""
        return {
            **os.environ,
            **self.extra_environment,
            "ASAN_OPTIONS": f"log_path={self.root}/reports/report:detect_leaks=0:detect_stack_use_after_return=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",  # beside ASan it knows no log_path: the error log
        }

    def sanitizer_reports(self) -> str:
        """What the sanitizers found since this was last asked; what an idle server finds, it found before."""
        text = ""
        if SANITIZED and self._process is not None and self._process.poll() is None:
            wait_until(self.idle, "no thread of the server is running")
        for path in sorted((self.root / "reports").iterdir()):
            text += f"{path.name}\n{path.read_text(errors='replace')}\n"
            path.unlink()
        return text

    def start(self, config: str) -> None:
        path = self.write_config(config)
        limit = ["sh", "-c", f'ulimit -n {self.open_files} && exec "$@"', "sh"] if self.open_files else []
        self._process = subprocess.Popen(
            [*limit, self.binary, "-DFOREGROUND", "-f", str(path)],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # prefork stops its children by a signal to its group
        )
        process = self._process

        def answers() -> bool:
            if process.poll() is not None:
                assert process.stderr is not None
                raise AssertionError(f"httpd did not start: {process.stderr.read().decode()}{self.error_log()}")
            for port in self.ports.values():
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) != 0:
                        return False
            return len(self.children()) >= (WORKERS if self.mpm == "prefork" else 1)

        wait_until(answers, "httpd starts")
        wait_until(self.idle, "the server has done with the connections that asked whether it answers")
        self._read = len(self.error_log())

    def stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process is not None and process.stderr is not None:
            process.stderr.close()
        reports = self.sanitizer_reports()
        late = [line for line in self.take_log() if "exit signal" in line]
        shutil.rmtree(self.root, ignore_errors=True)
        assert not reports, reports
        assert not late, late

    def children(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(word) for word in text.split()]

    def idle(self) -> bool:
        """No thread of the server runs, waiting for a client is no work; and no child is dead without its parent having
        said so."""
        assert self._process is not None
        for pid in [*self.children(), self._process.pid]:
            try:
                threads = list(Path(f"/proc/{pid}/task").iterdir())
                if any(re.search(r"\) [RDZX] ", (thread / "stat").read_text()) for thread in threads):
                    return False
            except (FileNotFoundError, ProcessLookupError):
                return False
        return True

    def descriptors(self) -> int:
        """Open descriptors of all children together."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.children())

    def resident_kib(self) -> int:
        total = 0
        for pid in self.children():
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
        return total

    def busy_workers(self) -> int:
        """As mod_status tells it, without the worker that says so."""
        text = fetch(self.port("main"), "/status?auto").body.decode()
        return int(text.split("BusyWorkers: ")[1].split()[0]) - 1

    def error_log(self) -> str:
        path = self.root / "logs" / "error"
        return path.read_text(errors="replace") if path.exists() else ""

    def access_line(self, needle: str) -> str:
        """The one access log line of the request that has this in its query."""
        path = self.root / "logs" / "access"

        def found() -> list[str]:
            return [line for line in path.read_text().splitlines() if needle in line]

        wait_until(lambda: bool(found()), f"an access log line with {needle}")
        lines = found()
        assert len(lines) == 1, lines
        return lines[0]

    def new_log_lines(self) -> list[str]:
        """The error log's lines that take_log has not given yet."""
        return self.error_log()[self._read :].splitlines()

    def take_log(self) -> list[str]:
        """Those lines, once the server is quiet; what is written later is given next time, and lost by nobody."""
        if self._process is not None and self._process.poll() is None:
            wait_until(self.idle, "no thread of the server is running")
        text = self.error_log()[self._read :]
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole)
        return whole.splitlines()


@dataclass(slots=True)
class ErrorLog:
    """What the server may complain about during one test."""

    httpd: Httpd
    expected: list[re.Pattern[str]] = field(default_factory=list)

    def matching(self, pattern: str) -> list[str]:
        return [line for line in self.httpd.new_log_lines() if re.search(pattern, line)]

    def expect(self, pattern: str, *, times: int = 1) -> str:
        """Exactly so many lines match; returns the last of them."""
        self.expected.append(re.compile(pattern))
        wait_until(lambda: len(self.matching(pattern)) >= times, f"a log line with {pattern}")
        lines = self.matching(pattern)
        assert len(lines) == times, lines
        return lines[-1]

    def unexpected(self) -> list[str]:
        """What the server complained about since this was last asked, and was not expected to."""
        return [
            line
            for line in self.httpd.take_log()
            if PROBLEM.search(line) and not any(p.search(line) for p in self.expected)
        ]
