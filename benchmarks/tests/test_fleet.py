# SPDX-License-Identifier: Apache-2.0
"""What the fleet's runs come to. No container is started here, and nothing is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchlib import fleet, fleet_report, parts, publish, suite, tools
from benchlib.tools import ROOT, BenchmarkError


def run(kind: str, hosts: int, steps: int = 1, **given: Any) -> dict[str, Any]:
    """A run of a fleet in which every host costs the same, and so does every step."""
    work = 2.0 + (3.0 * steps if kind != "no_change" else 0.0) + 4.0 * hosts
    return {
        "kind": kind, "hosts": hosts, "steps": steps, "forks": 5, "pipelining": True, "tasks": 100,
        "wall_s": 10.0 + 10.0 * hosts, "controller_cpu_s": work, "main_cpu_s": work / 4, "controller_pss": 1e6 * work,
        "hosts_cpu_s": 6.0 * hosts, **given,
    }  # fmt: skip


def straight() -> list[dict[str, Any]]:
    """All sizes of a full run."""
    seen = {1: (1,), 2: (2,), 8: (5, 2), 24: (6,)}
    found = [run("no_change", hosts) for hosts in seen]
    return found + [run(kind, n, steps) for kind in ("rollout", "again") for n in seen for steps in seen[n]]


def varied() -> list[dict[str, Any]]:
    """Eight hosts with other settings."""
    forks = [run("no_change", 8, forks=1, wall_s=360.0), run("no_change", 8, forks=25, wall_s=45.0)]
    return [*forks, run("no_change", 8, pipelining=False, wall_s=180.0), *(run(kind, 8) for kind in fleet.FACTS)]


def document(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"runs": runs, "missing": {}, "idle": {"2": 0.01}}


def test_steps_and_hosts_are_told_apart() -> None:
    growth = fleet_report.fits(straight())["rollout"]["controller_cpu_s"]
    assert (growth.fixed, growth.step, growth.host) == pytest.approx((2.0, 3.0, 4.0))
    assert growth.worst == pytest.approx(0.0, abs=1e-9) and growth.ahead == pytest.approx(1.0)
    assert growth.at(100, 4) == pytest.approx(2 + 12 + 400)


def test_a_step_that_seems_to_give_something_back_costs_nothing() -> None:
    """As where more steps were measured a little cheaper: a thousand hosts would not become cheap by it."""
    seen = {(1, 1): 20.0, (2, 2): 40.0, (8, 2): 170.0, (8, 5): 150.0, (24, 6): 480.0}
    growth = fleet_report.fit(seen, steps=True)
    assert growth.step == 0 and growth.host == pytest.approx(20.0, rel=0.05)
    runs = [each | {"controller_cpu_s": seen.get((each["hosts"], each["steps"]), 9.0)} for each in straight()]
    told = fleet_report.facts({"runs": [*runs, *varied()]})
    assert told["fleet_rollout_step_cpu"] == "nothing that could be told"


def test_what_grows_faster_than_the_hosts_is_seen_in_the_largest_fleet() -> None:
    """A fit of a straight line through a parabola: the fleet that it has not seen took more than it says."""
    runs = [run("no_change", hosts, controller_cpu_s=5.0 + hosts + 0.2 * hosts**2) for hosts in (1, 2, 8, 24)]
    seen = fleet_report.medians(runs, "no_change", "controller_cpu_s")
    growth = fleet_report.fit(seen, steps=False)
    # 144.2, where a line through the other three says 67.8.
    assert growth.ahead == pytest.approx(2.126, abs=0.001)
    assert growth.worst > 0.1


def test_a_fit_weighs_small_fleets_as_much_as_large_ones() -> None:
    """An error of a tenth at one host is not drowned by a thousandth at a hundred."""
    seen = {(1, 1): 1.1, (2, 1): 2.0, (100, 1): 100.0}
    growth = fleet_report.fit(seen, steps=False)
    assert abs(growth.at(1) - 1.1) / 1.1 < 0.05


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({(2, 1): 1.0}, "1 points cannot tell 2"),
        ({(2, 2): 1.0, (8, 8): 2.0, (9, 9): 3.0}, "do not determine"),
    ],
    ids=["few", "steps are hosts"],
)
def test_too_few_points_are_no_fit(seen: dict[tuple[int, int], float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fleet_report.fit(seen, steps=(2, 2) in seen)


def test_runs_with_other_forks_or_without_pipelining_are_not_in_the_growth() -> None:
    other = [run("no_change", 8, forks=25, wall_s=1e6), run("no_change", 8, pipelining=False, wall_s=1e6)]
    runs = [*straight(), *other]
    assert fleet_report.fits(runs)["no_change"]["wall_s"] == fleet_report.fits(straight())["no_change"]["wall_s"]
    hosts, found = fleet_report.options(runs)
    assert hosts == 8
    assert [title for title, _ in found] == ["forks 5, Ansible's own number", "forks 25", "forks 5, no pipelining"]
    assert "1,000,000" in fleet_report.options_table(runs)


def test_what_operations_says_of_forks_and_pipelining_are_ratios_at_the_same_size() -> None:
    """Eight hosts take 90 s with five forks."""
    found = fleet_report.settings_facts([*straight(), *varied()])
    assert (found["fleet_forks_from_few"], found["fleet_forks_to_many"]) == ("0.25", "0.50")
    assert (found["fleet_pipelining_time"], found["fleet_pipelining_hosts"]) == ("2.00", "1.00")
    assert fleet_report.settings_facts(straight()) == {}


def test_hosts_in_turn_are_groups_of_forks_in_every_step() -> None:
    """Of 20 s with one host 10 are its turn: 12 hosts in steps of 1, 1, 4 and 6, five at a time."""
    length = fleet_report.Path(base=10.0, turn=10.0)
    assert length.seconds(12, [1, 1, 4, 6], forks=5) == 10 * 3 + 10 * (1 + 1 + 1 + 2)
    # With one host 20 s, with two in two steps 30.
    assert fleet_report.path(straight(), "rollout") == length


def test_a_prediction_is_the_largest_bound_and_the_waits_of_a_rollout() -> None:
    few = fleet_report.predict(straight(), "rollout", 100, forks=5)
    # 1, 9, 25, 15, 25, 25: turns of 1 + 2 + 5 + 3 + 5 + 5 groups.
    assert (few.steps, few.path) == (6, 10 * 20 + 10 * 21)
    assert few.waits == 6 * 60 + 21 * 15
    assert (few.bound, few.wall) == ("hosts in turn", few.path + few.waits)
    busy = [{**each, "main_cpu_s": each["controller_cpu_s"] / 2} for each in straight()]
    many = fleet_report.predict(busy, "no_change", 1000, forks=500)
    assert (many.bound, many.wall, many.waits) == ("the controller's main process", pytest.approx(4002 / 2), 0)
    spread = [{**each, "main_cpu_s": each["controller_cpu_s"] / 8} for each in straight()]
    many = fleet_report.predict(spread, "no_change", 1000, forks=500)
    assert (many.bound, many.wall) == ("the controller's cores", pytest.approx(4002 / fleet_report.CORES))


def test_memory_grows_with_the_hosts_that_are_worked_on_at_once() -> None:
    """25 forks have no more to do than there are hosts: 70 MB more for 7 of them."""
    more = [run("no_change", 8, forks=1, controller_pss=20e6), run("no_change", 8, forks=25, controller_pss=90e6)]
    assert fleet_report.memory_per_fork([*straight(), *more]) == pytest.approx(10e6)
    assert fleet_report.memory_per_fork(straight()) == 0
    # 100 MB, one more for every host, and ten more for each that is worked on.
    runs = [
        {**each, "controller_pss": 100e6 + 1e6 * each["hosts"] + 10e6 * min(5, each["hosts"])} for each in straight()
    ]
    growth = fleet_report.fits([*runs, *more])["no_change"]["controller_pss"]
    assert (growth.fixed, growth.host) == pytest.approx((100e6, 1e6))
    few, many = (fleet_report.predict([*runs, *more], "no_change", 100, forks) for forks in (5, 25))
    assert (few.memory, many.memory) == pytest.approx((250e6, 450e6))


def test_the_waits_and_the_steps_are_those_of_the_rollouts_defaults() -> None:
    meta = yaml.safe_load((ROOT / "playbooks/rollout.meta.yml").read_text())
    options = meta["argument_specs"]["rollout"]["options"]
    told = [options[f"rollout_{name}"]["default"] for name in ("soak", "watch", "drain_wait")]
    assert told == [fleet_report.SOAK, fleet_report.WATCH, fleet_report.DRAIN_WAIT]
    assert (options["rollout_ramp"]["default"], options["rollout_at_once"]["default"]) == (fleet.RAMP, fleet.AT_ONCE)


def test_the_report_says_how_good_the_fit_is_and_how_far_it_reaches() -> None:
    text = fleet_report.report(fleet_report.merge([document(straight())]))
    assert "| `site.yml`, no change | 24 | - | 250 | 98.0 |" in text
    assert "| rollout of a new release | 8 | 5 |" in text
    assert re.search(r"\| rollout of a new release: controller's CPU, s \| 2.0 \| 3.0 \| 4.00 \| 0% \| 1.00 \|", text)
    assert "1,000 hosts are 42 times the largest fleet" in text


def test_two_rounds_are_medians_with_quartiles() -> None:
    slow = [{**each, "wall_s": each["wall_s"] + 4} for each in straight()]
    second = {**document(slow), "idle": {"2": 0.05}}
    text = fleet_report.report(fleet_report.merge([document(straight()), second]))
    assert "| `site.yml`, no change | 24 | - | 252 (251-253) |" in text
    assert "asks anything of them: 0.03 (0.02-0.04) with 2." in text


def test_a_run_of_too_few_sizes_is_reported_without_a_growth() -> None:
    runs = [each for each in straight() if each["hosts"] == 2]
    merged = fleet_report.merge([document(runs)])
    assert "No growth could be fitted" in fleet_report.report(merged)
    assert fleet_report.facts(merged) == {}


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ("4:memory:/x/libpod-ab12\n0::/libpod_parent/libpod-ab12/init.scope\n", "libpod_parent/libpod-ab12"),
        ("0::/machine.slice/libpod-ab12.scope/container/init.scope\n", "machine.slice/libpod-ab12.scope"),
    ],
    ids=["v1 beside v2", "v2"],
)
def test_a_containers_cgroup_is_that_of_all_its_processes(groups: str, found: str) -> None:
    assert fleet.container_group("ab12", groups) == found


def test_a_container_without_a_cgroup_of_its_own_is_not_measured() -> None:
    with pytest.raises(BenchmarkError, match="no cgroup of its own in '/'"):
        fleet.container_group("ab12", "0::/\n")


def test_the_last_lines_of_a_playbook_are_counted_by_host() -> None:
    text = (
        "msg: PLAY RECAP\nbench-9 : ok=1 changed=0\n"
        "PLAY RECAP *****\nbench-1 : ok=3 changed=0 unreachable=0 failed=0 skipped=2\n"
        "step 1                    : ok=1    changed=1    unreachable=0\n"
    )
    found = fleet.recap(text)
    assert set(found) == {"bench-1", "step 1"}
    assert (found["bench-1"]["skipped"], found["step 1"]["changed"]) == (2, 1)


def test_what_is_looked_for_is_what_the_playbooks_say_and_what_the_roles_gather() -> None:
    """Or an hour is over before somebody sees that a name was changed."""
    (first, *_) = yaml.safe_load((ROOT / "playbooks/tasks/rollout_turn.yml").read_text())
    assert fleet.turns(f"TASK [{first['name']}] ***\nok: [a]\n") == 1
    said = (ROOT / "playbooks/rollout.yml").read_text().replace("{{ __rollout_steps | join(', ') }}", "1, 2")
    assert fleet.steps(said) == 2
    (needed,) = fleet.FACTS["facts_needed"]["tasks"]
    for path in ROOT.glob("roles/*/tasks/assert.yml"):
        gathered = [
            task["ansible.builtin.setup"]
            for task in yaml.safe_load(path.read_text())
            if "ansible.builtin.setup" in task
        ]
        assert needed["ansible.builtin.setup"] in gathered, path


def test_hosts_that_had_a_turn_are_counted_over_all_steps() -> None:
    task = "TASK [Note that the turn begins] *****\n"
    assert fleet.turns(f"{task}ok: [a]\n\n{task}ok: [b]\nok: [c]\n\nTASK [Another] ***\nok: [d]\n") == 3
    assert fleet.turns("TASK [Another] ***\nok: [d]\n") == 0


def test_the_main_process_is_counted_without_its_children() -> None:
    stat = "12 (a (b) c) Z 1 2 3 4 5 6 7 8 9 10 300 200 9000 9000 20 0 1 0"
    assert fleet.own_cpu_seconds(stat) == pytest.approx(500 / os.sysconf("SC_CLK_TCK"))


def test_a_machine_with_too_few_inotify_instances_is_told_which_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "number", lambda path: 128)
    monkeypatch.setattr(fleet, "instances_in_use", lambda: 100)
    monkeypatch.setattr(fleet, "available", lambda: int(100e9))
    most, short = fleet.most_hosts()
    assert most == 28 // fleet.INSTANCES_PER_HOST
    assert "max_user_instances is 128, and 100 are in use" in short


def test_the_fleet_runs_only_where_it_is_named() -> None:
    assert "fleet" not in [part.key for part in suite.chosen([])]
    assert [part.key for part in suite.chosen(["fleet"])] == ["fleet"]
    assert {part.key for part in suite.chosen([])} == {part.key for part in parts.PARTS} - {"fleet"}


def test_the_section_of_the_operations_page_is_replaced_and_the_rest_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, template = tmp_path / "operations.md", tmp_path / "operations.md.in"
    page.write_text(f"before\n\n{fleet_report.MARK.format(name='old')}\nold\n{fleet_report.END}\n\nafter\n")
    template.write_text("## Costs\n\n{fleet_rollout_host_cpu} s, {run}\n")
    monkeypatch.setattr(fleet_report, "OPERATIONS", page)
    monkeypatch.setattr(fleet_report, "TEMPLATE", template)
    merged = fleet_report.merge([document(straight())])
    text = fleet_report.section("new", merged, "about")
    assert text == (
        f"before\n\n{fleet_report.MARK.format(name='new')}\n## Costs\n\n4.0 s, new\n{fleet_report.END}\n\nafter\n"
    )
    template.write_text("{speed_of_light}")
    with pytest.raises(BenchmarkError, match="no figure for speed_of_light"):
        fleet_report.section("new", merged, "about")


def test_a_fleet_alone_is_published_without_the_other_scenarios(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "results_directory", lambda name: tmp_path)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    with pytest.raises(BenchmarkError, match=r"point\.json is missing"):
        publish.render("x")
    merged = fleet_report.merge([document([*straight(), *varied()])])
    words = ("processor", "cores", "kernel", "system", "commit", "daemon_python", "loop", "json")
    merged |= {"machine": dict.fromkeys(words, "x"), "loads": [0.1], "took": 60.0, "quick": False}
    suite.write({"fleet": merged}, tmp_path)
    assert set(publish.render("x")) == {fleet_report.OPERATIONS}


def test_all_hosts_are_copies_of_one_image_whoever_edits_the_checkout_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new file that is not tracked yet is deployed, so it is another image's."""
    root = tmp_path / "root"
    for name in ("roles/a.yml", "daemon-src/a.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("one")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.setattr(fleet, "ROOT", root)
    monkeypatch.setattr(tools, "ROOT", root)

    def begun(name: str) -> fleet.Fleet:
        bench = fleet.Fleet(tmp_path / name, print)
        bench.copy_checkout()
        return bench

    first = begun("first")
    image = first.image(12)
    (root / "README.md").write_text("two")
    assert begun("same").image(12) == image
    (root / "roles/b.yml").write_text("two")
    assert first.image(12) == image
    assert begun("other").image(12) != image


class Rollouts(fleet.Fleet):
    """Says of every rollout what the playbook would, and does none of it."""

    def playbook(self, kind: str, play: str, names: list[str], *arguments: str, **options: Any) -> dict[str, Any]:
        given = json.loads(arguments[-1])
        planned = fleet.rollout_steps()(given["rollout_ramp"], len(names), given["rollout_at_once"])
        assert len(names) < 2 or max(planned) < len(names), "all web hosts together are refused"
        said = f"msg: >-\n  Release x to many hosts in steps\n  of {', '.join(map(str, planned))}; each is drained"
        return run(kind, len(names), self.told or fleet.steps(said), turns=len(names) if kind == "rollout" else 0)

    told = 0

    def next_release(self) -> None:
        self.turn += 1


@pytest.mark.parametrize("settings", [fleet.QUICK, fleet.FULL], ids=["quick", "full"])
def test_every_round_has_the_rollouts_from_which_hosts_and_steps_are_told_apart(
    settings: fleet.Settings, tmp_path: Path
) -> None:
    bench, found = Rollouts(tmp_path, print), [run("no_change", hosts) for hosts in settings.sizes]
    for size in settings.sizes:
        found += fleet.rolled_out(bench, [f"bench-{place}" for place in range(size)], settings)
    growth = fleet_report.fits(found)["rollout"]["controller_cpu_s"]
    assert (growth.fixed, growth.step, growth.host) == pytest.approx((2.0, 3.0, 4.0))


def test_a_rollout_in_other_steps_than_were_meant_is_no_figure(tmp_path: Path) -> None:
    bench = Rollouts(tmp_path, print)
    bench.told = 1
    with pytest.raises(BenchmarkError, match="8 hosts went in 1 steps, where 5 were meant"):
        bench.roll_out([f"bench-{place}" for place in range(8)], fleet.RAMP, fleet.AT_ONCE)


def test_every_rollout_brings_what_no_host_has(tmp_path: Path) -> None:
    """The word that differs is replaced, not heaped up."""
    bench = fleet.Fleet(tmp_path, print)
    name = "daemon-src/streaming_daemon/__init__.py"
    (bench.checkout / name).parent.mkdir(parents=True)
    (bench.checkout / name).write_text((ROOT / name).read_text())
    seen = [(bench.checkout / name).read_text()]
    for _ in range(3):
        bench.next_release()
        seen.append((bench.checkout / name).read_text())
        compile(seen[-1], name, "exec")
    assert len(set(seen)) == 4
    assert seen[-1] == seen[0].replace('"""', '"""Release 3. ', 1)


def test_a_run_that_fails_is_named_and_those_before_it_are_kept(tmp_path: Path) -> None:
    def measured() -> Iterator[dict[str, Any]]:
        yield run("no_change", 2)
        raise BenchmarkError("site.yml ended with 2")

    runs: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    fleet.collect(runs, missing, fleet.Fleet(tmp_path, print), "no change, 2 hosts", measured())
    assert [each["hosts"] for each in runs] == [2]
    assert missing == {"no change, 2 hosts": "site.yml ended with 2"}


def test_a_command_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(BenchmarkError, match=r"ls /no-such-file failed:\n.*No such file"):
        tools.checked(["ls", "/no-such-file"], LC_ALL="C")
