"""Whole rollouts to hosts that are names on this machine: in which order, who is left alone, what the table says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from stubbed_fleet import LOST, run_playbook

QUICK = {"rollout_release": "2.0", "rollout_soak": 0, "rollout_watch": 0, "rollout_drain_wait": 0}
FOUR: dict[str, dict[str, Any]] = {f"web{number}": {} for number in range(1, 5)}
TURN = "streaming_daemon main"


def test_a_rollout_goes_from_step_to_step_and_asks_each_host_once(tmp_path):
    """What all cases below depart from."""
    run = run_playbook(tmp_path, "rollout", FOUR, **QUICK)
    assert run.code == 0, run.out
    assert sorted(run.asked("handoff_app prepare")) == sorted(FOUR)
    assert run.asked(TURN) == ["web1", "web2", "web3", "web4"]
    assert [run.row(host) for host in FOUR] == [f"{host} 2.0 done" for host in FOUR], run.out
    assert sorted(run.asked("rollout_lock free")) == sorted(FOUR)


def test_a_canary_that_was_lost_before_its_turn_stops_all_steps_and_not_only_the_first(tmp_path):
    answers = {"web1": {"rollout_lock": "unreachable"}}
    run = run_playbook(tmp_path, "rollout", FOUR, answers=answers, **{**QUICK, "rollout_max_failed": 1})
    assert run.code != 0
    assert "(web1), and of the first step none may." in run.text
    assert run.asked(TURN) == []
    assert run.row("web1").startswith("web1 unnamed LOST, was waiting unreachable")
    assert run.row("web4") == "web4 unnamed waiting"


BROKEN_APACHE = "#!/bin/sh\necho 'AH00526: Syntax error on line 3 of /etc/apache2/x.conf' >&2\nexit 1\n"
NO_SPACE = "No space left on device"


def test_a_host_that_nobody_could_watch_in_its_soak_goes_back(tmp_path):
    """Its turn samples it twice, the soak then twice."""
    five = {**FOUR, "web5": {}}
    answers = {
        "web1": {"host_health": [{}, {}, {}, "MODULE FAILURE"]},
        "web2": {"host_health": [{}, {}, "no systemctl", {}]},
        "web3": {"host_health": [{}, {}, {}, "unreachable", {}]},
        "web5": {"host_health": [{}, {"ended": "many"}]},
    }
    given = {**QUICK, "rollout_soak": 1, "rollout_ramp": "4,100%", "rollout_at_once": 4}
    run = run_playbook(tmp_path, "rollout", five, answers=answers, **given)
    assert run.code != 0
    for host, part in (
        ("web1", "It could not be asked how it has served: MODULE FAILURE"),
        ("web2", "It could not be asked as its soak began: no systemctl"),
        ("web3", "unreachable"),
        ("web4", "web4 2.0 done"),
        ("web5", "web5 unnamed waiting"),
    ):
        assert part in run.row(host), run.out
    assert all("unnamed rolled back" in run.row(host) for host in ("web1", "web2", "web3")), run.out
    assert sorted(run.asked(TURN)) == ["web1", "web2", "web3", "web4"]


def test_a_watcher_that_falls_over_takes_its_step_back_and_stops_the_rollout(tmp_path):
    broken = "class FilterModule:\n    def filters(self):\n        return {'soak_verdicts': lambda *a, **b: 1 / 0}\n"
    files = {"plugins/filter/soak_verdicts.py": broken}
    run = run_playbook(tmp_path, "rollout", FOUR, files=files, **{**QUICK, "rollout_soak": 1})
    assert run.code != 0
    assert run.row("web1").startswith("web1 unnamed rolled back"), run.out
    assert "Nobody could judge how it serves" in run.row("web1")
    assert run.asked(TURN) == ["web1"]
    assert sorted(run.asked("rollout_lock free")) == sorted(FOUR)


def test_hosts_of_one_step_are_not_all_drained_at_once(tmp_path):
    run = run_playbook(tmp_path, "rollout", FOUR, **{**QUICK, "rollout_ramp": "100%"})
    assert run.code == 0, run.out
    begun, recorded = (
        [index for index, line in enumerate(run.log) if line.endswith(f"host_release {state}")]
        for state in ("begun", "recorded")
    )
    # Each of the four is recorded twice, before and behind its soak, and only then the next begins.
    assert all(recorded[2 * number + 1] < begun[number + 1] for number in range(3)), run.log


def test_the_only_host_behind_a_load_balancer_is_not_drained(tmp_path):
    groups = {"load_balancers": {"hosts": {"lb1": {}}}}
    run = run_playbook(tmp_path, "rollout", {"web1": BEHIND}, groups=groups, **QUICK)
    assert run.code == 0, run.out
    assert run.asked("handoff_lb drain") == []
    assert "web1 is the only one of web_hosts, so it is not drained" in run.text


BEHIND = {"handoff_app_proxy_protocol": True, "handoff_app_load_balancers": ["192.0.2.10"]}
# name -> (what is given, further arguments, what is said); one host beside the web hosts watches them.
NOTHING_TO_DO: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a misspelt host": ({"rollout_hosts": "wbe1"}, [], 'rollout_hosts is "wbe1"; that is no host'),
    "hosts of another kind": ({"rollout_hosts": "all"}, [], 'rollout_hosts is "all"; that has mon1'),
    "only some tags": ({}, ["--tags", "configure"], "--tags configure"),
    "without some tags": ({}, ["--skip-tags", "configure"], "--skip-tags configure"),
    "everybody at once": (
        {"rollout_drain": "health_file", "rollout_at_once": "100%", "rollout_ramp": "100%"},
        [],
        "rollout_at_once is 100%; that drains all 4 web_hosts together",
    ),
    "a variable of the hosts alone": (
        {"for_web_hosts": {"rollout_soak": 86400}},
        [],
        "rollout_soak is 86400 for web1 and 0 for the rollout",
    ),
}


@pytest.mark.parametrize("name", NOTHING_TO_DO)
def test_a_rollout_that_would_do_something_else_than_was_meant_is_refused(name, tmp_path):
    given, arguments, said = NOTHING_TO_DO[name]
    of_hosts = given.get("for_web_hosts", {})
    groups = {"monitoring": {"hosts": {"mon1": {}}}}
    hosts = dict.fromkeys(FOUR, of_hosts)
    # Not with -e, which would be the hosts' too.
    variables = {option: QUICK[option] for option in of_hosts}
    rest = {option: value for option, value in {**QUICK, **given}.items() if option not in [*of_hosts, "for_web_hosts"]}
    run = run_playbook(tmp_path, "rollout", hosts, *arguments, groups=groups, variables=variables, **rest)
    assert run.code != 0
    assert said in run.text, run.out
    assert "Nothing was changed." in run.text
    assert run.log == []


def test_a_fleet_of_which_nobody_could_be_prepared_is_told_why_and_is_not_locked_any_more(tmp_path):
    hosts = {**dict.fromkeys(FOUR, BEHIND), "web3": {**BEHIND, "streaming_daemon_socket": "/run/other.sock"}}
    hosts["web4"] = {}
    run = run_playbook(
        tmp_path,
        "rollout",
        hosts,
        groups={"load_balancers": {"hosts": {"lb1": {}}}},
        answers={"web1": {"streaming_daemon prepare": NO_SPACE}},
        files={"apache2ctl-web2": BROKEN_APACHE},
        **QUICK,
    )
    assert run.code != 0
    for host, part in (
        ("web1", NO_SPACE),
        ("web2", "AH00526: Syntax error on line 3"),
        ("web3", "all three have to mean the same socket"),
        ("web4", "speaks the PROXY protocol"),
    ):
        assert run.row(host).startswith(f"{host} unnamed not prepared"), run.out
        assert part in run.row(host), run.out
    assert "web1 is not prepared, and was not touched" in run.text
    assert run.asked(TURN) == []
    assert sorted(run.asked("rollout_lock free")) == sorted(FOUR)
    # Apache is asked before anything else.
    assert "web2" not in run.asked("streaming_daemon assert")


def test_a_checkout_that_changes_while_it_is_rolled_out_stops_the_rollout(tmp_path):
    """Also: balancers that are named by a variable are asked like those of the group."""
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(FOUR, BEHIND),
        groups={"others": {"hosts": {"lb1": {}}}},
        variables={"handoff_lb_balancers": ["lb1"]},
        inputs="one\ntwo",
        **QUICK,
    )
    assert run.code != 0
    assert run.asked(TURN) == ["web1"]
    assert run.asked("handoff_lb drain") == ["web1"]
    assert run.row("web2").startswith("web2 unnamed untouched"), run.out
    assert "has changed since this rollout began" in run.row("web2")


def test_who_serves_is_drained_before_it_goes_back_and_who_was_cut_off_goes_back_too(tmp_path):
    """The disk of one is full behind its turn, and of the other when it takes up a turn that was cut off."""
    answers = {
        "web1": {"host_release recorded": NO_SPACE},
        "web2": {"host_release": {"turn": {"release": "1.5"}}, "host_release begun": NO_SPACE},
    }
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(FOUR, BEHIND),
        groups={"load_balancers": {"hosts": {"lb1": {}}}},
        answers=answers,
        files={"apache2ctl-web2": BROKEN_APACHE},
        **{**QUICK, "rollout_ramp": "2,100%", "rollout_at_once": 2},
    )
    assert run.code != 0
    of_web1 = [line for line in run.log if line.startswith("web1 ") and ("handoff_lb" in line or "restored" in line)]
    there_and_back = ["web1 handoff_lb drain", "web1 handoff_lb enable"]
    assert of_web1 == [*there_and_back, there_and_back[0], "web1 host_release restored", there_and_back[1]]
    # Its Apache may be broken by the turn that was cut off, so that does not keep it from the next.
    assert "web2" in run.asked("host_release restored")
    for host in ("web1", "web2"):
        assert run.row(host).startswith(f"{host} unnamed rolled back"), run.out
        assert NO_SPACE in run.row(host)


PARTS = {"daemon": "0.1.0", "module": "", "configuration": ""}


def test_a_census_has_a_line_for_a_host_that_cannot_be_read(tmp_path):
    """It is written by whoever runs the playbook, also where the inventory says that root does everything."""
    place = tmp_path / "census.json"
    run = run_playbook(
        tmp_path,
        "status",
        {host: {"ansible_become": False} for host in FOUR},
        answers={
            "web1": {"host_release": {"digest": "d", "snapshots": [], "parts": PARTS}},
            "web2": {"host_release": "record.json is not JSON"},
            "web3": {"host_release": "unreachable"},
            "web4": {
                "host_release": {
                    **{"digest": "d", "snapshots": [], "parts": PARTS},
                    "turn": {"release": "1.5", "by": "ada@admin1"},
                }
            },
        },
        variables={"ansible_become": True, "ansible_become_exe": "/nonexistent/sudo"},
        status_file=str(place),
    )
    assert run.code == 0, run.out
    assert [run.row(host) for host in FOUR] == [
        "web1 unnamed 0.1.0 0 - -",
        "web2 ? CANNOT BE READ: See what it runs: record.json is not JSON",
        "web3 ? UNREACHABLE",
        "web4 unnamed 0.1.0 0 - - UNFINISHED: 1.5 of ada@admin1",
    ], run.out
    census = {each["host"]: each for each in json.loads(place.read_text())}
    assert sorted(census) == sorted(FOUR)
    assert census["web2"]["unreadable"].endswith("record.json is not JSON")


def test_a_backend_that_fails_everybody_is_not_taken_for_the_release_in_the_last_step_either(tmp_path):
    """Nobody has the old release any more; the first host is watched in its own soak, and beside the second's."""
    badly = {"ended": 100, "bad": 60}
    answers = {
        "web1": {"host_health": [{}, {}, {}, {}, {}, badly]},
        "web2": {"host_health": [{}, {}, {}, {}, {}, badly]},
    }
    run = run_playbook(tmp_path, "rollout", {"web1": {}, "web2": {}}, answers=answers, **{**QUICK, "rollout_soak": 1})
    assert [run.row(host) for host in ("web1", "web2")] == ["web1 2.0 done", "web2 2.0 done"], run.out
    assert run.code == 0
    assert "web2 (new): 100 streams ended, 60 of them badly" in run.text


