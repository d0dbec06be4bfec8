# SPDX-License-Identifier: Apache-2.0
"""benchmarks/module: what a handoff costs Apache.

For each MPM four private servers run side by side, equal but for this module; each request goes to the one that its
contender names. All contenders are measured in every round, in an order that changes from round to round.

    without   this module is not loaded
    loaded    it is loaded, and no target declared: raw socket paths, as in the original's configurations
    targets   targets are declared, and allowed in one location
    fdpass    httpd's own mod_proxy_fdpass, and not this module
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import apache, callgrind, machine, tools
from benchlib.apache import Apache
from benchlib.cpu import cpu_ns, split_cores
from benchlib.figures import Figure, figure, ratio
from benchlib.report import Aim, spread, table
from benchlib.tools import CACHE, BenchmarkError, Generator, Receiver

MPMS = ("event", "worker", "prefork")
SERVERS = ("without", "loaded", "targets", "fdpass")
KIB = 1024


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to answer a request. `payload`: bytes that the daemon must get with each client, None: no handoff."""

    key: str
    title: str
    server: str
    uri: str
    group: str = "answer"
    payload: int | None = None
    keep_alive: bool = False


@dataclass(frozen=True, slots=True)
class Payload:
    """A handoff with so much data: through `target`, in the header or as the response's body."""

    size: int
    target: str
    in_body: bool = False

    @property
    def key(self) -> str:
        return f"{self.target}-{'body' if self.in_body else 'header'}-{self.size}"

    @property
    def title(self) -> str:
        size = f"{self.size // KIB} KiB" if self.size else "none"
        kind = "plain" if self.target == "seqpacket" else self.target
        return f"{size}, {kind}, {'response body' if self.in_body else 'header'}"


PAYLOADS = (
    *(Payload(size * KIB, "seqpacket") for size in (0, 1, 16, 64, 200)),
    *(Payload(size * KIB, "envelope") for size in (1, 16, 64, 200)),
    *(Payload(size * KIB, "envelope", in_body=True) for size in (1, 64, 200, 1024)),
)

TARGETS = ("seqpacket", "stream", "envelope", "ack")

DATA = 200
"""Bytes that the handoffs of the first table carry: a prompt and a user."""

CONTENDERS = (
    Contender("static", "static file", "targets", "/file.txt"),
    Contender("dynamic", "trivial dynamic response", "targets", "/dynamic"),
    Contender("path", "handoff to a raw path, plain", "loaded", "/handoff/path", payload=DATA),
    Contender("seqpacket", "handoff, plain, seqpacket", "targets", "/handoff/seqpacket", payload=DATA),
    Contender("stream", "handoff, plain, stream", "targets", "/handoff/stream", payload=DATA),
    Contender("envelope", "handoff, envelope", "targets", "/handoff/envelope", payload=DATA),
    Contender("ack", "handoff, envelope and ack", "targets", "/handoff/ack", payload=DATA),
    Contender("fdpass", "mod_proxy_fdpass", "fdpass", "/fdpass", payload=0),
    *(Contender(p.key, p.title, "targets", f"/payload/{p.key}", "payload", p.size) for p in PAYLOADS),
    *(
        Contender(f"static-{server}{suffix}", title, server, "/file.txt", "bystander", keep_alive=bool(suffix))
        for suffix in ("", "-kept")
        for server, title in (
            ("without", "not loaded"),
            ("loaded", "loaded"),
            ("targets", "loaded, with targets allowed elsewhere"),
        )
    ),
    Contender("null", "the load generator's ceiling: a server that does nothing", "null", "/null", "ceiling"),
)

HANDOFFS = ("path", "seqpacket", "stream", "envelope", "ack")


@dataclass(frozen=True, slots=True)
class Settings:
    rounds: int
    seconds: float  # of one measurement
    connections: tuple[int, ...]
    instructions: int  # requests counted by callgrind; 0: none


QUICK = Settings(rounds=2, seconds=0.05, connections=(16,), instructions=20)
FULL = Settings(rounds=15, seconds=0.7, connections=(1, 16), instructions=300)

Samples = dict[str, dict[int, dict[str, list[float]]]]
"""contender -> connections -> what -> one value per round"""


def location(uri: str, *lines: str) -> str:
    return "\n".join((f"<Location {uri}>", "SetHandler bench", *lines, "</Location>\n"))


