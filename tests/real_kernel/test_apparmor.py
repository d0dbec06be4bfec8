"""What only a kernel of its own shows: the AppArmor profile in force, and credentials that systemd decrypts at boot.

A host is deployed as a container, booted by Debian's kernel (``vm``), and deployed once more: now its kernel takes
profiles. A quarter of an hour under emulation; run by ``script/test real_kernel``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
VM = PROJECT / "tests/real_kernel/vm"
CONTAINER, BOOTED = "kernel12", "kernel12-booted"
TOOLS = {name: PROJECT / name for name in ("daemon-src/tests/traffic.py", "tests/chain/front_door.py")}
LOGIN_AND_1_MB = """
import sys
from urllib.parse import urlencode
sys.path.insert(0, "/root")
from front_door import Connection, Session, assert_complete
session = Session("127.0.0.1")
session.log_in("demo", "chain-test-password")
form = urlencode({"prompt": "x" * 1_000_000, "tokens": 30, "pace": 10_000}).encode()
request = session.request("POST", "/stream.php", form, {"X-CSRF-Token": session.csrf})
assert_complete(Connection(session.address, request).read_to_end(), 30)
"""


def run(*command: str | Path, timeout: float = 1200, stdin: str | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout, input=stdin, check=False
    )
    assert done.returncode == 0, (command, done.stdout[-4000:], done.stderr[-4000:])
    return done.stdout


def on(host: str, command: str, stdin: str | None = None) -> str:
    """The output of a command that root runs there."""
    return run("ssh", "-F", PROJECT / ".cache/ssh/config", host, f"sudo sh -c '{command}'", stdin=stdin)


def deploy(host: str, *arguments: str) -> str:
    inventory = PROJECT / "tests/real_kernel/inventory"
    return run("ansible-playbook", "-i", inventory, *arguments, "--limit", host)


@pytest.fixture(scope="module")
def booted() -> Iterator[str]:
    assert os.geteuid() == 0, "a disk with root's files is made by root: run script/test real_kernel as root"
    os.chdir(PROJECT)
    try:
        run("script/host", "up", CONTAINER, "12")
        on(CONTAINER, "apt-get update -q && apt-get install -q -y --no-install-recommends apparmor")
        deploy(CONTAINER, "site.yml")
        assert "AppArmorProfile" not in on(CONTAINER, "cat /etc/systemd/system/streaming-daemon.service")
        run(VM, "up", CONTAINER, BOOTED)
        deploy(BOOTED, "site.yml")
        for path in TOOLS.values():
            on(BOOTED, f"cat >/root/{path.name}", stdin=path.read_text())
        yield BOOTED
    finally:
        run(VM, "down", BOOTED)
        run("script/host", "down", CONTAINER)


def denials(host: str) -> list[str]:
    """What AppArmor has refused the daemon."""
    lines = on(host, "dmesg").splitlines()
    return [line for line in lines if 'apparmor="DENIED"' in line and 'profile="streaming-daemon"' in line]


def confinement(host: str) -> list[str]:
    return on(host, "for pid in $(pgrep -u streaming-daemon); do cat /proc/$pid/attr/current; done").splitlines()


def test_every_process_of_the_daemon_is_confined_and_needs_nothing_more(booted: str) -> None:
    assert set(confinement(booted)) == {"streaming-daemon (enforce)"}
    on(booted, "cat >/root/login.py", stdin=LOGIN_AND_1_MB)
    on(booted, "python3 /root/login.py")
    steps = ("reload=systemctl reload streaming-daemon", "restart=systemctl restart streaming-daemon")
    told = on(
        booted,
        "python3 /root/traffic.py --socket /run/streaming-daemon.sock --rate 10 "
        + " ".join(f'--step "{step}"' for step in steps),
    )
    report = json.loads(told)
    assert report["statuses"] == {"reload": 0, "restart": 0} and report["broken"] == [] and report["error"] == ""
    assert set(confinement(booted)) == {"streaming-daemon (enforce)"}
    assert denials(booted) == []


def test_the_key_is_encrypted_and_given_to_the_daemon(booted: str) -> None:
    assert on(booted, "ls /etc/streaming-daemon/credentials") == "openai_api_key.cred\n"
    assert on(booted, "cat /run/credentials/streaming-daemon.service/openai_api_key") == "sk-real-kernel-test"


# Root in the daemon's profile: what is refused here is refused by AppArmor alone.
@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/shadow').read()",
        "open('/root/front_door.py').read()",
        "open('/opt/streaming-daemon/x', 'w')",
        "open('/var/tmp/x', 'w')",
        "subprocess.run(['/usr/bin/id'], check=True)",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    ],
)
def test_the_profile_bites(booted: str, attempt: str) -> None:
    on(booted, "cat >/opt/streaming-daemon/attempt.py", stdin=f"import socket, subprocess\n{attempt}\n")
    command = "python3 -P /opt/streaming-daemon/attempt.py >/dev/null 2>&1 && echo done || echo refused"
    assert on(booted, f"{command}; rm -f /opt/streaming-daemon/x /var/tmp/x") == "done\n"
    before = len(denials(booted))
    assert (
        on(booted, f"aa-exec -p streaming-daemon -- {command}; rm -f /opt/streaming-daemon/attempt.py") == "refused\n"
    )
    assert len(denials(booted)) > before


def test_a_second_run_changes_nothing_and_the_removal_takes_the_profile(booted: str) -> None:
    assert re.search(r"changed=0 .*failed=0", deploy(booted, "site.yml"))
    deploy(booted, "playbooks/remove.yml")
    assert "streaming-daemon" not in on(booted, "cat /sys/kernel/security/apparmor/profiles; ls /etc/apparmor.d")
