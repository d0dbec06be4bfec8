"""Whole rollouts to a fleet that is in use: what the operator is told, who runs what, and what the users got.

Every case ends with the same three questions. The budget is no stream lost on any host that stays up.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import Fleet, Ledger, Run
from operator_runs import replace

WORKER = "daemon-src/streaming_daemon/worker.py"
AFTER_IMPORTS = "EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2\n"
# name of a bad release -> (file, what is replaced, by what, part of what the operator reads)
BAD = {
    "does not start": (WORKER, AFTER_IMPORTS, f"{AFTER_IMPORTS}raise RuntimeError('broken')\n", "Reload the daemon"),
    "crashes after 5 s": (
        WORKER,
        AFTER_IMPORTS,
        f"{AFTER_IMPORTS}import threading\n"
        "_fuse = threading.Timer(5, os.kill, (os.getpid(), signal.SIGKILL))\n_fuse.daemon = True\n_fuse.start()\n",
        "workers died",
    ),
    "streams garbage": (
        "daemon-src/streaming_daemon/http_response.py",
        "b'data: {\"content\":'",
        "b'data: {\"contents\":'",
        'carries no JSON object with "content"',
    ),
    "breaks Apache": (
        "templates/etc/apache2/mods-available/socket_handoff.conf.j2",
        "# Written by socket_handoff.fleet",
        "SocketHandoffNonsense On\n# Written by socket_handoff.fleet",
        "SocketHandoffNonsense",
    ),
}


def said(run: Run) -> str:
    """What the operator read, on one line."""
    return " ".join(run.stdout.split())


def assert_undone(fleet: Fleet, users: Ledger, run: Run, before: dict[str, str], part: str) -> None:
    assert run.returncode != 0, run.stdout[-3000:]
    assert part in said(run), run.stdout[-6000:]
    assert re.search(rf"{fleet.web[0]} +\S+ +rolled back", run.stdout), run.stdout[-6000:]
    assert f"{fleet.web[1]}" in run.stdout
    assert fleet.releases() == before
    assert users.lost() == []
    assert len(users.lines) > 0


@pytest.mark.parametrize("name", BAD)
def test_a_bad_release_is_undone_on_the_canary_and_reaches_nobody_else(fleet: Fleet, users: Ledger, name: str) -> None:
    before = fleet.releases()
    path, old, new, part = BAD[name]
    bad = fleet.candidate(re.sub(r"\W", "-", name))
    replace(bad / path, old, new)
    run = fleet.roll_out("bad", bad)
    assert_undone(fleet, users, run, before, part)
    # Nobody else was touched, not even drained.
    assert f"[{fleet.web[1]}]" not in run.stdout.split("PLAY [Roll out]")[1]
    assert all(each["failed"]["release"] == "bad" for name, each in fleet.census().items() if name == fleet.web[0])


def test_a_good_release_reaches_every_host_and_nobody_notices(fleet: Fleet, users: Ledger) -> None:
    good = fleet.candidate("good")
    replace(good / "module-src/handoff_version.h", 'HANDOFF_VERSION "', 'HANDOFF_VERSION "1')
    run = fleet.roll_out("good", good)
    assert run.returncode == 0, run.stdout[-6000:]
    assert fleet.releases() == dict.fromkeys(fleet.web, "good")
    assert users.lost() == []
    # It went through all of them while they streamed.
    assert {line["host"] for line in users.lines} - {""} != set()
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


def test_a_host_that_is_lost_before_its_turn_stops_the_rollout_and_is_in_the_table(fleet: Fleet, users: Ledger) -> None:
    before = fleet.releases()
    lost = fleet.web[-1]
    candidate = fleet.candidate("lost-before")
    container(lost, "pause")
    try:
        run = fleet.roll_out("lost-before", candidate)
    finally:
        container(lost, "unpause")
    assert run.returncode != 0
    assert re.search(rf"{lost} +\S+ +LOST, was waiting +unreachable", run.stdout), run.stdout[-6000:]
    assert fleet.releases() == before
    assert users.lost(without=lost_cookie(fleet, lost)) == []


def lost_cookie(fleet: Fleet, name: str) -> str:
    """The name that the balancer's cookie has for a host."""
    text = fleet.on(fleet.balancer, "cat /etc/haproxy/haproxy.cfg")
    return dict(re.findall(r"^ *server (\S+) .* cookie (\S+)", text, re.M))[name]


def test_a_rollout_that_is_killed_is_gone_on_with_and_two_at_once_are_refused(fleet: Fleet, users: Ledger) -> None:
    candidate = fleet.candidate("killed")
    log = fleet.work / "killed.log"
    # The canary is done, and the next host in the middle of its turn.
    with log.open("w") as out:
        first = subprocess.Popen(
            fleet.command("rollout", "-e", fleet.inputs("killed", rollout_ramp="1,2,100%")),
            cwd=candidate,
            env=fleet.environment(candidate),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 1200
        while "Apply the module" not in log.read_text().split("[Judge behind the step]")[-1] or (
            "[Judge behind the step]" not in log.read_text()
        ):
            assert first.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.5)
        second = fleet.roll_out("second", candidate)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
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
