"""A fleet behind a load balancer, rolled out to by the playbooks, while users stream without a pause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chain"))

from ledger import Ledger, streaming
from operator_runs import ENVIRONMENT, PROJECT, address_of, copy_of_checkout, replace

PASSWORD = "chain-test-password"
INVENTORY = os.environ.get("FLEET_INVENTORY", str(PROJECT / "molecule/fleet/inventory"))
Run = subprocess.CompletedProcess[str]
# Short, because the machine is small and the tests are many; an operator's are longer.
QUICK = {"rollout_soak": 4, "rollout_watch": 8, "rollout_drain_wait": 1, "rollout_error_minimum": 5}


@dataclass
class Fleet:
    """The hosts of the inventory, and what an operator does with them."""

    web: list[str]
    balancer: str
    work: Path
    number: int = 0
    made: dict[str, Path] = field(default_factory=dict)

    def command(self, play: str, *arguments: str) -> list[str]:
        return [str(PROJECT / "script/enter"), "ansible-playbook", "-i", INVENTORY, f"playbooks/{play}.yml", *arguments]

    def environment(self, checkout: Path) -> dict[str, str]:
        return {**ENVIRONMENT, "ANSIBLE_CONFIG": str(checkout / "ansible.cfg"), "ANSIBLE_TIMEOUT": "8"}

    def run(self, play: str, *arguments: str, checkout: Path = PROJECT) -> Run:
        """Run a playbook to its end."""
        return subprocess.run(
            self.command(play, *arguments),
            cwd=checkout,
            env=self.environment(checkout),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )

    def roll_out(self, release: str, checkout: Path, **given: Any) -> Run:
        return self.run("rollout", "-e", self.inputs(release, **given), checkout=checkout)

    def inputs(self, release: str, **given: Any) -> str:
        return json.dumps({**QUICK, "rollout_release": release, **given})

    def census(self) -> dict[str, dict[str, Any]]:
        """What every host says it runs."""
        place = self.work / "census.json"
        done = self.run("status", "-e", f"status_file={place}")
        assert done.returncode == 0, done.stdout[-3000:]
        return {each["host"]: each for each in json.loads(place.read_text())}

    def releases(self) -> dict[str, str]:
        """Who runs which release; whoever has drifted, has a turn left over or is locked is named with it."""
        found = {}
        for name, each in self.census().items():
            wrong = [word for word in ("drift", "unfinished", "lock", "problems") if each.get(word)]
            found[name] = each.get("release", "unreachable") + (f" {each[wrong[0]]}" if wrong else "")
        return found

    def on(self, name: str, script: str) -> str:
        """Run a shell script on a host, as root."""
        ssh = ["ssh", "-F", str(PROJECT / ".cache/ssh/config"), "-o", "BatchMode=yes", name, "sudo", "sh", "-c"]
        done = subprocess.run([*ssh, f"'{script}'"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def set_server(self, name: str, state: str) -> None:
        """What somebody at the load balancer tells HAProxy of a web host."""
        arguments = f"backend=web server={name} state={state} wait={20 if state == 'ready' else 0}"
        module = ["-b", "-m", "socket_handoff.fleet.haproxy_server", "-a", arguments]
        subprocess.run(
            [str(PROJECT / "script/enter"), "ansible", "-i", INVENTORY, self.balancer, *module],
            cwd=PROJECT,
            env=self.environment(PROJECT),
            check=True,
            timeout=120,
        )

    def candidate(self, name: str) -> Path:
        """A copy of this checkout, to be altered like one that is a version ahead."""
        self.number += 1
        copy = copy_of_checkout(self.work / f"{name}-{self.number}")
        replace(copy / "daemon-src/streaming_daemon/__init__.py", '"""', f'"""Candidate {name} {self.number}. ')
        return copy


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The whole fleet, deployed by site.yml; each host with a release of the same name."""
    listed = subprocess.run(
        [str(PROJECT / "script/enter"), "ansible-inventory", "-i", INVENTORY, "--list"],
        cwd=PROJECT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    groups = json.loads(listed.stdout)
    found = Fleet(groups["web_hosts"]["hosts"], groups["load_balancers"]["hosts"][0], tmp_path_factory.mktemp("fleet"))
    deployed = found.run("../site")
    assert deployed.returncode == 0, deployed.stdout[-5000:]
    base = found.roll_out("base", PROJECT, rollout_soak=0, rollout_watch=0, rollout_ramp="100%")
    assert base.returncode == 0, base.stdout[-5000:]
    return found


@pytest.fixture
def users(fleet: Fleet) -> Iterator[Ledger]:
    """Users that stream without a pause, from before a test until it asks what they got."""
    with streaming(address_of(fleet.balancer), PASSWORD) as ledger:
        yield ledger
