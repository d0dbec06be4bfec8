# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run keeps its rounds, goes on, and says what is missing; nothing here measures anything."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchlib import (
    beyond,
    door,
    loadgen,
    machine,
    parts,
    plot,
    point,
    point_report,
    profile,
    publish,
    publisher,
    suite,
    summary,
    tools,
)
from benchlib.tools import BenchmarkError

BENCHMARKS = Path(__file__).resolve().parents[1]


def look(level: int, live: int, answered: float, p99: float, pss: float = 50e6) -> dict[str, float]:
    """What a climb has seen at a level."""
    return {
        "wanted": level, "live": live, "waiting": level - live, "failed": 0, "answered": answered, "p50_ms": p99 / 3,
        "p99_ms": p99, "events": 3 * live, "cpu_s": 0.1, "seconds": 3.0, "pss": pss, "generator_share": 0.2,
        "prober_share": 0.1, "complete": 1.0, "late_p99_ms": 5.0, "first_p99_ms": 3.0,
        "pss_per_stream": pss / max(1, live), "cpu_s_per_million": 30.0,
    }  # fmt: skip


def test_streams_of_which_none_began_have_no_time_to_the_first_event() -> None:
    assert point.first_events({"first_event_ms": {"p50": 0.0, "p99": 0.0, "max": 0.0}}) == {}
    assert point.first_events({"first_event_ms": {"p50": 0.0, "p99": 0.2, "max": 0.2}}) == {"first_p99_ms": 0.2}


def test_a_round_in_which_the_pages_cost_more_than_the_events_counts_as_it_is() -> None:
    """Without it the median would be that of the rounds that were dear."""
    idle, many = {**look(0, 0, 1, 2), "cpu_s": 0.3}, look(10, 10, 1, 2)
    costs = [point.cost_of_events({**many, "cpu_s": seconds}, idle) for seconds in (0.27, 0.3, 0.36)]
    assert costs == pytest.approx([-1000.0, 0.0, 2000.0])
    assert point.cost_of_events({**many, "answered": 0.5}, idle) is None
    assert point.cost_of_events({**many, "events": 0}, idle) is None


def climbed(factor: float) -> dict[str, Any]:
    """A round of the point: a contender that lives, one that stops; times are so many times those of another round."""
    good = {
        "0": look(0, 0, 1, 2 * factor),
        "10": look(10, 10, 1, 2 * factor),
        "1000": look(1000, 1000, 1, 2.4 * factor),
    }
    bad = {"0": look(0, 0, 1, 2 * factor), "10": look(10, 10, 1, 4 * factor), "1000": look(1000, 25, 0, 3000)}
    short = {"wanted": 100, "completed": 100, "failed": 0, "waiting": 0}
    samples = {"25": {"mod_php": bad, "handoff": {**good, "short": short}}}
    return {"settings": parts.PARTS[0].settings(False), "samples": samples, "missing": {}}


def test_the_plain_pages_ratio_is_formed_within_each_round() -> None:
    """A machine that was twice as slow for one round changes nothing."""
    document = point_report.merge([climbed(1.0), climbed(2.0)])
    aims = {aim.text: aim for aim in point_report.aims(document)}
    (text,) = (text for text in aims if text.startswith("plain page's p99"))
    assert "1,000 streams (handoff, 25 workers)" in text
    assert aims[text].value.low == aims[text].value.high == pytest.approx(1.2) and aims[text].met


def test_a_contender_that_is_missing_in_one_round_is_left_out_of_all_with_a_word() -> None:
    """The others' ratios are formed all the same."""
    second = climbed(2.0)
    del second["samples"]["25"]["mod_php"]
    second["missing"] = {"mod_php, 25 workers": "it did not start\nand more"}
    document = point_report.merge([climbed(1.0), second])
    document |= {"machine": machine.describe(daemon_python="3", loop="x", json="y"), "loads": [0.1], "took": 1.0}
    document["quick"] = False
    text = summary.report({"point": document})
    assert "- mod_php, 25 workers: in 1 of 2 rounds, and so left out of all: it did not start\n" in text
    assert "| PHP streams, mod_php |" not in text and text.count("| handoff, relayed |") == 3
    assert any(aim.text.startswith("plain page's p99") for aim in point_report.aims(document))