BALANCED: dict[str, Any] = {"groups": {"load_balancers": {"hosts": {"lb1": {}}}}}
SILENT = [("no HAProxy at its socket", "lb1: no HAProxy"), ("unreachable", "lb1 cannot")]
IN_SERVICE = {"before": "ready", "status": "UP"}
BY_HAND = {"before": "maint", "status": "MAINT"}


@pytest.mark.parametrize(("answer", "said"), SILENT)
@pytest.mark.parametrize(("answers", "state"), [(0, "not prepared"), (2, "untouched")])
def test_a_host_is_not_touched_where_a_load_balancer_could_not_drain_it(answers, state, answer, said, tmp_path):
    """It may be found as the two are prepared, or only in the turn of the first."""
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(("web1", "web2"), BEHIND),
        answers={"lb1": {"haproxy_server ready": [IN_SERVICE] * answers + [answer]}},
        **BALANCED,
        **QUICK,
    )
    assert run.code != 0
    assert run.row("web1").startswith(f"web1 unnamed {state}"), run.out
    assert said in run.row("web1")
    assert run.asked("host_release begun") == []
    assert sorted(run.asked("rollout_lock free")) == ["web1", "web2"]


@pytest.mark.parametrize(("before", "state"), [(0, "not prepared"), (2, "untouched")])
def test_a_host_that_somebody_keeps_out_of_service_is_not_brought_back_by_a_rollout(before, state, tmp_path):
    """Its turn would end with that; it may have been taken out while others had their soak."""
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(("web1", "web2"), BEHIND),
        "--forks=1",
        answers={"lb1": {"haproxy_server ready": [IN_SERVICE] * before + [BY_HAND, IN_SERVICE]}},
        **BALANCED,
        **QUICK,
    )
    assert run.code != 0
    assert run.row("web1").startswith(f"web1 unnamed {state}"), run.out
    assert "kept out of service (maint at lb1), and no turn is open on it" in run.row("web1")
    assert run.row("web2").startswith("web2 unnamed waiting"), run.out
    assert "Example: -e 'rollout_hosts=web_hosts:!web1'" in run.text
    assert run.asked("host_release begun") == []
    assert run.asked("handoff_lb drain") == run.asked("handoff_lb enable") == []


