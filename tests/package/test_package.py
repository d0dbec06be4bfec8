"""A host that gets the module as a package: installed, upgraded, taken back, refused, purged. One story, in order."""

from __future__ import annotations

import json
import subprocess

from conftest import NAME, Packages
from front_door import Session, assert_complete
from operator_runs import changes, playbook
from testinfra.host import Host

MODULE = "/usr/lib/apache2/modules/mod_socket_handoff.so"
DEPLOY = {"play": "playbooks/deploy.yml"}


def deploy(
    name: str, packages: Packages, version: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Deploy Apache's part with one version of the package, from the controller."""
    variables = {
        "apache_handoff_package_dir": str(packages.directory),
        "apache_handoff_package_version": version,
        **more,
    }
    chosen = arguments or ("--tags", "apache_handoff")
    return playbook(name, *chosen, "--extra-vars", json.dumps(variables), **DEPLOY)


def installed(host: Host) -> str:
    return str(host.check_output(f"dpkg-query --show --showformat '${{Version}}' {NAME}"))


def main_pid(host: Host) -> str:
    return str(host.check_output("systemctl show --property=MainPID --value apache2"))


def streams(host: Host) -> None:
    session = Session(host.check_output("hostname -I").split()[0])
    session.log_in("demo", "chain-test-password")
    stream = session.open_stream(tokens=5, pace=50)
    assert_complete(stream.read_to_end(), 5)


def test_two_checkouts_give_the_same_package(packages: Packages) -> None:
    assert packages.again.read_bytes() == packages.path(packages.good).read_bytes()


def test_check_mode_says_what_it_would_install_and_the_run_installs_it(
    host: Host, name: str, packages: Packages
) -> None:
    predicted = deploy(name, packages, packages.good, "--check")
    assert predicted.returncode == 0, predicted.stdout[-4000:]
    assert f"Would install {NAME} {packages.good}" in " ".join(predicted.stdout.split())
    assert not host.exists("apache2")
    done = deploy(name, packages, packages.good, "--diff")
    assert done.returncode == 0, done.stdout[-5000:]
    assert installed(host) == packages.good
    assert NAME in host.check_output(f"dpkg --search {MODULE}")
    assert not host.exists("apxs") and not host.exists("make")
    streams(host)


def test_a_second_run_changes_nothing(name: str, packages: Packages) -> None:
    again = deploy(name, packages, packages.good, "--diff")
    assert again.returncode == 0, again.stdout[-4000:]
    assert changes(again.stdout) == []


def test_another_version_restarts_apache_and_the_one_before_comes_back_from_the_host_itself(
    host: Host, name: str, packages: Packages
) -> None:
    before = main_pid(host)
    ahead = deploy(name, packages, packages.ahead)
    assert ahead.returncode == 0, ahead.stdout[-4000:]
    assert installed(host) == packages.ahead and main_pid(host) != before
    before = main_pid(host)
    back = deploy(name, packages, packages.good)
    assert back.returncode == 0, back.stdout[-4000:]
    assert "Copy it from the controller" not in changes(back.stdout)
    assert installed(host) == packages.good and main_pid(host) != before
    streams(host)


def test_a_package_that_apache_cannot_load_is_not_installed(host: Host, name: str, packages: Packages) -> None:
    before = main_pid(host), host.check_output(f"sha256sum {MODULE}")
    refused = deploy(name, packages, packages.broken)
    assert refused.returncode != 0
    assert "Apache refuses the new configuration; nothing was changed" in " ".join(refused.stdout.split())
    assert installed(host) == packages.good
    assert (main_pid(host), host.check_output(f"sha256sum {MODULE}")) == before
    streams(host)


def test_the_package_comes_back_where_a_later_step_fails(host: Host, name: str, packages: Packages) -> None:
    """Apache cannot be restarted, which shows when the package is there already."""
    before = host.check_output(f"sha256sum {MODULE}")
    host.check_output("systemctl mask --runtime apache2.service && systemctl daemon-reload")
    try:
        failed = deploy(name, packages, packages.ahead)
    finally:
        host.check_output("systemctl unmask --runtime apache2.service && systemctl daemon-reload")
    assert failed.returncode != 0
    assert installed(host) == packages.good, failed.stdout[-4000:]
    assert host.check_output(f"sha256sum {MODULE}") == before
    again = deploy(name, packages, packages.good)
    assert again.returncode == 0, again.stdout[-4000:]
    streams(host)


def test_no_other_way_writes_over_the_package(host: Host, name: str, packages: Packages) -> None:
    refused = deploy(name, packages, packages.good, apache_handoff_build="on_host")
    assert refused.returncode != 0
    assert f"{MODULE} belongs to the package {NAME}" in " ".join(refused.stdout.split())
    assert NAME in host.check_output(f"dpkg --verify {NAME}; dpkg --search {MODULE}")


def test_the_removal_purges_the_package_that_the_role_has_installed(host: Host, name: str) -> None:
    predicted = playbook(name, "--check", play="playbooks/remove.yml")
    done = playbook(name, play="playbooks/remove.yml")
    assert done.returncode == 0, done.stdout[-4000:]
    assert changes(predicted.stdout) == changes(done.stdout)
    assert host.run(f"dpkg-query --show {NAME}").rc != 0
    left = host.check_output("find /etc/apache2 /usr/lib/apache2 /var/lib /var/cache -name '*socket*handoff*'")
    assert left == ""
    assert host.service("apache2").is_running
