"""What a monitoring host sees of a web host, and what nobody else does; where the scenario's inventory has one.

The monitoring host is asked over SSH, as its own Prometheus answers there. Scrapes are five seconds apart in the
scenario, so a wait of half a minute is several of them.
"""

from __future__ import annotations

import http.client
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import testinfra
import yaml
from exposure import assert_baseline
from front_door import Session, assert_complete
from operator_runs import PROJECT, copy_of_checkout, playbook, replace
from testinfra.host import Host

AwaitTrue = Callable[..., None]
PORT = 9464
UNIT = "handoff-metrics.service"
DASHBOARD = json.loads((PROJECT / "roles/handoff_monitoring/files/socket-handoff.json").read_text())


@pytest.fixture(scope="module")
def inventory(name: str) -> Path:
    return PROJECT / "molecule" / name.rstrip("0123456789") / "inventory"


@pytest.fixture(scope="module")
def watcher(inventory: Path) -> Host:
    """The first host of the group monitoring."""
    groups = yaml.safe_load((inventory / "hosts.yml").read_text())
    if "monitoring" not in groups:
        pytest.fail("this scenario has no monitoring host")
    first = next(iter(groups["monitoring"]["hosts"]))
    return testinfra.get_host(f"ssh://{first}", ssh_config=str(PROJECT / ".cache/ssh/config"), sudo=True)


# Hosts have Python, as Ansible needs it, and not curl.
FETCH = (
    "import http.client, sys; asked = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=10); "
    "asked.request('GET', sys.argv[3]); answer = asked.getresponse(); "
    "sys.stdout.buffer.write(b'%d\\n' % answer.status + answer.read())"
)


def fetch(host: Host, address: str, port: int, path: str) -> tuple[int, str]:
    """What a host is answered: status and body. The path goes out as it is."""
    said = host.check_output(f"python3 -c {shlex.quote(FETCH)} {address} {port} {shlex.quote(path)}")
    status, _, body = said.partition("\n")
    return int(status), body


def api(watcher: Host, path: str, **query: str) -> Any:
    """One answer of Prometheus' API; AssertionError with its words where it is none."""
    _, answer = fetch(watcher, "127.0.0.1", 9090, f"/api/v1/{path}?{urlencode(query)}")
    found = json.loads(answer)
    assert found["status"] == "success", answer
    return found["data"]


def values(watcher: Host, query: str) -> dict[str, float]:
    """What a query yields: job (or alertstate) -> value."""
    rows = api(watcher, "query", query=query)["result"]
    return {row["metric"].get("alertstate") or row["metric"].get("job", ""): float(row["value"][1]) for row in rows}


