# SPDX-License-Identifier: Apache-2.0
"""benchmarks/daemon: what a stream costs the daemon.

Each measurement has a daemon of its own, freshly started on a core of its own, and a load generator and a stand-in for
the language model on the others. All contenders are measured in every round, in an order that changes from round to
round.

    ours    the streaming daemon of this checkout, one worker, every feature on
    go      a goroutine per stream, examples/daemons/streaming_daemon.go, on one core as well
    naive   asyncio with a task per stream, src/naive.py
    null    C that understands nothing and writes, src/nullstream.c: what is left for everybody else to pay
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib import http2, machine, tools
from benchlib.apache import free_port
from benchlib.cpu import children, cpu_ns, split_cores
from benchlib.figures import figure, ratio
from benchlib.report import Aim, aims_table, spread, table
from benchlib.tools import BENCHMARKS, BUILD, CACHE, ROOT, BenchmarkError, Talker, kill_all, spawn, wait_until

CONTENDERS = ("ours", "go", "naive", "null")
DAEMON = ROOT / "daemon-src"
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
"""Debian's, with Debian's httptools and uvloop, as on a host."""

SOCKET_ACTIVATE = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind(sys.argv[1])
listening.listen(4096)
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does for a daemon with a socket unit (sd_listen_fds(3))."""

MODEL_CERTIFICATE = ("localhost.pem", "localhost.key")

CONFIG = """
[server]
workers = 1
max_streams = 12000

[listen]
message = "envelope"

[limits]
streams_per_user = 4
streams_per_address = 1000000
user_rate = 1000.0
user_burst = 1000

[resume]
buffer = 65536

[log]
level = "info"

[access_log]
path = "{directory}/access.log"

[metrics]
listen = "unix:{directory}/metrics.sock"

[backend]
default = "{backend}"

[backends.demo]
type = "demo"

[backends.model]
type = "openai"
base_url = "{url}"
model = "{model}"
idle_connections = 10000
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One measurement. ``how`` are the generator's words; tokens, pace: what each stream writes; ``count``: seconds
    to look at it once all streams are there."""

    key: str
    title: str
    streams: int
    how: tuple[str, ...]
    tokens: int
    pace: float
    count: float = 0.0
    model: str = ""  # "", plain, tls, h2: who answers
    warm: bool = True  # as many connections to the model as will be needed are there before
    contenders: tuple[str, ...] = CONTENDERS


@dataclass(frozen=True, slots=True)
class Settings:
    rounds: int
    scale: float  # of the numbers of streams
    seconds: float  # of what is measured for some time

    def scenarios(self) -> list[Scenario]:
        def n(number: int) -> int:
            return max(10, int(number * self.scale))

        two, both = self.seconds, ("ours", "naive")
        three = ("ours", "go", "naive")
        idle = [
            Scenario(f"idle-{k}", f"{k:,} idle streams", n(k), ("ramp", "2000"), 1000, 0.1, contenders=three)
            for k in (1000, 5000, 9000)
        ]
        return [
            *idle,
            Scenario("burst", "a burst of 9,000 handoffs", n(9000), ("burst",), 1000, 0.1),
            Scenario("ramp", "5,000 handoffs, 1,000 per second", n(5000), ("ramp", "1000"), 1000, 1.0),
            Scenario("saturated", "500 streams of 18 events, closed loop", n(500), ("loop", str(two)), 18, 1000.0),
            Scenario("paced", "500 streams, 100 events/s each", n(500), ("ramp", "500"), 100_000, 100.0, 1.5 * two),
            Scenario("relay", "500 relayed, 20 tokens/s each", n(500), ("ramp", "250"), 100000, 20.0, 2 * two,
                     "plain", contenders=both),
            Scenario("relay-memory", "4,000 relayed, 1 token/s each", n(4000), ("ramp", "500"), 100000, 1.0, 1 + two,
                     "plain", contenders=both),
            Scenario("relay-tls", "1,000 relayed over TLS, connections reused, 5 tokens/s each", n(1000),
                     ("ramp", "250"), 100000, 5.0, two, "tls", contenders=("ours",)),
            Scenario("relay-tls-new", "1,000 relayed over TLS, each on a new connection, 5 tokens/s each", n(1000),
                     ("ramp", "250"), 100000, 5.0, two, "tls", False, ("ours",)),
            Scenario("relay-h2", "1,000 relayed through HAProxy, HTTP/2 over TLS from there, 5 tokens/s each", n(1000),
                     ("ramp", "250"), 100000, 5.0, two, "h2", False, ("ours",)),
        ]  # fmt: skip