def test_the_others_to_roll_out_to_are_those_that_were_meant(tmp_path):
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(FOUR, BEHIND),
        answers={"lb1": {"haproxy_server ready": BY_HAND}},
        **BALANCED,
        **{**QUICK, "rollout_hosts": "web1,web2"},
    )
    assert "Example: -e 'rollout_hosts=web1,web2,!web2'" in run.text, run.out


@pytest.mark.parametrize(("before", "state"), [(0, "not prepared"), (4, "untouched")])
def test_the_last_host_that_serves_is_not_drained(before, state, tmp_path):
    """The two others of its step are drained with it; the fourth is down, by itself."""
    alone = {"up": ["web1"] if state == "not prepared" else ["web1", "web2", "web3"]}
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(FOUR, BEHIND),
        "--forks=1",
        answers={
            "lb1": {"haproxy_server ready": [{**IN_SERVICE, "up": sorted(FOUR)}] * before + [{**IN_SERVICE, **alone}]}
        },
        **BALANCED,
        **{**QUICK, "rollout_ramp": "3,100%", "rollout_at_once": 3},
    )
    assert run.code != 0
    assert run.row("web1").startswith(f"web1 unnamed {state}"), run.out
    together = "web1" if state == "not prepared" else "web1, web2, web3"
    assert f"{together} would be drained, and nobody else serves at lb1" in run.text, run.out
    assert run.asked("handoff_lb drain") == []


