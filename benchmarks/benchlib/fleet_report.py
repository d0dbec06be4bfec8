# SPDX-License-Identifier: Apache-2.0
"""What the fleet's runs come to: how they grow with hosts and steps, and what that says about fleets nobody has here.

A figure y of a run with N hosts in S steps is taken as  y = fixed + step * S + host * N  and the three are fitted by
least squares of the relative error, so that a run with two hosts says as much as one with twenty-four. How good that is
is said by the worst residual, and by a second fit without the largest fleet, which has to predict that one.

On real machines a run takes at least the longest of three: the controller's CPU time over its cores; the CPU time of
the controller's main process, which is one thread; and the tasks one after another, as one host alone takes them, once
for each group of so many hosts as there are forks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchlib.figures import figure, rounds
from benchlib.fleet import AT_ONCE, DEFAULT_FORKS, RAMP, Run, rollout_steps
from benchlib.report import filled, spread, table
from benchlib.tools import BENCHMARKS, ROOT, BenchmarkError

Document = dict[str, Any]

SOAK, WATCH, DRAIN_WAIT = 60, 10, 5
"""Seconds; the defaults of playbooks/rollout.yml, which the measured rollouts do not wait for."""

PREDICTED = (100, 1000)
FORKS = (5, 25, 50)
CORES = 4
"""Of the controller that is reckoned with."""

KINDS = {
    "no_change": "`site.yml`, no change",
    "rollout": "rollout of a new release",
    "again": "the same rollout once more",
}
FITTED = ("controller_cpu_s", "main_cpu_s", "hosts_cpu_s", "wall_s", "controller_pss")


# --- the fit ------------------------------------------------------------------------------------


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots. Raises ValueError where there is more than one solution."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for at in range(size):
        best = max(range(at, size), key=lambda line: abs(rows[line][at]))
        rows[at], rows[best] = rows[best], rows[at]
        if abs(rows[at][at]) < 1e-12:
            raise ValueError("the points do not determine the fit")
        for line in range(size):
            if line != at:
                factor = rows[line][at] / rows[at][at]
                rows[line] = [value - factor * other for value, other in zip(rows[line], rows[at], strict=True)]
    return [rows[at][-1] / rows[at][at] for at in range(size)]


def least_squares(points: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients of each column that make the sum of squared relative errors least."""
    # Bytes and seconds alike: a pivot is small beside 1, and not because the unit is.
    unit = max(values)
    lines = [[x / (value / unit) for x in point] for point, value in zip(points, values, strict=True)]
    columns = range(len(points[0]))
    normal = [[sum(line[a] * line[b] for line in lines) for b in columns] for a in columns]
    return [unit * share for share in solve(normal, [sum(line[a] for line in lines) for a in columns])]


@dataclass(frozen=True, slots=True)
class Fit:
    """y = fixed + step * steps + host * hosts. ``worst``: the largest relative error of a point it was made from.

    ``ahead``: for the largest fleet, measured over what a fit without it predicts; None where none can be made.
    """

    fixed: float
    step: float
    host: float
    points: int
    worst: float
    ahead: float | None = None

    def at(self, hosts: int, steps: int = 1) -> float:
        return self.fixed + self.step * steps + self.host * hosts


def fit(seen: dict[tuple[int, int], float], steps: bool) -> Fit:
    """Of (hosts, steps) -> figure; without the steps' share where they do not vary, do not matter or cannot be told.

    Raises ValueError where the points are too few.
    """
    found = _fit(seen, steps)
    largest = max(hosts for hosts, _ in seen)
    smaller = {place: value for place, value in seen.items() if place[0] < largest}
    try:
        before = _fit(smaller, steps)
    except ValueError:
        return found
    place = max(seen)
    foretold = before.at(*place)
    ahead = seen[place] / foretold if foretold > 0 else None
    return Fit(found.fixed, found.step, found.host, found.points, found.worst, ahead)