def get(address: str, path: str) -> tuple[int, bytes]:
    """Ask the port of the metrics from here, which is no monitoring host."""
    connection = http.client.HTTPConnection(address, PORT, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_prometheus_reads_the_daemon_and_the_module(watcher: Host, name: str, await_true: AwaitTrue) -> None:
    both = {"streaming-daemon": 1.0, "socket-handoff": 1.0}
    await_true(lambda: values(watcher, f'up{{host="{name}"}}') == both, f"both jobs of {name} up", 40.0)


def test_a_stream_is_counted_at_both_ends(watcher: Host, name: str, session: Session, await_true: AwaitTrue) -> None:
    sent = f'sum by (job) (socket_handoff_results_total{{host="{name}",target="llm",result="sent"}})'
    done = f'sum by (job) (daemon_streams_total{{host="{name}",outcome="done"}})'
    # What a load balancer has asked just before may not have been scraped yet.
    seen: list[dict[str, float]] = []

    def settled() -> bool:
        seen.append({**values(watcher, sent), **values(watcher, done)})
        time.sleep(6)  # more than the time between two scrapes
        return len(seen) > 1 and seen[-1] == seen[-2]

    await_true(settled, "nobody else is streamed to", 60.0)
    before = seen[-1]
    assert before.keys() == {"streaming-daemon", "socket-handoff"}
    assert_complete(session.open_stream(tokens=3, pace=100).read_to_end(), 3)
    after = {job: count + 1 for job, count in before.items()}
    await_true(lambda: {**values(watcher, sent), **values(watcher, done)} == after, f"{after} at both ends", 40.0)


def test_every_metric_that_rules_and_dashboard_name_is_scraped(
    watcher: Host, name: str, session: Session, await_true: AwaitTrue
) -> None:
    rules = yaml.safe_load(watcher.file("/etc/prometheus/socket-handoff-rules.yml").content_string)
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    expressions += [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    text = re.sub(r'"[^"]*"', "", " ".join(expressions))
    named = set(re.findall(r"\b(?:daemon|socket_handoff)_[a-z_]+", text))
    assert len(named) > 50
    assert_complete(session.open_stream(tokens=1, pace=100).read_to_end(), 1)

    def missing() -> set[str]:
        query = {"match[]": f'{{host="{name}"}}'}
        return named - set(api(watcher, "label/__name__/values", **query))

    await_true(lambda: missing() == set(), f"all metrics of {name}; missing are {sorted(missing())}", 40.0)


# All in one go: a login for each would take longer than all of them.
ASK_ALL = """
import json, sys, urllib.parse, urllib.request
for query in json.load(sys.stdin):
    asked = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    answer = json.load(urllib.request.urlopen(asked, timeout=10))
    assert answer["status"] == "success", (query, answer)
    print(len(answer["data"]["result"]))
"""


def test_prometheus_answers_every_question_of_the_dashboard(watcher: Host) -> None:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    asked = [target["expr"].replace("$__rate_interval", "1m").replace("$host", ".*") for target in targets]
    counts = watcher.check_output(f"echo {shlex.quote(json.dumps(asked))} | python3 -c {shlex.quote(ASK_ALL)}")
    silent = [query for query, count in zip(asked, counts.splitlines(), strict=True) if count == "0"]
    # A demo backend reports no tokens; nothing else is without a number.
    assert [query for query in silent if "daemon_tokens_total" not in query] == []


def test_nobody_but_the_monitoring_hosts_may_read(host: Host, watcher: Host, address: str) -> None:
    for path in ("/daemon/metrics", "/module/metrics?prometheus"):
        status, body = get(address, path)
        assert status == 403 and b"daemon_" not in body and b"socket_handoff_" not in body, (path, status, body[:500])
        assert fetch(host, "127.0.0.1", PORT, path)[0] == 403, "from the web host itself"
        allowed, numbers = fetch(watcher, address, PORT, path)
        assert allowed == 200 and re.search(r"^(daemon|socket_handoff)_\w+", numbers, re.M), (allowed, numbers[:500])


@pytest.mark.parametrize("path", ["/", "/daemon/", "/daemon/metrics/../status", "/server-status", "/stream.php"])
def test_the_port_has_nothing_else(watcher: Host, address: str, path: str) -> None:
    assert get(address, path)[0] == 403
    assert fetch(watcher, address, PORT, path)[0] in (403, 404), "not even to the monitoring host"


def connects(host: Host, user: str, path: str) -> bool:
    """Whether a user of the host may connect to a socket."""
    code = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
    done = host.run(f'runuser -u {user} -- python3 -c "{code}"')
    assert done.rc == 0 or "PermissionError" in done.stderr, done.stderr
    return done.rc == 0


def test_apache_may_read_numbers_and_has_no_other_way_to_the_daemon(host: Host, watcher: Host) -> None:
    assert connects(host, "www-data", "/run/handoff-metrics.sock")
    assert not connects(host, "nobody", "/run/handoff-metrics.sock")
    for name in ("metrics.sock", "control.sock"):
        assert not connects(host, "www-data", f"/run/streaming-daemon/{name}")
    assert "streaming-daemon" not in host.check_output("id -Gn www-data").split()


def test_what_passes_the_metrics_on_is_locked_up(host: Host, watcher: Host) -> None:
    report = host.run(f"systemd-analyze security --no-pager {UNIT}").stdout
    score = re.search(r"Overall exposure level for .*: ([0-9.]+)", report)
    assert score and float(score[1]) <= 1.0, report
    assert_baseline(host, UNIT)


def test_a_daemon_that_is_gone_is_an_alert_and_one_that_is_back_is_none(
    host: Host, watcher: Host, name: str, daemon_runs: None, await_true: AwaitTrue
) -> None:
    alert = f'ALERTS{{alertname="HandoffDaemonDown",host="{name}"}}'
    assert values(watcher, alert) == {}
    host.check_output("systemctl stop streaming-daemon.socket streaming-daemon.service")
    await_true(lambda: values(watcher, alert) in ({"pending": 1.0}, {"firing": 1.0}), "the alert", 60.0)
    assert values(watcher, f'up{{host="{name}"}}')["socket-handoff"] == 1.0, "Apache is not the daemon"
    host.check_output("systemctl start streaming-daemon.socket streaming-daemon.service")
    await_true(lambda: values(watcher, alert) == {}, "the alert to go", 60.0)


def test_a_configuration_that_prometheus_refuses_never_gets_there_and_a_good_one_needs_no_restart(
    watcher: Host, tmp_path: Path
) -> None:
    watching = watcher.check_output("hostname")
    files = "sha256sum /etc/prometheus/*.yml /etc/systemd/system/prometheus.service.d/*"
    places = "/etc/prometheus /var/lib/socket-handoff/prometheus"
    process = "systemctl show --property=MainPID prometheus"
    before, running = watcher.check_output(files), watcher.check_output(process)

    def deploy(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        more = ("--tags", "configure", *arguments)
        return playbook(watching, *more, play="playbooks/deploy.yml", checkout=checkout)

    broken = copy_of_checkout(tmp_path / "broken")
    replace(broken / "templates/etc/prometheus/socket-handoff-rules.yml.j2", "== 0", "=== 0")
    refused = deploy(broken)
    assert refused.returncode != 0 and "parse error" in refused.stdout, refused.stdout[-3000:]
    assert watcher.check_output(files) == before, "what was refused is there all the same"
    assert api(watcher, "status/runtimeinfo")["reloadConfigSuccess"] is True

    watcher.check_output(f"tar --create --file /root/monitoring-test.tar {places}")
    try:
        done = deploy(PROJECT, "-e", "handoff_monitoring_first_event_seconds=77")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        assert "> 77" in json.dumps(api(watcher, "rules")), "the new rules are not in use"
        assert watcher.check_output(process) == running, "Prometheus was restarted"
    finally:
        back = "tar --extract --directory / --file /root/monitoring-test.tar && rm /root/monitoring-test.tar"
        watcher.check_output(f"{back} && systemctl reload prometheus")
    assert watcher.check_output(files) == before


def test_prometheus_listens_for_its_own_host_only(watcher: Host) -> None:
    listening = watcher.check_output("ss --listening --tcp --numeric --no-header sport = :9090")
    assert [line.split()[3] for line in listening.splitlines()] == ["127.0.0.1:9090"]
