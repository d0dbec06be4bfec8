"""Whole rollouts to a fleet that is in use: what the operator is told, who runs what, and what the users got.

Every case ends with the same three questions. The budget is no stream lost on any host that stays up.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Fleet, Run
from ledger import Ledger
from operator_runs import PROJECT, replace

WORKER = "daemon-src/streaming_daemon/worker.py"
AFTER_IMPORTS = "EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2\n"
DEMO = "daemon-src/streaming_daemon/backends/demo.py"
APACHE_TEMPLATE = "templates/etc/apache2/mods-available/socket_handoff.conf.j2"
WRITTEN_BY = "# Written by socket_handoff.fleet"


@dataclass(frozen=True)
class Bad:
    """A release that is bad: what is replaced in which file, and a pattern of what the operator reads."""

    edits: tuple[tuple[str, str, str], ...]
    read: str
    given: dict[str, object] = field(default_factory=dict)


BAD = {
    "does not start": Bad(
        ((WORKER, AFTER_IMPORTS, f"{AFTER_IMPORTS}raise RuntimeError('broken')\n"),), "Reload the daemon"
    ),
    "crashes after 5 s": Bad(
        (
            (
                WORKER,
                AFTER_IMPORTS,
                f"{AFTER_IMPORTS}import threading\n"
                "_fuse = threading.Timer(5, os.kill, (os.getpid(), signal.SIGKILL))\n"
                "_fuse.daemon = True\n_fuse.start()\n",
            ),
        ),
        # Whichever is found first: the stream that it cut, or the count.
        "the connection broke after|workers died|the stream ends after",
    ),
    "streams garbage": Bad(
        (("daemon-src/streaming_daemon/http_response.py", "b'data: {\"content\":'", "b'data: {\"contents\":'"),),
        'carries no JSON object with "content"',
    ),
    "is slow": Bad(
        ((DEMO, "self._loop.call_soon(call.begin)", "self._loop.call_later(9, call.begin)"),),
        "too slow: ",
        {"handoff_app_probe_first_event": 5},
    ),
    "breaks Apache": Bad(
        ((APACHE_TEMPLATE, WRITTEN_BY, f"SocketHandoffNonsense On\n{WRITTEN_BY}"),), "SocketHandoffNonsense"
    ),
    "has a handler that fails": Bad(
        (
            (APACHE_TEMPLATE, WRITTEN_BY, f"# Changed.\n{WRITTEN_BY}"),
            ("roles/apache_handoff/handlers/main.yml", "[/usr/sbin/apache2ctl, configtest]", "[/bin/false]"),
        ),
        "Test Apache's configuration",
    ),
}


def said(run: Run) -> str:
    """What the operator read, on one line."""
    return " ".join(run.stdout.split())


def assert_undone(fleet: Fleet, users: Ledger, run: Run, before: dict[str, str], part: str) -> None:
    assert run.returncode != 0, run.stdout[-3000:]
    assert re.search(part, said(run)), run.stdout[-6000:]
    assert re.search(rf"{fleet.web[0]} +\S+ +rolled back", run.stdout), run.stdout[-6000:]
    assert f"{fleet.web[1]}" in run.stdout
    assert fleet.releases() == before
    assert users.lost() == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_release_is_undone_on_the_canary_and_reaches_nobody_else(fleet: Fleet, users: Ledger, name: str) -> None:
    before = fleet.releases()
    bad = fleet.candidate(re.sub(r"\W", "-", name))
    for path, old, new in BAD[name].edits:
        replace(bad / path, old, new)
    run = fleet.roll_out("bad", bad, **BAD[name].given)
    assert_undone(fleet, users, run, before, BAD[name].read)
    # Nobody else was touched, not even drained.
    assert f"[{fleet.web[1]}]" not in run.stdout.split("PLAY [Roll out]")[1]
    assert fleet.census()[fleet.web[0]]["failed"]["release"] == "bad"


def test_what_only_users_meet_is_found_while_the_canary_serves_them_and_undone(fleet: Fleet, users: Ledger) -> None:
    """The probe is answered well. The users of this one host are not, until it is put back."""
    before = fleet.releases()
    bad = fleet.candidate("users-only")
    demo = bad / DEMO
    replace(demo, "from .base import Sink", "from .base import Failure, Sink")
    failure = 'Failure(502, "backend_error", "made up", "made up")'
    replace(
        demo,
        "        call = DemoCall(",
        '        if handoff.question().startswith("user-"):\n'
        f"            self._loop.call_soon(sink.failed, {failure})\n"
        "            return DemoCall(self._wheel, sink, prompt, 0, 1.0)\n"
        "        call = DemoCall(",
    )
    run = fleet.roll_out("users-only", bad, rollout_soak=20)
    assert run.returncode != 0, run.stdout[-3000:]
    assert "It serves worse than before" in said(run), run.stdout[-6000:]
    assert re.search(rf"{fleet.web[0]} +\S+ +rolled back", run.stdout), run.stdout[-6000:]
    assert fleet.releases() == before
    canary = cookie_of(fleet, fleet.web[0])
    assert users.lost(without=canary) == []
    assert {line["outcome"] for line in users.lines if line["host"] == canary} >= {"refused", "whole"}


def cookie_of(fleet: Fleet, name: str) -> str:
    """The name that the balancer's cookie has for a host."""
    text = fleet.on(fleet.balancer, "cat /etc/haproxy/haproxy.cfg")
    return dict(re.findall(r"^ *server (\S+) .* cookie (\S+)", text, re.M))[name]


