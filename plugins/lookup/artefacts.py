# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup artefacts: finished builds of the module that the controller keeps."""

from __future__ import annotations

import hashlib
import json
import os
import re

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: artefacts
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Find finished builds of the module on the controller
description:
  - Reads C(*/*/manifest.json) below a directory. A build without a manifest was not finished and is not there.
  - Every build that is returned has been compared with the SHA-256 in its manifest. One that differs is an error, so
    that a damaged binary reaches no host.
options:
  _terms:
    description: One directory on the controller. It need not exist.
    type: list
    elements: path
    required: true
  match:
    description: Entries that a manifest must have, with these values. Other builds are not looked at.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Show the builds for Debian 12
  ansible.builtin.debug:
    msg: "{{ query('socket_handoff.fleet.artefacts', '/srv/ansible/artefacts', match={'debian': '12'}) }}"
"""

RETURN = r"""
_raw:
  description: The manifests, that of the newest build first, each with C(path), the binary on the controller.
  type: list
  elements: dict
"""

BINARY = "mod_socket_handoff.so"
NEEDED = ("architecture", "debian", "key", "mmn", "sha256", "sources", "version")
FORMS = {"version": re.compile(r"[0-9A-Za-z.+~-]+"), "key": re.compile(r"[0-9A-Za-z-]+")}


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return the manifests of the builds that match."""
        self.set_options(var_options=variables, direct=kwargs)
        wanted = self.get_option("match")
        found = []
        for term in terms:
            for path in self._manifests(os.path.expanduser(term)):
                manifest = self._read(path)
                if all(manifest.get(name) == value for name, value in wanted.items()):
                    binary = os.path.join(os.path.dirname(path), BINARY)
                    self._compare(binary, manifest["sha256"])
                    found.append((os.stat(path).st_mtime, {**manifest, "path": binary}))
        return [manifest for _moment, manifest in sorted(found, key=lambda pair: pair[0], reverse=True)]

    @staticmethod
    def _manifests(root):
        """Return the paths of the manifests below a directory, sorted."""
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            if "manifest.json" in names:
                found.append(os.path.join(folder, "manifest.json"))
        return found

    @staticmethod
    def _read(path):
        try:
            with open(path, encoding="utf-8") as handle:
                manifest = json.load(handle)
            missing = [name for name in NEEDED if not isinstance(manifest[name], str)]
            # They become a path on the hosts.
            missing += [name for name, form in FORMS.items() if not missing and not form.fullmatch(manifest[name])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing = [str(error)]
        if missing:
            raise AnsibleError(
                f"artefacts: {path} is no manifest of a build ({', '.join(missing)}); allowed is a JSON object with "
                f"the texts {', '.join(NEEDED)}. Remove {os.path.dirname(path)}, then run again: it is built anew."
            )
        return manifest

    @staticmethod
    def _compare(path, wanted):
        try:
            with open(path, "rb") as handle:
                actual = hashlib.sha256(handle.read()).hexdigest()
        except OSError as error:
            actual = f"none, {error.strerror}"
        if actual != wanted:
            raise AnsibleError(
                f"artefacts: {path} has the SHA-256 {actual}; allowed is {wanted}, which its manifest says. "
                f"Remove {os.path.dirname(path)}, then run again: it is built anew."
            )
