"""Hosts in trouble: the run fails with the reason, and what served before goes on serving, byte by byte the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import testinfra
from conftest import refused
from front_door import Session
from operator_runs import PROJECT, playbook, replace
from testinfra.host import Host

APACHE = ("--tags", "apache_handoff", "--skip-tags", "verify")
DAEMON = ("--tags", "streaming_daemon", "--skip-tags", "verify")
Serving = Callable[[], None]


def variables(**values: object) -> tuple[str, str]:
    return "--extra-vars", json.dumps(values)


@contextmanager
def full_disk(host: Host, folder: str) -> Iterator[None]:
    """Put a file system with no room over a directory, with all that was in it."""
    copy = "/root/full-disk-copy"
    host.check_output(f"cp -a {folder} {copy} && mount -t tmpfs -o mode=755 tmpfs {folder} && cp -a {copy}/. {folder}/")
    size = host.check_output(f"du --summarize --block-size=4096 {folder}").split()[0]
    # One block is left: a directory can be made, a file of some size cannot be written.
    host.check_output(f"mount -o remount,size={(int(size) + 1) * 4096} {folder}")
    host.run(f"head -c 1G /dev/zero >{folder}/.fill 2>/dev/null")
    try:
        yield
    finally:
        host.check_output(f"rm -rf {copy} && umount --lazy {folder}")


def test_a_full_disk_below_apaches_configuration(host: Host, name: str, serving: Serving) -> None:
    with full_disk(host, "/etc/apache2"):
        aliases = [f"alias{n}.example" for n in range(200)]
        run = playbook(
            name, "--tags", "handoff_app", "--skip-tags", "verify", *variables(handoff_app_server_aliases=aliases)
        )
        refused(run, "No space left on device")
        host.check_output("rm /etc/apache2/.fill")
        serving()


def test_a_full_disk_where_releases_lie(host: Host, name: str, serving: Serving, altered: Path) -> None:
    replace(altered / "daemon-src/streaming_daemon/__init__.py", '__version__ = "0.', '__version__ = "8.')
    with full_disk(host, "/opt/streaming-daemon/releases"):
        run = playbook(name, *DAEMON, checkout=altered)
        refused(run, "No space left on device", "Free space or mend permissions")
        assert "8." not in host.check_output("ls -A /opt/streaming-daemon/releases")
        serving()


def test_a_configuration_of_apache_that_was_broken_before(host: Host, name: str, serving: Serving) -> None:
    broken = "/etc/apache2/conf-enabled/by-hand.conf"
    host.check_output(f"echo 'Nonsense On' >{broken}")
    try:
        run = playbook(name, *APACHE, *variables(apache_handoff_connect_timeout_ms=152))
        refused(run, "Apache's configuration was broken before this change; mend it first", broken, "Nonsense")
    finally:
        host.check_output(f"rm {broken}")
    serving()


def test_a_port_that_another_program_holds(host: Host, name: str, serving: Serving) -> None:
    host.check_output("systemd-run --unit=in-the-way /usr/bin/python3 -m http.server 8088")
    try:
        host.check_output("for n in $(seq 100); do ss -Hltn sport = 8088 | grep -q . && exit; sleep 0.1; done; exit 1")
        run = playbook(name, "--tags", "handoff_app", "--skip-tags", "verify", *variables(handoff_app_port=8088))
        refused(run, "port 8088 is held by python3, not by Apache", "Choose another port")
    finally:
        host.check_output("systemctl stop in-the-way")
    serving()


# What is broken in the checkout, and what the operator is told.
BROKEN = {
    "a daemon that crashes when it starts": (
        ("daemon-src/streaming_daemon/worker.py", "def run(", "raise SystemExit('broken on purpose')\n\n\ndef run("),
        ["Reload the daemon", "broken on purpose", "are those from before this run", "serves with them"],
    ),
    "a unit that systemd refuses": (
        (
            "templates/etc/systemd/system/streaming-daemon.service.j2",
            "ExecStart=/usr/bin/python3",
            "ExecStart=/usr/bin/none",
        ),
        ["Let systemd judge the units", "/usr/bin/none", "serves with them"],
    ),
    "a unit that looks good and does not start": (
        (
            "templates/etc/systemd/system/streaming-daemon.service.j2",
            "ExecReload=",
            "ExecStartPre=/bin/false\nExecReload=",
        ),
        ["Restart the daemon", "are those from before this run", "serves with them"],
    ),
    "a configuration that the daemon refuses": (
        ("templates/etc/streaming-daemon/config.toml.j2", "[listen]", "[listen]\nnonsense = 1"),
        ["Write the configuration, if the new release takes it", "nonsense", "serves with them"],
    ),
}


@pytest.mark.parametrize("trouble", BROKEN)
def test_what_is_broken_is_refused_and_nothing_of_it_stays(
    name: str, serving: Serving, altered: Path, trouble: str
) -> None:
    (path, old, new), said = BROKEN[trouble]
    replace(altered / path, old, new)
    refused(playbook(name, *DAEMON, checkout=altered), *said)
    serving()


def test_a_directory_that_cannot_be_written(host: Host, name: str, serving: Serving) -> None:
    folder = "/etc/apache2/mods-available"
    host.check_output(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
    try:
        run = playbook(name, *APACHE, *variables(apache_handoff_connect_timeout_ms=152))
        refused(run, "Read-only file system", "was taken back")
    finally:
        host.check_output(f"umount {folder}")
    serving()


def test_wrong_permissions_are_mended(host: Host, name: str, serving: Serving) -> None:
    wrong = "/etc/streaming-daemon/config.toml /opt/streaming-daemon /etc/handoff-app/config.php"
    before = host.check_output(f"stat -c '%a %U %G' {wrong}")
    host.check_output(f"chown nobody {wrong} && chmod 700 {wrong}")
    run = playbook(name, "--skip-tags", "verify")
    assert run.returncode == 0, run.stdout[-4000:]
    assert host.check_output(f"stat -c '%a %U %G' {wrong}") == before
    serving()


@pytest.mark.usefixtures("session")
def test_after_all_this_there_is_nothing_to_mend(host: Host, name: str) -> None:
    run = playbook(name, "--check", "--diff")
    assert f"{name} " in run.stdout and "changed=0 " in run.stdout, run.stdout[-3000:]
    assert "failed=0 " in run.stdout
    assert host.run("ls /var/lib/socket-handoff/*.unfinished").rc != 0


def test_a_first_installation_that_fails_leaves_nothing_for_the_next_boot(
    host: Host, name: str, session: Session, altered: Path
) -> None:
    assert playbook(name, play="playbooks/remove.yml").returncode == 0
    (path, old, new), said = BROKEN["a daemon that crashes when it starts"]
    replace(altered / path, old, new)
    refused(playbook(name, *DAEMON, checkout=altered), *said[1:2], "The daemon was not here before")
    units = "streaming-daemon.socket streaming-daemon.service"
    assert host.run(f"systemctl is-enabled {units}").stdout.split().count("enabled") == 0
    assert host.run(f"systemctl is-active {units}").stdout.split().count("active") == 0
    left = host.run(
        "ls /etc/systemd/system/streaming-daemon.* /etc/streaming-daemon/config.toml /opt/streaming-daemon/current"
    )
    assert left.stdout == ""
    assert playbook(name, play="playbooks/remove.yml").returncode == 0


def test_a_host_without_a_source_of_packages_is_told_so_and_left_alone() -> None:
    config = PROJECT / ".cache" / "ssh" / "config"
    empty: Host = testinfra.get_host("ssh://hostile13", ssh_config=str(config), sudo=True)
    empty.check_output(
        "mv /etc/apt/sources.list /etc/apt/sources.list.away; mkdir -p /root/away; "
        "find /etc/apt/sources.list.d -type f -exec mv {} /root/away ';'; rm -rf /var/lib/apt/lists/*"
    )
    run = playbook("hostile13")
    refused(run, "python3-httptools")
    for path in ("/etc/streaming-daemon", "/opt/streaming-daemon", "/etc/systemd/system/streaming-daemon.service"):
        assert not empty.file(path).exists, path
    assert not empty.user("streaming-daemon").exists
