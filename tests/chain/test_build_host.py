"""A host without a compiler runs the very binary that a build host has made for it, and knows where that came from.

For the scenario `prefork`, whose web hosts have build hosts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from operator_runs import PROJECT, changes, copy_of_checkout, playbook, replace
from testinfra.host import Host

MODULE = "/usr/lib/apache2/modules/mod_socket_handoff.so"
COMPILERS = ("apxs", "apxs2", "cc", "gcc", "make")


def checksum(host: Host, path: str) -> str:
    return str(host.check_output(f"sha256sum {path}").split()[0])


def test_there_is_no_compiler_on_the_host(host: Host) -> None:
    assert [name for name in COMPILERS if host.exists(name)] == []
    for package in ("apache2-dev", "make", "gcc"):
        assert not host.package(package).is_installed, package


def test_the_binary_is_the_one_of_the_manifest_which_describes_this_host(host: Host) -> None:
    kept = host.check_output("ls -dt /var/cache/socket-handoff/*").splitlines()[-1]
    manifest = json.loads(host.check_output(f"cat {kept}/manifest.json"))
    assert manifest["sha256"] == checksum(host, f"{kept}/mod_socket_handoff.so") == checksum(host, MODULE)
    # Apache complains about the empty configuration after it has answered.
    abi = re.search(r"Module Magic Number: *(\S+)", host.run("/usr/sbin/apache2 -V -f /dev/null").stdout)
    assert abi and manifest["mmn"] == abi[1]
    assert manifest["architecture"] == host.check_output("dpkg --print-architecture")
    assert manifest["debian"] == host.check_output("sed -n 's/^VERSION_ID=\"\\(.*\\)\"/\\1/p' /etc/os-release")


def test_other_sources_are_built_once_and_going_back_builds_nothing(host: Host, name: str, tmp_path: Path) -> None:
    """An upgrade of the module, and its rollback; the build host is in neither run's limit."""
    before = checksum(host, MODULE)
    copy = copy_of_checkout(tmp_path / "checkout")
    replace(copy / "module-src/handoff_version.h", '"0.1.0"', '"0.1.1"')
    arguments = ("--tags", "apache_handoff")
    ahead = playbook(name, *arguments, play="playbooks/deploy.yml", checkout=copy)
    # Whatever came of it: the tests that follow are about this checkout.
    back = playbook(name, *arguments, play="playbooks/deploy.yml", checkout=PROJECT)
    assert ahead.returncode == 0, ahead.stdout[-5000:]
    assert any("Compile mod_socket_handoff 0.1.1" in task for task in changes(ahead.stdout))
    assert any("Restart Apache" in task for task in changes(ahead.stdout))
    assert back.returncode == 0, back.stdout[-5000:]
    assert not any("Compile" in task or "Fetch" in task for task in changes(back.stdout))
    assert checksum(host, MODULE) == before
    assert len(host.check_output("ls /var/cache/socket-handoff").splitlines()) == 2
