"""A HAProxy that somebody else had configured gets the role, loses it again, and is what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import testinfra
from operator_runs import PROJECT, playbook
from test_remove import differences, succeeded
from testinfra.host import Host

Picture = Callable[[], dict[str, object]]
REMOVE = "playbooks/remove.yml"
NAME = "removelb"
KEPT = "/var/lib/socket-handoff/foreign/etc/haproxy/haproxy.cfg"


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
    assert host.check_output("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/") == "308"
    assert succeeded(playbook(NAME, "--check", "--skip-tags", "verify")) == []


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
