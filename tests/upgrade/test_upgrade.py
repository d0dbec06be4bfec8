"""A host that serves with an earlier version gets this one, and goes back. One story, told in order.

Whatever is open while the host changes has to come to its end. A rollout drains, by a command; site.yml does not, so
requests that come in the moments in which the module is new and the application is not may be refused there, and
nothing that was begun may be cut.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PASSWORD
from front_door import Connection, Session, assert_complete
from ledger import Ledger
from operator_runs import changes, playbook
from testinfra.host import Host

Run = subprocess.CompletedProcess[str]
# Short, because nothing is to be found out here that takes its time to show.
ROLLOUT = {"rollout_soak": 0, "rollout_watch": 2, "rollout_drain_wait": 0}
# An answer that outlasts a change.
MANY, PACE = 20_000, 10.0
# What people have added to a host, in the places that Debian and systemd mean for it.
BY_HAND = {
    "/etc/systemd/system/streaming-daemon.service.d/by-hand.conf": "[Service]\nEnvironment=BY_HAND=yes\n",
    "/etc/apache2/conf-enabled/by-hand.conf": "Header always set X-By-Hand yes\n",
    "/var/www/handoff-app/public/by-hand.txt": "by hand\n",
}


def succeeded(run: Run) -> Run:
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    return run


def rollout(name: str, release: str, **given: object) -> Run:
    """Run this checkout's rollout for one host."""
    arguments = json.dumps({**ROLLOUT, "rollout_release": release, "rollout_hosts": name, **given})
    return playbook(name, "-e", arguments, play="playbooks/rollout.yml", limited=False)


def version(host: Host) -> str:
    """Which of the two Apache is configured for."""
    text = host.check_output("cat /etc/apache2/mods-enabled/socket_handoff.conf")
    return "this" if "SocketHandoffTarget" in text else "previous"


def assert_kept(host: Host, session: Session) -> None:
    """What was added by hand is there, and in use."""
    for path, text in BY_HAND.items():
        assert host.file(path).content_string == text
    assert "BY_HAND=yes" in host.check_output("systemctl show --property Environment streaming-daemon.service")
    page = session.get("/by-hand.txt")
    assert page.header("X-By-Hand") == "yes" and page.body == b"by hand\n"


def assert_nothing_was_cut(users: Ledger) -> None:
    assert {line["outcome"] for line in users.close()} <= {"whole", "refused"}, users.outcomes()
    assert users.outcomes()["whole"] >= 4


def assert_streams(session: Session) -> None:
    """Somebody who logged in long ago is still known, and gets an answer."""
    assert_complete(session.open_stream(tokens=20, pace=100.0).read_to_end(), 20)


@pytest.fixture
def answer(session: Session) -> Iterator[Connection]:
    """An answer without an end, begun before the host changes: users' own may be over by the time that it does."""
    connection = session.open_stream(tokens=MANY, pace=PACE)
    connection.read_until(b"data: ")
    yield connection
    connection.close()


def assert_goes_on(answer: Connection) -> None:
    """Every event that is due by now has come; by one that has been cut, or stands still, this fails."""
    due = int((time.monotonic() - answer.began) * PACE)
    while answer.raw.count(b"data: ") < due:
        assert answer.read_more(), (answer.end, due, bytes(answer.raw[-300:]))
    assert due < MANY, "it has come to its end before the host was looked at"


@pytest.fixture(scope="module")
def session(address: str) -> Session:
    """Somebody who has logged in before anything changed."""
    return Session(address)


def test_the_previous_version_serves_and_gets_additions_by_hand(
    host: Host, name: str, previous: Path, session: Session
) -> None:
    succeeded(playbook(name, checkout=previous))
    assert version(host) == "previous"
    host.check_output("a2enmod --quiet headers")
    for path, text in BY_HAND.items():
        host.check_output("install -D -m 644 /dev/null %s && printf '%%s' %s >%s", path, text, path)
    host.check_output("systemctl daemon-reload && systemctl restart streaming-daemon apache2")
    assert_kept(host, session)
    session.log_in("demo", PASSWORD)
    assert_streams(session)


def by_command(drained: Path, log: Path) -> dict[str, object]:
    """What takes new requests from a host and gives them back; it says so in a log."""
    shell = ["/bin/sh", "-c"]
    return {
        "rollout_drain": "command",
        "rollout_drain_command": [*shell, f'touch {drained} && sleep 1 && echo "drain $0" >>{log}'],
        "rollout_undrain_command": [*shell, f'rm -f {drained} && echo "undrain $0" >>{log}'],
    }


def test_a_rollout_brings_this_version_to_a_host_that_serves(
    host: Host, name: str, users: Ledger, session: Session, answer: Connection, drained: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    succeeded(rollout(name, "this", **by_command(drained, log)))
    assert log.read_text().splitlines() == [f"drain {name}", f"undrain {name}"]
    assert version(host) == "this"
    assert users.lost() == []
    assert_goes_on(answer)
    assert_kept(host, session)
    # Without a new login.
    assert_streams(session)


def test_a_rollback_takes_it_back_to_what_served_before(
    host: Host, name: str, users: Ledger, session: Session, answer: Connection, drained: Path, tmp_path: Path
) -> None:
    given = json.dumps(by_command(drained, tmp_path / "log"))
    succeeded(playbook(name, "-e", given, play="playbooks/rollback.yml"))
    assert version(host) == "previous"
    assert users.lost() == []
    assert_goes_on(answer)
    assert_kept(host, session)
    assert_streams(session)


def test_the_previous_versions_own_playbook_finds_nothing_to_mend(name: str, previous: Path) -> None:
    """Whoever goes on with the old checkout goes on as before."""
    run = succeeded(playbook(name, checkout=previous))
    # Beside the copies of the units that it has judged.
    unused = "socket_handoff.fleet.streaming_daemon : Write the units to a place where nothing uses them"
    assert [change for change in changes(run.stdout) if not change.startswith(unused)] == []


def test_site_yml_brings_this_version_to_a_host_that_serves(
    host: Host, name: str, users: Ledger, session: Session, answer: Connection
) -> None:
    succeeded(playbook(name))
    assert version(host) == "this"
    assert_nothing_was_cut(users)
    assert_goes_on(answer)
    assert_kept(host, session)
    assert_streams(session)


def test_the_previous_versions_own_playbook_is_refused_before_anything_of_this_one_is_lost(
    host: Host, name: str, previous: Path, users: Ledger
) -> None:
    """It changes Apache's configuration in another order; Apache is asked first, and says no."""
    run = playbook(name, checkout=previous)
    assert run.returncode != 0
    assert "nothing was changed" in " ".join(run.stdout.split())
    assert users.lost() == []
    assert version(host) == "this"


def test_a_rollback_by_name_takes_it_down_again(
    host: Host, name: str, users: Ledger, session: Session, answer: Connection, tmp_path: Path
) -> None:
    """site.yml leaves no record, so the name says where to go: status.yml lists what is kept."""
    census = tmp_path / "census.json"
    succeeded(playbook(name, "-e", f"status_file={census}", play="playbooks/status.yml"))
    (row,) = json.loads(census.read_text())
    (kept,) = {each["name"] for each in row["kept"] if each["name"].startswith("unnamed")}
    succeeded(playbook(name, "-e", f"rollback_release={kept}", play="playbooks/rollback.yml"))
    assert version(host) == "previous"
    assert_nothing_was_cut(users)
    assert_goes_on(answer)
    assert_kept(host, session)
    assert_streams(session)
