"""Fixtures of the whole-chain tests: a test host that site.yml has converged, seen from outside and from inside.

Run by molecule's verify step (molecule/README.md), which names the hosts; they are reached over SSH with sudo.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import pytest
from front_door import Answer, Session
from host_report import add_logs
from testinfra.host import Host

PASSWORD = "chain-test-password"
# What a scenario has no hosts for, or another one tries: the daemon knows nothing of MPMs. pytest's --ignore would not
# do: molecule names every file.
ELSEWHERE = {
    "default": {"test_build_host", "test_programs"},
    "prefork": {"test_load_balancer", "test_monitoring", "test_openai"},
}


# It is about the monitoring host, of which there is one: once, not for every web host.
ONCE = "test_a_configuration_that_prometheus_refuses_never_gets_there_and_a_good_one_needs_no_restart[ssh://default13]"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = ELSEWHERE.get(os.environ.get("MOLECULE_SCENARIO_NAME", ""), set())
    left_out = [item for item in items if item.path.stem in elsewhere or item.name == ONCE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def address(host: Host) -> str:
    """The host's own address on the test network."""
    return host.check_output("hostname -I").split()[0]


@pytest.fixture(scope="module")
def session(address: str) -> Session:
    session = Session(address)
    session.log_in("demo", PASSWORD)
    return session


@pytest.fixture(scope="module")
def name(host: Host) -> str:
    """The host's name in the scenario's inventory."""
    return str(host.check_output("hostname"))


@pytest.fixture(scope="module")
def prefork(host: Host) -> bool:
    return bool(host.file("/etc/apache2/mods-enabled/mpm_prefork.load").exists)


@pytest.fixture(scope="module")
def await_true() -> Callable[[Callable[[], object], str], None]:
    """Await a condition, 20 s at most; the failure says which."""

    def wait(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.1)  # the interval of a bounded poll

    return wait


@pytest.fixture(scope="module", autouse=True)
def no_health_checks(request: pytest.FixtureRequest, host: Host) -> Iterator[None]:
    """Nobody is handed over but by the test itself: a load balancer's checks would start a daemon that is to be
    stopped, and be counted. Not where the load balancer is what is tested."""
    if request.module.__name__ == "test_load_balancer":
        yield
        return
    host.check_output("touch /etc/handoff-app/maintenance")
    yield
    host.check_output("rm /etc/handoff-app/maintenance")


@pytest.fixture
def daemon_runs(host: Host, session: Session) -> Iterator[None]:
    """Put the daemon back, whatever a test did to it."""
    yield
    host.run("systemctl reset-failed streaming-daemon.socket streaming-daemon.service")
    host.check_output("systemctl start streaming-daemon.socket")
    host.check_output("systemctl start streaming-daemon.service")


@pytest.fixture(scope="module")
def hand_off(host: Host, session: Session) -> Iterator[Callable[..., Answer]]:
    """A function that makes PHP name any target with any data, as an application with a fault in it might.

    The virtual host permits handoffs to stream.php, in every directory; `page` names one that is not permitted.
    """
    root = "/var/www/handoff-app/public/chain-test"
    code = (
        "<?php header('X-Socket-Handoff: ' . $_GET['target']); setcookie('chain', 'test'); setcookie('second', '2');"
        " header('X-Chain-Test: from PHP'); header('Content-Length: 15');"
        " if (isset($_GET['data'])) header('X-Handoff-Data: ' . $_GET['data']); echo 'the body of PHP';"
    )
    pages = f"{root}/stream.php {root}/other.php"
    host.check_output(f"mkdir {root} && printf %s {shlex.quote(code)} | tee {pages}")

    def ask(target: str, data: str = "{}", page: str = "stream.php") -> Answer:
        return session.get(f"/chain-test/{page}?" + urlencode({"target": target, "data": data}))

    yield ask
    host.check_output(f"rm -r {root}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure carries the journal and Apache's error log of the host it happened on."""
    outcome = yield
    add_logs(item, outcome)