def test_a_point_of_which_nothing_could_be_measured_is_reported_as_that() -> None:
    nothing = {**climbed(1.0), "samples": {}, "missing": {"mod_php, 25 workers": "php is missing"}}
    document = point_report.merge([nothing, nothing])
    assert document["missing"] == {"mod_php, 25 workers": "php is missing"}
    assert point_report.charts(document) == {} and point_report.facts(document) == {}
    assert "svg" not in point_report.report(document)


def test_a_contender_that_stopped_answering_has_no_latency_in_table_and_chart() -> None:
    document = point_report.merge([climbed(1.0)])
    text = point_report.report(document)
    row = next(line for line in text.splitlines() if line.startswith("| PHP streams, mod_php | 2.0"))
    assert row.endswith("| **0% answered** |")
    assert "| 4 events each | asked for | complete, to [DONE], 8 s after the last was asked for | failed |" in text
    charts = point_report.charts(document)
    assert set(charts) == {"point-25.svg", "point-memory.svg"}
    # Three points of the one that lives, two of the one that stopped.
    assert charts["point-25.svg"].count("<circle") == 5


def test_the_share_of_events_that_came_is_not_called_one_of_those_in_time() -> None:
    """An event that came a second late has come: what is late has a column of its own."""
    point_text = point_report.report(point_report.merge([climbed(1.0)]))
    seen = dict.fromkeys((what for what, _, _ in beyond.COLUMNS), 1.0)
    document = {"missing": {}, "levels": {"10": seen}, "limits": {"memory": 1}, "nearest": "memory", "workers": 1}
    document |= {"generators": 1, "descriptors": 100, "pace": 1.0}
    for text in (point_text, beyond.report(beyond.merge([document]))):
        assert "*Events that came*" in text and "events that came" in text and "in time" not in text


def test_memory_of_worker_bound_streams_is_divided_by_those_that_live() -> None:
    document = point_report.merge([climbed(1.0)])
    aims = {aim.text: aim for aim in point_report.aims(document)}
    (aim,) = (aim for text, aim in aims.items() if text.startswith("memory of all processes"))
    assert aim.value.median == pytest.approx(25 / 1000) and aim.met


@pytest.mark.parametrize("key", ["lines", "bars"])
def test_a_chart_is_well_formed_and_has_colours_for_light_and_dark(key: str) -> None:
    svg = {
        "lines": plot.lines("a < b", "c & d", "x", [plot.Line("one", ((0, 1.0), (10, None)), True)]),
        "bars": plot.bars("a < b", "c & d", [plot.Bar("one", 2.0, 1.0, 3.0), plot.Bar("two", 900.0, 900.0, 900.0)]),
    }[key]
    root = ET.fromstring(svg)
    assert root.findtext("{http://www.w3.org/2000/svg}title") == "a < b"
    assert "prefers-color-scheme: dark" in svg
    assert ("(logarithmic)" in svg) == (key == "bars")


def test_names_at_the_lines_ends_do_not_cover_each_other() -> None:
    places = plot._apart([100.0, 101.0, 99.0, 395.0, 399.0], 18, 90, 400)
    ordered = sorted(places)
    assert all(later - earlier >= 18 for earlier, later in pairwise(ordered))
    assert places[2] < places[0] < places[1] and max(places) <= 400
    assert plot._apart([95.0, 95.0, 95.0], 18, 90, 400) == [95.0, 113.0, 131.0]


