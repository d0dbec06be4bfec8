# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup rollout_controller: who and where this run of Ansible is, and whether another one still runs here.

Theory of operation. A process is named by the machine, its boot, its number and when it started, so that a number that
is used again, or a reboot, is not taken for it. Numbers mean something within their namespace only: two containers with
one image's name and id are two machines here. Of a process on another machine nothing is known, and nothing is claimed;
nor where those of others cannot be seen, because /proc is mounted with hidepid or a unit has ProtectProc=.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import socket
from pathlib import Path

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: rollout_controller
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Who and where this run of Ansible is, and whether another one still runs
description:
  - Without terms returns C(by), the person and the machine, and C(process), a name of this run.
  - With terms, which are such names, returns for each C(here) while it runs on this machine, C(gone) where it does
    not any
    more, and C(elsewhere) where it was on another machine, or could not be seen on
    this one.
options:
  _terms:
    description: Names of runs.
    type: list
    elements: str
"""

EXAMPLES = r"""
- name: Say who runs this
  ansible.builtin.debug:
    msg: "{{ lookup('socket_handoff.fleet.rollout_controller').by }}"
"""

RETURN = r"""
_raw:
  description: One dictionary, or one word for each term.
  type: list
  elements: raw
"""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _machine() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "unknown"
    return f"{socket.gethostname()}/{_read('/etc/machine-id')[:12]}/{namespace}"


def _user() -> str:
    """Return who runs this; a container may run it under a number that nobody gave a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid{os.getuid()}"


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; nothing where there is none, or it has ended."""
    # The name, in parentheses, may hold anything.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def name_of(pid: int) -> str:
    """Return the name of a process on this machine."""
    return f"{_machine()} {_read('/proc/sys/kernel/random/boot_id')} {pid} {_started(pid)}"


def state_of(name: str) -> str:
    """Return here, gone or elsewhere."""
    parts = name.split(" ")
    if len(parts) != 4 or parts[0] != _machine():
        return "elsewhere"
    if parts[2].isdigit() and name == name_of(int(parts[2])) and parts[3]:
        return "here"
    # Whoever does not even see the first process, which always runs, may not see that one either.
    if parts[1] == _read("/proc/sys/kernel/random/boot_id") and not _started(1):
        return "elsewhere"
    return "gone"


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return who this is, or what became of others."""
        self.set_options(var_options=variables, direct=kwargs)
        if terms:
            return [state_of(str(term)) for term in terms]
        # A lookup may run in a worker of ansible-playbook, which is gone a moment later.
        parent = multiprocessing.parent_process()
        pid = parent.pid if parent is not None and parent.pid else os.getpid()
        return [{"by": f"{_user()}@{socket.gethostname()}", "process": name_of(pid)}]
