# SPDX-License-Identifier: Apache-2.0
"""The scenarios of benchmarks/run: one Part each, and nothing of them known anywhere else.

A Part measures one round at a time, so that rounds of all scenarios alternate and a run that was interrupted can go on.
To add one: write its module with measure, merge, report and facts, and its line in PARTS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchlib import (
    apache,
    beyond,
    callgrind,
    daemon,
    fleet,
    fleet_report,
    loadgen,
    module,
    plot,
    point,
    point_report,
    tools,
)
from benchlib.figures import figure
from benchlib.report import Aim, aims_table, spread

Say = Callable[[str], None]
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One scenario. Rounds and seconds are pairs: of a full run, of a quick one. Seconds: a first guess at a round."""

    key: str
    title: str
    rounds: tuple[int, int]
    seconds: tuple[float, float]
    measure: Callable[[int, bool, Say], Document]
    merge: Callable[[list[Document]], Document]
    report: Callable[[Document], str]
    charts: Callable[[Document], dict[str, str]]
    facts: Callable[[Document], dict[str, str]]
    aims: Callable[[Document], list[Aim]]
    settings: Callable[[bool], Document]
    chart_names: tuple[str, ...] = ()  # patterns of the names that charts gives
    # Has a budget of its own, needs what the others do not, and so is measured only where it is named.
    by_name: bool = False


# --- the point ----------------------------------------------------------------------------------


def _point_settings(quick: bool) -> point.Settings:
    return point.QUICK if quick else point.FULL


def _measure_point(number: int, quick: bool, say: Say) -> Document:
    point.build()
    settings = _point_settings(quick)
    samples, missing = point.measure_round(number, settings, say)
    return {"settings": asdict(settings), "samples": samples, "missing": missing}


# --- the handoff --------------------------------------------------------------------------------


def _module_settings(quick: bool) -> module.Settings:
    """One round at a time; shorter ones than those of benchmarks/module, and as many as the run has."""
    if quick:
        return replace(module.QUICK, rounds=1)
    return replace(module.FULL, rounds=1, seconds=0.4)


def _measure_module(number: int, quick: bool, say: Say) -> Document:
    """Instructions are the same in every round, and so are counted in the first one only."""
    tools.build()
    count = number == 0 and callgrind.available()
    settings = _module_settings(quick) if count else replace(_module_settings(quick), instructions=0)
    mpms = ("event",) if quick else module.MPMS
    results = {mpm: module.measure_mpm(mpm, settings, list(module.CONTENDERS), say, number) for mpm in mpms}
    missing = {f"{mpm}: {key}": reason for mpm, result in results.items() for key, reason in result["missing"].items()}
    if number == 0 and not count:
        missing["instructions"] = "valgrind is missing: apt install valgrind"
    return {"mpms": results, "missing": missing}


def _merge_module(rounds: list[Document]) -> Document:
    mpms: Document = {}
    missing: dict[str, str] = {}
    for document in rounds:
        missing |= document["missing"]
        for mpm, result in document["mpms"].items():
            merged = mpms.setdefault(mpm, {"samples": {}, "missing": {}, "instructions": {}})
            merged["missing"] |= result["missing"]
            merged["instructions"] |= result.get("instructions", {})
            for key, cells in result["samples"].items():
                for connections, cell in cells.items():
                    # JSON has made texts of the numbers.
                    values = merged["samples"].setdefault(key, {}).setdefault(int(connections), {})
                    for what, more in cell.items():
                        values.setdefault(what, []).extend(more)
    for result in mpms.values():
        for key in result["missing"]:
            # What could not be measured in one round cannot be compared with what could in all.
            result["samples"].pop(key, None)
    return {**rounds[0], "rounds": len(rounds), "mpms": mpms, "missing": missing}


def _report_module(document: Document) -> str:
    settings = module.Settings(document["rounds"], 0, _module_settings(document["quick"]).connections, 0)
    text = "## The handoff: what it costs Apache\n\n| aim | MPM | at most | measured | |\n|---|---|---:|---:|---|\n"
    for mpm, result in document["mpms"].items():
        for aim in module.aims(result, settings.connections):
            text += f"| {aim.text} | {mpm} | {aim.limit:.2f} | {spread(aim.value, 3)} | {aim.verdict} |\n"
    for mpm, result in document["mpms"].items():
        text += "\n#" + module.report_mpm(mpm, result, settings, list(module.CONTENDERS)).replace("\n### ", "\n#### ")
    return text


def _with_numbers(result: Document) -> Document:
    """One MPM's result as it was before JSON made texts of the numbers of connections."""
    samples = {key: {int(many): cell for many, cell in seen.items()} for key, seen in result["samples"].items()}
    return {**result, "samples": samples}


