"""The parts of a rollout that need no host: who is counted as lost, when it stops, what a drain by command runs.

The playbooks' own task files, run by ansible-playbook itself for hosts that are names on this machine. Whole playbooks
are run from a copy of the collection in which a host is a directory: modules of ours find it in their environment, and
what would touch this machine (services, the front door, HAProxy) notes what it was asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate_readme import ROOT
from test_host_release import STORE, FakeHost, roll

Run = subprocess.CompletedProcess[str]


def play(work: Path, hosts: dict[str, dict[str, Any]], plays: list[dict[str, Any]]) -> Run:
    (work / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
    (work / "play.yml").write_text(yaml.safe_dump(plays, sort_keys=False))
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", work / "hosts.yml", work / "play.yml"],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "COLUMNS": "300",
        },
        capture_output=True,
        text=True,
        check=False,
    )


DONE = {"__rollout_state": "done"}
BACK = {"__rollout_state": "rolled back", "__rollout_why": "it streams garbage"}
IN_TURN = {"__rollout_state": "changing"}
STOPS = "hosts are lost or have failed"
# name -> (step, hosts of the first, budget, facts of hosts in the play, of hosts that are in it no more, what is said)
GATES: dict[str, tuple[int, int, int, dict[str, Any], dict[str, Any], list[str]]] = {
    "nothing has happened": (1, 1, 0, {"a": {}, "b": {}}, {}, []),
    "all is well": (2, 1, 0, {"a": DONE, "b": {}}, {}, []),
    "a canary came back": (1, 1, 9, {"a": BACK, "b": {}}, {}, [STOPS, "(a)", "of the first step none may", "garbage"]),
    "a canary is lost": (1, 1, 9, {"b": {}}, {"a": IN_TURN}, [STOPS, "(a)", "LOST, was changing"]),
    "one is away and may be": (1, 1, 1, {"a": {}, "b": {}}, {"c": {}}, []),
    "one is away and may not be": (
        1,
        1,
        0,
        {"a": {}, "b": {}},
        {"c": {}},
        [STOPS, "(c)", "0 may", "LOST, was waiting"],
    ),
    "one failed and is counted once": (2, 1, 1, {"a": DONE, "d": {}}, {"b": BACK}, []),
    "two failed in different ways": (2, 1, 1, {"a": DONE}, {"b": BACK, "c": IN_TURN}, [STOPS, "(b, c)", "1 may"]),
    "out of service": (
        2,
        1,
        0,
        {"a": DONE, "b": {"__rollout_state": "OUT OF SERVICE", "__rollout_why": "no"}},
        {},
        [STOPS, "(b)"],
    ),
    "not prepared": (
        1,
        1,
        0,
        {"a": {}},
        {"b": {"__rollout_state": "not prepared", "__rollout_why": "full"}},
        [STOPS, "(b)"],
    ),
    "done hosts of an earlier run": (1, 1, 0, {"a": {"__rollout_finished": True}}, {}, []),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_counts_hosts_and_not_what_ansible_calls_failures(name, tmp_path):
    step, first, budget, there, gone, said = GATES[name]
    names = sorted([*there, *gone])
    common = {"ansible_connection": "local", "ansible_become": False}
    found = {"__rollout_found": {"record": {"release": "1.0", "time": "then"}}, "__rollout_finished": False}
    hosts = {host: {**common, **found, **facts} for host, facts in (there | gone).items()}
    watcher = {"__rollout_step": step, "__rollout_first": first, "__rollout_last": 3, "__rollout_hosts": names}
    hosts["step"] = {**common, **watcher}
    rollout = {"drain": "none", "rollout_max_failed": budget, "rollout_release": "2.0"}
    rollout["holder"] = {"id": "0f3a55c1e2b7"}
    gate = {
        "ansible.builtin.include_tasks": str(ROOT / "playbooks/tasks/rollout_gate.yml"),
        "vars": {"__gate_opens": True},
        "when": "inventory_hostname == 'step'",
    }
    stop = {"ansible.builtin.debug": {"var": "hostvars.step.__rollout_stop"}, "run_once": True}
    done = play(
        tmp_path,
        hosts,
        [
            {
                "hosts": ":".join(["step", *there]),
                "gather_facts": False,
                "vars": {"__rollout": rollout},
                "tasks": [gate, stop],
            }
        ],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert (STOPS in text) == bool(said), text
    for part in said:
        assert part in text, text
    # The table is there where it stops, with a line for each host.
    assert all(f"{host} " in text for host in names) or not said


def test_a_command_that_drains_gets_the_name_of_the_host_as_its_last_argument(tmp_path):
    log = tmp_path / "log"
    given = {"__drain_by": "command", "__drain_wait": 0, "__maintenance": "nobody"}
    given["__drain_command"] = ["sh", "-c", f'echo "$0 $1" >>{log}', "out"]
    given["__undrain_command"] = ["sh", "-c", f'echo "$0 $1" >>{log}', "in"]
    tasks = [
        {"ansible.builtin.include_tasks": str(ROOT / f"playbooks/tasks/{name}.yml")} for name in ("drain", "undrain")
    ]
    hosts = {"web1": {"ansible_connection": "local"}}
    done = play(tmp_path, hosts, [{"hosts": "all", "gather_facts": False, "vars": given, "tasks": tasks}])
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().splitlines() == ["out web1", "in web1"]


@pytest.mark.parametrize("name", ["drain", "undrain"])
def test_a_command_on_the_controller_is_not_run_as_root_because_the_hosts_are(name, tmp_path):
    """What an inventory says of all hosts has more to say than a task's keyword, but not than its variables."""
    given = {"__drain_by": "command", "__drain_wait": 0, "__drain_command": ["true"], "__undrain_command": ["true"]}
    given["__maintenance"] = "nobody"
    # Another user than the one who runs this, or Ansible would not ask at all.
    everywhere = {"ansible_become": True, "ansible_become_user": "nobody", "ansible_become_exe": str(tmp_path / "sudo")}
    hosts = {"web1": {"ansible_connection": "local", **everywhere}, "localhost": everywhere}
    (tmp_path / "sudo").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 1\n")
    (tmp_path / "sudo").chmod(0o755)
    tasks = [{"ansible.builtin.include_tasks": str(ROOT / f"playbooks/tasks/{name}.yml")}]
    done = play(tmp_path, hosts, [{"hosts": "web1", "gather_facts": False, "vars": given, "tasks": tasks}])
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "asked").exists()


