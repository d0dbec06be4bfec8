"""A HAProxy that somebody else had configured gets the role, loses it again, and is what it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import testinfra
from operator_runs import PROJECT, playbook
from test_remove import differences, succeeded
from testinfra.host import Host

Picture = Callable[[], dict[str, object]]
REMOVE = "playbooks/remove.yml"
NAME = "removelb"
NOTES = "/var/lib/socket-handoff"
REDIRECT = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/"
KEPT = f"{NOTES}/foreign/etc/haproxy/haproxy.cfg"


@pytest.fixture(scope="module")
def host() -> Host:
    """Not one of the scenario's web hosts, to which --hosts leads all other tests here."""
    return testinfra.get_host(f"ssh://{NAME}", ssh_config=str(PROJECT / ".cache/ssh/config"), sudo=True)


@pytest.fixture(scope="module")
def virgin(picture: Picture) -> dict[str, object]:
    return picture()


def test_check_mode_before_anything_was_done_changes_nothing(virgin: dict[str, object], picture: Picture) -> None:
    assert succeeded(playbook(NAME, "--check", "--diff", "--skip-tags", "verify"))
    assert differences(virgin, picture()) == {}


def test_a_configuration_by_hand_is_kept_for_root_alone_and_not_shown(host: Host, virgin: dict[str, object]) -> None:
    done = playbook(NAME, "--diff", "--skip-tags", "verify")
    succeeded(done)
    assert "s3cr3t" not in done.stdout
    assert host.file(KEPT).contains("s3cr3t")
    assert host.run(f"runuser -u nobody -- cat {KEPT}").rc != 0
    assert host.check_output(REDIRECT) == "308"
    assert succeeded(playbook(NAME, "--check", "--skip-tags", "verify")) == []


def test_what_haproxy_or_a_port_refuses_leaves_the_old_configuration_serving(host: Host) -> None:
    before = host.check_output("cat /etc/haproxy/haproxy.cfg /etc/systemd/system/haproxy.service.d/*")
    # The first is no certificate, which HAProxy's own test finds before the file is in place. The second is sshd's,
    # which shows only when the new process begins.
    self_signed = "handoff_lb_certificate_self_signed"
    for variables in ({self_signed: False, "handoff_lb_certificate_path": "/etc/hosts"}, {"handoff_lb_http_port": 22}):
        done = playbook(NAME, "-e", json.dumps(variables))
        assert done.returncode != 0
        assert "files are those from before this run, and HAProxy serves with them" in " ".join(done.stdout.split())
        assert host.check_output("cat /etc/haproxy/haproxy.cfg /etc/systemd/system/haproxy.service.d/*") == before
        assert host.check_output(REDIRECT) == "308"
        assert not host.file(f"{NOTES}/handoff-lb.unfinished").exists


def test_a_certificate_of_the_operator_is_used_and_its_key_shown_nowhere(host: Host, tmp_path: Path) -> None:
    key, certificate, pem = (tmp_path / name for name in ("key", "crt", "pem"))
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj /CN=operators.example"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], capture_output=True, check=True)
    pem.write_text(certificate.read_text() + key.read_text())
    secret = key.read_text().splitlines()[1]
    given = {"handoff_lb_certificate_self_signed": False, "handoff_lb_certificate_file": str(pem)}
    done = playbook(NAME, "--diff", "-vvv", "--skip-tags", "verify", "-e", json.dumps(given))
    assert done.returncode == 0, done.stdout[-5000:]
    assert secret not in done.stdout + done.stderr
    assert "operators.example" in host.check_output("openssl s_client -connect 127.0.0.1:443 </dev/null 2>&1")
    # Not the key itself: sudo's log has the command.
    pattern = f"[{secret[0]}]{secret[1:]}"
    found = host.check_output(f"grep -rl -e '{pattern}' /etc /var/lib /var/log /run 2>/dev/null || true").split()
    assert len(found) == 1 and found[0].startswith("/etc/haproxy/socket-handoff/"), found
    assert (host.file(found[0]).mode, host.file(found[0]).user) == (0o600, "root")


def test_the_removal_does_what_check_mode_said_and_haproxy_never_stops(
    host: Host, virgin: dict[str, object], picture: Picture
) -> None:
    before, main = picture(), host.check_output("systemctl show -p MainPID --value haproxy")
    predicted = succeeded(playbook(NAME, "--check", "--diff", play=REMOVE))
    assert differences(before, picture()) == {}
    assert succeeded(playbook(NAME, "--diff", play=REMOVE)) == predicted
    assert differences(virgin, picture()) == {}
    assert host.check_output("systemctl show -p MainPID --value haproxy") == main
    assert host.check_output("curl -s http://127.0.0.1:8404/") == "by hand"
    assert succeeded(playbook(NAME, play=REMOVE)) == [], "and then there is nothing left to remove"