def _fit(seen: dict[tuple[int, int], float], steps: bool) -> Fit:
    columns = 3 if steps else 2
    if len(seen) < columns:
        raise ValueError(f"{len(seen)} points cannot tell {columns} shares apart")
    points = [(1.0, float(hosts), float(many))[:columns] for hosts, many in seen]
    share = least_squares(points, list(seen.values()))
    if steps and share[2] < 0:
        # No step gives anything back: it costs less than what the points differ by.
        return _fit(seen, steps=False)
    result = Fit(share[0], share[2] if steps else 0.0, share[1], len(seen), 0.0)
    worst = max(abs(result.at(*place) - value) / value for place, value in seen.items())
    return Fit(result.fixed, result.step, result.host, len(seen), worst)


# --- what was seen ------------------------------------------------------------------------------


def plain(run: Run) -> bool:
    """With Ansible's own number of forks, and pipelining."""
    return bool(run["forks"] == DEFAULT_FORKS and run["pipelining"])


def values(runs: Sequence[Run], kind: str, what: str) -> dict[tuple[int, int], list[float]]:
    """(hosts, steps) -> what all such runs have shown."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        if run["kind"] == kind and plain(run):
            found.setdefault((run["hosts"], run["steps"]), []).append(run[what])
    return found


def medians(runs: Sequence[Run], kind: str, what: str) -> dict[tuple[int, int], float]:
    return {place: figure(seen).median for place, seen in values(runs, kind, what).items()}


def fits(runs: Sequence[Run]) -> dict[str, dict[str, Fit]]:
    """kind -> figure -> its growth; memory is without the forks, of which small fleets keep only some busy.

    Memory is site.yml's only: how many forks are busy in a rollout differs from step to step.
    Raises ValueError where there are too few sizes.
    """
    fork = memory_per_fork(runs)
    found: dict[str, dict[str, Fit]] = {}
    for kind in KINDS:
        seen = {what: medians(runs, kind, what) for what in FITTED if kind == "no_change" or what != "controller_pss"}
        if "controller_pss" in seen:
            seen["controller_pss"] = {
                place: value - fork * min(DEFAULT_FORKS, place[0]) for place, value in seen["controller_pss"].items()
            }
        found[kind] = {what: fit(values, kind != "no_change") for what, values in seen.items()}
    return found


@dataclass(frozen=True, slots=True)
class Path:
    """Seconds that one host alone takes: outside the steps, and in its step. What more forks cannot shorten."""

    base: float
    turn: float

    def seconds(self, hosts: int, steps: Sequence[int], forks: int) -> float:
        turns = sum(math.ceil(many / forks) for many in steps)
        return self.base * math.ceil(hosts / forks) + self.turn * turns


def path(runs: Sequence[Run], kind: str) -> Path:
    """From a run with one host; a rollout's turn from one with two hosts, one after the other.

    Raises KeyError where there was none.
    """
    wall = medians(runs, kind, "wall_s")
    alone = wall[1, 1]
    if kind == "no_change":
        return Path(alone, 0.0)
    turn = min(max(0.0, wall[2, 2] - alone), alone)
    return Path(alone - turn, turn)


def memory_per_fork(runs: Sequence[Run]) -> float:
    """Bytes of the controller's for each host that it works on at the same time; 0 where forks were not varied."""
    hosts, varied = options(runs)
    seen = {
        min(some[0]["forks"], hosts): figure([run["controller_pss"] for run in some]).median
        for _, some in varied
        if some[0]["pipelining"]
    }
    if len(seen) < 2:
        return 0.0
    few, many = min(seen), max(seen)
    return float(max(0.0, (seen[many] - seen[few]) / (many - few)))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, and bytes of memory. ``waits``: for rollout_soak and the like, in ``wall`` already."""

    hosts: int
    steps: int
    forks: int
    controller_cpu: float
    main: float
    path: float
    memory: float
    waits: float
    wall: float

    @property
    def bound(self) -> str:
        work = {
            "hosts in turn": self.path,
            "the controller's main process": self.main,
            "the controller's cores": self.controller_cpu / CORES,
        }
        return max(work, key=lambda what: work[what])


def predict(runs: Sequence[Run], kind: str, hosts: int, forks: int) -> Prediction:
    """A fleet of real machines, in the default steps, with a controller of CORES cores."""
    found = fits(runs)
    growth = found[kind]
    steps = rollout_steps()(RAMP, hosts, AT_ONCE) if kind != "no_change" else [hosts]
    many = len(steps) if kind != "no_change" else 1
    cpu, main = (growth[what].at(hosts, many) for what in ("controller_cpu_s", "main_cpu_s"))
    memory = found["no_change"]["controller_pss"].at(hosts) + min(forks, hosts) * memory_per_fork(runs)
    length = path(runs, kind).seconds(hosts, steps, forks)
    waits = 0.0
    if kind == "rollout":
        turns = sum(math.ceil(size / forks) for size in steps)
        waits = SOAK * many + (WATCH + DRAIN_WAIT) * turns
    wall = max(length, main, cpu / CORES) + waits
    return Prediction(hosts, many, forks, cpu, main, length, memory, waits, wall)


# --- words --------------------------------------------------------------------------------------


def merge(parts: list[Document]) -> Document:
    """One document of several rounds' documents."""
    missing: dict[str, str] = {}
    idle: dict[str, list[float]] = {}
    for document in parts:
        missing |= document["missing"]
        for hosts, cores in document["idle"].items():
            idle.setdefault(hosts, []).append(cores)
    runs = [run for document in parts for run in document["runs"]]
    return {**parts[0], "rounds": len(parts), "runs": runs, "missing": missing, "idle": idle}