NOTICED = "Wait until the load balancers have noticed"


@pytest.mark.parametrize("name", ["drain", "undrain"])
def test_balancers_that_are_told_by_a_command_get_the_time_to_notice(name, tmp_path):
    for wait, runs in ((0, False), (0.1, True)):
        given = {
            "__drain_by": "command",
            "__drain_wait": wait,
            "__maintenance": "nobody",
            "__drain_command": ["true"],
            "__undrain_command": ["true"],
        }
        tasks = [{"ansible.builtin.include_tasks": str(ROOT / f"playbooks/tasks/{name}.yml")}]
        hosts = {"web1": {"ansible_connection": "local"}}
        done = play(tmp_path, hosts, [{"hosts": "all", "gather_facts": False, "vars": given, "tasks": tasks}])
        assert bool(re.search(rf"{NOTICED}\].*\nok: ", done.stdout)) is runs, done.stdout + done.stderr


# What a stand-in notes, and where: the directory that is the host, or the load balancer.
BALANCER = """\
import os
from ansible.module_utils.basic import AnsibleModule
options = {name: {"type": "raw"} for name in ("backend", "server", "state", "wait", "socket")}
module = AnsibleModule(argument_spec=options)
with open(os.environ["FLEET_ROOT"] + "/asked", "a") as log:
    print(module.params["server"], module.params["state"], file=log)
module.exit_json(changed=True, sessions=0)
"""
ACTIVATE = """\
- name: Note what the services would take
  ansible.builtin.command:
    argv: [sh, -c, 'echo $1 >>$0/activated; test ! -e $0/sick || { rm $0/sick; false; }', "{{ root }}", "{{ to }}"]
  vars:
    to: "{{ __restored.to.name }}"
"""
PROBE = """\
- name: Refuse what the test calls bad
  ansible.builtin.command:
    argv: [sh, -c, '! grep -qxFf "$0/bad" "$0/etc/streaming-daemon/config.toml"', "{{ root }}"]
"""


