# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter fleet_table: lines of text that an operator reads as a table."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_table
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Lines of text that an operator reads as a table
positional: columns
description:
  - Pads every column but the last to its widest cell. Line breaks within a cell become spaces.
options:
  _input:
    description: The rows.
    type: list
    elements: dict
    required: true
  columns:
    description: Names of the members to show, which are the head of the table too.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Show who runs what
  ansible.builtin.debug:
    msg: "{{ [{'host': 'web1', 'release': '1.0'}] | socket_handoff.fleet.fleet_table(['host', 'release']) }}"
"""

RETURN = r"""
_value:
  description: The head and one line per row.
  type: list
  elements: str
"""


def fleet_table(rows, columns):
    """Return the head and one line per row."""
    table = [list(columns), *([" ".join(str(row.get(name, "")).split()) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filter by name."""
        return {"fleet_table": fleet_table}
