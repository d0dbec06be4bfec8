#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module rollout_lock: one rollout at a time on a host.

Theory of operation. The lock is a file that says who holds it. It is written
beside its place and linked there, which either succeeds or finds that somebody
was faster; so it is never empty, and two who ask at once are not both told yes.

A host cannot know whether a controller elsewhere is alive. The caller says which
holders it knows to be gone, or which one an operator has called so by name;
nothing is ever taken because of its age.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_lock
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Let one rollout at a time work on a host
description:
  - Takes, reads or gives back a lock that names its holder.
options:
  state:
    description:
      - V(held) takes the lock, and fails where another holder has it. V(free) gives it back, if O(holder) has it.
        V(read) only says who has it.
    type: str
    choices: [held, free, read]
    default: read
  holder:
    description: Who asks. C(id) tells holders apart, everything else is for people. Required unless O(state=read).
    type: dict
  gone:
    description: Holders, by C(id), that are known not to run any more. Their lock is taken over.
    type: list
    elements: str
    default: []
  path:
    description: The lock.
    type: path
    default: /var/lib/socket-handoff/rollout.lock
attributes:
  check_mode:
    description: Fails where the lock could not be taken, and takes nothing.
    support: full
  diff_mode:
    description: The lock is gone when the run is over.
    support: none
"""

EXAMPLES = r"""
- name: Begin, unless somebody else has
  socket_handoff.fleet.rollout_lock:
    state: held
    holder: {id: 20261129T0130-4711, by: ada@admin1, release: 2026-11-29.1, since: '2026-11-29T01:30:00Z'}
"""

RETURN = r"""
holder:
  description: Who has the lock, or had it; empty where nobody has.
  type: dict
  returned: always
taken_over:
  description: Whether it was taken from a holder that is gone.
  type: bool
  returned: with O(state=held)
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule


def read(path):
    """Return who has the lock, None where nobody has."""
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except FileNotFoundError:
        return None
    except ValueError:
        return {"id": "unreadable", "by": "unknown", "release": "unknown", "since": "unknown"}


def take(path, holder):
    """Put the lock there if nobody has it; return whether it is ours."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    staging = f"{path}.{holder['id']}"
    try:
        with open(staging, "w", encoding="utf-8") as handle:
            json.dump(holder, handle)
        os.link(staging, path)
    except FileExistsError:
        return False
    finally:
        if os.path.lexists(staging):
            os.unlink(staging)
    return True


def refusal(found, path):
    """Return what somebody reads who comes second."""
    return (
        f"rollout_lock: a rollout is running: {found.get('release')}, begun {found.get('since')} by "
        f"{found.get('by')}, id "
        f"{found['id']} ({path}). Wait for it, or stop it there. Where it is certain that it does not run any more, "
        "and only "
        f"then: -e rollout_break_lock={found['id']}"
    )


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["held", "free", "read"], "default": "read"},
            "holder": {"type": "dict"},
            "gone": {"type": "list", "elements": "str", "default": []},
            "path": {"type": "path", "default": "/var/lib/socket-handoff/rollout.lock"},
        },
        required_if=[("state", "held", ("holder",)), ("state", "free", ("holder",))],
        supports_check_mode=True,
    )
    params, path = module.params, module.params["path"]
    found = read(path)
    if params["state"] == "read":
        module.exit_json(changed=False, holder=found or {})
    ours = found is not None and found["id"] == params["holder"]["id"]
    try:
        if params["state"] == "free":
            if ours and not module.check_mode:
                os.unlink(path)
            module.exit_json(changed=ours, holder=found or {})
        stale = found is not None and not ours and found["id"] in params["gone"]
        if found is not None and not ours and not stale:
            module.fail_json(msg=refusal(found, path), holder=found)
        if not ours and not module.check_mode:
            if stale:
                os.unlink(path)
            if not take(path, params["holder"]):
                faster = read(path) or {"id": "unknown"}
                module.fail_json(msg=refusal(faster, path), holder=faster)
    except OSError as error:
        module.fail_json(msg=f"rollout_lock: {path}: {error.strerror}. Is the disk full?")
    module.exit_json(changed=not ours, holder=params["holder"], taken_over=stale)


if __name__ == "__main__":
    main()
