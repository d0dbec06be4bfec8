"""One build for all hosts that are alike: three of them, in two batches, with this machine's own compiler and Apache.

The hosts are this machine, each with a cache of its own; what is run is the role's inspect.yml and build.yml.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import DEBIAN

ROOT = Path(__file__).resolve().parents[2]
PLAY = """\
- hosts: web
  gather_facts: false
  serial: 2
  tasks:
    - ansible.builtin.set_fact: {facts}
      delegate_to: "{{{{ item }}}}"
      delegate_facts: true
      loop: "{{{{ groups['all'] }}}}"
      run_once: true
    - ansible.builtin.include_role:
        name: socket_handoff.fleet.apache_handoff
        tasks_from: "{{{{ item }}}}"
        # Its own spec asks for everything that a whole deployment needs.
        rolespec_validate: false
      loop: [inspect, build]
"""


class Fleet:
    """Three web hosts that are alike, and a build host, in a directory of their own."""

    def __init__(self, work: Path) -> None:
        self.work, self.shelf = work, work / "artefacts"
        hosts = {"web": {"hosts": dict.fromkeys(("web1", "web2", "web3"))}, "build": {"hosts": {"builder": None}}}
        (work / "hosts.yml").write_text(yaml.safe_dump(hosts))
        (work / "play.yml").write_text(PLAY.format(facts=json.dumps({**DEBIAN, "cacheable": True})))

    def run(self, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run the play; return what it said."""
        given = {
            "apache_handoff_build": "build_host",
            "apache_handoff_build_hosts": ["builder"],
            "apache_handoff_artefact_dir": str(self.shelf),
            "apache_handoff_install_packages": False,
            # Below the first host's name for all that is done in its name, also on the build host.
            "__apache_handoff_cache": str(self.work / "cache") + "/{{ inventory_hostname }}",
            **variables,
        }
        return subprocess.run(
            [
                *("ansible-playbook", "-c", "local", "-i", self.work / "hosts.yml", *arguments),
                *("-e", json.dumps(given), self.work / "play.yml"),
            ],
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "true",
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def binary(self) -> Path:
        """The one build on the controller."""
        (path,) = self.shelf.rglob("mod_socket_handoff.so")
        return path


def compiled(said: str) -> list[str]:
    """The hosts in whose name something was compiled."""
    parts = re.findall(r"^TASK \[[^\n]*: Compile mod_socket_handoff.*?(?=^TASK|\Z)", said, re.M | re.S)
    return re.findall(r"^changed: \[(\S+) -> builder", "".join(parts), re.M)


def words(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def first(fleet: Fleet) -> subprocess.CompletedProcess[str]:
    """The first run, which everything else follows."""
    done = fleet.run()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done


def test_check_mode_says_so_and_builds_nothing(tmp_path):
    fleet = Fleet(tmp_path)
    done = fleet.run("--check", "--limit", "web1")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Would take mod_socket_handoff" in done.stdout
    assert compiled(done.stdout) == [] and not fleet.shelf.exists() and not (tmp_path / "cache").exists()


def test_one_host_has_it_built_for_all_also_for_those_of_a_later_batch(fleet, first):
    assert compiled(first.stdout) == ["web1"]
    digest = hashlib.sha256(fleet.binary().read_bytes()).hexdigest()
    manifest = json.loads((fleet.binary().parent / "manifest.json").read_text())
    assert manifest["sha256"] == digest
    assert set(manifest) == {
        *("module", "version", "sources", "key", "sha256", "debian", "architecture", "mmn"),
        *("apache", "cflags", "compiler"),
    }
    assert "gcc" in manifest["compiler"] and "-O2" in manifest["cflags"]
    for host in ("web1", "web2", "web3"):
        (arrived,) = (fleet.work / "cache" / host).glob("*/mod_socket_handoff.so")
        assert hashlib.sha256(arrived.read_bytes()).hexdigest() == digest


def test_a_second_run_changes_nothing_even_if_the_build_host_has_another_abi_by_now(fleet, first):
    again = fleet.run("--limit", "web2", __apache_handoff_builder_abi="20120211:1")
    assert again.returncode == 0, again.stdout[-4000:]
    assert re.findall(r"changed=(\d+)", again.stdout) == ["0"]


def test_another_abi_of_host_and_build_host_means_another_build(fleet, first):
    abi = {"__apache_handoff_builder_abi": "20120211:999", "__apache_handoff_abi": "20120211:999"}
    done = fleet.run("--check", "--limit", "web1", **abi)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Would take mod_socket_handoff" in done.stdout


def test_a_build_host_with_another_abi_is_refused_and_both_are_named(fleet, first, tmp_path):
    done = fleet.run(
        "--limit", "web3", __apache_handoff_builder_abi="20120211:1", apache_handoff_artefact_dir=str(tmp_path)
    )
    assert done.returncode != 0
    manifest = json.loads((fleet.binary().parent / "manifest.json").read_text())
    said = words(done)
    assert "with module ABI 20120211:1, and web3 has" in said
    assert f"with module ABI {manifest['mmn']}; allowed is the same ABI on both" in said
    assert compiled(done.stdout) == []


def test_the_others_are_refused_where_the_first_could_not_have_it_built(fleet, first, tmp_path):
    done = fleet.run(
        "--limit", "web1,web2", apache_handoff_artefact_dir=str(tmp_path / "file"), apache_handoff_apxs="/nonexistent"
    )
    assert done.returncode != 0
    said = words(done)
    assert "builder has no /nonexistent that runs" in said
    assert "web1 was to have it made by builder in this run" in said


def test_a_damaged_build_reaches_no_host(fleet, first):
    path = fleet.binary()
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        done = fleet.run("--limit", "web2")
    finally:
        path.write_bytes(before)
    assert done.returncode != 0
    assert f"allowed is {hashlib.sha256(before).hexdigest()}, which its manifest says" in words(done)
