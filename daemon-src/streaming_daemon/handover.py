"""Who takes handoffs between two supervisors: the workers of the first, until those of the second do.

A new supervisor needs a third of a second and more until a worker of its own is ready, and after a crash systemd waits
before it starts one. Workers whose supervisor has gone are as able to serve as they were before, so they go on for
``SECONDS`` at most. They stop as soon as the next supervisor says that it serves, by putting another mark into the
runtime directory before the first of its workers is told to. So what is answered after ``systemctl restart`` has
returned is answered by the new ones.

Without a runtime directory there is no mark to watch, and workers stop at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_NAME = "serving"
# A start on a busy small machine, and RestartSec= before it. After a stop, this is how long handoffs are still taken.
SECONDS = 3.0


def mark_path(environ: Mapping[str, str]) -> Path | None:
    """Where the mark is, for a service with a RuntimeDirectory; None without one."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(runtime) / _NAME if runtime else None


def announce(path: Path | None) -> None:
    """Say that from now on this supervisor's workers take handoffs; raises OSError."""
    if path is None:
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(os.urandom(16).hex())
    fresh.replace(path)


def read_mark(path: Path | None) -> str:
    """The mark as it is now, empty where there is none."""
    if path is None:
        return ""
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return ""
