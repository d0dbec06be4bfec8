# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Lookup daemon_config: what the streaming daemon says to a configuration, asked on the controller."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: daemon_config
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Let the streaming daemon judge a configuration on the controller
description:
  - Runs C(python3 -m streaming_daemon --check) of this collection on the controller, with the Python that runs
    Ansible, so that a wrong file is known before any host is touched. The daemon never repeats a value that may be a
    key.
options:
  _terms:
    description: Texts in TOML.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Refuse a wrong file
  ansible.builtin.assert:
    that: query('socket_handoff.fleet.daemon_config', lookup('ansible.builtin.file', 'config.toml')) | length == 0
"""

RETURN = r"""
_raw:
  description: >-
    What is wrong, one line each, without the file's name and the line's number. Nothing, where all texts are right.
  type: list
  elements: str
"""

SOURCE = Path(__file__).resolve().parents[2] / "daemon-src"
PLACE = re.compile(r"/dev/stdin:(?:\d+:)? ")
REFUSED = 2


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return the daemon's complaints about all texts."""
        self.set_options(var_options=variables, direct=kwargs)
        complaints = []
        for text in terms:
            done = subprocess.run(
                [sys.executable, "-B", "-m", "streaming_daemon", "--check", "--config", "/dev/stdin"],
                env={**os.environ, "PYTHONPATH": str(SOURCE)},
                input=text,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                continue
            found = [line for line in done.stderr.splitlines() if PLACE.match(line)]
            if done.returncode != REFUSED or not found:
                raise AnsibleError(f"streaming_daemon --check ended with {done.returncode}: {done.stderr[-2000:]}")
            complaints += [PLACE.sub("", line, count=1) for line in found]
        return complaints