def _module_aims(document: Document) -> list[Aim]:
    connections = _module_settings(document["quick"]).connections
    return [
        replace(aim, text=f"{aim.text}, {mpm}")
        for mpm, result in document["mpms"].items()
        for aim in module.aims(_with_numbers(result), connections)
    ]


def _module_facts(document: Document) -> dict[str, str]:
    found: dict[str, str] = {}
    for mpm, result in document["mpms"].items():
        reading = module.Reading(_with_numbers(result)["samples"])
        many = max(_module_settings(document["quick"]).connections)
        if reading.has("envelope") and reading.has("dynamic"):
            cost = reading.ratio("envelope", "dynamic", many, "httpd_cpu_us").median
            found[f"handoff_cpu_ratio_{mpm}"] = f"{cost:.2f}"
            found[f"handoff_cpu_us_{mpm}"] = f"{reading.of('envelope', many, 'httpd_cpu_us').median:.0f}"
            found[f"handoffs_per_second_{mpm}"] = f"{reading.of('envelope', many, 'requests_per_second').median:,.0f}"
        if reading.has("null"):
            found[f"loadgen_ceiling_{mpm}"] = f"{reading.of('null', many, 'requests_per_second').median:,.0f}"
    return found


# --- the daemon ---------------------------------------------------------------------------------


def _daemon_settings(quick: bool) -> daemon.Settings:
    """One round at a time; quick ones with a tenth of the streams: fewer cost what the idle worker costs."""
    return daemon.Settings(1, 0.1, 0.5) if quick else replace(daemon.FULL, rounds=1)


def _measure_daemon(number: int, quick: bool, say: Say) -> Document:
    tools.build("daemon", module=False)
    settings = _daemon_settings(quick)
    with daemon.bench(http_2=True) as world:
        samples, missing = daemon.measure_rounds(
            world, settings, settings.scenarios(), daemon.CONTENDERS, say, first=number
        )
    return {"settings": asdict(settings), "samples": samples, "missing": missing}


def _merge_daemon(rounds: list[Document]) -> Document:
    samples: daemon.Samples = {}
    missing: dict[str, str] = {}
    for document in rounds:
        missing |= document["missing"]
        for scenario, cells in document["samples"].items():
            for who, cell in cells.items():
                for what, values in cell.items():
                    samples.setdefault(scenario, {}).setdefault(who, {}).setdefault(what, []).extend(values)
    for name in missing:
        scenario, _, who = name.partition("/")
        samples.get(scenario, {}).pop(who, None)
    return {**rounds[0], "rounds": len(rounds), "samples": samples, "missing": missing}


def _report_daemon(document: Document) -> str:
    samples = document["samples"]
    text = "## The daemon: what a stream costs it\n\n"
    if document["settings"]["scale"] != 1:
        text += f"With {document['settings']['scale']:g} of the streams that the titles say.\n\n"
    text += aims_table(daemon.aims(samples), daemon.digits_of)
    text += "\n![memory](daemon-memory.svg)\n\n![CPU time](daemon-cpu.svg)\n"
    for scenario in _daemon_settings(document["quick"]).scenarios():
        if samples.get(scenario.key):
            text += f"\n### {scenario.title}\n\n" + daemon.scenario_table(scenario, samples[scenario.key])
    return text


def _daemon_charts(document: Document) -> dict[str, str]:
    found: dict[str, str] = {}
    scenarios = {scenario.key: scenario for scenario in _daemon_settings(document["quick"]).scenarios()}
    for name, key, what, title, unit, scale in (
        ("daemon-memory.svg", "idle-9000", "rss_per_stream", "Memory of the daemon per idle stream", "KB (RSS)", 1e-3),
        ("daemon-cpu.svg", "saturated", "cpu_s_per_million", "CPU time per event, 500 streams as fast as they can",
         "seconds per million events", 1.0),
    ):  # fmt: skip
        bars = []
        for who, cell in document["samples"].get(key, {}).items():
            if cell.get(what):
                value = figure([number * scale for number in cell[what]])
                bars.append(plot.Bar(who, value.median, value.low, value.high, who == "ours"))
        if bars:
            bars.sort(key=lambda bar: bar.value)
            found[name] = plot.bars(title, f"{unit}; {scenarios[key].streams:,} streams", bars)
    return found


