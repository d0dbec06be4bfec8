"""Hosts that serve with an earlier version, and what an operator brings to them and takes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chain"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fleet"))

from ledger import Ledger, streaming
from operator_runs import PROJECT, address_of

PASSWORD = "chain-test-password"


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the version that comes before this one: the last tag, or what tests/upgrade/previous names."""
    describe = ["git", "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^"]
    commit = subprocess.run(describe, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        lines = Path(__file__).with_name("previous").read_text().splitlines()
        (commit,) = [line for line in lines if line and not line.startswith("#")]
    known = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=PROJECT, check=False).returncode == 0
    assert known, f"this clone's history does not have {commit}, the version to upgrade from: git fetch --unshallow"
    checkout = tmp_path_factory.mktemp("previous")
    archive = subprocess.run(["git", "archive", commit], cwd=PROJECT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", "--directory", str(checkout)], input=archive, check=True)
    return checkout


@pytest.fixture(scope="module")
def name(host: Host) -> str:
    """The host's name in the scenario's inventory."""
    return str(host.check_output("hostname"))


@pytest.fixture(scope="module")
def address(name: str) -> str:
    """Where its front door is."""
    return address_of(name)


@pytest.fixture(scope="session")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that says to users, while it is there, that they get no new connection: all of a load balancer here."""
    return tmp_path_factory.mktemp("balancer") / "drained"


@pytest.fixture
def users(address: str, drained: Path) -> Iterator[Ledger]:
    """Users with answers of a quarter of a minute, from before a change until a test asks what they got."""
    # A rollout that failed may have left it.
    drained.unlink(missing_ok=True)
    options = ("--plain", "--users", "4", "--tokens", "150", "--pace", "10", "--unless", str(drained))
    with streaming(address, PASSWORD, *options) as ledger:
        yield ledger
