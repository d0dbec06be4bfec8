# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter rollout_steps: turn a ramp into the number of hosts of each step."""

from __future__ import annotations

import math
import re

DOCUMENTATION = r"""
name: rollout_steps
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Turn a ramp into the number of hosts of each step
positional: hosts, at_once
description:
  - Each item of a ramp says how many hosts have the release after the step, as a number or as a percentage of all,
    which is
    rounded up. Steps that would bring it to no further host are left out.
  - A step with more than O(at_once) hosts is cut into several.
options:
  _input:
    description: The ramp, a list, or a text with commas.
    type: raw
    required: true
  hosts:
    description: How many hosts there are.
    type: int
    required: true
  at_once:
    description: How many hosts a step has at most, as a number, or as a percentage of all, which is rounded up.
    type: raw
    default: 100%
"""

EXAMPLES = r"""
- name: Show that six hosts are done in three steps of 1, 2 and 3
  ansible.builtin.debug:
    msg: "{{ '1, 10%, 50%, 100%' | socket_handoff.fleet.rollout_steps(6) }}"
"""

RETURN = r"""
_value:
  description: Hosts per step; empty where the ramp, or O(at_once), is none.
  type: list
  elements: int
"""

ITEM = re.compile(r"^([1-9][0-9]{0,5}|(?:[1-9][0-9]?|100)%)\Z")


def ramp_items(ramp):
    """Return the items of a ramp as texts."""
    items = ramp.split(",") if isinstance(ramp, str) else ramp if isinstance(ramp, list) else [ramp]
    return [re.sub(r"\s+", "", str(item)) for item in items]


def share(item, hosts):
    """Return how many of the hosts an item means, at most all."""
    return math.ceil(hosts * int(item[:-1]) / 100) if item.endswith("%") else min(int(item), hosts)


def rollout_steps(ramp, hosts, at_once="100%"):
    """Return how many hosts each step adds; nothing where the ramp is no ramp to all of them."""
    items, steps, done = ramp_items(ramp), [], 0
    most = re.sub(r"\s+", "", str(at_once))
    if not items or items[-1] != "100%" or not all(ITEM.match(item) for item in [*items, most]):
        return []
    for item in items:
        reached = share(item, hosts)
        while reached > done:
            steps.append(min(reached - done, share(most, hosts)))
            done += steps[-1]
    return steps


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filters by name."""
        return {"rollout_steps": rollout_steps}
