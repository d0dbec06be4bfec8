# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter soak_verdicts: which hosts serve worse with a new release than others do with the old one."""

from __future__ import annotations

DOCUMENTATION = r"""
name: soak_verdicts
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Say which hosts serve worse with a new release than others do with the old one
description:
  - Takes what M(socket_handoff.fleet.host_health) has said of hosts at the end of a soak.
  - A host with the new release is refused where anything speaks against it, or where the share of its streams that
    ended badly
    is larger than that of all old hosts together by more than O(margin).
options:
  _input:
    description: Dictionaries with C(host), C(new), C(ended), C(bad) and C(problems).
    type: list
    elements: dict
    required: true
  margin:
    description: Percentage points.
    type: float
    required: true
  minimum:
    description: Streams that have to have ended on the new host for its share to say anything.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Judge one canary by one other host
  ansible.builtin.debug:
    msg: "{{ samples | socket_handoff.fleet.soak_verdicts(margin=2, minimum=20) }}"
  vars:
    samples:
      - {host: web1, new: true, ended: 100, bad: 40, problems: []}
      - {host: web2, new: false, ended: 100, bad: 1, problems: []}
"""

RETURN = r"""
_value:
  description: Host -> what speaks against it. Hosts that serve well are not in it.
  type: dict
"""


def soak_verdicts(samples, margin, minimum):
    """Return host -> what speaks against it."""
    old = [each for each in samples if not each["new"]]
    ended, bad = sum(each["ended"] for each in old), sum(each["bad"] for each in old)
    usual = 100 * bad / ended if ended else 0.0
    verdicts = {}
    for each in samples:
        if not each["new"]:
            continue
        said = list(each["problems"])
        share = 100 * each["bad"] / each["ended"] if each["ended"] else 0.0
        if each["ended"] >= minimum and share > usual + margin:
            said.append(
                f"{each['bad']} of {each['ended']} streams ended badly ({share:.1f} %), and {usual:.1f} % did on "
                "hosts with the "
                f"old release; {margin:g} percentage points more are allowed"
            )
        if said:
            verdicts[each["host"]] = "It serves worse than before: " + "; ".join(said)
    return verdicts


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filter by name."""
        return {"soak_verdicts": soak_verdicts}