def _daemon_facts(document: Document) -> dict[str, str]:
    found = {
        f"{scenario.key}_streams".replace("-", "_"): f"{scenario.streams:,}"
        for scenario in _daemon_settings(document["quick"]).scenarios()
    }
    for scenario, cells in document["samples"].items():
        for who, cell in cells.items():
            for what, digits in (
                ("rss_per_stream", 0),
                ("cpu_s_per_million", 1),
                ("handoffs_per_second", 0),
                ("handoffs_per_cpu_second", 0),
                ("base_rss", 0),
            ):
                if cell.get(what):
                    name = f"{scenario}_{who}_{what}".replace("-", "_")
                    value = figure(cell[what]).median * (1e-6 if what == "base_rss" else 1)
                    found[name] = f"{value:,.{digits}f}"
    ceiling = document["samples"].get("saturated", {}).get("null", {}).get("events_per_second")
    if ceiling:
        found["streams_ceiling"] = f"{figure(ceiling).median:,.0f}"
    return found


# --- beyond -------------------------------------------------------------------------------------


def _beyond_settings(quick: bool) -> beyond.Settings:
    return beyond.QUICK if quick else beyond.FULL


def _measure_beyond(number: int, quick: bool, say: Say) -> Document:
    del number  # one contender: there is no order
    beyond.build()
    settings = _beyond_settings(quick)
    return {"settings": asdict(settings), "missing": {}, **beyond.measure(settings, say)}


# --- the generators -----------------------------------------------------------------------------


def _generator_settings(quick: bool) -> Document:
    return {"seconds": 0.5, "streams": 100} if quick else {"seconds": 3.0, "streams": 1000}


def _measure_generators(number: int, quick: bool, say: Say) -> Document:
    del number, say  # one contender: there is no order, and no progress in a few seconds
    tools.build("generators", module=False)
    return {"samples": loadgen.ceiling(**_generator_settings(quick)), "missing": {}}


# --- the fleet ----------------------------------------------------------------------------------


def _fleet_settings(quick: bool) -> fleet.Settings:
    return fleet.QUICK if quick else fleet.FULL


def _measure_fleet(number: int, quick: bool, say: Say) -> Document:
    del number  # one contender: there is no order
    return {**fleet.measure(_fleet_settings(quick), say), "settings": asdict(_fleet_settings(quick))}


def _nothing(document: Document) -> dict[str, str]:
    del document
    return {}


def _no_aims(document: Document) -> list[Aim]:
    del document
    return []


PARTS = (
    Part("point", "the point: streams held open, and the plain page meanwhile", (3, 1), (510, 145), _measure_point,
         point_report.merge, point_report.report, point_report.charts, point_report.facts,
         lambda document: list(point_report.aims(document)), lambda quick: asdict(_point_settings(quick)),
         ("point-[0-9]*.svg", "point-memory.svg")),
    Part("handoff", "the handoff: what it costs Apache", (2, 1), (200, 20), _measure_module, _merge_module,
         _report_module, _nothing, _module_facts, _module_aims, lambda quick: asdict(_module_settings(quick))),
    Part("daemon", "the daemon: what a stream costs it", (2, 1), (195, 80), _measure_daemon, _merge_daemon,
         _report_daemon, _daemon_charts, _daemon_facts,
         lambda document: list(daemon.aims(document["samples"])), lambda quick: asdict(_daemon_settings(quick)),
         ("daemon-memory.svg", "daemon-cpu.svg")),
    Part("beyond", "beyond one process's descriptors", (2, 1), (110, 10), _measure_beyond, beyond.merge,
         beyond.report, _nothing, beyond.facts, _no_aims, lambda quick: asdict(_beyond_settings(quick))),
    Part("loadgen", "the load generators' ceiling", (3, 1), (12, 3), _measure_generators, loadgen.merge,
         loadgen.report, _nothing, loadgen.facts, _no_aims, _generator_settings),
    # Its figures are not of docs/performance.md: fleet_report.section writes them into docs/operations.md.
    Part("fleet", "the fleet: no-change runs and rollouts, by the number of hosts", (1, 1), (3300, 900),
         _measure_fleet, fleet_report.merge, fleet_report.report, _nothing, fleet_report.facts, _no_aims,
         lambda quick: asdict(_fleet_settings(quick)), by_name=True),
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of everything that is measured, as far as it is installed: what is not will be named as missing data."""
    found = {"httpd": apache.version(), **daemon.versions()}
    for name, command, word in (
        ("PHP", ["php", "-v"], 1),
        ("nginx", ["nginx", "-v"], 2),
        ("Pushpin", ["pushpin", "--version"], 1),
        ("HAProxy", ["haproxy", "-v"], 2),
        ("Go", ["go", "version"], 2),
    ):
        said = tools.output(command)
        if said:
            found[name] = said.split()[word].removeprefix("nginx/").removeprefix("go")
    return found


def names() -> list[str]:
    return [part.key for part in PARTS]


def results_directory(name: str) -> Path:
    """Of a run that is kept with the sources."""
    return tools.BENCHMARKS / "results" / name