BY_A_TURN, BY_SOMEBODY = "rollout\n", "the disk is being changed\n"


@pytest.mark.parametrize(
    ("words", "drain", "play"),
    [
        *((words, "haproxy", "rollout") for words in ("", BY_A_TURN, BY_SOMEBODY)),
        *((BY_SOMEBODY, *rest) for rest in (("health_file", "rollout"), ("haproxy", "rollback"))),
        *((words, "health_file", "rollback") for words in (BY_A_TURN, BY_SOMEBODY)),
    ],
)
def test_a_file_that_fails_the_health_checks_stays_if_it_is_somebody_elses(words, drain, play, tmp_path):
    """A turn that was cut off begins anew whatever it finds; without one, a rollout leaves such a host alone."""
    place = tmp_path / "maintenance"
    if words:
        place.write_text(words)
    turn = {"release": "1.5", "by": "ada@admin1"} if play == "rollout" else {}
    release = {
        "host_release": {"turn": turn, "runs": "1.5", "gone_back": False},
        "host_release begun": {"stays": "", "back_to": "1.0"},
    }
    run = run_playbook(
        tmp_path,
        play,
        dict.fromkeys(("web1", "web2"), BEHIND),
        "--forks=1",
        answers={"web1": release, "web2": release},
        __maintenance_file=str(place),
        rollout_drain=drain,
        **BALANCED,
        **{key: value for key, value in QUICK.items() if play == "rollout" or key == "rollout_drain_wait"},
    )
    assert run.code == 0, run.out
    by_hand = words == BY_SOMEBODY
    assert place.exists() == by_hand
    assert not by_hand or place.read_text() == words
    assert ("web2 stays out of service, because somebody makes its health checks fail" in run.text) == by_hand
    assert run.asked("handoff_lb enable") == (["web1", "web2"] if drain == "haproxy" else [])


