# SPDX-License-Identifier: Apache-2.0
"""The C programs: built from src/, started, and read. Their own first comments say what they do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
CACHE = ROOT / ".cache" / "benchmarks"
BUILD = CACHE / "build"
MODULE = ROOT / "module-src" / "build" / "mod_socket_handoff.so"


PATIENCE = 30.0
"""Seconds in which a program starts, or ends."""

POLL = 0.02
"""Seconds between two looks at something that does not tell by itself."""


class BenchmarkError(Exception):
    """A measurement that cannot be had; the message says why."""


def build(*goals: str, module: bool = True) -> None:
    """Compiles the programs here, all or those that are named, and the module of this checkout."""
    commands = [["make", "-s", "-C", str(BENCHMARKS), f"B={BUILD}", *goals]]
    if module:
        commands.append(["make", "-s", "-C", str(MODULE.parents[1])])
    for command in commands:
        checked(command)


def answer_body() -> bytes:
    """What every contender answers, from src/answer.h."""
    text = (BENCHMARKS / "src" / "answer.h").read_text()
    literals = text.split("#define ANSWER_BODY", 1)[1].split("#define", 1)[0]
    return "".join(literals.split('"')[1::2]).replace("\\n", "\n").encode()


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started in here, and its children, run on these cores only, from their first instruction on.

    sched_setaffinity(2) is about one thread, here the calling one, and a child begins with what that has: so no Python
    has to run between fork(2) and execve(2), where a lock that another thread held is held for ever.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def spawn(command: list[str], cores: set[int], **options: Any) -> subprocess.Popen[Any]:
    """A process on these cores; ``options`` are Popen's."""
    with on_cores(cores):
        return subprocess.Popen(command, **options)


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of the load generator says. Seconds, bytes; latency in microseconds."""

    requests: int
    failures: dict[str, int]
    reopened: int  # kept connections that the server closed while they were idle
    response_bytes: int
    seconds: float
    cpu_seconds: float
    latency_us: dict[str, float]


@dataclass(frozen=True, slots=True)
class Generator:
    cores: set[int]

    def run(self, port: int, uri: str, *, connections: int, amount: str, keep_alive: bool = False) -> Load:
        """`amount` is seconds, or a number of requests with an x behind it."""
        command = [str(BUILD / "loadgen"), str(port), uri, str(connections), amount]
        if keep_alive:
            command.append("keep-alive")
        with on_cores(self.cores):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise BenchmarkError(f"{' '.join(command)} failed: {done.stderr}")
        load = Load(**json.loads(done.stdout))
        if any(load.failures.values()) or load.requests == 0:
            raise BenchmarkError(
                f"{uri} on port {port}: {load.requests} requests were answered and failures were {load.failures}"
            )
        return load


class Talker:
    """A program that answers each line with one of JSON."""

    def __init__(self, command: list[str], cores: set[int], nice: int = 0) -> None:
        self._name = Path(command[0]).name
        self._process = spawn(
            command, cores, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if nice:
            # Root may; others measure with a prober that waits for its turn like everybody. It has one thread, and has
            # nothing to do before it is asked.
            with suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, nice)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.hear()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        text = self._process.stdout.readline()
        if not text:
            raise BenchmarkError(f"{self._name} ended: {self._process.stderr.read().strip()}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        self.say(line)
        return self.hear()

    def stop(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Receiver:
    """The daemon of the benchmarks, listening at each KIND:WHERE."""

    def __init__(self, places: list[str], cores: set[int]) -> None:
        self._process = spawn([str(BUILD / "receiver"), *places], cores, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready\n":
            self.stop()
            raise BenchmarkError(f"the receiver did not start: {places}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        return line

    @property
    def pid(self) -> int:
        return self._process.pid

    def counts(self) -> dict[str, Any]:
        """handoffs, answers, message_bytes, payload_bytes, failures since it started."""
        self._process.send_signal(signal.SIGUSR1)
        counts: dict[str, Any] = json.loads(self._line())
        return counts

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def checked(command: list[str], **environment: str) -> str:
    """What a command says, run in the checkout. Raises BenchmarkError with its own words where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:].strip()}")
    return done.stdout


def output(command: list[str]) -> str:
    """What a command says, on either stream; "" where it is not installed or fails."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    except FileNotFoundError:
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""


def started(command: list[str], cores: set[int], ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """A program that runs until it is stopped."""
    process = spawn(command, cores, stdout=subprocess.DEVNULL)
    try:
        wait_until(process, ready, lambda: f"{' '.join(command)} did not start")
    except BenchmarkError:
        stopped(process)
        raise
    return process


def wait_until(process: subprocess.Popen[Any], ready: Callable[[], bool], complaint: Callable[[], str]) -> None:
    """Raises BenchmarkError with the complaint where the process ends before it is ready, or PATIENCE does."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(complaint())
        time.sleep(POLL)  # the interval of a bounded poll


def accepts(*ports: int) -> bool:
    """Whether somebody listens on the loopback at all of these."""
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return False
    return True


def runs(pid: int) -> bool:
    """Whether it can still use anything: what only waits for its parent to read its end (a zombie) cannot."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_all(pids: list[int]) -> None:
    """SIGKILL, and until they are gone. Raises BenchmarkError where one stays: it would be in all later figures."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while left := [pid for pid in pids if runs(pid)]:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"processes {left} do not end, {PATIENCE:g} s after SIGKILL")
        time.sleep(POLL)  # the interval of a bounded poll


def stopped(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