QUICK = Settings(rounds=1, scale=0.02, seconds=0.3)
FULL = Settings(rounds=5, scale=1.0, seconds=2.0)

Samples = dict[str, dict[str, dict[str, list[float]]]]
"""scenario -> contender -> what -> one value per round"""


def envelope(tokens: int, pace: float, model: str) -> bytes:
    """What the module sends, about; "@@@@@@@@" is the client's number."""
    # No prompt for the demo: it would keep the words of the question, as no real backend does.
    data: dict[str, object] = {"demo": {"tokens": tokens, "tokens_per_second": pace}}
    if model:
        data = {"prompt": "What happened on the way to this answer?", "model": model}
    message = {
        "handoff": 2,
        "id": "aSNwZH8AAAEAAB7b@@@@@@@@",
        "method": "GET",
        "uri": "/chat/stream.php?prompt=hello",
        "protocol": "HTTP/1.1",
        "host": "chat.example",
        "client": {"addr": "203.0.113.9", "port": 40001},
        "peer": {"addr": "10.0.0.2", "port": 33012},
        "scheme": "http",
        "target": "llm",
        "user": "user-@@@@@@@@",
        "headers": [["User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"]],
        "response_headers": [["Set-Cookie", "session=@@@@@@@@; Path=/; HttpOnly"]],
        "status": 200,
        "unread_body": 0,
        "prefetched": 0,
        "data": json.dumps(data, separators=(",", ":")),
    }
    return json.dumps(message, separators=(",", ":")).encode()


