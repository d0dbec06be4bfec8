# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup source_tree: read a directory of sources on the controller as one parcel."""

from __future__ import annotations

import fnmatch
import os

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.socket_handoff.fleet.plugins.module_utils.source_tree import digest_of, pack

DOCUMENTATION = r"""
name: source_tree
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Read a directory of sources on the controller as one parcel with a digest
description:
  - Reads every regular file below a directory whose name matches one of the patterns and returns the digest that
    names this exact set of files, together with a parcel that M(socket_handoff.fleet.source_tree) writes on a host.
  - The digest depends on relative paths and contents only, so the same checkout gives the same digest everywhere.
  - Hidden entries, C(__pycache__), C(tests) and C(build) directories below the start are left out.
options:
  _terms:
    description: Directories on the controller.
    type: list
    elements: path
    required: true
  patterns:
    description: Shell patterns of file names to take.
    type: list
    elements: str
    default: ['*']
"""

EXAMPLES = r"""
- name: Show which release this checkout would deploy
  ansible.builtin.debug:
    msg: "{{ lookup('socket_handoff.fleet.source_tree', 'daemon-src/streaming_daemon', patterns=['*.py']).digest }}"
"""

RETURN = r"""
_raw:
  description: One dictionary per directory.
  type: list
  elements: dict
  contains:
    digest:
      description: SHA-256 over relative paths and contents, hexadecimal.
      type: str
    files:
      description: Relative paths, sorted.
      type: list
      elements: str
    parcel:
      description: The packed tree for the module of the same name.
      type: str
"""

SKIPPED = {"__pycache__", "tests", "build"}


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return one dictionary for every directory named."""
        self.set_options(var_options=variables, direct=kwargs)
        return [self._read(term, self.get_option("patterns")) for term in terms]

    @staticmethod
    def _read(root, patterns):
        root = os.path.realpath(os.path.expanduser(root))
        if not os.path.isdir(root):
            raise AnsibleError(
                f"source_tree: {root} is not a directory on the controller. "
                "Run from a complete checkout or an installed collection."
            )
        files = {}
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED and not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(folder, name)
                wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                if name.startswith(".") or not wanted or not os.path.isfile(path):
                    continue
                with open(path, "rb") as handle:
                    files[os.path.relpath(path, root).replace(os.sep, "/")] = handle.read()
        if not files:
            raise AnsibleError(f"source_tree: no file below {root} matches {', '.join(patterns)}.")
        return {"digest": digest_of(files), "files": sorted(files), "parcel": pack(files)}