def locations(run: Path) -> str:
    """The same sections in every server: httpd walks through all of them for every request."""
    text = location("/dynamic", "BenchAnswer On")
    text += location("/handoff/path", f"BenchTarget {run}/seqpacket.sock", f"BenchData {DATA}")
    for target in TARGETS:
        text += location(f"/handoff/{target}", f"BenchTarget {target}", f"BenchData {DATA}")
    for p in PAYLOADS:
        how = "response-body" if p.in_body else ""
        text += location(f"/payload/{p.key}", f"BenchTarget {p.target}", f"BenchData {p.size} {how}")
    return text


def server_config(name: str, run: Path) -> str:
    """One of SERVERS."""
    before, allow = "", ""
    if name in ("loaded", "targets"):
        before = f"LoadModule socket_handoff_module {tools.MODULE}\nSocketHandoffAllowedPrefix {run}/\n"
    if name == "targets":
        allow = "SocketHandoffAllow All"
        before += (
            f"SocketHandoffTarget seqpacket unix:{run}/seqpacket.sock\n"
            f"SocketHandoffTarget stream unix:{run}/stream.sock transport=stream\n"
            f"SocketHandoffTarget envelope unix:{run}/seqpacket.sock envelope=on\n"
            f"SocketHandoffTarget ack unix:{run}/ack.sock envelope=on ack=on\n"
        )
    if name == "fdpass":
        before = "".join(
            f"LoadModule {module}_module {apache.apxs('LIBEXECDIR')}/mod_{module}.so\n"
            for module in ("proxy", "proxy_fdpass")
        )
        # Its URL can only name a socket below ServerRoot.
        before += "ProxyPass /fdpass fd://fdpass.sock\n"
    allowed = f'<LocationMatch "^/(handoff|payload)/">\n{allow}\n</LocationMatch>\n'
    return before + allowed + locations(run)


@dataclass(slots=True)
class Bench:
    """Everything that runs while one MPM is measured."""

    servers: dict[str, Apache]
    receiver: Receiver
    generator: Generator
    null_port: int

    def measure(self, contender: Contender, connections: int, amount: str) -> dict[str, float]:
        """One run; all but the first three are per request. Raises BenchmarkError where the work was not done."""
        server = self.servers.get(contender.server)
        port = server.port if server else self.null_port
        workers = server.workers() if server else []
        before, httpd, receiver = self.receiver.counts(), cpu_ns(workers), cpu_ns([self.receiver.pid])
        load = self.generator.run(
            port, contender.uri, connections=connections, amount=amount, keep_alive=contender.keep_alive
        )
        used_httpd, used_receiver = cpu_ns(workers) - httpd, cpu_ns([self.receiver.pid]) - receiver
        after = self.receiver.counts()
        self._check(contender, load.requests, {key: after[key] - before[key] for key in after})
        client = load.cpu_seconds * 1e9
        room = load.seconds * 1e9 * len(self.generator.cores)
        return {
            "requests_per_second": load.requests / load.seconds,
            "client_share": load.cpu_seconds / load.seconds,
            "others_busy": (client + used_receiver) / room,
            "p50_us": load.latency_us["p50"],
            "p99_us": load.latency_us["p99"],
            "mean_us": load.latency_us["mean"],
            "reopened": load.reopened,
            "wall_us": load.seconds * 1e6 / load.requests,
            "httpd_cpu_us": used_httpd / 1e3 / load.requests,
            "receiver_cpu_us": used_receiver / 1e3 / load.requests,
            "client_cpu_us": client / 1e3 / load.requests,
            "server_cpu_us": (used_httpd + used_receiver) / 1e3 / load.requests,
        }

    @staticmethod
    def _check(contender: Contender, requests: int, did: dict[str, int]) -> None:
        """The receiver got every client, and the data that belongs to it."""
        expected = requests if contender.payload is not None else 0
        got = did["message_bytes"] + did["payload_bytes"]
        if did["failures"] or did["handoffs"] != expected or got < expected * (contender.payload or 0):
            raise BenchmarkError(f"{contender.key}: {requests} requests, and of them the receiver says {did}")


@contextmanager
def bench(mpm: str) -> Iterator[Bench]:
    """Four servers and the receiver; gone afterwards with every file they made."""
    ours, others = split_cores()
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="handoff-bench-"))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        root.chmod(0o755)
        run = apache.run_directory()
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        servers = {name: Apache(mpm, root / name, ours, server_config(name, run)) for name in SERVERS}
        null_port = apache.free_port()
        places = [f"{kind}:{run}/{kind}.sock" for kind in ("seqpacket", "stream", "ack")]
        receiver = Receiver([*places, f"fdpass:{root}/fdpass/fdpass.sock", f"tcp:{null_port}"], others)
        stack.callback(receiver.stop)
        for server in servers.values():
            (server.root / "htdocs" / "file.txt").write_bytes(tools.answer_body())
            stack.callback(server.stop)
            server.start()
        yield Bench(servers, receiver, Generator(others), null_port)


