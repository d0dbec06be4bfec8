"""Tasks that change nothing, run by Ansible's own code for many hosts in this process: a hundredth of a second each.

What ansible-playbook does between a playbook and a task stays as it is: reading, roles and their argument specs,
precedence of variables, templates, conditions, loops, action plugins. Left out are the worker processes, one per task
and host, and with them whatever needs a result of an earlier task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import yaml
from ansible import context
from ansible._internal._task import TaskContext
from ansible.cli import CLI
from ansible.executor.task_executor import TaskExecutor
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.collections import ImmutableDict
from ansible.parsing.dataloader import DataLoader
from ansible.playbook import Playbook
from ansible.playbook.play_context import PlayContext
from ansible.playbook.task import Task
from ansible.plugins import loader as plugins
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

TASKS = Path(__file__).resolve().parents[2] / "playbooks/tasks"
# The play that checks the inputs of one role.
ASSERT = """\
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.import_role:
        name: socket_handoff.fleet.{role}
        tasks_from: assert
"""
DEBIAN = {
    "distribution": "Debian",
    "distribution_major_version": "12",
    "service_mgr": "systemd",
    "architecture": "x86_64",
}


class _Nobody:
    """Who listens to the items of a loop: nobody, their results are in the task's."""

    def send_callback(self, *arguments: Any, **named: Any) -> None:
        """Take what ansible-playbook would print."""


def _remembering(compile_template: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a template once and not for every host: half of the time otherwise. Variables do not change the code."""
    compiled: dict[tuple[type, str, tuple[object, ...]], Any] = {}

    def compile_once(self: jinja2.Environment, source: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(source, str):
            return compile_template(self, source, *arguments, **named)
        key = (type(self), str(source), (*arguments, *sorted(named.items())))
        if key not in compiled:
            compiled[key] = compile_template(self, source, *arguments, **named)
        return compiled[key]

    return compile_once


def _tasks(blocks: Iterable[Any]) -> Iterator[Task]:
    """Return the tasks of a play's blocks in the order of their execution."""
    for each in blocks:
        yield from [each] if isinstance(each, Task) else _tasks(each.block)


def _run(
    task: Task, host: Any, variables: dict[str, Any], loader: DataLoader, manager: VariableManager
) -> dict[str, Any]:
    task = task.copy()
    arguments = [PlayContext(), loader, plugins, _Nobody(), manager]
    executor = TaskExecutor(host, task, variables, *arguments)
    with TaskContext(task):
        return dict(executor.run())


def refusals(
    play: str, hosts: Mapping[str, Mapping[str, Any]], work: Path, facts: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any] | None]:
    """Run the one play of a playbook for hosts, each with variables of its own and facts of a Debian 12 beside its own.

    Returns the result of the first task that failed for each host, None where none did.
    """
    work.mkdir(exist_ok=True)
    (work / "hosts.yml").write_text(
        yaml.safe_dump({"all": {"hosts": {name: dict(given) for name, given in hosts.items()}}})
    )
    (work / "play.yml").write_text(play)
    # What a playbook imports is found beside it.
    if not (work / "tasks").exists():
        (work / "tasks").symlink_to(TASKS)
    context.CLIARGS = ImmutableDict(
        connection="local", verbosity=0, check=False, diff=False, tags=["all"], skip_tags=[]
    )
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(work / "hosts.yml")])
    manager = VariableManager(loader=loader, inventory=inventory, version_info=CLI.version_info(gitinfo=False))
    HostVars(inventory, manager, loader)  # tells the manager of itself: what the variable hostvars is
    (loaded,) = Playbook.load(str(work / "play.yml"), variable_manager=manager, loader=loader).get_plays()
    for name in hosts:
        manager.set_host_facts(name, {**DEBIAN, **(facts or {}).get(name, {})})
    tasks = [task for task in _tasks(loaded.compile()) if task.action not in ("meta", "ansible.builtin.meta")]
    assert tasks, "the play has no task"
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(hosts)
    with mock.patch.object(jinja2.Environment, "compile", _remembering(jinja2.Environment.compile)):
        for host in inventory.get_hosts():
            for task in tasks:
                variables = manager.get_vars(play=loaded, host=host, task=task)
                result = _run(task, host, variables, loader, manager)
                if result.get("failed"):
                    found[host.name] = result
                    break
    return found


def sentences(answer: dict[str, Any]) -> str:
    """Everything an operator would read of a failure: its own message, or those of the failed items of a loop."""
    failed = [item for item in answer.get("results", []) if item.get("failed")] or [answer]
    said = " ".join(f"{item['msg']} {' '.join(item.get('argument_errors', []))}" for item in failed)
    return " ".join(said.split())
