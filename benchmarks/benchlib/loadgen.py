# SPDX-License-Identifier: Apache-2.0
"""benchmarks/loadgen: the load generators by one command, and the proof that they are not what is measured.

    requests   a closed loop of requests (src/loadgen.c)
    streams    opens streams through a web server, or hands clients to a daemon's socket, and watches them
               (src/streams.c); meanwhile, where it is told to, asks for a page at a steady rate (src/prober.c)
    ceiling    what the generators do against servers that do nothing, and what of a core they need for it

Everything is printed as JSON, a line for each look; the first comments of the C files say what the names mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchlib import apache, daemon, door, tools
from benchlib.cpu import split_cores
from benchlib.daemon import Model
from benchlib.figures import figure, rounds
from benchlib.report import spread, table
from benchlib.tools import BUILD, BenchmarkError, Generator, Receiver, Talker


def ceiling(seconds: float, streams: int) -> dict[str, dict[str, float]]:
    """what was done -> how fast, and what it cost. Client and server have a core each, where there are two."""
    server, client = split_cores()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadgen-")))
        return {
            "requests": _requests(stack, server, client, seconds),
            "handed over": _handed(stack, server, client, scratch, streams, seconds),
            "front door": _front_door(stack, server, client, scratch, streams, seconds),
        }


def _requests(stack: ExitStack, server: set[int], client: set[int], seconds: float) -> dict[str, float]:
    port = apache.free_port()
    receiver = Receiver([f"tcp:{port}"], server)
    stack.callback(receiver.stop)
    load = Generator(client).run(port, "/", connections=16, amount=str(seconds))
    return {
        "per_second": load.requests / load.seconds,
        "per_cpu_second": load.requests / load.cpu_seconds,
        "share": load.cpu_seconds / load.seconds,
    }


def _handed(
    stack: ExitStack, server: set[int], client: set[int], scratch: Path, streams: int, seconds: float
) -> dict[str, float]:
    """Clients handed to the daemon that only writes."""
    sock = scratch / "null.sock"
    null = tools.started([str(BUILD / "nullstream"), str(sock)], server, sock.exists)
    stack.callback(tools.stopped, null)

    def generator(pace: float) -> Talker:
        message = scratch / f"message-{pace:g}"
        message.write_bytes(daemon.envelope(100_000, pace, ""))
        return Talker([str(BUILD / "streams"), str(sock), str(message), str(streams), "steps"], client)

    return _events(generator, streams, seconds)


def _front_door(
    stack: ExitStack, server: set[int], client: set[int], scratch: Path, streams: int, seconds: float
) -> dict[str, float]:
    """Through the stand-in for the model, which is a web server that only writes."""
    model = Model(server, [])
    stack.callback(model.stop)

    def generator(pace: float) -> Talker:
        request = scratch / f"request-{pace:g}"
        request.write_bytes(door.request(door.chat("/v1/chat/completions"), 100_000, pace))
        return Talker([str(BUILD / "streams"), f"tcp:{model.port}", str(request), str(streams), "steps"], client)

    return _events(generator, streams, seconds)


def _events(generator: Callable[[float], Talker], streams: int, seconds: float) -> dict[str, float]:
    """Streams that say little are opened as fast as they are taken, and others with 100 events per second watched."""
    found: dict[str, float] = {}
    for pace in (1.0, 100.0):
        talker = generator(pace)
        try:
            opened = talker.ask(f"grow {streams} 1000000 10")
            if opened["live"] != streams:
                raise BenchmarkError(f"of {streams} streams {opened['live']} begin: {opened['failures']}")
            found.setdefault("opened_per_second", streams / opened["seconds"])
            counted = talker.ask(f"count {seconds} {1000 / pace}")
        finally:
            talker.stop()
        found["per_second"] = counted["events"] / counted["seconds"]
        found["per_cpu_second"] = counted["events"] / counted["cpu_seconds"]
        found["share"] = counted["cpu_seconds"] / counted["seconds"]
    return found


# --- as a scenario of benchmarks/run ------------------------------------------------------------


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several rounds' documents."""
    samples: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    for document in parts:
        missing |= document["missing"]
        for what, seen in document["samples"].items():
            for name, value in seen.items():
                samples.setdefault(what, {}).setdefault(name, []).append(value)
    return {**parts[0], "rounds": len(parts), "samples": samples, "missing": missing}


TITLES = {
    "requests": "requests, 16 at a time, each on a new connection, from a server that does nothing else",
    "handed over": "events of streams handed to a daemon that only writes",
    "front door": "events of streams through a web server that only writes",
}


