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

VARIANTS = ("plain", "ack", "hasty")

CAPABILITIES = {
    "plain": "takes the plain message",
    "envelope": "takes the envelope",
    "ack": "says its byte where it is told to",
    "json": "its data is JSON, and other data is refused",
    "default": "answers data without prompt",
    "pace": "knows demo.tokens and demo.tokens_per_second",
    "echo": "answers with the words of the prompt",
    "hasty": "its system calls go through the C library, where the suite can put itself between",
    "members": "knows every member that docs/wire-protocol.md lists for the data",
    "backend": "asks an OpenAI-compatible server",
}

_ANSWERS_ITSELF = {
    "members": "reads prompt and demo, and leaves the other members to who copies it",
    "backend": "makes its answer up itself",
}


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
            for tool, package in {"gcc": "gcc", **self.needs}.items()
            if not (Path(tool).exists() if tool.startswith("/") else shutil.which(tool))
        ]


# Debian's Python, as on a host: the environment of the tests has other packages.
_PYTHON = "/usr/bin/python3"
_PRODUCTION = (_PYTHON, "-P", "-m", "streaming_daemon", "--config", "{build}/{variant}.toml")

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
        cannot={**_ANSWERS_ITSELF, "hasty": "makes its system calls itself, without the C library"},
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
        needs={"/usr/include/jansson.h": "libjansson-dev", _PYTHON: "python3"},
    ),
]


def check_table() -> None:
    """Whatever a daemon cannot has a reason, and is one of the capabilities there are."""
    for daemon in DAEMONS:
        unknown = set(daemon.cannot) - set(CAPABILITIES)
        if unknown or not all(daemon.cannot.values()):
            raise ValueError(f"{daemon.name}: cannot has {sorted(unknown)} or a capability without a reason")


class Running:
    """One daemon, once per variant, and its sockets below ``directory``.

    ``plain`` is the daemon as it is, ``ack`` says its byte, ``hasty`` gets 0 from its first recvmsg of a connection.
    """

    def __init__(self, daemon: Daemon, directory: Path, url: str) -> None:
        self.daemon = daemon
        self.directory = directory
        directory.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.variants = [name for name in VARIANTS if name == "plain" or name not in daemon.cannot]
        for name in self.variants:
            config = daemon.config.replace("{url}", url)
            config += f"[server]\nworkers = 1\n[listen]\nack = {'true' if name == 'ack' else 'false'}\n"
            # The variants do not share a runtime directory: they are not generations of one.
            config += '[metrics]\nlisten = "off"\n'
            (directory / f"{name}.toml").write_text(config)

    def _filled(self, word: str, variant: str = "plain") -> str:
        return word.replace("{build}", str(self.directory)).replace("{variant}", variant)

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
        if "hasty" in self.variants:
            source = Path(__file__).with_name("hasty_recvmsg.c")
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", self._hasty(), str(source)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )

    def _hasty(self) -> str:
        return str(self.directory / "hasty_recvmsg.so")

    def path(self, variant: str) -> str:
        return str(self.directory / f"{variant}.sock")

    def start(self) -> None:
        for name in self.variants:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(self.path(name))
            Path(self.path(name)).chmod(0o666)  # Apache's children are another user
            listener.listen(4096)
            command = [self._filled(word, name) for word in self.daemon.command]
            if name == "ack" and "streaming_daemon" not in command:
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
                            **({"LD_PRELOAD": self._hasty()} if name == "hasty" else {}),
                        },
                        start_new_session=True,
                    )
                )

    def _flag_position(self, command: list[str]) -> int:
        """Behind the program's own name: what follows it in ``exec`` is another program."""
        return 1 if self.daemon.name == "exec" else len(command)

    def way(self, variant: str) -> Direct:
        return Direct(self.path(variant))

    def pids(self) -> list[int]:
        """Of the processes that were started, which may have children."""
        return [process.pid for process in self._processes]

    def ended(self) -> str:
        """Which of them has ended, or nothing."""
        return ", ".join(
            f"the daemon ({name}) has ended with status {process.poll()}"
            for name, process in zip(self.variants, self._processes, strict=False)
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