def test_a_good_release_reaches_every_host_and_nobody_notices(fleet: Fleet, users: Ledger) -> None:
    good = fleet.candidate("good")
    replace(good / "module-src/handoff_version.h", 'HANDOFF_VERSION "', 'HANDOFF_VERSION "1')
    run = fleet.roll_out("good", good)
    assert run.returncode == 0, run.stdout[-6000:]
    assert fleet.releases() == dict.fromkeys(fleet.web, "good")
    assert users.lost() == []
    # It went through all of them while they streamed.
    assert {line["host"] for line in users.lines} == {cookie_of(fleet, name) for name in fleet.web}
    # Once more: every host is done, and left alone.
    began = fleet.census()
    again = fleet.roll_out("good", good)
    assert again.returncode == 0, again.stdout[-6000:]
    assert {name: each["since"] for name, each in fleet.census().items()} == {
        name: each["since"] for name, each in began.items()
    }


def test_a_rollback_takes_every_host_back_while_streams_run(fleet: Fleet, users: Ledger) -> None:
    current = set(fleet.releases().values())
    previous = {each["previous"]["release"] for each in fleet.census().values()}
    run = fleet.run("rollback")
    assert run.returncode == 0, run.stdout[-6000:]
    assert set(fleet.releases().values()) == previous != current
    assert users.lost() == []
    times = re.findall(r"again, ([0-9.]+) s after it", said(run))
    assert len(times) == len(fleet.web)
    # By name, and one host only.
    (name,) = current
    run = fleet.run("rollback", "-e", f"rollback_release={name}", "--limit", fleet.web[0])
    assert run.returncode == 0, run.stdout[-6000:]
    assert fleet.releases() == {**dict.fromkeys(fleet.web, previous.pop()), fleet.web[0]: name}


def container(name: str, *command: str) -> None:
    subprocess.run(["podman", *command, f"socket-handoff-{name}"], check=True, capture_output=True)


@contextmanager
def out_of_reach(name: str) -> Iterator[None]:
    """A host that serves its users and answers no SSH."""
    script = "systemctl stop ssh.socket ssh.service; kill -9 $(pidof sshd sshd-session); true"
    enter = ["podman", "exec", f"socket-handoff-{name}", "sh", "-c"]
    subprocess.run([*enter, script], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "systemctl start ssh"], check=True, capture_output=True)


def test_a_host_that_is_lost_before_its_turn_stops_the_rollout_and_is_in_the_table(fleet: Fleet, users: Ledger) -> None:
    before = fleet.releases()
    lost = fleet.web[-1]
    candidate = fleet.candidate("lost-before")
    with out_of_reach(lost):
        run = fleet.roll_out("lost-before", candidate)
    assert run.returncode != 0
    assert re.search(rf"{lost} +\S+ +LOST, was waiting +unreachable", run.stdout), run.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def await_in(log: Path, process: subprocess.Popen[bytes], *parts: str) -> None:
    """Wait until a rollout has said all of this, in this order."""
    deadline = time.monotonic() + 1200
    while True:
        text = log.read_text()
        rest = text
        for part in parts:
            rest = rest.partition(part)[2]
        if rest:
            return
        assert process.poll() is None, text[-5000:]
        assert time.monotonic() < deadline, text[-5000:]
        time.sleep(0.5)  # the interval of a bounded poll


