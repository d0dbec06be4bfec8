"""The daemons of this repository: how each is built and started, what it can, and why not the rest.

A daemon is started as systemd does it: the listening socket is descriptor 3, LISTEN_FDS says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from exchange import PATIENCE, Direct, Failed, wait_for

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "daemons"

CAPABILITIES = {
    "plain": "takes the plain message",
    "envelope": "takes the envelope",
    "ack": "says its byte where it is told to",
    "json": "its data is JSON, and other data is refused",
    "default": "answers data without prompt",
    "pace": "knows demo.tokens and demo.tokens_per_second",
    "echo": "answers with the words of the prompt",
    "members": "knows every member that docs/wire-protocol.md lists for the data",
    "backend": "asks an OpenAI-compatible server",
}

_ANSWERS_ITSELF = {
    "members": "reads prompt and demo, and leaves the other members to who copies it",
    "backend": "makes its answer up itself",
}
_ENVELOPE_JSON = {"/usr/include/jansson.h": "libjansson-dev"}


@dataclass(frozen=True)
class Daemon:
    """``build`` and ``command`` may name {build}, a directory of their own; ``ack`` is the flag for it. ``needs``:
    programs or files, and the package of Debian that has each."""

    name: str
    command: tuple[str, ...]
    ack: str = "--ack"
    build: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=lambda: dict(_ANSWERS_ITSELF))
    config: str = ""

    def missing(self) -> list[str]:
        return [
            f"{self.name} needs {tool}, of Debian's package {package}"
            for tool, package in self.needs.items()
            if not (Path(tool).exists() if tool.startswith("/") else shutil.which(tool))
        ]


# Debian's Python, as on a host: the environment of the tests has other packages.
_PYTHON = "/usr/bin/python3"
_PRODUCTION = (_PYTHON, "-P", "-m", "streaming_daemon", "--config", "{build}/{ack}.toml")

DAEMONS = [
    Daemon(
        "daemon-demo",
        _PRODUCTION,
        needs={_PYTHON: "python3"},
        cannot={"echo": "has the prompt in an answer of its own", "backend": "its backend is the demo, see daemon-llm"},
        # Most vectors do not say a pace, and its answer is long.
        config='[backends.demo]\ntype = "demo"\ntokens_per_second = 2000.0\n',
    ),
    Daemon(
        "daemon-llm",
        _PRODUCTION,
        needs={_PYTHON: "python3"},
        cannot={
            "default": "a model cannot be asked nothing: 400",
            "members": "as daemon-demo, which need not be asked something",
        },
        config="""
[backend]
default = "standin"
[backends.standin]
type = "openai"
base_url = "{url}"
model = "conformance"
extra = ["demo", "backend_does"]
""",
    ),
    Daemon("python", (_PYTHON, "-P", f"{EXAMPLES}/test_daemon.py"), needs={_PYTHON: "python3"}),
    Daemon(
        "go",
        ("{build}/streaming_daemon",),
        ack="-ack",
        build=("go", "build", "-o", "{build}/streaming_daemon", f"{EXAMPLES}/streaming_daemon.go"),
        needs={"go": "golang-go"},
    ),
    Daemon(
        "php",
        ("php", "-d", "pcre.jit=0", f"{EXAMPLES}/streaming_daemon.php"),
        needs={"php": "php-cli"},
    ),
    Daemon(
        "exec",
        ("{build}/handoff_exec", f"{EXAMPLES}/answer.py"),
        ack="-a",
        build=(
            *("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", "{build}/handoff_exec"),
            *(f"{EXAMPLES}/handoff_exec.c", "-ljansson"),
        ),
        needs={"gcc": "gcc", **_ENVELOPE_JSON, _PYTHON: "python3"},
    ),
]


def check_table() -> None:
    """Whatever a daemon cannot has a reason, and is one of the capabilities there are."""
    for daemon in DAEMONS:
        unknown = set(daemon.cannot) - set(CAPABILITIES)
        if unknown or not all(daemon.cannot.values()):
            raise ValueError(f"{daemon.name}: cannot has {sorted(unknown)} or a capability without a reason")


class Running:
    """One daemon twice, without and with acknowledgement, and its sockets below ``directory``."""

    def __init__(self, daemon: Daemon, directory: Path, url: str) -> None:
        self.daemon = daemon
        self.directory = directory
        directory.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        for ack in ("off", "on"):
            config = daemon.config.replace("{url}", url)
            config += f"[server]\nworkers = 1\n[listen]\nack = {'true' if ack == 'on' else 'false'}\n"
            # The two do not share a runtime directory: they are not generations of one.
            config += '[metrics]\nlisten = "off"\n'
            (directory / f"{ack}.toml").write_text(config)

    def _filled(self, word: str, ack: str = "off") -> str:
        return word.replace("{build}", str(self.directory)).replace("{ack}", ack)

    def build(self, cache: Path) -> None:
        """Raises CalledProcessError, with what the compiler said."""
        if self.daemon.build:
            environment = {**os.environ, "GOCACHE": str(cache / "go"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
            subprocess.run(
                [self._filled(word) for word in self.daemon.build],
                check=True,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
            )

    def path(self, ack: bool) -> str:
        return str(self.directory / ("ack.sock" if ack else "plain.sock"))

    def start(self) -> None:
        for ack in (False, True):
            name = "on" if ack else "off"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(self.path(ack))
            Path(self.path(ack)).chmod(0o666)  # Apache's children are another user
            listener.listen(4096)
            command = [self._filled(word, name) for word in self.daemon.command]
            if ack and "streaming_daemon" not in command:
                command.insert(self._flag_position(command), self.daemon.ack)
            runtime = self.directory / f"runtime-{name}"
            runtime.mkdir(mode=0o700)
            with listener, (self.directory / f"{name}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(listener.fileno()), *command],
                        pass_fds=[listener.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={
                            **{key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
                            "PYTHONPATH": str(ROOT / "daemon-src"),
                            "PYTHONDONTWRITEBYTECODE": "1",
                            "RUNTIME_DIRECTORY": str(runtime),
                        },
                        start_new_session=True,
                    )
                )

    def _flag_position(self, command: list[str]) -> int:
        """Behind the program's own name: what follows it in ``exec`` is another program."""
        return 1 if self.daemon.name == "exec" else len(command)

    def way(self, ack: bool = False) -> Direct:
        return Direct(self.path(ack))

    def ended(self) -> str:
        """Which of the two has ended, or nothing."""
        return ", ".join(
            f"the daemon {'with' if index else 'without'} ack has ended with status {process.poll()}"
            for index, process in enumerate(self._processes)
            if process.poll() is not None
        )

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("*.log")))

    def close(self) -> None:
        """End every process of both, each being the leader of a session of its own."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE / 4)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_serving(running: Running, serves: Callable[[], bool]) -> str:
    """Wait until it serves; what has become of it instead."""
    try:
        wait_for(lambda: bool(running.ended()) or serves(), f"{running.daemon.name} serves")
    except Failed as error:
        return str(error)
    return running.ended()


def activate(fd: int, command: list[str]) -> None:
    """Become the daemon, with the listening socket where systemd would have put it."""
    os.dup2(fd, 3)
    if fd != 3:
        os.close(fd)
    os.environ["LISTEN_FDS"] = "1"
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.execvp(command[0], command)


if __name__ == "__main__":
    activate(int(sys.argv[1]), sys.argv[2:])
