"""What the tests in trouble share: a host that serves, and what has to stay as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chain"))

from front_door import Session, assert_complete
from host_report import add_logs
from operator_runs import copy_of_checkout, playbook

Run = subprocess.CompletedProcess[str]
# Everything that a service of the chain reads, and where it points.
FILES = "/etc/apache2 /etc/streaming-daemon /etc/handoff-app /etc/systemd/system /usr/lib/apache2/modules"
LOOK = (
    f"find {FILES} -type f ! -name 'config.toml.previous' -exec sha256sum {{}} + | sort -k2;"
    " find /etc/apache2 /etc/systemd/system -type l -printf '%p %l\\n' | sort; readlink /opt/streaming-daemon/current"
)


@pytest.fixture(scope="module")
def name(host: Host) -> str:
    """The host's name in the scenario's inventory."""
    return str(host.check_output("hostname"))


@pytest.fixture(scope="module")
def session(host: Host, name: str) -> Session:
    """The chain, deployed once, and a user who is logged in."""
    deployed = playbook(name)
    assert deployed.returncode == 0, deployed.stdout[-5000:]
    session = Session(host.check_output("hostname -I").split()[0])
    session.log_in("demo", "chain-test-password")
    return session


@pytest.fixture
def serving(host: Host, session: Session) -> Iterator[Callable[[], None]]:
    """A stream that runs while the trouble happens; a function that asserts that nothing has changed for anybody."""
    before = host.check_output(LOOK)
    stream = session.open_stream(tokens=200, pace=10)
    stream.read_until(b"data: ")

    def assert_serving() -> None:
        assert host.check_output(LOOK).splitlines() == before.splitlines()
        assert_complete(session.open_stream(tokens=5, pace=100).read_to_end(), 5)

    yield assert_serving
    stream_end = stream.read_to_end()
    assert_complete(stream_end, 200)


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """A copy of this checkout, to be broken."""
    return copy_of_checkout(tmp_path / "checkout")


def refused(run: Run, *said: str) -> None:
    """Assert that a run failed, and that its message has these parts."""
    assert run.returncode == 2, run.stdout[-4000:]
    text = " ".join(run.stdout.split())
    for part in said:
        assert part in text, f"{part!r} is not in\n{run.stdout[-4000:]}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure carries the journal and Apache's error log."""
    outcome = yield
    add_logs(item, outcome)