def minutes(seconds: float) -> str:
    """40 s, 3.5 min, 2.1 h: as precise as anybody wants to know it."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("wall_s", "here, s", 1, 0),
    ("controller_cpu_s", "controller's CPU, s", 1, 1),
    ("main_cpu_s", "its main process, s", 1, 1),
    ("controller_pss", "its memory, MB", 1e-6, 0),
    ("hosts_cpu_s", "hosts' CPU, s", 1, 1),
)
"""Key, title, factor, digits."""


def shown(seen: Sequence[float], digits: int) -> str:
    """Quartiles only where there is more than one."""
    value = figure(list(seen))
    return spread(value, digits) if value.rounds > 1 else f"{value.median:,.{digits}f}"


def measured_table(runs: Sequence[Run]) -> str:
    rows = []
    for kind, title in KINDS.items():
        for hosts, steps in sorted(values(runs, kind, "wall_s")):
            cells = [
                shown([value * factor for value in values(runs, kind, what)[hosts, steps]], digits)
                for what, _, factor, digits in COLUMNS
            ]
            rows.append([title, str(hosts), str(steps) if kind != "no_change" else "-", *cells])
    return table(["", "hosts", "steps", *(title for _, title, _, _ in COLUMNS)], rows)


def growth_table(runs: Sequence[Run]) -> str:
    rows = []
    for kind, growth in fits(runs).items():
        for what, name, factor, _ in COLUMNS:
            if what not in growth:
                continue
            one = growth[what]
            title = "its memory without forks, MB" if what == "controller_pss" else name
            rows.append(
                [
                    f"{KINDS[kind]}: {title}",
                    f"{one.fixed * factor:,.1f}",
                    f"{one.step * factor:,.1f}" if one.step else "-",
                    f"{one.host * factor:,.2f}",
                    f"{one.worst:.0%}",
                    f"{one.ahead:.2f}" if one.ahead else "-",
                ]
            )
    return table(["", "fixed", "per step", "per host", "worst residual", "largest fleet: measured / predicted"], rows)


def options(runs: Sequence[Run]) -> tuple[int, list[tuple[str, list[Run]]]]:
    """At how many hosts forks and pipelining were varied, and the runs by what was different."""
    varied = [run for run in runs if run["kind"] == "no_change" and not plain(run)]
    if not varied:
        return 0, []
    hosts = varied[0]["hosts"]
    same = [run for run in runs if run["kind"] == "no_change" and run["hosts"] == hosts]
    found = [
        (f"forks {forks}" + (", Ansible's own number" if forks == DEFAULT_FORKS else ""),
         [run for run in same if run["forks"] == forks and run["pipelining"]])
        for forks in sorted({run["forks"] for run in same})
    ]  # fmt: skip
    found.append((f"forks {DEFAULT_FORKS}, no pipelining", [run for run in same if not run["pipelining"]]))
    return hosts, [(title, some) for title, some in found if some]


def options_table(runs: Sequence[Run]) -> str:
    _, found = options(runs)
    rows = [
        [title, *(shown([run[what] * factor for run in some], digits) for what, _, factor, digits in COLUMNS)]
        for title, some in found
    ]
    return table(["`site.yml`, no change", *(title for _, title, _, _ in COLUMNS)], rows)


FACTS = {"facts_none": "nothing (`ping`)", "facts_needed": "what the roles ask for", "facts_all": "everything"}


def facts_rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {kind: [run for run in runs if run["kind"] == kind] for kind in FACTS}


def facts_table(runs: Sequence[Run]) -> str:
    """Per host."""
    rows = []
    for kind, some in facts_rows(runs).items():
        if some:
            cells = [
                f"{1e3 * figure([run[what] / run['hosts'] for run in some]).median:,.0f}"
                for what in ("controller_cpu_s", "hosts_cpu_s")
            ]
            rows.append([FACTS[kind], *cells])
    return table(
        ["a play of one task that gathers", "controller's CPU per host, its start included, ms", "host's CPU, ms"], rows
    )


def prediction_table(runs: Sequence[Run]) -> str:
    rows = []
    for kind, title in KINDS.items():
        for hosts in PREDICTED:
            for forks in FORKS:
                one = predict(runs, kind, hosts, forks)
                rows.append(
                    [
                        title,
                        f"{hosts:,}",
                        str(one.steps) if kind != "no_change" else "-",
                        str(forks),
                        minutes(one.controller_cpu),
                        minutes(one.main),
                        minutes(one.path),
                        minutes(one.waits) if one.waits else "-",
                        f"**{minutes(one.wall)}**",
                        one.bound,
                        f"{one.memory / 1e6:,.0f}",
                    ]
                )
    head = ["", "hosts", "steps", "forks", "controller's CPU", "its main process", "hosts in turn", "waits", "at least",
            "because of", "controller's memory, MB"]  # fmt: skip
    return table(head, rows)


def largest(runs: Sequence[Run]) -> int:
    return max((run["hosts"] for run in runs), default=0)


def report(document: Document) -> str:
    runs = document["runs"]
    text = (
        "## The fleet: no-change runs and rollouts\n\n"
        f"{rounds(document['rounds'])}; where a run was made more than once the median, quartiles in brackets.\n"
        "Hosts are containers on the controller's own cores, so the time *here* is not what it is with real machines;\n"
        "CPU time is. The rollouts waited for nothing (soak, watch and drain are 0). Memory is the most that the\n"
        "controller had, PSS.\n\n"
    )
    text += measured_table(runs)
    _, varied = options(runs)
    if varied:
        text += f"\n### Forks and pipelining, with {options(runs)[0]} hosts\n\n{options_table(runs)}"
    if any(facts_rows(runs).values()):
        text += f"\n### Facts\n\n{facts_table(runs)}"
    idle = ", ".join(f"{shown(cores, 2)} with {hosts}" for hosts, cores in document["idle"].items())
    text += f"\nCores that the hosts use while nobody asks anything of them: {idle}.\n"
    try:
        text += f"\n### Growth\n\n{growth_table(runs)}"
        text += f"\n### Predicted for real machines\n\n{prediction_table(runs)}{honest(runs)}"
    except (ValueError, KeyError) as error:
        text += f"\nNo growth could be fitted: {error}.\n"
    return text


def honest(runs: Sequence[Run]) -> str:
    """What a reader has to know about the predictions."""
    factor = PREDICTED[-1] / largest(runs)
    return (
        f"\nA controller of {CORES} cores like this one, hosts that have cores of their own and answer as fast as one "
        f"alone does here. *At least*:\nwhat is largest of the three, plus the waits of a rollout with the defaults "
        f"({SOAK} s of soak per step, {WATCH} s of watching and {DRAIN_WAIT} s of\ndraining per group of forks). "
        "Memory is reckoned from that of `site.yml`, which has as many hosts at once as there are forks.\n"
        f"{PREDICTED[-1]:,} hosts are {factor:,.0f} times the largest fleet that was measured: whatever grows faster "
        "than\nthe hosts (each fork copies the main process's page tables, every gate reads all hosts' variables) "
        "would not have shown yet, so take\nit for the order of magnitude.\n"
    )


def facts(document: Document) -> dict[str, str]:
    """What docs/operations.md says, by name. Nothing where the sizes are too few for a fit."""
    runs = document["runs"]
    try:
        growth = fits(runs)
        tables = {"fleet_growth": growth_table(runs), "fleet_predicted": prediction_table(runs)}
    except (ValueError, KeyError):
        return {}
    found = {
        "fleet_largest": str(largest(runs)),
        "fleet_measured": measured_table(runs).strip(),
        "fleet_options": options_table(runs).strip(),
        "fleet_facts": facts_table(runs).strip(),
        "fleet_honest": honest(runs).strip(),
        **{name: text.strip() for name, text in tables.items()},
    }
    found |= settings_facts(runs)
    for kind, by in growth.items():
        cpu = by["controller_cpu_s"]
        found |= {
            f"fleet_{kind}_host_cpu": f"{cpu.host:.1f}",
            f"fleet_{kind}_main_host": f"{by['main_cpu_s'].host:.1f}",
            f"fleet_{kind}_hosts_own": f"{by['hosts_cpu_s'].host:.1f}",
            f"fleet_{kind}_step_cpu": f"{cpu.step:.1f} CPU seconds" if cpu.step else "nothing that could be told",
            f"fleet_{kind}_worst": f"{cpu.worst:.0%}",
            f"fleet_{kind}_ahead": f"{cpu.ahead:.2f}" if cpu.ahead else "no figure",
        }
    return found


def settings_facts(runs: Sequence[Run]) -> dict[str, str]:
    """Of forks and pipelining, by name; ratios of medians. Nothing where they were not varied."""
    hosts, varied = options(runs)
    if not varied:
        return {}

    def of(some: Sequence[Run], what: str) -> float:
        return figure([run[what] for run in some]).median

    by_forks = {some[0]["forks"]: some for _, some in varied if some[0]["pipelining"]}
    without = [some for _, some in varied if not some[0]["pipelining"]]
    few, many = min(by_forks), max(by_forks)
    base = by_forks[DEFAULT_FORKS]
    found = {
        "fleet_options_hosts": str(hosts),
        "fleet_forks_base": str(DEFAULT_FORKS),
        "fleet_forks_few": str(few),
        "fleet_forks_many": str(many),
        "fleet_forks_from_few": f"{of(base, 'wall_s') / of(by_forks[few], 'wall_s'):.2f}",
        "fleet_forks_to_many": f"{of(by_forks[many], 'wall_s') / of(base, 'wall_s'):.2f}",
        "fleet_fork_mb": f"{memory_per_fork(runs) / 1e6:.0f}",
    }
    for name, what in (("time", "wall_s"), ("controller", "controller_cpu_s"), ("hosts", "hosts_cpu_s")):
        if without:
            found[f"fleet_pipelining_{name}"] = f"{of(without[0], what) / of(base, what):.2f}"
    return found


# --- the section of docs/operations.md ----------------------------------------------------------

OPERATIONS = ROOT / "docs" / "operations.md"
TEMPLATE = BENCHMARKS / "operations.md.in"
MARK = "<!-- benchmarks/run --publish {name} -->"
"""Where the section begins, in a line of its own; it names the run that it was written from."""

END = "<!-- end of benchmarks/operations.md.in -->"


def section(name: str, document: Document, about: str) -> str:
    """The whole page with the section written anew from a run; the template's {names} are the run's figures.

    Raises BenchmarkError where a name has no figure, or the page has no place for it.
    """
    found = {**facts(document), "run": name, "about": about}
    written = filled(TEMPLATE, found, name)
    page = OPERATIONS.read_text()
    begin, end = re.search(MARK.format(name=r"[\w-]+"), page), page.find(END)
    if begin is None or end < begin.end():
        raise BenchmarkError(f"{OPERATIONS.name} has no place between '{MARK}' and '{END}'")
    return f"{page[: begin.start()]}{MARK.format(name=name)}\n{written}{page[end:]}"
