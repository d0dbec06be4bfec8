"""Whole runs of the playbooks for a fleet, by ansible-playbook itself, for hosts that are names on this machine.

What touches a host is a stub: the modules host_release, host_health, rollout_lock and haproxy_server, the tasks of the
roles, and those that tell services what host_release has put back. Plays, task files, filters, lookups, and the roles'
defaults are the collection's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from generate_readme import ROOT

STUBS = Path(__file__).with_name("fleet_stubs")
MODULES = ("host_release", "host_health", "rollout_lock", "haproxy_server")
# role -> the entry points that playbooks ask for.
ASKED = {
    "streaming_daemon": ("assert", "prepare", "main"),
    "apache_handoff": ("assert", "prepare", "main"),
    "handoff_app": ("assert", "prepare", "main", "probe"),
    "handoff_lb": ("assert", "drain", "enable", "main"),
}
# Nobody answers on port 9, the discard service.
LOST = {
    "ansible_connection": "ssh",
    "ansible_host": "127.0.0.1",
    "ansible_port": 9,
    "ansible_ssh_common_args": "-o ConnectTimeout=2",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    text: str  # what the operator read, on one line
    out: str
    log: list[str]  # what was asked of whom, in order

    def asked(self, what: str) -> list[str]:
        """Return the hosts that were asked for this."""
        return [line.split(" ", 1)[0] for line in self.log if line.split(" ", 1)[1] == what]

    def row(self, host: str) -> str:
        """Return the line of a host in the last table, its columns one space apart."""
        table = self.text.rpartition("- host release ")[2].partition(" TASK [")[0].partition(" PLAY ")[0]
        rows = [row.strip(" '") for row in re.split(r" - (?='?web[0-9] )", table)]
        return next((row for row in rows if row.startswith(f"{host} ")), table)


def stub_of(name: str) -> str:
    """Return a file of tasks that only notes that it was run."""
    return yaml.safe_dump([{"name": f"Be {name}", "socket_handoff.fleet.stub": {"name": name}}])


def collection(work: Path) -> Path:
    """Make the collection with stubs; return its root."""
    root = work / "ansible_collections/socket_handoff/fleet"
    shutil.copytree(ROOT / "playbooks", root / "playbooks")
    shutil.copytree(ROOT / "meta", root / "meta")
    shutil.copy(ROOT / "galaxy.yml", root)
    for kind in ("filter", "lookup", "plugin_utils", "module_utils"):
        (root / "plugins" / kind).mkdir(parents=True)
        for path in (ROOT / "plugins" / kind).glob("*.py"):
            (root / "plugins" / kind / path.name).symlink_to(path)
    (root / "plugins/action").mkdir()
    for name in ("stub", *MODULES):
        (root / "plugins/action" / f"{name}.py").symlink_to(STUBS / "action/stub.py")
    (root / "playbooks/tasks/activate.yml").write_text(stub_of("activate"))
    for role, entries in ASKED.items():
        (root / "roles" / role / "tasks").mkdir(parents=True)
        for kind in ("defaults", "vars"):
            (root / "roles" / role / kind).symlink_to(ROOT / "roles" / role / kind)
        for entry in entries:
            (root / "roles" / role / "tasks" / f"{entry}.yml").write_text(stub_of(f"{role} {entry}"))
    # It needs nothing but the module haproxy_server.
    for name in ("ask", "look", "somebody"):
        shutil.copy(ROOT / f"roles/handoff_lb/tasks/{name}.yml", root / "roles/handoff_lb/tasks")
    return root


def run_playbook(
    work: Path,
    name: str,
    hosts: dict[str, dict[str, Any]],
    *arguments: str,
    answers: dict[str, dict[str, Any]] | None = None,
    groups: dict[str, dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
    inputs: str = "",
    files: dict[str, str] | None = None,
    **given: Any,
) -> Outcome:
    """Run a playbook for web hosts with variables of their own; what is given besides goes in with -e.

    A file whose path begins with ``plugins/`` is put in place of the collection's, any other into the working
    directory, where ``apache2ctl-HOST`` is the Apache of that host. Where inputs are given, their first line is what a
    release is made from, and the second what it is made from once a host has been through its probe.
    """
    root = collection(work)
    if inputs:
        (root / "plugins/lookup/release_inputs.py").unlink()
        (root / "plugins/lookup/release_inputs.py").symlink_to(STUBS / "lookup/release_inputs.py")
    for path, text in (files or {}).items():
        place = (root if path.startswith("plugins/") else work) / path
        place.unlink(missing_ok=True)
        place.write_text(text)
        place.chmod(0o755)
    here = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    children = {"web_hosts": {"hosts": hosts}, **(groups or {})}
    inventory = {"all": {"vars": {**here, **(variables or {})}, "children": children}}
    (work / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))
    (work / "answers.json").write_text(json.dumps(answers or {}))
    (work / "inputs").write_text(inputs)
    apache = f"{work}/apache2ctl-{{{{ inventory_hostname }}}}"
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("ansible-playbook"), "-i", work / "hosts.yml"),
            *("-e", json.dumps({"__apache2ctl": apache, **given}), *arguments),
            root / "playbooks" / f"{name}.yml",
        ],
        cwd=work,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(work),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "FLEET_STUBS": str(work),
            "COLUMNS": "300",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    log = work / "log"
    out = done.stdout + done.stderr
    return Outcome(done.returncode, " ".join(out.split()), out, log.read_text().splitlines() if log.exists() else [])
