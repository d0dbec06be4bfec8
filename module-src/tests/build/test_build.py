# SPDX-License-Identifier: Apache-2.0
"""The same sources give the same bytes, wherever, whenever and by whomever they are compiled; the package agrees."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2]
MODULE = "mod_socket_handoff"


def sources(target: Path, moment: float) -> Path:
    """A copy of what is compiled, all of one moment (seconds since 1970)."""
    target.mkdir(parents=True)
    for path in [ROOM / "Makefile", *ROOM.glob("*.[ch]")]:
        os.utime(shutil.copy(path, target), (moment, moment))
    return target


def build(where: Path, umask: int, user: str | None = None, **environment: str) -> bytes:
    """Compile; return the module's bytes."""
    for path in [where, *where.rglob("*")]:
        if user is not None:
            os.chown(path, pwd.getpwnam(user).pw_uid, -1)
    done = subprocess.run(
        ["make", "-j2", "-C", where],
        env={"PATH": os.environ["PATH"], **environment},
        user=user,
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (where / f"build/{MODULE}.so").read_bytes()


@pytest.fixture
def anywhere() -> Iterator[Path]:
    """A directory that every user may enter; pytest closes its own to others, again at the start of any other run."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_two_builds_in_other_places_at_other_times_by_other_users_are_the_same_bytes(anywhere: Path) -> None:
    here = build(sources(anywhere / "a", 1_000_000_000), 0o022, LC_ALL="C", TZ="UTC", HOME="/")
    there = build(
        sources(anywhere / "somewhere-else/and/deeper", 1_700_000_000),
        0o077,
        "nobody" if os.geteuid() == 0 else None,
        **{"LC_ALL": "C.UTF-8", "TZ": "Pacific/Auckland", "HOME": "/nonexistent", "SOURCE_DATE_EPOCH": "5"},
    )
    assert hashlib.sha256(here).hexdigest() == hashlib.sha256(there).hexdigest()
    assert str(anywhere).encode() not in here, "the directory is in the binary"


def test_the_package_has_the_version_of_the_sources() -> None:
    version = re.search(r'HANDOFF_VERSION "(.+)"', (ROOM / "handoff_version.h").read_text())
    packaged = re.match(r"libapache2-mod-socket-handoff \((.+)\) ", (ROOM / "debian/changelog").read_text())
    assert version and packaged and packaged[1] == version[1]


def test_the_package_is_not_enabled_by_its_installation() -> None:
    assert "dh_apache2 --noenable" in (ROOM / "debian/rules").read_text()


def test_the_package_loads_what_the_role_loads() -> None:
    template = (ROOM.parent / "templates/etc/apache2/mods-available/socket_handoff.load.j2").read_text()
    (loads,) = re.findall(r"^LoadModule .*$", template, re.M)
    path = f"/usr/lib/apache2/modules/{MODULE}.so"
    assert (ROOM / "debian/socket_handoff.load").read_text() == (
        loads.replace("{{ __apache_handoff_module_path }}", path) + "\n"
    )
