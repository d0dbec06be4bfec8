"""Parts of the role release_puller, by ansible-playbook itself, with all that it writes below a directory of the test.

In the place of systemctl stands a program that writes down how it was called: there is no unit that it could stop here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate_readme import ROOT
from test_pull_flow import QUICK

SYSTEMCTL = """#!/bin/sh
echo "$*" >>"${0%/*}/calls"
case "$*" in
*ActiveState*) echo inactive ;;
*show*) printf 'LoadState=loaded\\nActiveState=active\\nSubState=waiting\\nUnitFileState=enabled\\n' ;;
*is-enabled*) echo enabled ;;
esac
"""
MARK = "# Written by socket_handoff.fleet, role release_puller.\n"
ROLE = {"name": "socket_handoff.fleet.release_puller"}


class Host:
    """The places where the role writes, below one directory, and what systemd was asked."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.places = {
            **{"program": work / "sbin/pull-release", "own": work / "etc", "notes": work / "notes"},
            **{"service": work / "units/release-puller.service", "timer": work / "units/release-puller.timer"},
            **{"state": work / "state", "cores": work / "opt"},
        }
        self.files = [self.places[name] for name in ("program", "service", "timer")] + [work / "etc/config.toml"]
        for name in ("sbin", "etc", "notes", "units", "state", "opt/core", "bin"):
            (work / name).mkdir(parents=True)
        (work / "bin/systemctl").write_text(SYSTEMCTL)
        (work / "bin/systemctl").chmod(0o755)

    def run(self, *tasks: dict[str, Any], **given: Any) -> subprocess.CompletedProcess[str]:
        play = {"hosts": "localhost", "gather_facts": False, "tasks": list(tasks)}
        (self.work / "play.yml").write_text(yaml.safe_dump([play]))
        own = {f"__release_puller_{name}": str(path) for name, path in self.places.items()}
        program = Path(sys.executable).with_name("ansible-playbook")
        command = [program, "-e", json.dumps({**own, **given}), self.work / "play.yml"]
        path = f"{self.work}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "HOME": str(self.work), "LANG": "C.UTF-8", "COLUMNS": "300"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def asked(self) -> str:
        calls = self.work / "bin/calls"
        return calls.read_text() if calls.exists() else ""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


REMOVE = {"ansible.builtin.import_role": {**ROLE, "tasks_from": "remove"}}
INSPECT = {"ansible.builtin.import_role": {**ROLE, "tasks_from": "inspect"}}


def test_the_removal_takes_what_the_role_wrote_and_stops_its_timer(host):
    for path in host.files:
        path.write_text(MARK)
    done = host.run(REMOVE)
    assert done.returncode == 0, done.stdout
    assert [
        path for path in (*host.files, *(host.work / name for name in ("etc", "state", "opt"))) if path.exists()
    ] == []
    assert "stop release-puller.timer" in host.asked()


def test_the_removal_leaves_what_somebody_else_wrote_under_these_names(host):
    """It runs on every web host, and most have never pulled."""
    for path in host.files:
        path.write_text("# mine\n")
    done = host.run(REMOVE)
    assert done.returncode == 0, done.stdout
    assert all(path.read_text() == "# mine\n" for path in host.files)
    assert (host.work / "state").is_dir() and (host.work / "opt/core").is_dir()
    assert "release-puller" not in host.asked()


def test_the_role_writes_over_nothing_that_is_somebody_elses(host):
    mine, ours = host.files[:2]
    mine.write_text("# mine\n")
    ours.write_text(MARK)
    done = host.run(INSPECT)
    assert done.returncode == 2
    said = " ".join(done.stdout.split())
    assert f"{mine} on localhost is somebody else's; allowed is" in said
    assert str(ours) not in said.partition("somebody else's")[2]
    mine.write_text(MARK)
    assert host.run(INSPECT).returncode == 0


@pytest.mark.parametrize("end", ["", "\n"])
def test_ssh_can_read_the_key_that_is_written_also_where_a_lookup_took_its_last_end_of_a_line(host, end):
    key = host.work / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    copy = {"content": "{{ __release_puller_ssh_key_text }}", "dest": f"{host.work}/written", "mode": "0600"}
    done = host.run(INSPECT, {"ansible.builtin.copy": copy}, release_puller_ssh_key=key.read_text().rstrip("\n") + end)
    assert done.returncode == 0, done.stdout
    assert (host.work / "written").read_text() == key.read_text()
    subprocess.run(["ssh-keygen", "-y", "-f", str(host.work / "written")], check=True, capture_output=True)


def test_the_configuration_has_what_the_program_and_the_playbook_read(host):
    template = {"src": f"{ROOT}/templates/etc/release-puller/config.toml.j2", "dest": f"{host.work}/config.toml"}
    given = {"release_puller_repository": "https://git.example.com/fleet.git"}
    done = host.run(INSPECT, {"ansible.builtin.template": {**template, "mode": "0600"}}, **given)
    assert done.returncode == 0, done.stdout
    text = (host.work / "config.toml").read_text()
    read = re.findall(r"""config\[["'](\w+)["']\]""", (ROOT / "roles/release_puller/files/pull-release").read_text())
    assert set(tomllib.loads(text)) == {*read, "timeout"}
    # What stands for it in the tests of whole turns.
    assert {line.replace("web1", "localhost") for line in QUICK["__here"]} <= set(text.splitlines())
