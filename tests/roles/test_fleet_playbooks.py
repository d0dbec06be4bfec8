"""The parts of a rollout that need no host: who is counted as lost, when it stops, what a drain by command runs.

The playbooks' own task files, run by ansible-playbook itself for hosts that are names on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate_readme import ROOT

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
    given = {"__drain_by": "command", "__drain_wait": 0}
    given["__drain_command"] = ["sh", "-c", f'echo "$0 $1" >>{log}', "out"]
    given["__undrain_command"] = ["sh", "-c", f'echo "$0 $1" >>{log}', "in"]
    tasks = [
        {"ansible.builtin.include_tasks": str(ROOT / f"playbooks/tasks/{name}.yml")} for name in ("drain", "undrain")
    ]
    hosts = {"web1": {"ansible_connection": "local"}}
    done = play(tmp_path, hosts, [{"hosts": "all", "gather_facts": False, "vars": given, "tasks": tasks}])
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().splitlines() == ["out web1", "in web1"]