DEPLOY = """\
- hosts: web_hosts
  gather_facts: false
  tasks:
    - name: Stand for {name}.yml
      ansible.builtin.command:
        argv: [sh, -c, 'echo {name} >>"$0/deployed"', "{{{{ root }}}}"]
"""


class Fleet:
    """Directories that stand for hosts, and a copy of the collection that takes them for hosts."""

    def __init__(self, work: Path, release: Callable[..., dict[str, Any]], names: list[str]) -> None:
        self.work, self.release = work, release
        self.hosts = {name: FakeHost(work / "hosts" / name) for name in names}
        self.copy = work / "collections/ansible_collections/socket_handoff/fleet"
        for room in ("playbooks", "plugins", "roles"):
            shutil.copytree(ROOT / room, self.copy / room)
        shutil.copy(ROOT / "site.yml", self.copy)
        modules = self.copy / "plugins/modules"
        for module, default in (("host_release", '"default": "/"'), ("rollout_lock", '"default": "/var/lib/socket-')):
            text = (modules / f"{module}.py").read_text()
            assert default in text
            found = default.replace('"default": "', '"default": os.environ["FLEET_ROOT"] + "')
            (modules / f"{module}.py").write_text(text.replace(default, found))
        (modules / "haproxy_server.py").write_text(BALANCER)
        (self.copy / "playbooks/tasks/activate.yml").write_text(ACTIVATE)
        shutil.rmtree(self.copy / "roles/handoff_app/meta")
        (self.copy / "roles/handoff_app/tasks/probe.yml").write_text(PROBE)
        # What they refuse is in refusals.yml, and takes half of the time. What removes would remove from this machine.
        for name, cut in (("rollback", 3), ("remove", 2)):
            plays = yaml.safe_load((self.copy / f"playbooks/{name}.yml").read_text())
            plays[0]["tasks"] = []
            stands = [{"hosts": "web_hosts", "gather_facts": False, "tasks": []}] if name == "remove" else []
            (self.copy / f"playbooks/{name}.yml").write_text(yaml.safe_dump(plays[:cut] + stands, sort_keys=False))
        (self.copy / "playbooks/verify.yml").write_text(DEPLOY.format(name="verify"))
        before, behind = (
            play for play in yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text()) if " rollout " in play["name"]
        )
        looks = behind["tasks"][0]["ansible.builtin.stat"]
        looks["path"] = "{{ root }}" + looks["path"]
        plays = [before, *yaml.safe_load(DEPLOY.format(name="deploy")), behind]
        (self.copy / "playbooks/deploy.yml").write_text(yaml.safe_dump(plays, sort_keys=False))
        self.variables: dict[str, Any] = {"rollout_drain": "command", "rollout_drain_wait": 0}
        for name in ("drain", "undrain"):
            script = f'echo "{name} $0" >>{work}/commands'
            self.variables[f"rollout_{name}_command"] = ["sh", "-c", script]
        self.groups: dict[str, Any] = {"web_hosts": {"hosts": {name: self.named(name) for name in names}}}

    def named(self, name: str) -> dict[str, Any]:
        """The variables of a host: an interpreter that tells our modules which directory they are on."""
        root = self.work / "hosts" / name
        root.mkdir(parents=True, exist_ok=True)
        (root / "bad").write_text("nothing\n")
        (root / "python").write_text(f'#!/bin/sh\nFLEET_ROOT={root} exec {sys.executable} "$@"\n')
        (root / "python").chmod(0o755)
        python = {"ansible_python_interpreter": str(root / "python")}
        return {"ansible_connection": "local", "ansible_become": False, "root": str(root), **python}

    def on(self, name: str, state: str, /, **arguments: Any) -> dict[str, Any]:
        return self.release(state, root=str(self.hosts[name].root), **arguments)

    def roll(self, name: str, *versions: str) -> None:
        for version in versions:
            roll(lambda state, **given: self.on(name, state, **given), self.hosts[name], version)

    def serves(self) -> list[str]:
        return [(host.root / "etc/streaming-daemon/config.toml").read_text().split()[1] for host in self.hosts.values()]

    def noted(self, name: str, what: str) -> list[str]:
        place = self.work / "hosts" / name / what
        return place.read_text().splitlines() if place.exists() else []

    def commands(self) -> list[str]:
        place = self.work / "commands"
        return place.read_text().splitlines() if place.exists() else []

    def locks(self) -> list[str]:
        return [name for name, host in self.hosts.items() if (host.root / LOCK).exists()]

    def run(self, playbook: str, *arguments: str, **given: Any) -> Run:
        (self.work / "inventory.yml").write_text(yaml.safe_dump({"all": {"children": self.groups}}))
        return subprocess.run(
            [
                *(Path(sys.executable).with_name("ansible-playbook"), "-i", self.work / "inventory.yml"),
                *(*arguments, "-e", json.dumps({**self.variables, **given}), self.copy / f"playbooks/{playbook}.yml"),
            ],
            cwd=self.work,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(self.work / "collections"),
                "COLUMNS": "300",
            },
            capture_output=True,
            text=True,
            check=False,
        )


LOCK = "var/lib/socket-handoff/rollout.lock"


@pytest.fixture
def fleet(tmp_path, run_module) -> Fleet:
    return Fleet(tmp_path, lambda state, **given: run_module("host_release", state=state, **given), ["web1", "web2"])


def said(done: Run) -> str:
    return " ".join((done.stdout + done.stderr).split())


def test_a_rollback_that_is_run_twice_leaves_the_good_release_where_it_is(fleet):
    for name in fleet.hosts:
        fleet.roll(name, "2.0", "3.0")
    first = fleet.run("rollback")
    assert (first.returncode, fleet.serves()) == (0, ["2.0", "2.0"]), said(first)
    again = fleet.run("rollback")
    assert (again.returncode, fleet.serves()) == (0, ["2.0", "2.0"]), said(again)
    assert said(again).count("stays as it is: it has gone back to 2.0 already") == 2
    # Who stays is not drained either.
    assert sorted(fleet.commands()) == ["drain web1", "drain web2", "undrain web1", "undrain web2"]
    assert fleet.locks() == []


def test_hosts_that_the_rollout_has_not_reached_do_not_go_further_back(fleet):
    fleet.roll("web1", "2.0", "3.0")
    fleet.roll("web2", "2.0")
    refused = fleet.run("rollback")
    assert refused.returncode != 0
    assert "The hosts run different releases (web1: 3.0, web2: 2.0)" in said(refused)
    assert (fleet.serves(), fleet.commands(), fleet.locks()) == (["3.0", "2.0"], [], [])
    done = fleet.run("rollback", rollback_from="3.0")
    assert (done.returncode, fleet.serves()) == (0, ["2.0", "2.0"]), said(done)
    assert "web2 stays as it is: it runs 2.0, and only hosts that run 3.0 go back" in said(done)


def test_a_host_in_the_middle_of_its_turn_counts_as_one_that_runs_the_new_release(fleet):
    fleet.roll("web1", "2.0", "3.0")
    fleet.roll("web2", "2.0")
    fleet.on("web2", "begun", release="3.0")
    fleet.hosts["web2"].deploy("3.0")
    done = fleet.run("rollback")
    assert (done.returncode, fleet.serves()) == (0, ["2.0", "2.0"]), said(done)


def test_a_host_that_cannot_keep_a_lock_is_named_and_keeps_nobody_else_on_a_bad_release(fleet):
    for name in fleet.hosts:
        fleet.roll(name, "2.0", "3.0")
    (fleet.hosts["web1"].root / f"{LOCK}.part").mkdir()
    done = fleet.run("rollback", rollback_serial="100%")
    assert done.returncode != 0
    assert "web1: rollout_lock: " in said(done)
    assert fleet.serves() == ["3.0", "2.0"], said(done)


def test_a_rollback_waits_until_the_balancers_have_noticed_and_not_longer_than_it_is_told(fleet):
    fleet.roll("web1", "2.0", "3.0")
    quick = fleet.run("rollback", "--limit", "web1")
    assert not re.search(rf"{NOTICED}\].*\nok: ", quick.stdout), said(quick)
    fleet.roll("web1", "4.0")
    done = fleet.run("rollback", "--limit", "web1", rollout_drain_wait=0.1)
    assert len(re.findall(rf"{NOTICED}\].*\nok: ", done.stdout)) == 2, said(done)


def cut_off(fleet: Fleet, name: str) -> None:
    """A rollout that was killed while this host was changed."""
    fleet.roll(name, "2.0")
    fleet.on(name, "begun", release="3.0")
    fleet.hosts[name].deploy("3.0")


def test_a_host_on_which_a_rollout_was_cut_off_serves_again_where_the_first_attempt_fails(fleet):
    cut_off(fleet, "web1")
    (fleet.hosts["web1"].root / "sick").touch()
    done = fleet.run("rollback", "--limit", "web1")
    assert done.returncode != 0
    assert "web1 did not go back to previous. Note what the services would take: " in said(done)
    assert "It serves with 2.0, as before." in said(done)
    assert fleet.noted("web1", "activated") == ["2.0", "2.0"]
    assert fleet.commands() == ["drain web1", "undrain web1"]
    assert (fleet.on("web1", "read")["turn"], fleet.locks()) == ({}, [])


def test_a_host_that_cannot_be_proved_stays_drained_and_says_so(fleet):
    cut_off(fleet, "web1")
    (fleet.hosts["web1"].root / "bad").write_text("# 2.0\n")
    done = fleet.run("rollback", "--limit", "web1")
    assert done.returncode != 0
    assert "AND THEN, GOING BACK: Refuse what the test calls bad: " in said(done)
    assert "THE HOST MAY STILL BE DRAINED" in said(done)
    assert fleet.commands() == ["drain web1"]
    assert fleet.on("web1", "read")["turn"]["release"] == "previous"


AWAY = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_connection": "ssh", "ansible_become": False}


def with_balancers(fleet: Fleet, **second: Any) -> None:
    """Two in the inventory."""
    fleet.groups["load_balancers"] = {"hosts": {"lb1": fleet.named("lb1"), "lb2": second or fleet.named("lb2")}}
    fleet.variables["rollout_drain"] = "haproxy"


def test_a_balancer_that_is_away_fails_the_rollback_of_a_host_and_does_not_lose_the_host(fleet):
    """To Ansible it is the web host that cannot be reached: nothing more is run for it, its lock stays."""
    for name in fleet.hosts:
        fleet.roll(name, "2.0", "3.0")
    with_balancers(fleet, **AWAY)
    done = fleet.run("rollback", "--limit", "web1,localhost,load_balancers")
    assert done.returncode == 2, said(done)
    assert "web1 did not go back to previous. Refuse a load balancer that could not be told: Load balancer lb2" in said(
        done
    )
    assert (fleet.serves(), fleet.locks()) == (["3.0", "3.0"], [])
    # Where it could be told, it was taken back.
    assert fleet.noted("lb1", "asked") == ["web1 maint", "web1 ready"]


def test_every_balancer_is_told_before_any_is_waited_for(fleet):
    fleet.roll("web1", "2.0", "3.0")
    with_balancers(fleet)
    done = fleet.run("rollback", "--limit", "web1", rollout_drain_wait=0.1)
    assert (done.returncode, fleet.serves()) == (0, ["2.0", "1.0"]), said(done)
    assert "0 requests and streams are still being answered" in said(done)
    # The second time is the wait.
    assert fleet.noted("lb1", "asked") == fleet.noted("lb2", "asked") == ["web1 maint", "web1 maint", "web1 ready"]


def test_balancers_that_only_a_variable_names_are_told_by_a_rollback_as_by_a_rollout(fleet):
    fleet.roll("web1", "2.0", "3.0")
    fleet.groups["others"] = {"hosts": {"lb1": fleet.named("lb1")}}
    fleet.variables.update(rollout_drain="auto", handoff_lb_balancers=["lb1"])
    done = fleet.run("rollback", "--limit", "web1")
    assert (done.returncode, fleet.serves()) == (0, ["2.0", "1.0"]), said(done)
    assert fleet.noted("lb1", "asked") == ["web1 maint", "web1 ready"]


def test_a_rollback_does_not_take_the_only_web_host_from_its_balancer(fleet):
    fleet.roll("web1", "2.0", "3.0")
    with_balancers(fleet)
    del fleet.groups["web_hosts"]["hosts"]["web2"]
    done = fleet.run("rollback")
    assert (done.returncode, fleet.serves()) == (0, ["2.0", "1.0"]), said(done)
    assert fleet.noted("lb1", "asked") == []


def held(fleet: Fleet, run_module: Callable[..., dict[str, Any]], name: str, process: str) -> None:
    holder = {"id": "0f3a55c1e2b7", "by": "ada@admin1", "release": "3.0", "since": "now", "process": process}
    run_module("rollout_lock", state="held", holder=holder, path=str(fleet.hosts[name].root / LOCK))


@pytest.mark.parametrize(("playbook", "who"), [("../site", "here"), ("deploy", "elsewhere"), ("remove", "here")])
def test_nothing_else_changes_hosts_while_a_rollout_is_at_work(fleet, run_module, playbook, who):
    controller = importlib.import_module("ansible_collections.socket_handoff.fleet.plugins.lookup.rollout_controller")
    name = controller.name_of(os.getpid())
    held(fleet, run_module, "web2", name if who == "here" else f"other/{name}")
    done = fleet.run(playbook)
    assert done.returncode != 0
    assert "A rollout is at work on web2: 3.0, begun now by ada@admin1" in said(done)
    assert '"holder": {"id": "0f3a55c1e2b7"}' in said(done).replace("\\", "")
    # Of the other host neither.
    assert fleet.noted("web1", "deployed") == []
    assert "PLAY [web_hosts]" not in said(done)


def test_a_deployment_ends_what_a_dead_rollout_has_left_open(fleet, run_module):
    cut_off(fleet, "web1")
    key = fleet.hosts["web1"].root / STORE / "turn.json"
    assert key.exists()
    dead = subprocess.Popen(["true"])
    controller = importlib.import_module("ansible_collections.socket_handoff.fleet.plugins.lookup.rollout_controller")
    name = controller.name_of(dead.pid)
    dead.wait()
    held(fleet, run_module, "web1", name)
    # How that turn had drained the host.
    file = fleet.work / "maintenance"
    file.write_text("rollout\n")
    part = fleet.run("../site", "--skip-tags", "configure", __maintenance_file=str(file))
    assert (part.returncode, key.exists(), file.exists()) == (0, True, True), said(part)
    done = fleet.run("../site", __maintenance_file=str(file))
    assert (done.returncode, key.exists(), file.exists()) == (0, False, False), said(done)
    assert "web1 was left in the middle of a rollout" in said(done)
    assert "web2 was left" not in said(done)
    # A turn that fails from now on goes back to what the deployment brought.
    assert fleet.on("web1", "begun", release="4.0")["interrupted"] is False
    assert fleet.on("web1", "restored", to="turn")["paths"] == []


UNDO = """\
- hosts: web_hosts
  gather_facts: false
  vars:
    __rollout: {id: 0f3a55c1e2b7, holder: {id: 0f3a55c1e2b7}, drain: command, by: ada, rollout_keep: 3,
                rollout_drain_wait: 0.1,
                rollout_drain_command: "{{ rollout_drain_command }}",
                rollout_undrain_command: "{{ rollout_undrain_command }}"}
    __rollout_state: serving
    __maintenance: nobody
  tasks:
    - block:
        - ansible.builtin.fail: {msg: it streams garbage}
      rescue:
        - ansible.builtin.include_tasks: tasks/undo.yml
    - ansible.builtin.debug:
        msg: "{{ inventory_hostname }} is {{ __rollout_state }}: {{ __rollout_why }}"
"""


def test_a_turn_is_undone_behind_a_drain_and_by_whoever_has_the_lock(fleet, run_module):
    (fleet.copy / "playbooks/undo_only.yml").write_text(UNDO)
    for name, holder in (("web1", "0f3a55c1e2b7"), ("web2", "aaaaaaaaaaaa")):
        cut_off(fleet, name)
        path = str(fleet.hosts[name].root / LOCK)
        holder = {"id": holder, "by": "bob", "release": "4.0", "since": "now"}
        run_module("rollout_lock", state="held", holder=holder, path=path)
    done = fleet.run("undo_only")
    assert "web1 is rolled back: " in said(done)
    # Whoever has taken over finds the host as it was left.
    assert "web2 is OUT OF SERVICE: " in said(done)
    assert "the lock of this run (0f3a55c1e2b7) was taken over: 4.0, begun now by bob, has it" in said(done)
    assert (fleet.serves(), fleet.commands()) == (["2.0", "3.0"], ["drain web1", "undrain web1"])
    assert len(re.findall(rf"{NOTICED}\].*\nok: ", done.stdout)) == 2, said(done)
