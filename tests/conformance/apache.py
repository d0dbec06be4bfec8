"""A private httpd with the module, one per MPM, that hands clients to every daemon under test."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "module-src" / "tests" / "integration"))

from handoff_httpd import Httpd, writable_run  # noqa: E402  (it lives with the module's own tests)

MPMS = ("event", "worker", "prefork")


def build_module() -> None:
    """Compile the module and the handler that plays the application. Raises CalledProcessError."""
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "module-src"), "all", "build/mod_handoff_test.so"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def sockets_directory() -> Path | None:
    """A directory of our own below /run, where targets have to be; None where this user cannot make one."""
    parent = writable_run()
    if parent is None:
        return None
    path = Path(tempfile.mkdtemp(prefix="handoff-conformance-", dir=parent))
    path.chmod(0o755)
    return path


def start(mpm: str, run: Path, sockets: dict[str, tuple[str, str]]) -> Httpd:
    """``sockets``: per daemon its socket without and with acknowledgement. The port is named "main"."""
    httpd = Httpd(mpm=mpm, run=run)
    targets = ""
    for name, (plain, ack) in sockets.items():
        targets += f"SocketHandoffTarget {name}-plain unix:{plain} timeout=10s\n"
        targets += f"SocketHandoffTarget {name}-envelope unix:{plain} envelope=on timeout=10s\n"
        targets += f"SocketHandoffTarget {name}-ack unix:{ack} envelope=on ack=on timeout=10s\n"
    httpd.start(f"""
Listen 127.0.0.1:{httpd.port("main")}
DocumentRoot {httpd.root}/htdocs
{targets}
SocketHandoffAllow All
<Location /t>
    SetHandler handoff-test
</Location>
""")
    return httpd


def complaints(httpd: Httpd) -> list[str]:
    """Lines of the error log that no handoff may cause."""
    from handoff_httpd import PROBLEM

    return [line for line in httpd.take_log() if PROBLEM.search(line)]


def may_run() -> str:
    """Why no httpd can be started here; nothing where it can."""
    if not os.access("/usr/bin/apxs", os.X_OK):
        return "apxs is not installed (Debian's package apache2-dev)"
    return "" if writable_run() is not None else "neither /run nor /run/user/<uid> is writable for this user"
