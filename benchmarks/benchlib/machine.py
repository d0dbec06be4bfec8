# SPDX-License-Identifier: Apache-2.0
"""What a report says about the machine it was made on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from benchlib.tools import ROOT


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def describe(**versions: str) -> dict[str, str | int | float]:
    """Kernel, processor, the versions of what is measured, and how busy it was with other things before we began."""
    system = dict(line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines())
    return {
        "processor": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "system": system.get("PRETTY_NAME", "unknown").strip('"'),
        **versions,
        "python": platform.python_version(),
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }
