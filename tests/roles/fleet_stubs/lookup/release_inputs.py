# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""In place of the digest of what a release is made from: what the case has written down."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.plugins.lookup import LookupBase


class LookupModule(LookupBase):
    """Ansible's entry point."""

    def run(self, terms, variables=None, **kwargs):
        """Return the digest; of a second line where the log says that the canary has gone through the front door."""
        place = Path(os.environ["FLEET_STUBS"])
        first, *more = (place / "inputs").read_text().splitlines()
        probed = (place / "log").exists() and "handoff_app probe" in (place / "log").read_text()
        return [more[0] if more and probed else first]
