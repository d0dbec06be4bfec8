# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup playbook_options: the argument spec of a playbook of this collection."""

from __future__ import annotations

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils.inputs import playbook_options

DOCUMENTATION = r"""
name: playbook_options
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Return the argument spec of a playbook of this collection
description:
  - Reads C(playbooks/<name>.meta.yml), for M(ansible.builtin.validate_argument_spec). The file has the form that the
    play keyword C(validate_argspec) of ansible-core 2.20 reads; this works with older lines too, and wherever the
    playbook is imported from.
options:
  _terms:
    description: Names of playbooks, such as V(deploy).
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Check what the playbook was told
  ansible.builtin.validate_argument_spec:
    argument_spec: "{{ lookup('socket_handoff.fleet.playbook_options', 'deploy') }}"
"""

RETURN = r"""
_raw:
  description: One dictionary of options for each playbook.
  type: list
  elements: dict
"""


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return one dictionary for every playbook named."""
        self.set_options(var_options=variables, direct=kwargs)
        specs = playbook_options()
        for term in terms:
            if term not in specs:
                raise AnsibleError(
                    f"playbook_options: {term} is no playbook with a spec; allowed are {', '.join(sorted(specs))}. "
                    "Example: deploy"
                )
        return [specs[term] for term in terms]
