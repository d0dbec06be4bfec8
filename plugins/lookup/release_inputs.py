# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup release_inputs: one digest of everything that a release of this host is made from."""

from __future__ import annotations

import hashlib
import json
import re

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils.inputs import ROOT, role_options

DOCUMENTATION = r"""
name: release_inputs
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: One digest of everything that a release of this host is made from
description:
  - Taken over the sources of the module, the daemon and the application, the templates, the plugins, the
    roles, and the values that the current host has for their variables.
  - Secrets do not go into it, so a rollout that brings nothing but another secret needs another name.
options:
  _terms:
    description: None. The lookup takes no terms.
  of:
    description:
      - With V(files), the values of variables are left out. They are another host's for another host, and where roles
        are included and not imported, their defaults are not among them.
    type: str
    choices: [files, all]
    default: all
"""

EXAMPLES = r"""
- name: Tell whether this host would get anything new
  ansible.builtin.debug:
    msg: "{{ lookup('socket_handoff.fleet.release_inputs') }}"
"""

RETURN = r"""
_raw:
  description: The digest.
  type: list
  elements: str
"""

ROLES = ("streaming_daemon", "apache_handoff", "handoff_app")
TREES = (
    ("module-src", (".c", ".h", "Makefile")),
    ("daemon-src/streaming_daemon", (".py",)),
    # As in the vars of the role.
    ("examples/php-app", (".php", ".css", ".js", ".svg", ".html", ".ico", ".png")),
    ("templates/etc", (".j2",)),
    *((f"roles/{role}", (".yml",)) for role in ROLES),
)
# Plugins that the roles name, but for those that only look: these bring nothing to a host.
NAMED = re.compile(r"\bsocket_handoff\.fleet\.(\w+)")
LOOK = {"handoff_probe", "unknown_variables", *ROLES}
# Other trees' tests and builds are no part of a release.
SKIPPED = {"tests", "build", "__pycache__", "debian"}
CREDENTIALS = "streaming_daemon_credentials"
# What a host is deployed with, not what it gets.
WITHOUT = ("handoff_app_probe_", "handoff_foreign_variables", "handoff_app_password", "streaming_daemon_keep_releases")


def digest_of_trees() -> str:
    """Return the digest of the files that a release is made from."""
    total, named = hashlib.sha256(), set()
    for tree, endings in TREES:
        root = ROOT / tree
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and path.name.endswith(endings) and not SKIPPED & set(inside.parts[:-1]):
                content = path.read_bytes()
                if tree.startswith("roles/"):
                    named |= set(NAMED.findall(content.decode()))
                total.update(f"{tree}/{inside} {hashlib.sha256(content).hexdigest()}\n".encode())
    for path in sorted((ROOT / "plugins").glob("*/*.py")):
        if path.stem in named - LOOK:
            inside = path.relative_to(ROOT)
            total.update(f"{inside} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return the digest."""
        self.set_options(var_options=variables, direct=kwargs)
        if terms:
            raise AnsibleError("release_inputs takes no terms. Example: lookup('socket_handoff.fleet.release_inputs')")
        if self.get_option("of") == "files":
            return [digest_of_trees()]
        values = {}
        for role in ROLES:
            for name, option in role_options()[role]["main"].items():
                if name not in (variables or {}) or name.startswith(WITHOUT):
                    continue
                value = self._templar.template(variables[name])
                if name == CREDENTIALS:
                    values[name] = sorted(value)  # which there are, not what they are
                elif not option.get("no_log"):
                    values[name] = value
        text = json.dumps([digest_of_trees(), values], sort_keys=True, default=str)
        return [hashlib.sha256(text.encode()).hexdigest()]