def report(document: dict[str, Any]) -> str:
    text = (
        "## The load generators' ceiling\n\n"
        f"Medians of {rounds(document['rounds'])}, quartiles in brackets. What one generator takes when the server "
        "costs as little as it can;\n*per CPU second* is what it would take with a core of its own. Where a table "
        "above shows less than that, and a\ngenerator's share is below 1, the generator was not the limit.\n\n"
    )
    rows = [
        [
            TITLES[what],
            *(
                spread(figure(seen[name]), digits)
                for name, digits in (("per_second", 0), ("per_cpu_second", 0), ("share", 2))
            ),
            spread(figure(seen["opened_per_second"])) if "opened_per_second" in seen else "-",
        ]
        for what, seen in document["samples"].items()
    ]
    return text + table(["", "per second", "per CPU second", "share of a core", "streams opened/s"], rows)


def facts(document: dict[str, Any]) -> dict[str, str]:
    """What docs/performance.md says, by name."""
    names = {"requests": "ceiling_requests", "handed over": "ceiling_handed", "front door": "ceiling_door"}
    return {names[what]: f"{figure(seen['per_cpu_second']).median:,.0f}" for what, seen in document["samples"].items()}


# --- the command --------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/loadgen", description="Load generators; each prints JSON.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    requests = kinds.add_parser("requests", help="a closed loop: as many requests as a server on 127.0.0.1 answers")
    requests.add_argument("port", type=int)
    requests.add_argument("uri", help="has to answer what src/answer.h says")
    requests.add_argument("--connections", type=int, default=16, help="at a time (default: %(default)s)")
    requests.add_argument("--seconds", type=float, default=5.0, help="default: %(default)s")
    requests.add_argument("--keep-alive", action="store_true", help="many requests on each connection")
    streams = kinds.add_parser("streams", help="open streams and watch them: first event, lateness, completeness")
    streams.add_argument("target", help="tcp:PORT, a web server on 127.0.0.1; or the path of a daemon's socket")
    streams.add_argument(
        "message", type=Path, help="file with the request, or the envelope; @@@@@@@@ is the client's number"
    )
    streams.add_argument("--streams", type=int, default=100, help="default: %(default)s, at most 20000")
    streams.add_argument("--rate", type=float, default=100.0, help="opened per second (default: %(default)s)")
    streams.add_argument(
        "--patience", type=float, default=5.0, help="seconds for the first event (default: %(default)s)"
    )
    streams.add_argument("--seconds", type=float, default=5.0, help="of watching (default: %(default)s)")
    streams.add_argument(
        "--interval", type=float, default=0.0, metavar="MS", help="between a stream's events: lateness"
    )
    streams.add_argument(
        "--finish", type=float, default=0.0, metavar="SECONDS", help="then wait so long for their ends"
    )
    streams.add_argument("--page", type=Path, help="file with a request for a page: asked for meanwhile")
    streams.add_argument("--page-rate", type=float, default=50.0, help="per second (default: %(default)s)")
    kinds.add_parser("ceiling", help="the generators against servers that do nothing")
    options = parser.parse_args(argv)
    if options.kind == "streams":
        for path in filter(None, (options.message, options.page)):
            if not path.is_file():
                parser.error(f"{path} is no file")
        if options.page and not options.target.startswith("tcp:"):
            parser.error("--page: a page comes from a web server; the target has to be tcp:PORT")
    return options


def _watch(options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> bool:
    """Whether all streams began and none failed; with --finish, whether all came to their [DONE] and closed."""
    cores = os.sched_getaffinity(0)
    with ExitStack() as stack:
        command = [str(BUILD / "streams"), options.target, str(options.message), str(options.streams), "steps"]
        streams = Talker(command, cores)
        stack.callback(streams.stop)
        opened = streams.ask(f"grow {options.streams} {options.rate} {options.patience}")
        say({"opened": opened})
        prober = None
        if options.page:
            port = options.target.removeprefix("tcp:")
            command = [str(BUILD / "prober"), port, str(options.page), str(options.page_rate), str(options.patience)]
            prober = Talker(command, cores, nice=-10)
            stack.callback(prober.stop)
            prober.say(f"count {options.seconds}")
        seen = streams.ask(f"count {options.seconds} {options.interval}")
        say({"seen": seen})
        if prober:
            say({"page": prober.hear()})
        if options.finish:
            seen = streams.ask(f"finish {options.finish}")
            say({"finished": seen})
            return bool(seen["completed"] == options.streams)
        return not any(seen["failures"].values()) and seen["waiting"] == 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)

    def say(document: dict[str, Any]) -> None:
        print(json.dumps(document), flush=True)

    try:
        tools.build("generators", module=False)
        if options.kind == "ceiling":
            say(ceiling(2.0, 500))
        elif options.kind == "requests":
            command = [str(BUILD / "loadgen"), str(options.port), options.uri, str(options.connections)]
            command += [str(options.seconds), *(["keep-alive"] if options.keep_alive else [])]
            os.execv(command[0], command)
        elif not _watch(options, say):
            print("not all streams began and went well", file=sys.stderr)
            return 1
    except BenchmarkError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0
