"""Packages of three versions for the release of a test host: this checkout's, one that is ahead, and a broken one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chain"))
from operator_runs import PROJECT, copy_of_checkout, replace

NAME = "libapache2-mod-socket-handoff"


@dataclasses.dataclass
class Packages:
    """Where packages are on the controller, and their versions from the oldest to the newest."""

    directory: Path
    good: str
    ahead: str
    broken: str
    again: Path
    """The good one, built once more in another checkout."""

    def path(self, version: str) -> Path:
        (found,) = self.directory.glob(f"{NAME}_{version}_*.deb")
        return found


def build(checkout: Path, release: str, directory: Path) -> Path:
    """Run script/debian-package of a checkout."""
    done = subprocess.run(
        ["script/debian-package", release, directory], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Path(done.stdout.splitlines()[0])


def somebodys_checkout(target: Path) -> Path:
    """Somebody else's checkout of what is here."""
    copy_of_checkout(target)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    subprocess.run(["git", "add", "."], cwd=target, check=True)
    return target


def break_package(good: Path, version: str, target: Path, work: Path) -> None:
    """Make a package whose binary Apache cannot load."""
    subprocess.run(["dpkg-deb", "--raw-extract", good, work], check=True)
    replace(work / "DEBIAN/control", f"Version: {good.name.split('_')[1]}", f"Version: {version}")
    (work / "usr/lib/apache2/modules/mod_socket_handoff.so").write_text("not a module\n")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", work, target], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def name(host: Host) -> str:
    """The host's name in the scenario's inventory."""
    return str(host.check_output("hostname"))


@pytest.fixture(scope="module")
def packages(name: str, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    release, work = name[-2:], tmp_path_factory.mktemp(name)
    directory = work / "packages"
    good = build(PROJECT, release, directory)
    checkout = somebodys_checkout(work / "checkout")
    again = build(checkout, release, work / "again")
    replace(checkout / "module-src/handoff_version.h", '"0.1.0"', '"0.1.1"')
    replace(checkout / "module-src/debian/changelog", "(0.1.0)", "(0.1.1)")
    ahead = build(checkout, release, directory)
    version = re.sub(r"^0\.1\.0", "0.1.2", good.name.split("_")[1])
    break_package(good, version, directory / good.name.replace(good.name.split("_")[1], version), work / "raw")
    return Packages(directory, good.name.split("_")[1], ahead.name.split("_")[1], version, again)
