"""Whole turns that a host takes by itself, for a host that is a name on this machine: what is asked, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stubbed_fleet import Outcome, run_playbook

COMMIT = "5f0c2f6d7c0be0b1d1a9d2a7a5e0e4a6c7d8e9f0"
QUICK: dict[str, Any] = {
    **{"pull_release": "2.0", "pull_commit": COMMIT, "rollout_soak": 0, "rollout_watch": 0, "rollout_drain_wait": 0},
    # What the role would have written on the host.
    "__here": ['name = "web1"', "timeout = 3600"],
}
TURN = ["streaming_daemon main", "apache_handoff main", "handoff_app main"]
BROKEN_APACHE = "#!/bin/sh\necho 'AH00526: Syntax error on line 3 of /etc/apache2/x.conf' >&2\nexit 1\n"
BALANCERS = {"load_balancers": {"hosts": {"lb1": {}}}}


def pull(work: Path, answers: dict[str, Any] | None = None, **more: Any) -> Outcome:
    host = more.pop("host", {})
    files = more.pop("files", {"apache2ctl-web1": "#!/bin/sh\n"})
    groups = more.pop("groups", None)
    given = {**QUICK, **more}
    return run_playbook(
        work, "pull", {"web1": host}, answers={"web1": answers or {}}, files=files, groups=groups, **given
    )


def asked(run: Outcome) -> list[str]:
    return [line.split(" ", 1)[1] for line in run.log]


def untouched(run: Outcome) -> None:
    assert run.code != 0
    assert not {"host_release begun", "host_release restored", *TURN} & set(asked(run)), run.log
    assert asked(run)[-1] == "rollout_lock free"


def went_back(run: Outcome) -> None:
    """Proved like a turn, noted, and the lock given back."""
    way = ["host_release restored", "activate", "handoff_app probe", "host_release returned", "rollout_lock free"]
    assert asked(run)[-5:] == way


def test_a_turn_goes_from_the_lock_to_the_record_and_gives_the_lock_back(tmp_path):
    """What all cases below depart from."""
    run = pull(tmp_path)
    assert run.code == 0, run.out
    assert asked(run) == [
        *("rollout_lock", "rollout_lock held", "host_release", "host_release"),
        *(f"{role} assert" for role in ("streaming_daemon", "apache_handoff", "handoff_app")),
        *(f"{role} prepare" for role in ("streaming_daemon", "apache_handoff", "handoff_app")),
        *("rollout_lock kept", "host_release begun", "host_health", *TURN, "handoff_app probe", "handoff_app probe"),
        *("host_health", "host_release recorded", "host_health", "host_health", "host_release recorded"),
        "rollout_lock free",
    ]


def test_a_host_alone_behind_load_balancers_has_to_expect_them(tmp_path):
    run = pull(tmp_path, host={"handoff_app_proxy_protocol": True}, groups=BALANCERS)
    untouched(run)
    assert "HAProxy on lb1 speaks the PROXY protocol to its web hosts" in run.text
    assert "web1 has handoff_app_proxy_protocol false or" in run.text


def test_a_host_that_expects_its_load_balancers_is_drained_by_its_health_checks(tmp_path):
    """On one that is new nothing answers them yet."""
    known = {"handoff_app_proxy_protocol": True, "handoff_app_load_balancers": ["192.0.2.10"]}
    run = pull(tmp_path, host=known, groups=BALANCERS)
    assert run.code == 0, run.out
    assert "Look whether health checks are answered here" in run.text
    assert "haproxy_server" not in " ".join(asked(run))


@pytest.mark.parametrize("drain", ["health_file", "none"])
def test_a_host_that_somebody_keeps_out_of_service_is_left_alone_until_it_is_back(drain, tmp_path):
    """Where a turn would not drain it, it does not bring it back either."""
    place = tmp_path / "maintenance"
    place.touch()
    run = pull(tmp_path, rollout_drain=drain, __maintenance_file=str(place))
    assert place.exists()
    if drain == "none":
        assert run.code == 0, run.out
        return
    untouched(run)
    assert f"web1 is kept out of service ({place}), and no turn is open on it" in run.text
    assert "Bring it back first." in run.text


def test_an_apache_that_somebody_has_broken_before_is_not_taken_for_the_release(tmp_path):
    run = pull(tmp_path, files={"apache2ctl-web1": BROKEN_APACHE})
    untouched(run)
    assert "AH00526" in run.text


def test_a_turn_that_its_unit_would_cut_off_each_time_does_not_begin(tmp_path):
    run = pull(tmp_path, rollout_soak=1700, rollout_drain_wait=30)
    assert (run.code != 0, run.log) == (True, [])
    assert "rollout_soak, rollout_watch and four times rollout_drain_wait are 1820 s" in run.text
    assert "TimeoutStartSec= of release-puller.service is 3600 s; allowed is at most half of it" in run.text


def test_who_was_cut_off_goes_back_although_its_apache_is_broken_and_its_turn_cannot_begin(tmp_path):
    answers = {"host_release": {"turn": {"release": "1.9"}}, "host_release begun": "cannot begin"}
    run = pull(tmp_path, answers, files={"apache2ctl-web1": BROKEN_APACHE})
    assert run.code != 0
    assert "web1: rolled back. Keep what serves" in run.text, run.out
    went_back(run)


@pytest.mark.parametrize("where", [1, 2])
def test_who_has_lost_the_lock_meanwhile_touches_nothing_more(where, tmp_path):
    """Before the turn, and before the way back of a turn that has failed."""
    answers = {"rollout_lock kept": [{}] * (where - 1) + ["taken over"], "handoff_app probe": "no answer"}
    run = pull(tmp_path, answers)
    assert run.code != 0
    assert "host_release restored" not in asked(run)
    assert ("untouched" if where == 1 else "OUT OF SERVICE") in run.text
    assert "taken over" in run.text


def test_a_host_that_serves_badly_in_its_soak_goes_back(tmp_path):
    run = pull(tmp_path, {"host_health": [{}, {}, {}, {"ended": 100, "bad": 50}]})
    assert run.code != 0
    assert "web1: rolled back. Refuse a host that serves badly" in run.text, run.out
    went_back(run)


def test_a_retry_that_was_cut_off_is_taken_up_again_and_does_not_leave_the_host_drained(tmp_path):
    failed = {"failed": {"release": "2.0", "rollout": COMMIT[:12], "time": "then"}, "release": "1.0"}
    run = pull(tmp_path, {"host_release": {"record": failed, "turn": {"release": "2.0"}}})
    assert run.code == 0, run.out
    assert asked(run)[-2:] == ["host_release recorded", "rollout_lock free"]


def test_what_has_failed_here_is_tried_again_only_when_asked(tmp_path):
    failed = {"failed": {"release": "2.0", "rollout": COMMIT[:12], "time": "then"}, "release": "1.0"}
    run = pull(tmp_path / "one", {"host_release": {"record": failed}})
    untouched(run)
    assert "has failed on web1 at then and was undone; 1.0 serves. It is not tried again." in run.text
    assert pull(tmp_path / "two", {"host_release": {"record": failed}}, pull_retry=True).code == 0