def memory(pids: list[int]) -> dict[str, int]:
    """Bytes of processes: Rss and Pss."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return {name: sum(int(text.split(f"\n{name}:")[1].split()[0]) * 1024 for text in texts) for name in ("Rss", "Pss")}


@dataclass(slots=True)
class Process:
    """A contender that takes handoffs: what was started, what does the work, and what else it needs for it."""

    started: subprocess.Popen[Any]
    pid: int
    proxy: int | None = None

    @property
    def pids(self) -> list[int]:
        return [self.pid, self.proxy] if self.proxy is not None else [self.pid]


@dataclass(frozen=True, slots=True)
class Way:
    """How the daemon reaches the model, and the process that stands between."""

    url: str
    proxy: int | None = None


class Streams(Talker):
    """src/streams.c, where anything but the work is an error."""

    def __init__(self, cores: set[int], sock: Path, message: Path, streams: int, how: tuple[str, ...]) -> None:
        super().__init__([str(BUILD / "streams"), str(sock), str(message), str(streams), *how], cores)

    def hear(self) -> dict[str, Any]:
        """The next report; raises BenchmarkError where anything but the work was done."""
        report = super().hear()
        if any(report["failures"].values()) or report["first_events"] == 0:
            raise BenchmarkError(f"{report['handoffs']} handoffs, and failures were {report['failures']}")
        return report


class Model:
    """src/llm.c; ``more`` are its certificate and key."""

    def __init__(self, cores: set[int], more: list[str]) -> None:
        self.port = free_port()
        command = [str(BUILD / "llm"), str(self.port), *more]
        self._process = spawn(command, cores, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self._line() != "ready\n":
            assert self._process.stderr is not None
            raise BenchmarkError(f"the stand-in for the model did not start: {self._process.stderr.read().strip()}")

    def connections(self) -> int:
        """Accepted so far."""
        self._process.send_signal(signal.SIGUSR1)
        return int(json.loads(self._line())["connections"])

    def check(self) -> None:
        """Raise BenchmarkError where it has ended: nobody else would say why nothing can be reached."""
        if self._process.poll() is not None:
            raise BenchmarkError(f"the stand-in for the model ended with {self._process.returncode}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        return line


@dataclass(slots=True)
class Bench:
    """Where everything runs: the contender on ``ours``, all others on ``others``."""

    directory: Path
    ours: set[int]
    others: set[int]
    models: dict[str, Model] = field(default_factory=dict)
    # Where HTTP/2 is spoken; 0 where it was not asked for.
    provider: int = 0

    def measure(self, scenario: Scenario, contender: str) -> dict[str, float]:
        """One run with a fresh daemon. Raises BenchmarkError where the work was not done."""
        model = f"{scenario.pace:g}x{scenario.tokens}" if scenario.model else ""
        if scenario.model:
            self.models["tls" if scenario.model == "tls" else "plain"].check()
        with ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            message = directory / "message"
            sock = directory / "daemon.sock"
            way = self._way_to(scenario.model, directory, stack)
            daemon = stack.enter_context(self._daemon(contender, directory, sock, way, model))
            # Everything is loaded.
            self._warm_up(sock, message, 20, "0.5x1" if scenario.model else "")
            before = memory(daemon.pids)
            if scenario.model == "tls" and scenario.warm:
                # As many connections as will be needed: all of them wait for the last one.
                pace = 1 / (scenario.streams / 250 + 4)
                self._warm_up(sock, message, scenario.streams, f"{pace:g}x1")
                made = self.models["tls"].connections()
            message.write_bytes(envelope(scenario.tokens, scenario.pace, model))
            sample = self._run(scenario, daemon, sock, message, before)
            if scenario.model == "tls" and scenario.warm:
                sample["new_connections"] = self.models["tls"].connections() - made
                if sample["new_connections"] > scenario.streams / 10:
                    raise BenchmarkError(f"{sample['new_connections']} connections were not used again")
            return sample

    def _way_to(self, model: str, directory: Path, stack: ExitStack) -> Way:
        if model == "h2":
            certificate = self.directory / MODEL_CERTIFICATE[0]
            path, pid = stack.enter_context(http2.egress(directory, self.ours, self.provider, certificate))
            return Way(f"unix:{path}:/v1", pid)
        return Way(f"{'https' if model == 'tls' else 'http'}://localhost:{self.models[model].port if model else 1}/v1")

    def _warm_up(self, sock: Path, message: Path, streams: int, model: str) -> None:
        """Short answers, to their end."""
        message.write_bytes(envelope(2, 1000.0, model))
        generator = Streams(self.others, sock, message, streams, ("ramp", "250"))
        try:
            generator.hear()
            # The last one ends so long after it has begun.
            generator.ask(f"count {0.5 + (1 / float(model.partition('x')[0]) if model else 0)}")
        finally:
            generator.stop()

    def _run(
        self, scenario: Scenario, daemon: Process, sock: Path, message: Path, before: Mapping[str, int]
    ) -> dict[str, float]:
        """``before`` is the memory of a daemon without streams."""
        cpu = cpu_ns(daemon.pids)
        generator = Streams(self.others, sock, message, scenario.streams, scenario.how)
        try:
            opened = generator.hear()
            opening = cpu_ns(daemon.pids) - cpu
            after = memory(daemon.pids)
            sample = {
                "handoffs_per_second": opened["handoffs"] / opened["seconds"],
                "handoffs_per_cpu_second": opened["handoffs"] / opening * 1e9,
                "first_p50_ms": opened["first_event_ms"]["p50"],
                "first_p99_ms": opened["first_event_ms"]["p99"],
                "rss_per_stream": (after["Rss"] - before["Rss"]) / scenario.streams,
                "pss_per_stream": (after["Pss"] - before["Pss"]) / scenario.streams,
                "base_rss": before["Rss"],
                "generator_share": opened["cpu_seconds"] / opened["seconds"],
            }
            if scenario.how[0] == "loop":
                sample |= self._events(opened, opening)
            if scenario.count:
                cpu = cpu_ns(daemon.pids)
                counted = generator.ask(f"count {scenario.count}")
                sample |= self._events(counted, cpu_ns(daemon.pids) - cpu)
            return sample
        finally:
            generator.stop()

    @staticmethod
    def _events(report: Mapping[str, Any], cpu: int) -> dict[str, float]:
        if not report["events"]:
            raise BenchmarkError("no events came")
        return {
            "events_per_second": report["events"] / report["seconds"],
            "cpu_s_per_million": cpu / 1e3 / report["events"],
            "events_per_read": report["events"] / report["reads"],
            "daemon_share": cpu / 1e9 / report["seconds"],
            "generator_share": report["cpu_seconds"] / report["seconds"],
        }

    @contextmanager
    def _daemon(self, contender: str, directory: Path, sock: Path, way: Way, name: str) -> Iterator[Process]:
        environ = {**os.environ, "PYTHONPATH": str(DAEMON), "SSL_CERT_FILE": str(self.directory / MODEL_CERTIFICATE[0])}
        if contender == "ours":
            config = directory / "config.toml"
            config.write_text(
                CONFIG.format(directory=directory, backend="model" if name else "demo", url=way.url, model=name or "x")
            )
            command = [PYTHON, "-m", "streaming_daemon", "--config", str(config), "--socket", str(sock)]
            command += ["--control", str(directory / "control.sock")]
        elif contender == "go":
            daemon = str(BUILD / "streaming_daemon_go")
            command = [PYTHON, "-c", SOCKET_ACTIVATE, str(sock), daemon, "-streams", "12000"]
            environ["GOMAXPROCS"] = "1"
        elif contender == "naive":
            port = [str(self.models["plain"].port)] if name else []
            command = [PYTHON, str(BENCHMARKS / "src" / "naive.py"), str(sock), *port]
        else:
            command = [str(BUILD / "nullstream"), str(sock)]
        with (directory / "log").open("wb") as log:
            started = spawn(command, self.ours, stdout=log, stderr=log, env=environ, cwd=directory)
        try:
            yield Process(started, self._worker(started, sock, contender, directory / "log"), way.proxy)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{(directory / 'log').read_text()[-2000:]}") from None
        finally:
            workers = children(started.pid) if started.poll() is None else []
            started.kill()
            started.wait()
            kill_all(workers)

    @staticmethod
    def _worker(started: subprocess.Popen[Any], sock: Path, contender: str, log: Path) -> int:
        """The process that holds the streams, once it is there."""

        def ready() -> bool:
            if contender == "go":
                return Path(f"/proc/{started.pid}/exe").resolve().name == "streaming_daemon_go"
            return (contender != "ours" or sock.exists()) and (
                "serving" if contender == "ours" else "ready"
            ) in log.read_text()

        wait_until(started, ready, lambda: f"{contender} did not start")
        return children(started.pid)[0] if contender == "ours" else started.pid


@contextmanager
def bench(http_2: bool) -> Iterator[Bench]:
    """The stand-ins for language models; gone afterwards with every file they made."""
    ours, others = split_cores()
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="daemon-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        world = Bench(directory, ours, others)
        certificate = make_certificate(directory)
        for kind, more in (("plain", []), ("tls", certificate)):
            world.models[kind] = Model(others, more)
            stack.callback(world.models[kind].stop)
        if http_2:
            world.provider = free_port()
            pair = (directory / name for name in MODEL_CERTIFICATE)
            stack.enter_context(http2.provider(directory, others, world.provider, world.models["plain"].port, *pair))
        yield world


def make_certificate(directory: Path) -> list[str]:
    certificate, key = (str(directory / name) for name in MODEL_CERTIFICATE)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    done = subprocess.run([*command, "-out", certificate, "-keyout", key], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"no certificate for the stand-in: {done.stderr}")
    return [certificate, key]


def measure_rounds(
    world: Bench,
    settings: Settings,
    chosen: list[Scenario],
    contenders: tuple[str, ...],
    say: Callable[[str], None],
    first: int = 0,
) -> tuple[Samples, dict[str, str]]:
    """All scenarios and contenders, all rounds; and what cannot be measured, with the reason.

    ``first`` is the number of the first round: each has an order of its own."""
    samples: Samples = {}
    missing: dict[str, str] = {}
    pairs = [(scenario, who) for scenario in chosen for who in scenario.contenders if who in contenders]
    for number in range(first, first + settings.rounds):
        random.Random(number).shuffle(pairs)
        for scenario, who in pairs:
            name = f"{scenario.key}/{who}"
            if name in missing:
                continue
            try:
                sample = measure_again(world, scenario, who) if who == "null" else world.measure(scenario, who)
            except BenchmarkError as error:
                missing[name] = str(error)
                samples.get(scenario.key, {}).pop(who, None)
                say(f"{name} CANNOT be measured: {error}")
                continue
            cell = samples.setdefault(scenario.key, {}).setdefault(who, {})
            for what, value in sample.items():
                cell.setdefault(what, []).append(value)
        say(f"round {number + 1 - first} of {settings.rounds}")
    return samples, missing


def measure_again(world: Bench, scenario: Scenario, who: str) -> dict[str, float]:
    """A second try for a contender that nobody promised anything about."""
    try:
        return world.measure(scenario, who)
    except BenchmarkError:
        return world.measure(scenario, who)


# --- the report ---------------------------------------------------------------------------------

COLUMNS = {
    "handoffs_per_second": ("handoffs/s", 0),
    "handoffs_per_cpu_second": ("per CPU s", 0),
    "first_p50_ms": ("first event p50 ms", 2),
    "first_p99_ms": ("p99 ms", 2),
    "rss_per_stream": ("RSS per stream, B", 0),
    "pss_per_stream": ("PSS per stream, B", 0),
    "events_per_second": ("events/s", 0),
    "cpu_s_per_million": ("CPU s per million events", 1),
    "events_per_read": ("events per read", 2),
    "daemon_share": ("of its core", 2),
    "generator_share": ("generator's share of a core", 2),
}
_OPENING = ("handoffs_per_second", "handoffs_per_cpu_second", "first_p50_ms", "first_p99_ms")
_EVENTS = ("events_per_second", "cpu_s_per_million", "events_per_read", "daemon_share")
_COLD = ("rss_per_stream", "pss_per_stream", "handoffs_per_cpu_second", "first_p99_ms", "cpu_s_per_million")
SHOWN = {
    "idle": ("rss_per_stream", "pss_per_stream"),
    "burst": _OPENING,
    "ramp": _OPENING,
    "saturated": (*_EVENTS, "handoffs_per_second"),
    "paced": _EVENTS,
    "relay": _EVENTS,
    "relay-memory": ("rss_per_stream", "pss_per_stream", "cpu_s_per_million"),
    "relay-tls": ("rss_per_stream", "pss_per_stream", "cpu_s_per_million"),
    "relay-tls-new": _COLD,
    "relay-h2": _COLD,
}
MAIN = {"rss_per_stream", "cpu_s_per_million", "handoffs_per_second", "first_p99_ms"}
"""Where a ratio to the naive daemon is shown."""

# scenario, what, limit, at least, text; of our own daemon, or where another is named, ours divided by its
AIMS: tuple[tuple[str, str, float, bool, str, str], ...] = (
    ("idle-9000", "rss_per_stream", 1500, False, "bytes of memory per idle stream at 9,000", ""),
    ("burst", "handoffs_per_second", 14000, True, "handoffs served per second in a burst of 9,000", ""),
    ("ramp", "first_p99_ms", 1.0, False, "milliseconds to the first event, p99, at 1,000 handoffs/s", ""),
    ("saturated", "cpu_s_per_million", 11, False, "CPU seconds per million events, saturated", ""),
    ("relay", "cpu_s_per_million", 40, False, "CPU seconds per million tokens relayed at 500 x 20/s", ""),
    ("relay-memory", "rss_per_stream", 6000, False, "bytes of memory per relayed stream at 4,000", ""),
    ("relay-tls", "rss_per_stream", 60000, False, "bytes of memory per stream relayed over TLS", ""),
    ("burst", "handoffs_per_second", 1.0, True, "handoffs served per second in a burst, of Go's", "go"),
    ("ramp", "first_p99_ms", 1.0, False, "time to the first event, p99, of Go's", "go"),
    ("saturated", "cpu_s_per_million", 1.0, False, "CPU time per event, saturated, of Go's", "go"),
    ("idle-9000", "rss_per_stream", 0.2, False, "memory per idle stream at 9,000, of Go's", "go"),
)


def aims(samples: Samples) -> Iterator[Aim]:
    for scenario, what, limit, at_least, text, against in AIMS:
        cells = samples.get(scenario, {})
        values = cells.get("ours", {}).get(what)
        others = cells.get(against, {}).get(what)
        if against and values and others:
            yield Aim(text, limit, ratio(values, others), at_least)
        elif values and not against:
            yield Aim(text, limit, figure(values), at_least)


def digits_of(aim: Aim) -> int:
    return 0 if aim.limit > 1000 else 2


def scenario_table(scenario: Scenario, cells: dict[str, dict[str, list[float]]]) -> str:
    shown = (*SHOWN[scenario.key if scenario.key in SHOWN else "idle"], "generator_share")
    head = ["", *(COLUMNS[what][0] for what in shown)]
    rows = []
    for who in CONTENDERS:
        if who not in cells:
            continue
        row = [who]
        for what in shown:
            text = spread(figure(cells[who][what]), COLUMNS[what][1])
            if what in MAIN and who != "ours" and all(v > 0 for v in cells.get("ours", {}).get(what, [0])):
                text += f", x{ratio(cells[who][what], cells['ours'][what]).median:.2f}"
            row.append(text)
        rows.append(row)
    return table(head, rows)


def report(document: dict[str, Any], chosen: list[Scenario]) -> str:
    about, settings, samples = document["machine"], document["settings"], document["samples"]
    text = (
        "# What a stream costs the daemon\n\n"
        "Made by `benchmarks/daemon`; what is measured, and how, is in `benchmarks/README.md`. "
        f"Medians of {settings['rounds']} rounds,\nquartiles in brackets; x is a ratio to ours, formed within each "
        "round. A generator whose share is near 1.00 was the limit itself.\n\n"
        f"{about['processor']}, {about['cores']} cores, Linux {about['kernel']}, {about['system']}, "
        f"Python {about['daemon_python']}, JSON by {about['json']}, {about['loop']}, commit {about['commit']}; "
        f"load average before: {about['load_before']:.2f}\n\n"
    )
    if settings["scale"] != 1:
        text = text.replace("Medians of", f"With {settings['scale']:g} of the streams that the titles say. Medians of")
    text += aims_table(aims(samples), digits_of)
    for scenario in chosen:
        if scenario.key in samples:
            text += f"\n## {scenario.title}\n\n" + scenario_table(scenario, samples[scenario.key])
    if document["missing"]:
        reasons = {key: reason.splitlines()[0] for key, reason in document["missing"].items()}
        text += "\n## Could not be measured\n\n" + "".join(f"- {key}: {reason}\n" for key, reason in reasons.items())
    return text


# --- the command --------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of what the daemon runs on."""
    code = (
        "import json, platform\n"
        "from streaming_daemon.backends import json_codec\n"
        "try:\n import uvloop; loop = f'uvloop {uvloop.__version__}'\n"
        "except ImportError: loop = 'asyncio'\n"
        "print(json.dumps({'daemon_python': platform.python_version(), 'json': json_codec.NAME, 'loop': loop}))"
    )
    environ = {**os.environ, "PYTHONPATH": str(DAEMON)}
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environ, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"the daemon cannot be imported: {done.stderr}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/daemon", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="to see that it works; its figures mean little")
    parser.add_argument("--only", default="", metavar="KEY,…", help="scenarios (idle, burst, relay-tls, …)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="instead of the default number")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--out", type=Path, default=CACHE / "results", help="where daemon.json and daemon.md go")
    options = parser.parse_args(argv)
    unknown = set(options.contenders.split(",")) - set(CONTENDERS)
    if unknown:
        parser.error(f"--contenders: {', '.join(sorted(unknown))} is none of {', '.join(CONTENDERS)}")
    known = {scenario.key for scenario in FULL.scenarios()} | {"idle"}
    unknown = set(filter(None, options.only.split(","))) - known
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    base = QUICK if options.quick else FULL
    settings = Settings(options.rounds or base.rounds, base.scale, options.seconds or base.seconds)
    wanted = set(filter(None, options.only.split(",")))
    chosen = [s for s in settings.scenarios() if not wanted or wanted & {s.key, s.key.partition("-")[0]} - {"relay"}
              or s.key in wanted]  # fmt: skip
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"  {time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        tools.build("daemon", module=False)
        document: dict[str, Any] = {
            "machine": machine.describe(**versions()),
            "settings": {"rounds": settings.rounds, "scale": settings.scale, "seconds": settings.seconds},
        }
        with bench(any(scenario.model == "h2" for scenario in chosen)) as world:
            contenders = tuple(options.contenders.split(","))
            document["samples"], document["missing"] = measure_rounds(world, settings, chosen, contenders, say)
    except BenchmarkError as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "daemon.json").write_text(json.dumps(document, indent=1) + "\n")
    text = report(document, chosen)
    (options.out / "daemon.md").write_text(text)
    print(f"\n{text}")
    if document["missing"]:
        print(f"incomplete, could not be measured: {', '.join(document['missing'])}", file=sys.stderr)
        return 1
    return 0
