# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter to_toml: write tables as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: to_toml
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Write tables as TOML
description:
  - Writes a dictionary as TOML 1.0.0 (U(https://toml.io/en/v1.0.0)). Text, numbers, truth values and lists become
    keys, a dictionary becomes a table, and a list of dictionaries an array of tables. What is below those is written
    inline.
  - Dates and null are refused, as TOML has no null and none of the files written here has a date.
positional: above
options:
  _input:
    description: What to write.
    type: dict
    required: true
  above:
    description: Name of the table in which these tables are, if any.
    type: str
    default: ''
"""

EXAMPLES = r"""
- name: Show two tables
  ansible.builtin.debug:
    msg: "{{ {'limits': {'streams_per_user': 4}, 'routes': [{'backend': 'demo'}]} | socket_handoff.fleet.to_toml }}"
"""

RETURN = r"""
_value:
  description: Lines, the last one with a newline, or nothing.
  type: str
"""

BARE = re.compile(r"[A-Za-z0-9_-]+")
# What JSON leaves as it is and TOML does not take.
DELETE = "\x7f"


def _text(value):
    return json.dumps(str(value), ensure_ascii=False).replace(DELETE, "\\u007F")


def _key(name):
    return str(name) if BARE.fullmatch(str(name)) else _text(name)


def _value(value, path):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        # repr() of a whole one has a point, of a large one an exponent: floats in TOML too, as are inf and nan.
        return repr(float(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inside = (f"{_key(name)} = {_value(below, f'{path}.{name}')}" for name, below in value.items())
        return f"{{ {', '.join(inside)} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(below, path) for below in value)}]"
    raise AnsibleFilterError(
        f"{path} is of type {type(value).__name__}; allowed are text, numbers, true, false, lists and dictionaries of"
        " these. Example: {limits: {streams_per_user: 4}}"
    )


def _lines(table, path):
    return [f"{_key(name)} = {_value(value, f'{path}.{name}')}" for name, value in table.items()]


def to_toml(tables, above=""):
    """Return the text of a dictionary of tables."""
    keys, below = [], []
    for name, value in tables.items():
        path = f"{above}.{name}" if above else str(name)
        header = ".".join([*([_key(above)] if above else []), _key(name)])
        if isinstance(value, Mapping):
            below.append([f"[{header}]", *_lines(value, path)])
        elif isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
            below += [[f"[[{header}]]", *_lines(each, path)] for each in value]
        else:
            keys += _lines({name: value}, above or "value")
    return "\n".join("\n".join([*part, ""]) for part in [*([keys] if keys else []), *below])


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filters of this file."""
        return {"to_toml": to_toml}