@pytest.fixture
def counted(tmp_path: Path) -> tuple[suite.Run, list[int]]:
    """A run of three rounds of a scenario that only counts, and the numbers of the rounds that were measured."""
    measured: list[int] = []

    def measure(number: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
        del quick, say
        if number == 1 and measured == [0]:
            measured.append(-1)
            raise KeyboardInterrupt
        measured.append(number)
        return {"missing": {}, "number": number}

    def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
        return {**rounds[0], "numbers": [document["number"] for document in rounds]}

    part = replace(parts.PARTS[0], key="count", measure=measure, merge=merge, settings=lambda quick: {"size": 1})
    return suite.Run(tmp_path / "state", [part], False, 3, {"httpd": "2.4"}, "abc"), measured


def test_a_run_that_was_interrupted_goes_on_where_it_was(counted: tuple[suite.Run, list[int]]) -> None:
    run, measured = counted
    with pytest.raises(KeyboardInterrupt):
        run.measure()
    run.measure()
    assert measured == [0, -1, 1, 2]
    assert run.documents()["count"]["numbers"] == [0, 1, 2]
    run.measure()
    assert measured == [0, -1, 1, 2]


@pytest.mark.parametrize("what", ["settings", "commit", "versions", "a file that is no JSON"])
def test_a_round_of_other_settings_or_another_commit_is_not_this_runs_and_is_measured_again(
    counted: tuple[suite.Run, list[int]], what: str
) -> None:
    run, measured = counted
    measured.append(-2)  # no interruption
    run.measure()
    if what == "settings":
        run.chosen = [replace(run.chosen[0], settings=lambda quick: {"size": 2})]
    elif what == "commit":
        run.commit = "def"
    elif what == "versions":
        run.versions = {"httpd": "2.4", "nginx": "1.22"}
    else:
        run.file(run.chosen[0], 1).write_text("{")
    assert [document["numbers"] for document in run.documents().values()] == (
        [[0, 2]] if what.startswith("a file") else []
    )
    del measured[:]
    measured.append(-2)
    run.measure()
    assert measured == ([-2, 1] if what.startswith("a file") else [-2, 0, 1, 2])


def test_a_fresh_start_drops_the_rounds_of_the_chosen_scenarios_only(counted: tuple[suite.Run, list[int]]) -> None:
    run, measured = counted
    measured.append(-2)  # no interruption
    run.measure()
    other = run.state / "other-0.json"
    other.write_text("{}")
    run.forget()
    assert list(run.state.iterdir()) == [other]


def test_files_of_an_earlier_run_make_way_and_those_of_others_stay(tmp_path: Path) -> None:
    earlier = ["point.json", "point-150.svg", "point-memory.svg", "daemon-cpu.svg", "profile-handoff-perf.svg"]
    others = ["module.json", "logo.svg", "point-notes.svg", "package.json"]
    for name in (*earlier, *others):
        (tmp_path / name).write_text("x")
    seen = {"per_second": 100.0, "per_cpu_second": 400.0, "share": 0.25}
    document = loadgen.merge([{"samples": {"requests": seen}, "missing": {}, "quick": True}])
    document |= {"machine": machine.describe(daemon_python="3", loop="x", json="y"), "loads": [0.1], "took": 1.0}
    suite.write({"loadgen": document}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "loadgen.json", "report.md"}
    charts = {name for part in parts.PARTS for name in part.chart_names}
    assert set(publish.CHARTS.values()) <= {name.replace("[0-9]*", "{workers}") for name in charts}


@pytest.mark.parametrize("key", ["beyond", "loadgen"])
def test_a_scenario_that_failed_is_no_round(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept as a round would not be tried again."""

    def fail(*arguments: object, **options: object) -> None:
        raise BenchmarkError(f"not today: {arguments} {options}")

    for module, name in ((beyond, "build"), (tools, "build"), (beyond, "measure"), (loadgen, "ceiling")):
        monkeypatch.setattr(module, name, (lambda *a, **o: None) if name == "build" else fail)
    part = next(part for part in parts.PARTS if part.key == key)
    with pytest.raises(BenchmarkError, match="not today"):
        part.measure(0, True, print)


def test_a_profile_that_cannot_be_had_fails_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    monkeypatch.setattr(suite.Run, "measure", lambda run: pytest.fail("measured"))
    assert suite.main(["--quick", "--profile", "--state", str(tmp_path), "loadgen"]) == 1
    assert "--profile needs perf" in capsys.readouterr().err


def test_what_all_rounds_are_guessed_to_take_is_what_the_commands_help_promises() -> None:
    """Three quarters of an hour, and five minutes of a quick run."""
    full, quick = (sum(part.rounds[kind] * part.seconds[kind] for part in suite.chosen([])) for kind in (0, 1))
    assert full < 45 * 60 and quick < 5 * 60


def test_what_could_not_be_measured_is_named_with_its_scenario(tmp_path: Path) -> None:
    point_part, beyond_part = parts.PARTS[0], next(part for part in parts.PARTS if part.key == "beyond")
    documents = {"point": {"missing": {"x-accel, 25 workers": "nginx is missing"}}}
    run = suite.Run(tmp_path, [point_part, beyond_part], False)
    assert suite.missing(documents, run) == ["beyond", "point: x-accel, 25 workers"]


def test_a_scenario_that_comes_to_nothing_does_not_stop_the_others(counted: tuple[suite.Run, list[int]]) -> None:
    run, measured = counted
    measured.append(-2)  # no interruption

    def fail(number: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
        del quick, say
        if number == 1:
            raise BenchmarkError("haproxy is missing")
        return {"missing": {}, "number": number}

    run.chosen.insert(0, replace(run.chosen[0], key="broken", measure=fail))
    run.measure()
    assert measured == [-2, 0, 1, 2]
    assert run.failed == {"broken": "haproxy is missing"}
    assert not run.file(run.chosen[0], 2).exists()
    documents = run.documents()
    assert set(documents) == {"broken", "count"} and suite.missing(documents, run) == ["broken"]


def test_the_sizing_table_reckons_with_the_runs_figures() -> None:
    """40 s per million tokens: 1,000 streams of 20 per second are 0.8 cores, and two workers that have some rest."""
    ours = {"rss_per_stream": [4000.0], "cpu_s_per_million": [40.0], "base_rss": [30e6]}
    documents = {
        "daemon": {"samples": {"relay-memory": {"ours": ours}, "relay": {"ours": ours}}},
        "handoff": {"mpms": {"event": {"samples": {"envelope": {"16": {"httpd_cpu_us": [60.0]}}}}}},
        "beyond": {"samples": {"500": {"kernel_per_stream": [1.0]}, "5000": {"kernel_per_stream": [8000.0]}}},
    }
    rows = publish.sizing(documents).splitlines()
    assert rows[2] == "| 1,000 | 0.8 | 2 | 2,024 | 64 MB | 8 MB | 33 | 0.2% |"
    # 80 cores want 115 workers; a daemon has 64 at most, and each of them has to be able to hold a sixty-fourth.
    assert rows[4] == "| 100,000 | 80.0 | 64 on each of 2 hosts | 4,150 | 4,240 MB | 800 MB | 3,333 | 20.0% |"
    del documents["beyond"]["samples"]["5000"]["kernel_per_stream"]
    with pytest.raises(BenchmarkError, match="kernel_per_stream"):
        publish.sizing(documents)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "speed is none of point, handoff, daemon, beyond"),
        (["--record", "../x"], "'../x' is no name of a run"),
        (["--record", "x", "--out", "y"], "leave out --out"),
        (["--rounds", "0"], "--rounds 0: a whole number from 1 on"),
        (["--rounds", "-1"], "--rounds -1: a whole number from 1 on"),
    ],
    ids=["scenario", "name", "both", "no rounds", "fewer than none"],
)
def test_a_wrong_argument_is_named_with_what_there_is(arguments: list[str], said: str) -> None:
    done = subprocess.run([str(BENCHMARKS / "run"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_daemon_has_as_many_workers_as_its_configuration_allows() -> None:
    text = (BENCHMARKS.parent / "daemon-src" / "streaming_daemon" / "config.py").read_text()
    found = re.search(r'integer\("workers", default\.workers, 0, (\d+)\)', text)
    assert found and int(found[1]) == publish.MOST_WORKERS


@pytest.mark.parametrize("quick", [True, False])
def test_the_sizes_of_a_quick_run_are_not_given_without_the_caution(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "sizing", lambda documents: "| the table |")
    text = publish.sizes({"point": {"quick": quick, "loads": [0.1]}})
    assert text.startswith("**A quick run") == quick and text.endswith("| the table |")


def test_a_run_without_a_scenario_is_not_published() -> None:
    with pytest.raises(BenchmarkError, match=r"no-such-run/point\.json is missing"):
        publish.publish("no-such-run")


def test_a_page_with_a_figure_that_the_run_does_not_have_is_not_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = tmp_path / "performance.md.in"
    template.write_text("{known} and {speed_of_light}")
    monkeypatch.setattr(publish, "TEMPLATE", template)
    monkeypatch.setattr(publish, "facts", lambda name: {"known": "1", "workers": "25"})
    with pytest.raises(BenchmarkError, match="no figure for speed_of_light"):
        publish.render("x")


def test_every_contenders_request_is_whole() -> None:
    for contender in door.CONTENDERS:
        text = door.request(contender.request, 424242, 0.5).decode()
        head, _, body = text.partition("\r\n\r\n")
        length = re.search(r"Content-Length: (\d+)", head)
        assert int(length[1] if length else 0) == len(body), contender.key
        assert not re.search(r"\{\w+\}", text), contender.key
        assert "424242" in text or contender.key == "fdpass", contender.key


def test_every_channel_is_published_to_once_per_second() -> None:
    told = publisher.Publisher(1, lambda number: f"user-{number}", {0})
    told.channels = 25
    seconds = [item["channel"] for part in range(publisher.PARTS) for item in told.items(part)]
    assert sorted(seconds) == sorted(f"user-{number}" for number in range(25))


def test_a_publisher_that_is_not_heard_says_so() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with publisher.Publisher(nobody.getsockname()[1], str, os.sched_getaffinity(0)) as told:
            told.channels = publisher.PARTS
            deadline = time.monotonic() + 20
            while not told.failed and time.monotonic() < deadline:
                time.sleep(0.02)  # the interval of a bounded poll
            assert "refused" in told.failed


def test_what_is_short_first_is_the_least_of_all_limits_and_cuts_the_levels() -> None:
    found = beyond.limits()
    assert "memory" in found and all(value > 0 for value in found.values())
    few = {"memory": 5_000_000, "ports": 700}
    assert beyond.allowed((500, 1000, 2000), few) == ("ports", [500, 700])
    assert beyond.limits_table({"nearest": "ports", "limits": few}).splitlines()[2] == "| **ports** | 700 |"


def test_perfs_script_becomes_stacks_from_the_root_on() -> None:
    script = "python3 \n\tffff send\n\t55ab loop\n\npython3 \n\tffff send\n\t55ab loop\n\nphp \n\t77aa [unknown]\n"
    stacks = profile.folded(script)
    assert stacks == {("python3", "loop", "send"): 2, ("php", "[unknown]"): 1}
    assert profile.words(stacks).splitlines()[0] == "- 66.7% in `send` of python3"
    assert "loop: 66.7%" in "".join(ET.fromstring(profile.flames("x", stacks)).itertext())


def test_the_report_says_that_a_busy_machines_times_mean_nothing() -> None:
    def document(load: float, quick: bool) -> dict[str, dict[str, Any]]:
        return {"point": {"loads": [2.5, 3.0], "quick": quick}, "daemon": {"loads": [load], "quick": quick}}

    assert summary.caution(document(0.1, False)) == ""
    assert "busy" in summary.caution(document(2.0, False))
    assert "quick" in summary.caution(document(0.1, True))


def test_loadgens_ceiling_is_reported_with_the_share_of_a_core() -> None:
    seen = {"per_second": 100.0, "per_cpu_second": 400.0, "share": 0.25}
    document = loadgen.merge([{"samples": {"requests": seen}, "missing": {}}] * 2)
    assert "| 100 (100-100) | 400 (400-400) | 0.25 (0.25-0.25) | - |" in loadgen.report(document)