def measure_rounds(
    world: Bench, settings: Settings, chosen: list[Contender], say: Callable[[str], None], first: int = 0
) -> tuple[Samples, dict[str, str]]:
    """All contenders, all rounds; and those that cannot be measured, with the reason.

    ``first`` is the number of the first round: each has an order of its own."""
    samples: Samples = {}
    missing: dict[str, str] = {}
    for contender in chosen:
        try:
            world.measure(contender, 1, "20x")
        except BenchmarkError as error:
            server = world.servers.get(contender.server)
            missing[contender.key] = f"{error}\n{server.complaints() if server else ''}".strip()
            say(f"{contender.key} CANNOT be measured: {error}")
    able = [contender for contender in chosen if contender.key not in missing]
    for number in range(first, first + settings.rounds):
        random.Random(number).shuffle(able)
        for contender in able:
            for connections in settings.connections:
                sample = world.measure(contender, connections, str(settings.seconds))
                cell = samples.setdefault(contender.key, {}).setdefault(connections, {})
                for what, value in sample.items():
                    cell.setdefault(what, []).append(value)
        say(f"round {number + 1 - first} of {settings.rounds}")
    return samples, missing


INSTRUCTION_ROWS = (
    ("close", "/file.txt", False, ("without", "loaded", "targets")),
    ("kept", "/file.txt", True, ("without", "loaded", "targets")),
    ("dynamic", "/dynamic", False, ("without", "targets")),
    ("handoff", "/handoff/seqpacket", False, ("targets",)),
    ("envelope", "/handoff/envelope", False, ("targets",)),
)


