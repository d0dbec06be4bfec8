# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup unknown_variables: find misspelt variables of this collection."""

from __future__ import annotations

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils.inputs import unknown

DOCUMENTATION = r"""
name: unknown_variables
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Find misspelt variables of this collection
description:
  - Ansible ignores a variable that nobody reads, so a misspelt name silently leaves the default in force. This looks at
    the names of all variables of the current host and returns one sentence for each that was meant for this collection
    and that no role or playbook of it takes, with the name that was probably meant.
  - Meant for this collection is a name that begins with C(handoff_) or the name of one of its roles, or that differs
    from one of its variables by no more than a slip of the fingers, such as C(streaming_deamon_workers).
  - It reads names only, never a value, and needs no facts.
options:
  _terms:
    description: None. The lookup takes no terms.
  foreign:
    description: Names that are somebody else's variables although they look like ours.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Refuse misspelt variables
  ansible.builtin.assert:
    that: query('socket_handoff.fleet.unknown_variables') | length == 0
    fail_msg: "{{ query('socket_handoff.fleet.unknown_variables') | join(' ') }}"
"""

RETURN = r"""
_raw:
  description: One sentence for each unknown variable, sorted by its name.
  type: list
  elements: str
  sample: ['apache_handoff_mmp is not known; did you mean apache_handoff_mpm?']
"""


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return the sentences."""
        self.set_options(var_options=variables, direct=kwargs)
        if terms:
            raise AnsibleError(
                "unknown_variables takes no terms. Example: query('socket_handoff.fleet.unknown_variables')"
            )
        found = unknown(variables or {}, self.get_option("foreign"))
        return [
            f"{name} is not known; did you mean {nearest}?"
            if nearest
            else f"{name} is not known, and nothing is called alike."
            for name, nearest in found.items()
        ]
