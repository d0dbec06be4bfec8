"""A host that had a life of its own gets the chain, loses it again, and is what it was. One story, told in order.

Check mode is held to its word on the way: it changes nothing, and says exactly what the real run then does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable

import pytest
from front_door import Session, assert_complete
from operator_runs import ENVIRONMENT, PROJECT, changes, command, playbook
from testinfra.host import Host

Picture = Callable[[], dict[str, object]]
NOTES = "/var/lib/socket-handoff"
# Where files by hand are kept that the roles replaced; molecule/remove/prepare.yml wrote them.
KEPT = {
    f"{NOTES}/apache/foreign/etc/apache2/sites-available/handoff-app.conf": "ServerName by-hand.example",
    f"{NOTES}/foreign/etc/systemd/system/streaming-daemon.service": "ExecStart=/bin/sleep infinity",
    f"{NOTES}/foreign/etc/streaming-daemon/config.toml": "# by hand",
    f"{NOTES}/foreign/etc/handoff-app/config.php": "<?php return [];",
    f"{NOTES}/foreign/etc/prometheus/prometheus.yml": "scrape_interval: 33s",
    f"{NOTES}/foreign/var/www/handoff-app/public/index.php": "by hand",
}
OTHER = {
    "apache_handoff_connect_timeout_ms": 160,
    "streaming_daemon_max_streams": 3999,
    "handoff_app_server_aliases": ["alias.example"],
    "handoff_monitoring_first_event_seconds": 20,
}
TOKENS = 80


def differences(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def succeeded(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Assert that a run came to its end; return what it changed."""
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    return changes(run.stdout)


@pytest.fixture(scope="module")
def virgin(picture: Picture) -> dict[str, object]:
    return picture()


def test_check_mode_before_anything_was_done_changes_nothing(
    name: str, virgin: dict[str, object], picture: Picture
) -> None:
    assert len(succeeded(playbook(name, "--check", "--diff"))) > 10
    assert differences(virgin, picture()) == {}


def test_a_host_with_files_by_hand_is_adopted_and_they_are_kept(
    host: Host, name: str, virgin: dict[str, object]
) -> None:
    assert "/etc/streaming-daemon/config.toml" in virgin
    succeeded(playbook(name, "--diff"))
    for path, text in KEPT.items():
        assert text in host.check_output(f"cat {path}"), path
        assert host.file(path).mode & 0o077 == 0 or host.run(f"runuser -u nobody -- cat {path}").rc != 0, path


def test_check_mode_says_exactly_what_the_run_then_changes(host: Host, name: str) -> None:
    """Other variables, and what somebody has changed by hand since."""
    host.check_output("rm /etc/apache2/mods-enabled/socket_handoff.conf && chmod 600 /etc/streaming-daemon/config.toml")
    arguments = ("--diff", "--skip-tags", "verify", "--extra-vars", json.dumps(OTHER))
    predicted = succeeded(playbook(name, "--check", *arguments))
    assert succeeded(playbook(name, *arguments)) == predicted
    assert len(predicted) >= 8, predicted
    assert succeeded(playbook(name, "--check", *arguments)) == [], "and then there is nothing left to say"


def test_a_run_after_one_that_was_cut_off_makes_good_what_that_left_undone(host: Host, name: str) -> None:
    """Killed after the files were written and before Apache was told: they would never be read otherwise."""
    arguments = ("--skip-tags", "verify", "--extra-vars", json.dumps({**OTHER, "apache_handoff_max_retries": 3}))
    begun = subprocess.Popen(
        command(name, *arguments),
        cwd=PROJECT,
        env={**ENVIRONMENT, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert begun.stdout
    said = ""
    for line in begun.stdout:
        said += line
        if line.startswith("changed:") and "Put mod_socket_handoff and its configuration in place" in said:
            break
    os.killpg(begun.pid, signal.SIGKILL)
    begun.stdout.close()
    begun.wait()
    note = f"{NOTES}/apache-handoff.unfinished"
    assert host.file(note).exists, said[-3000:]
    assert host.file("/etc/apache2/mods-available/socket_handoff.conf").contains("SocketHandoffMaxRetries 3")

    before = host.check_output("systemctl show -p MainPID --value apache2")
    done = succeeded(playbook(name, *arguments))
    assert any("because an earlier run was cut off" in task for task in done), done
    assert host.check_output("systemctl show -p MainPID --value apache2") != before
    assert not host.file(note).exists


def test_check_mode_of_the_removal_changes_nothing_and_the_removal_does_what_it_said(
    host: Host, name: str, picture: Picture
) -> None:
    before = picture()
    predicted = succeeded(playbook(name, "--check", "--diff", play="playbooks/remove.yml"))
    assert differences(before, picture()) == {}
    session = Session(host.check_output("hostname -I").split()[0])
    session.log_in("demo", "chain-test-password")
    stream = session.open_stream(tokens=TOKENS, pace=10)
    stream.read_until(b"data: ")
    assert succeeded(playbook(name, "--diff", play="playbooks/remove.yml")) == predicted
    assert_complete(stream.read_to_end(), TOKENS)


def test_the_host_is_what_it_was(virgin: dict[str, object], picture: Picture) -> None:
    assert differences(virgin, picture()) == {}


def test_a_second_removal_changes_nothing(name: str) -> None:
    again = playbook(name, "--diff", play="playbooks/remove.yml")
    assert succeeded(again) == []
    assert re.search(rf"^{name} .*changed=0 ", again.stdout, re.MULTILINE)
