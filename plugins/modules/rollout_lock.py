#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module rollout_lock: one rollout at a time on a host.

Theory of operation. The lock is a file that says who holds it. Whoever looks at
it to change it holds its directory by flock meanwhile, so two who ask at once, or
who both find that its holder is gone, are not both told yes. It is on the disk
before it is linked to its place, so a host that loses its power has no empty one;
what cannot be read all the same has an id made of its bytes, by which it can be
broken like any other, and only while it is the same bytes.

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
      - V(kept) fails unless O(holder) still has it. A controller that slept may wake up on a host that another one has
        taken over since.
    type: str
    choices: [held, kept, free, read]
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
    holder: {id: 0f3a55c1e2b7, by: ada@admin1, release: 2026-11-29.1, since: '2026-11-29T01:30:00Z'}

- name: Go on, unless somebody has taken over meanwhile
  socket_handoff.fleet.rollout_lock:
    state: kept
    holder: {id: 0f3a55c1e2b7}
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

import contextlib
import fcntl
import hashlib
import json
import os

from ansible.module_utils.basic import AnsibleModule


def read(path):
    """Return who has the lock, None where nobody has."""
    try:
        with open(path, "rb") as handle:
            content = handle.read()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("id"), str) and found["id"]:
        return found
    unknown = dict.fromkeys(("by", "since"), "unknown")
    return {"id": hashlib.sha256(content).hexdigest()[:12], "release": "unknown, because it cannot be read", **unknown}


@contextlib.contextmanager
def alone(path):
    """Be the only one who looks at the lock to change it. Raises OSError."""
    place = os.path.dirname(path)
    os.makedirs(place, exist_ok=True)
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
        # What was decided has to outlive the host's power.
        os.fsync(directory)
    finally:
        os.close(directory)


def put(path, holder):
    """Put the lock there, in place of one that is stale. Raises OSError."""
    staging = f"{path}.part"
    try:
        with open(staging, "w", encoding="utf-8") as handle:
            json.dump(holder, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staging, path)
    finally:
        if os.path.lexists(staging):
            os.unlink(staging)


def refusal(found, path):
    """Return what somebody reads who comes second."""
    return (
        f"rollout_lock: a rollout is running: {found.get('release')}, begun {found.get('since')} by "
        f"{found.get('by')}, id {found['id']} ({path}). Wait for it, or stop it there. Where it is certain that it "
        f"does not run any more, and only then: -e rollout_break_lock={found['id']}"
    )


def lost(found, holder, path):
    """Return what somebody reads whose lock was taken over."""
    who = (
        f"{found.get('release')}, begun {found.get('since')} by {found.get('by')}, has it" if found else "nobody has it"
    )
    return (
        f"rollout_lock: the lock of this run ({holder['id']}) was taken over: {who} ({path}). Nothing more was changed "
        "on this host; see playbooks/status.yml"
    )


def hold(module, path):
    """Take the lock, or fail. Raises OSError."""
    holder = module.params["holder"]
    found = read(path)
    ours = found is not None and found["id"] == holder["id"]
    stale = found is not None and not ours and found["id"] in module.params["gone"]
    if found is not None and not ours and not stale:
        module.fail_json(msg=refusal(found, path), holder=found)
    if not ours and not module.check_mode:
        put(path, holder)
    return {"changed": not ours, "holder": holder, "taken_over": stale}


def free(module, path):
    """Give it back, if it is ours. Raises OSError."""
    found = read(path)
    ours = found is not None and found["id"] == module.params["holder"]["id"]
    if ours and not module.check_mode:
        os.unlink(path)
    return {"changed": ours, "holder": found or {}}


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["held", "kept", "free", "read"], "default": "read"},
            "holder": {"type": "dict"},
            "gone": {"type": "list", "elements": "str", "default": []},
            "path": {"type": "path", "default": "/var/lib/socket-handoff/rollout.lock"},
        },
        required_if=[("state", state, ("holder",)) for state in ("held", "kept", "free")],
        supports_check_mode=True,
    )
    params, path = module.params, module.params["path"]
    try:
        found = read(path)
        if params["state"] == "kept" and (found is None or found["id"] != params["holder"]["id"]):
            module.fail_json(msg=lost(found, params["holder"], path), holder=found or {})
        if params["state"] in ("read", "kept"):
            module.exit_json(changed=False, holder=found or {})
        # Not even the directory is made.
        if found is None and params["state"] == "free":
            module.exit_json(changed=False, holder={})
        if found is None and module.check_mode:
            module.exit_json(changed=True, holder=params["holder"], taken_over=False)
        with alone(path):
            result = (hold if params["state"] == "held" else free)(module, path)
    except OSError as error:
        module.fail_json(msg=f"rollout_lock: {path}: {error.strerror} (is the disk full?)")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
