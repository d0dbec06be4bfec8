# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter apache_links: name the links that a2enmod, a2ensite and a2enconf would make."""

from __future__ import annotations

DOCUMENTATION = r"""
name: apache_links
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Name the links that a2enmod, a2ensite and a2enconf would make
description:
  - Turns file names into the links that enable them on Debian, as M(socket_handoff.fleet.apache_config) takes them.
positional: kind
options:
  _input:
    description: File names below the C(-available) directory.
    type: list
    elements: str
    required: true
  kind:
    description: Which pair of directories is meant.
    type: str
    choices: [mods, sites, conf]
    required: true
  enabled:
    description: Whether the links shall exist.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Show the links of a module
  ansible.builtin.debug:
    msg: "{{ ['proxy.conf', 'proxy.load'] | socket_handoff.fleet.apache_links('mods') }}"
"""

RETURN = r"""
_value:
  description: One dictionary per file, for the option O(socket_handoff.fleet.apache_config#module:links).
  type: list
  elements: dict
"""


def apache_links(names, kind, enabled=True):
    """Return one dictionary per file name."""
    return [
        {
            "path": f"{kind}-enabled/{name}",
            "target": f"../{kind}-available/{name}",
            "state": "present" if enabled else "absent",
        }
        for name in names
    ]


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filters of this file."""
        return {"apache_links": apache_links}
