"""Ansible run as an operator would, against hosts of a molecule scenario that is up; and what it said it changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# molecule points Ansible at a configuration of its own; a playbook run here uses the project's, as an operator's does.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
ENVIRONMENT["MOLECULE_PROJECT_DIRECTORY"] = str(PROJECT)


def address_of(name: str) -> str:
    """Where a host of the running scenario is reached from this machine."""
    found = subprocess.run([str(PROJECT / "script/host"), "address", name], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def command(name: str, *arguments: str, play: str = "site.yml", limited: bool = True) -> list[str]:
    """The command that applies a playbook to one host of the running scenario: of the inventory that names it.

    Without a limit the arguments have to say which host is meant, as a rollout's do.
    """
    hosts = [path for path in PROJECT.glob("molecule/*/inventory/hosts.yml") if f" {name}:\n" in path.read_text()]
    assert len(hosts) == 1, f"{name} is in {hosts}"
    inventory = hosts[0].parent
    return [
        str(PROJECT / "script" / "enter"),
        *("ansible-playbook", "-i", str(inventory), play, *(("--limit", name) if limited else ()), *arguments),
    ]


def playbook(
    name: str, *arguments: str, play: str = "site.yml", checkout: Path = PROJECT, limited: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a playbook of this checkout, or of an altered copy, against one host."""
    return subprocess.run(
        command(name, *arguments, play=play, limited=limited),
        cwd=checkout,
        env={**ENVIRONMENT, "ANSIBLE_CONFIG": str(checkout / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def changes(output: str) -> list[str]:
    """The tasks and handlers that a run, or check mode, reported as changed, with their items, in order."""
    found, task = [], ""
    for line in output.splitlines():
        if head := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*+$", line):
            task = head[1]
        elif item := re.match(r"changed: \[[^]]+\](?: => \(item=(.*?)\))?(?: => *)?$", line):
            found.append(f"{task} ({item[1]})" if item[1] else task)
    return found


def copy_of_checkout(copy: Path) -> Path:
    """A copy of what git knows or would know, to be altered like a checkout that is a version ahead."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(PROJECT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, copy / name, follow_symlinks=False)
    return copy


def replace(path: Path, old: str, new: str) -> None:
    """Alter a file of such a copy, once."""
    text = path.read_text()
    assert old in text, f"{path} has changed: {old!r} is not in it"
    path.write_text(text.replace(old, new, 1))