@contextmanager
def rolling(
    fleet: Fleet, release: str, checkout: Path, **given: object
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A rollout that goes on while the test does something to it."""
    command = fleet.command("rollout", "-e", fleet.inputs(release, **given))
    with going_on(fleet, command, checkout, fleet.work / f"{release}.log") as found:
        yield found


@contextmanager
def rolling_back(fleet: Fleet, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Likewise a rollback."""
    with going_on(fleet, fleet.command("rollback", *arguments), PROJECT, fleet.work / "rollback.log") as found:
        yield found


@contextmanager
def going_on(
    fleet: Fleet, command: list[str], checkout: Path, log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A playbook that runs, and is over when the context is left."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env=fleet.environment(checkout),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def roll_out_and_lose(fleet: Fleet, release: str, lost: str, *parts: str, **given: object) -> tuple[int, str]:
    """A rollout that loses a host once it has said all of this, until it ends; returns its status and what it said."""
    with rolling(fleet, release, fleet.candidate(release), **given) as (process, log):
        await_in(log, process, *parts)
        with out_of_reach(lost):
            return process.wait(timeout=900), log.read_text()


def test_a_host_that_is_lost_in_its_turn_stops_the_rollout_and_goes_back_when_it_is_found(
    fleet: Fleet, users: Ledger
) -> None:
    before = fleet.releases()
    canary = fleet.web[0]
    code, text = roll_out_and_lose(fleet, "lost-during", canary, "[Apply the module]")
    assert code != 0
    assert re.search(rf"{canary} +[?] +LOST, was changing +unreachable", text), text[-6000:]
    assert fleet.census()[canary]["unfinished"]["release"] == "lost-during"
    back = fleet.run("rollback", "--limit", canary)
    assert back.returncode == 0, back.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def test_a_host_that_freezes_in_its_turn_is_lost_and_not_waited_for(fleet: Fleet, users: Ledger) -> None:
    """Its connection stays open, and says nothing any more. Users of this one host wait with it."""
    before = fleet.releases()
    canary = fleet.web[0]
    cookie = cookie_of(fleet, canary)
    with rolling(fleet, "freezes", fleet.candidate("freezes")) as (process, log):
        await_in(log, process, "[Apply the module]")
        container(canary, "pause")
        try:
            code = process.wait(timeout=240)
        finally:
            container(canary, "unpause")
    text = log.read_text()
    assert code != 0
    assert re.search(rf"{canary} +[?] +LOST, was changing +unreachable", text), text[-6000:]
    back = fleet.run("rollback", "--limit", canary)
    assert back.returncode == 0, back.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost(without=cookie) == []


def test_a_host_that_is_lost_after_its_turn_stops_the_rollout_before_the_next_step(fleet: Fleet, users: Ledger) -> None:
    assert len(fleet.web) > 2, "FLEET_HOSTS is less than 3, and this needs a host behind the second step"
    before = fleet.releases()
    canary = fleet.web[0]
    said_first = ("[Judge behind the step]", "[Drain the host]")
    code, text = roll_out_and_lose(fleet, "lost-after", canary, *said_first, rollout_ramp="1,2,100%")
    assert code != 0
    assert re.search(rf"{canary} +lost-after +LOST, was done +unreachable", text), text[-6000:]
    census = fleet.census()
    found = {name: each["release"] for name, each in census.items()}
    assert found == {**before, canary: "lost-after", fleet.web[1]: "lost-after"}
    # Nobody could take it from the host that was lost; the next run finds that its holder is gone.
    assert [name for name, each in census.items() if each["lock"]] == [canary]
    assert fleet.run("rollback", "--limit", f"{canary},{fleet.web[1]}").returncode == 0
    assert fleet.releases() == before
    assert users.lost() == []


def test_a_rollout_that_is_killed_is_gone_on_with_and_two_at_once_are_refused(fleet: Fleet, users: Ledger) -> None:
    candidate = fleet.candidate("killed")
    # The canary is done, and the next host in the middle of its turn.
    with rolling(fleet, "killed", candidate, rollout_ramp="1,2,100%") as (process, log):
        await_in(log, process, "[Judge behind the step]", "[Apply the module]")
        os.killpg(process.pid, signal.SIGSTOP)
        second = fleet.roll_out("second", candidate)
    assert second.returncode != 0
    assert "a rollout is running: killed, begun" in said(second), second.stdout[-4000:]
    census = fleet.census()
    assert census[fleet.web[0]]["release"] == "killed"
    assert census[fleet.web[1]]["unfinished"]["release"] == "killed"
    since = census[fleet.web[0]]["since"]
    run = fleet.roll_out("killed", candidate, rollout_ramp="1,2,100%")
    assert run.returncode == 0, run.stdout[-6000:]
    assert "does not run any more; its lock is taken over" in said(run)
    assert fleet.releases() == dict.fromkeys(fleet.web, "killed")
    assert fleet.census()[fleet.web[0]]["since"] == since
    assert users.lost() == []


def test_a_full_disk_on_one_host_is_found_before_anything_changes(fleet: Fleet, users: Ledger) -> None:
    before = fleet.releases()
    full = fleet.web[1]
    candidate = fleet.candidate("full")
    releases, copy = "/opt/streaming-daemon/releases", "/root/full-disk-copy"
    fleet.on(
        full, f"cp -a {releases} {copy} && mount -t tmpfs -o mode=755 tmpfs {releases} && cp -a {copy}/. {releases}/"
    )
    size = int(fleet.on(full, f"du --summarize --block-size=4096 {releases}").split()[0])
    # One block is left: a directory can be made, a file of some size cannot be written.
    fleet.on(full, f"mount -o remount,size={(size + 1) * 4096} {releases}")
    fleet.on(full, f"head -c 1G /dev/zero >{releases}/.fill 2>/dev/null || true")
    try:
        run = fleet.roll_out("full", candidate)
    finally:
        fleet.on(full, f"rm -rf {copy} && umount --lazy {releases}")
    assert run.returncode != 0
    assert re.search(rf"{full} +\S+ +not prepared", run.stdout), run.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def test_hosts_that_somebody_keeps_out_of_service_are_found_before_anything_changes_and_stay_out(
    fleet: Fleet, users: Ledger
) -> None:
    """One by HAProxy, one by the file that fails its health checks: a turn would bring them back."""
    before = fleet.releases()
    stopped, failing = fleet.web[-2:]
    candidate = fleet.candidate("kept-out")
    fleet.set_server(stopped, "maint")
    fleet.on(failing, "touch /etc/handoff-app/maintenance")
    try:
        run = fleet.roll_out("kept-out", candidate)
        census = fleet.census()
    finally:
        fleet.on(failing, "rm /etc/handoff-app/maintenance")
        fleet.set_server(stopped, "ready")
    assert run.returncode != 0
    rows = said(run)
    assert re.search(rf"{stopped} +\S+ +not prepared .{{0,200}}[(]maint at {fleet.balancer}[)], and no turn", rows), (
        run.stdout
    )
    assert re.search(rf"{failing} +\S+ +not prepared .{{0,200}}[(]/etc/handoff-app/maintenance[)], and no turn", rows)
    assert {name: each["release"] for name, each in census.items()} == before
    assert census[stopped]["balancers"] == {fleet.balancer: "MAINT"}
    assert census[failing]["balancers"] == {fleet.balancer: "DOWN"}
    assert census[failing]["maintenance"]
    assert users.lost() == []


def test_a_host_whose_apache_would_not_start_again_is_found_before_anything_changes(
    fleet: Fleet, users: Ledger
) -> None:
    """Somebody has left a line there that only the next reload would notice."""
    before = fleet.releases()
    broken = fleet.web[1]
    candidate = fleet.candidate("broken-before")
    fleet.on(broken, "echo Nonsense >/etc/apache2/conf-enabled/by-hand.conf")
    try:
        run = fleet.roll_out("broken-before", candidate)
    finally:
        fleet.on(broken, "rm /etc/apache2/conf-enabled/by-hand.conf")
    assert run.returncode != 0
    assert re.search(rf"{broken} +\S+ +not prepared +Ask Apache .{{0,300}}Nonsense", said(run)), run.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def test_a_load_balancer_that_is_lost_in_a_turn_leaves_the_host_out_of_service_until_it_is_back(
    fleet: Fleet, users: Ledger
) -> None:
    """Users go on, on the other hosts: only the operator's way to the balancer is cut."""
    before = fleet.releases()
    canary = fleet.web[0]
    code, text = roll_out_and_lose(fleet, "no-way-back", fleet.balancer, "[Apply the module]")
    assert code != 0
    assert re.search(rf"{canary} +\S+ +OUT OF SERVICE", text), text[-6000:]
    back = fleet.run("rollback", "--limit", canary)
    assert back.returncode == 0, back.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def test_a_rollback_that_is_killed_and_run_again_goes_back_and_not_forward(fleet: Fleet, users: Ledger) -> None:
    before = fleet.releases()
    up = fleet.roll_out("forward", fleet.candidate("forward"), rollout_soak=0)
    assert up.returncode == 0, up.stdout[-6000:]
    canary = fleet.web[0]
    with rolling_back(fleet, "--limit", canary) as (process, log):
        await_in(log, process, "[Put back the release]")
        os.killpg(process.pid, signal.SIGKILL)
    for limit in ((), ("--limit", canary)):
        again = fleet.run("rollback", "-e", "rollback_from=forward", *limit)
        assert again.returncode == 0, again.stdout[-6000:]
        assert fleet.releases() == before
    assert users.lost() == []


def test_a_balancer_that_asks_for_health_drains_by_it(fleet: Fleet, users: Ledger) -> None:
    """The same HAProxy, told nothing: it asks /health.php, as anybody's own balancer would."""
    before = fleet.releases()
    given = {"rollout_drain": "health_file", "rollout_drain_wait": 4}
    up = fleet.roll_out("by-health", fleet.candidate("by-health"), **given)
    assert up.returncode == 0, up.stdout[-6000:]
    assert fleet.releases() == dict.fromkeys(fleet.web, "by-health")
    back = fleet.run("rollback", *[f"-e{name}={value}" for name, value in given.items()])
    assert back.returncode == 0, back.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost() == []


def test_a_host_that_is_away_may_be_left_out_where_the_budget_permits_and_has_its_turn_later(
    fleet: Fleet, users: Ledger
) -> None:
    before = fleet.releases()
    away, others = fleet.web[-1], fleet.web[:-1]
    candidate = fleet.candidate("budget")
    with out_of_reach(away):
        run = fleet.roll_out("budget", candidate, rollout_max_failed=1, rollout_ramp="1,100%")
    # It is no success: somebody has to look.
    assert run.returncode != 0
    assert re.search(rf"{away} +\S+ +LOST, was waiting", run.stdout), run.stdout[-6000:]
    assert fleet.releases() == {**dict.fromkeys(others, "budget"), away: before[away]}
    run = fleet.roll_out("budget", candidate, rollout_ramp="1,100%")
    assert run.returncode == 0, run.stdout[-6000:]
    assert fleet.releases() == dict.fromkeys(fleet.web, "budget")
    assert users.lost() == []


def test_a_load_balancer_that_cannot_be_reached_stops_the_rollout_before_it_begins(fleet: Fleet) -> None:
    before = fleet.releases()
    candidate = fleet.candidate("no-balancer")
    container(fleet.balancer, "pause")
    try:
        run = fleet.roll_out("no-balancer", candidate)
    finally:
        container(fleet.balancer, "unpause")
    assert run.returncode != 0
    assert f"Load balancer {fleet.balancer} cannot be reached, so nobody could be drained." in said(run), run.stdout[
        -4000:
    ]
    assert fleet.releases() == before


def test_inputs_are_refused_before_any_host_is_asked(fleet: Fleet) -> None:
    run = fleet.run("rollout", "-e", "rollout_release=x", "-e", "rollout_ramp=1,50%")
    assert run.returncode != 0
    assert "rollout_ramp is" in said(run)
    assert "[Take the lock" not in run.stdout