@pytest.mark.parametrize("drain", ["haproxy", "health_file", "none"])
def test_a_host_whose_health_checks_somebody_makes_fail_is_left_alone_where_its_turn_would_drain_it(drain, tmp_path):
    place = tmp_path / "maintenance"
    place.touch()
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(("web1", "web2"), BEHIND),
        __maintenance_file=str(place),
        rollout_drain=drain,
        **BALANCED,
        **QUICK,
    )
    assert place.exists()
    assert run.row("web2").startswith("web2 2.0 done" if drain == "none" else "web2 unnamed not prepared"), run.out
    assert (f"kept out of service ({place}), and no turn" in run.row("web2")) == (drain != "none")


def test_a_host_that_a_turn_has_left_out_of_service_is_given_its_turn_all_the_same(tmp_path):
    turn = {"turn": {"release": "1.5", "by": "ada@admin1"}}
    run = run_playbook(
        tmp_path,
        "rollout",
        dict.fromkeys(("web1", "web2"), BEHIND),
        "--forks=1",
        answers={"web1": {"host_release": turn}, "lb1": {"haproxy_server ready": [BY_HAND, IN_SERVICE]}},
        **BALANCED,
        **QUICK,
    )
    assert run.code == 0, run.out
    assert run.asked(TURN) == ["web1", "web2"]


def test_a_census_says_what_load_balancers_say_of_each_host(tmp_path):
    place = tmp_path / "census.json"
    release = {"host_release": {"digest": "d", "snapshots": [], "parts": PARTS}}
    run = run_playbook(
        tmp_path,
        "status",
        {f"web{number}": {} for number in range(1, 6)},
        "--forks=1",
        answers={
            **{f"web{number}": release for number in range(1, 5)},
            "web5": {"host_release": "unreachable"},
            "lb1": {"haproxy_server ready": [IN_SERVICE, BY_HAND, "server web3 is not in backend web", "unreachable"]},
            "lb2": {"haproxy_server ready": [IN_SERVICE, {"before": "ready", "status": "DOWN"}, IN_SERVICE]},
        },
        groups={"load_balancers": {"hosts": {"lb1": {}, "lb2": {}}}},
        status_file=str(place),
    )
    assert run.code == 0, run.out
    assert [run.row(f"web{number}") for number in range(1, 6)] == [
        "web1 unnamed 0.1.0 0 - -",
        "web2 unnamed 0.1.0 0 - - MAINT at lb1; DOWN at lb2",
        "web3 unnamed 0.1.0 0 - - UNKNOWN at lb1",
        "web4 unnamed 0.1.0 0 - - UNKNOWN at lb1",
        "web5 ? UNREACHABLE",
    ], run.out
    census = {each["host"]: each for each in json.loads(place.read_text())}
    assert census["web2"]["balancers"] == {"lb1": "MAINT", "lb2": "DOWN"}
    assert census["web3"]["balancers"] == {"lb1": "UNKNOWN: server web3 is not in backend web", "lb2": "UP"}


WRONG = {
    "a text for a list": ({"handoff_lb_balancers": "lb1"}, {}, ""),
    "a balancer that is away": ({"handoff_lb_balancers": ["lb1", "gone1"]}, {}, "UNKNOWN at gone1"),
    "a variable of one host": ({}, {"handoff_lb_drain_server": "{{ nope }}"}, "CANNOT BE READ: see above"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_census_has_its_table_whatever_is_wrong_with_load_balancers(name, tmp_path):
    given, of_host, remark = WRONG[name]
    release = {"host_release": {"digest": "d", "snapshots": [], "parts": PARTS}}
    run = run_playbook(
        tmp_path,
        "status",
        {"web1": {}, "web2": of_host},
        answers={"web1": release, "web2": release, "lb1": {"haproxy_server ready": IN_SERVICE}},
        groups={"load_balancers": {"hosts": {"lb1": {}}}, "elsewhere": {"hosts": {"gone1": LOST}}},
        **given,
    )
    assert run.row("web1").startswith("web1 unnamed 0.1.0 0"), run.out
    assert run.row("web2").endswith(remark or "0 - -"), run.out


@pytest.mark.parametrize(
    "arguments", [["--tags", "configure"], ["--skip-tags", "configure"], ["--skip-tags", "always"]]
)
def test_a_part_of_a_rollback_is_refused(arguments, tmp_path):
    run = run_playbook(tmp_path, "rollback", FOUR, *arguments)
    assert run.code != 0
    assert f"{' '.join(arguments)} would leave out what a release consists of" in run.text, run.out
    assert run.log == []