def count_instructions(mpm: str, requests: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """row -> server -> instructions per request"""
    counts: dict[str, dict[str, float]] = {}
    ours, others = split_cores()
    for name in ("without", "loaded", "targets"):
        with ExitStack() as stack:
            root = Path(tempfile.mkdtemp(prefix="handoff-bench-"))
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            root.chmod(0o755)
            run = apache.run_directory()
            stack.callback(shutil.rmtree, run, ignore_errors=True)
            receiver = Receiver([f"seqpacket:{run}/seqpacket.sock"], others)
            stack.callback(receiver.stop)
            server = callgrind.Callgrind(Apache(mpm, root / name, ours, server_config(name, run)))
            (server.apache.root / "htdocs" / "file.txt").write_bytes(tools.answer_body())
            stack.callback(server.stop)
            server.start()
            for row, uri, keep_alive, servers in INSTRUCTION_ROWS:
                if name in servers:
                    count = server.per_request(Generator(others), uri, requests, keep_alive=keep_alive)
                    counts.setdefault(row, {})[name] = count
        say(f"instructions, {name}")
    return counts


def measure_mpm(
    mpm: str, settings: Settings, chosen: list[Contender], say: Callable[[str], None], first: int = 0
) -> dict[str, Any]:
    with bench(mpm) as world:
        samples, missing = measure_rounds(world, settings, chosen, lambda text: say(f"{mpm}: {text}"), first)
    result: dict[str, Any] = {"samples": samples, "missing": missing}
    if settings.instructions:
        result["instructions"] = count_instructions(mpm, settings.instructions, lambda text: say(f"{mpm}: {text}"))
    return result


# --- the report ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """One MPM's samples, asked by contender, connections and what."""

    samples: Samples

    def has(self, key: str) -> bool:
        return key in self.samples

    def of(self, key: str, connections: int, what: str) -> Figure:
        return figure(self.samples[key][connections][what])

    def ratio(self, key: str, base: str, connections: int, what: str) -> Figure:
        return ratio(self.samples[key][connections][what], self.samples[base][connections][what])


def aims(result: dict[str, Any], connections: tuple[int, ...]) -> Iterator[Aim]:
    reading = Reading(result["samples"])
    many = max(connections)
    pairs = (("dynamic", 1.3, "a trivial dynamic response"), ("fdpass", 1.0, "mod_proxy_fdpass"))
    costs = (("wall_us", "time per request"), ("httpd_cpu_us", "Apache's CPU time"))
    # The plain message is what mod_proxy_fdpass can be compared with; the envelope is what the roles deploy.
    handoffs = (("seqpacket", "plain handoff", pairs), ("envelope", "handoff with the envelope", pairs[:1]))
    for key, kind, bases in handoffs:
        for base, limit, name in bases:
            for what, cost in costs:
                if reading.has(key) and reading.has(base):
                    yield Aim(f"{cost} of a {kind}, against {name}", limit, reading.ratio(key, base, many, what))
    for row, name in (("close", "static file"), ("kept", "static file on a kept connection")):
        count = result.get("instructions", {}).get(row)
        for server in ("loaded", "targets") if count else ():
            yield Aim(f"instructions of a {name}, {server}", 1.01, figure([count[server] / count["without"]]))


def answer_table(reading: Reading, keys: list[Contender], many: int, base: str) -> str:
    rows = []
    for c in keys:
        f, r = reading.of, reading.ratio
        rows.append(
            [
                c.title,
                spread(f(c.key, many, "requests_per_second")),
                spread(f(c.key, many, "p50_us")),
                spread(f(c.key, many, "p99_us")),
                spread(r(c.key, base, many, "wall_us"), 2),
                spread(f(c.key, many, "httpd_cpu_us"), 1),
                spread(r(c.key, base, many, "httpd_cpu_us"), 2),
                spread(f(c.key, many, "receiver_cpu_us"), 1),
                spread(r(c.key, base, many, "server_cpu_us"), 2),
                f"{f(c.key, many, 'others_busy').median:.0%}",
            ]
        )
    costs = ["Apache CPU µs", "ratio", "receiver CPU µs", "both, ratio", "others busy"]
    return table(["", "requests/s", "p50 µs", "p99 µs", "time, ratio", *costs], rows)


def latency_table(reading: Reading, keys: list[Contender], base: str) -> str:
    rows = [
        [
            c.title,
            spread(reading.of(c.key, 1, "p50_us")),
            spread(reading.of(c.key, 1, "p99_us")),
            spread(reading.ratio(c.key, base, 1, "p50_us"), 2),
        ]
        for c in keys
    ]
    return table(["", "p50 µs", "p99 µs", "p50, ratio"], rows)


def bystander_table(result: dict[str, Any], keys: list[Contender], many: int) -> str:
    reading = Reading(result["samples"])
    rows = []
    for c in keys:
        base = "static-without-kept" if c.keep_alive else "static-without"
        counts = result.get("instructions", {}).get("kept" if c.keep_alive else "close", {})
        count = counts.get(c.server)
        rows.append(
            [
                f"{c.title}, {'kept connection' if c.keep_alive else 'new connection'}",
                spread(reading.of(c.key, many, "requests_per_second")),
                spread(reading.ratio(c.key, base, many, "wall_us"), 3),
                spread(reading.ratio(c.key, base, many, "httpd_cpu_us"), 3),
                f"{count:,.0f}" if count else "not counted",
                f"{count / counts['without']:.4f}" if count else "",
            ]
        )
    return table(["static file", "requests/s", "time, ratio", "Apache CPU, ratio", "instructions", "ratio"], rows)


def report_mpm(mpm: str, result: dict[str, Any], settings: Settings, chosen: list[Contender]) -> str:
    reading = Reading(result["samples"])
    many = max(settings.connections)
    able = [c for c in chosen if reading.has(c.key)]
    groups = {group: [c for c in able if c.group == group] for group in ("answer", "payload", "bystander")}
    text = f"## {mpm}\n"
    if reading.has("null"):
        ceiling = reading.of("null", many, "requests_per_second")
        text += (
            f"\nThe load generator's ceiling, against a server that does nothing: {spread(ceiling)} requests/s. "
            "Its share of one core in the fastest row: "
            f"{max(reading.of(c.key, many, 'client_share').median for c in able if c.key != 'null'):.0%}.\n"
        )
    if reading.has("dynamic"):
        if groups["answer"]:
            text += f"\n### {many} connections at a time\n\n"
            text += answer_table(reading, groups["answer"], many, "dynamic")
            if 1 in settings.connections and many > 1:
                text += "\n### One connection at a time\n\n" + latency_table(reading, groups["answer"], "dynamic")
        if groups["payload"]:
            text += f"\n### By payload, {many} connections at a time\n\n"
            text += answer_table(reading, groups["payload"], many, "dynamic")
    if reading.has("static-without") and groups["bystander"]:
        text += "\n### What a request pays that hands nothing off\n\n"
        text += bystander_table(result, groups["bystander"], many)
    counts = result.get("instructions", {})
    if counts:
        rows = [
            [title, f"{counts[row]['targets']:,.0f}"]
            for row, title in (
                ("dynamic", "trivial dynamic response"),
                ("handoff", "handoff, plain"),
                ("envelope", "handoff, envelope"),
            )
            if row in counts
        ]
        text += "\n### Instructions in user space\n\n" + table(["one request, new connection", "instructions"], rows)
    if result["missing"]:
        reasons = {key: reason.splitlines()[0] for key, reason in result["missing"].items()}
        text += "\n### Could not be measured\n\n" + "".join(f"- {key}: {reason}\n" for key, reason in reasons.items())
    return text


def report(document: dict[str, Any], settings: Settings, chosen: list[Contender]) -> str:
    about = document["machine"]
    text = (
        "# What a handoff costs Apache\n\n"
        "Made by `benchmarks/module`; what is measured, and how, is in `benchmarks/README.md`. "
        f"Medians of {settings.rounds} rounds of {settings.seconds} s,\nquartiles in brackets. A ratio is to the "
        "trivial dynamic response of the same round, or for static files to Apache without\nthe module. Others busy: "
        "how much of their cores the load generator and the receiver use; near 100 % they are the limit,\nand the time "
        "is theirs and not Apache's.\n\n"
        f"{about['processor']}, {about['cores']} cores, Linux {about['kernel']}, {about['system']}, "
        f"httpd {about['httpd']}, commit {about['commit']}; load average before: {about['load_before']:.2f}\n\n"
        "| aim | MPM | at most | measured | |\n|---|---|---:|---:|---|\n"
    )
    for mpm, result in document["mpms"].items():
        for aim in aims(result, settings.connections):
            text += f"| {aim.text} | {mpm} | {aim.limit:.2f} | {spread(aim.value, 3)} | {aim.verdict} |\n"
    for mpm, result in document["mpms"].items():
        text += "\n" + report_mpm(mpm, result, settings, chosen)
    return text


# --- the command --------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/module", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works; its figures mean little")
    parser.add_argument("--mpm", default=",".join(MPMS), help="which, separated by commas (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="KEY,…", help="contenders; a group's name means all of it")
    parser.add_argument("--rounds", type=int, help="instead of the default number")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--no-instructions", action="store_true", help="leave callgrind out")
    parser.add_argument("--out", type=Path, default=CACHE / "results", help="where module.json and module.md go")
    options = parser.parse_args(argv)
    unknown = set(options.mpm.split(",")) - set(MPMS)
    if unknown:
        parser.error(f"--mpm: {', '.join(sorted(unknown))} is none of {', '.join(MPMS)}")
    known = {name for c in CONTENDERS for name in (c.key, c.group)}
    unknown = set(filter(None, options.only.split(","))) - known
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    base = QUICK if options.quick else FULL
    return Settings(
        rounds=options.rounds or base.rounds,
        seconds=options.seconds or base.seconds,
        connections=base.connections,
        instructions=0 if options.no_instructions else base.instructions,
    )


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    settings = settings_of(options)
    wanted = set(filter(None, options.only.split(",")))
    # Ratios need what they are formed to.
    wanted |= {"dynamic", "static-without", "static-without-kept", "null"} if wanted else set()
    chosen = [c for c in CONTENDERS if not wanted or wanted & {c.key, c.group}]
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"  {time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        tools.build()
        if settings.instructions and not callgrind.available():
            raise BenchmarkError("valgrind is missing: apt install valgrind, or leave it out by --no-instructions")
        document: dict[str, Any] = {
            "machine": machine.describe(httpd=apache.version()),
            "settings": {
                "rounds": settings.rounds,
                "seconds": settings.seconds,
                "connections": settings.connections,
                "workers": apache.WORKERS,
            },
            "mpms": {},
        }
        for mpm in options.mpm.split(","):
            document["mpms"][mpm] = measure_mpm(mpm, settings, chosen, say)
    except BenchmarkError as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "module.json").write_text(json.dumps(document, indent=1) + "\n")
    text = report(document, settings, chosen)
    (options.out / "module.md").write_text(text)
    print(f"\n{text}")
    incomplete = [f"{mpm}: {key}" for mpm, result in document["mpms"].items() for key in result["missing"]]
    if incomplete:
        print(f"incomplete, could not be measured: {', '.join(incomplete)}", file=sys.stderr)
        return 1
    return 0
