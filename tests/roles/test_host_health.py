"""What was added since a sample speaks against a host; what had been there before does not."""

from __future__ import annotations

import importlib
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ERROR = "[Sun Nov 29 01:00:00.1 2026] [socket_handoff:error] [pid 7] AH1: the daemon does not answer\n"
NOISE = (
    "[Sun Nov 29 01:00:00.1 2026] [mpm_event:notice] [pid 1] AH00489: configured -- resuming normal operations\n"
    "[Sun Nov 29 01:00:00.1 2026] [authz_core:error] [pid 7] AH01630: client denied by server configuration\n"
)
COUNTERS: dict[str, Any] = {
    "daemon_active_streams": 3,
    "daemon_streams_total": {"done": 10, "backend_error": 1, "client_gone": 2},
    "daemon_handoff_errors_total": {"invalid": 0, "network": 4},
    "daemon_workers_died_total": 5,
    "daemon_workers_hung_total": 0,
    "daemon_streams_lost_total": 0,
    "daemon_generations_refused_total": 0,
}


class FakeDaemon:
    """The metrics socket of a daemon, and what systemd and Apache say beside it."""

    family: int = socket.AF_UNIX

    def __init__(self, place: Path) -> None:
        self.path = str(place / "metrics.sock")
        self.log = place / "error.log"
        self.log.write_text(ERROR + NOISE)
        self.started = 100
        self.answer = ""
        self.values = json.loads(json.dumps(COUNTERS))
        self.units = {"apache2.service": ("active", 0), "streaming-daemon.service": ("active", 2)}
        self.server = socket.socket(self.family)
        self.server.bind({socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}.get(self.family, self.path))
        self.server.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                peer, _ = self.server.accept()
            except OSError:
                return
            with peer:
                peer.recv(4096)
                body = self.answer or json.dumps({"started": self.started, "values": self.values})
                peer.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{body}".encode())


@pytest.fixture
def daemon(tmp_path, monkeypatch) -> Iterator[FakeDaemon]:
    found = FakeDaemon(tmp_path)
    module = importlib.import_module("ansible_collections.socket_handoff.fleet.plugins.modules.host_health")
    monkeypatch.setattr(module, "units", lambda names: found.units)
    yield found
    found.server.close()


@pytest.fixture
def ask(run_module, daemon):
    def call(**arguments):
        return run_module(
            "host_health", socket=daemon.path, logs=[str(daemon.log)], units=list(daemon.units), **arguments
        )

    return call


def test_what_had_been_there_before_speaks_against_nobody(ask):
    before = ask()
    assert (before["problems"], before["streams"], before["changed"]) == ([], 3, False)
    later = ask(since=before["sample"], fail=True)
    assert (later["problems"], later["ended"], later["bad"]) == ([], 0, 0)


def test_streams_that_ended_are_counted_and_those_of_the_client_are_not_bad(ask, daemon):
    before = ask()
    daemon.values["daemon_streams_total"] = {"done": 20, "backend_error": 3, "client_gone": 9, "timeout": 1}
    later = ask(since=before["sample"])
    assert (later["ended"], later["bad"]) == (20, 3)


@pytest.mark.parametrize(
    ("counter", "value", "said"),
    [
        ("daemon_workers_died_total", 7, "2 workers died (daemon_workers_died_total"),
        ("daemon_workers_hung_total", 1, "1 workers hung"),
        ("daemon_streams_lost_total", 9, "9 streams were lost"),
        ("daemon_generations_refused_total", 1, "1 generations did not start"),
        ("daemon_handoff_errors_total", {"invalid": 2, "network": 4}, "handoffs came to nothing: 2 invalid"),
    ],
)
def test_a_counter_that_has_to_stand_still_speaks_against_the_host(ask, daemon, counter, value, said):
    before = ask()
    daemon.values[counter] = value
    refused = ask(since=before["sample"], fail=True)
    assert refused["failed"] is True
    assert said in refused["msg"]
    assert len(refused["problems"]) == 1


def test_clients_that_go_away_are_no_fault_of_the_host(ask, daemon):
    before = ask()
    daemon.values["daemon_handoff_errors_total"] = {"invalid": 0, "network": 40, "timeout": 3}
    assert ask(since=before["sample"])["problems"] == []


def test_a_new_supervisor_begins_at_nothing_and_all_that_it_counts_is_new(ask, daemon):
    before = ask()
    daemon.started, daemon.values["daemon_workers_died_total"] = 200, 1
    daemon.values["daemon_streams_total"] = {"done": 4}
    later = ask(since=before["sample"])
    assert later["ended"] == 4
    assert "1 workers died" in later["problems"][0]


def test_new_lines_of_apache_count_where_they_are_errors_of_the_chain(ask, daemon):
    before = ask()
    with daemon.log.open("a") as log:
        log.write(
            NOISE + "[t] [core:notice] [pid 1] AH00052: child pid 9 exit signal Segmentation fault (11)\n" + ERROR
        )
    (problem,) = ask(since=before["sample"])["problems"]
    assert "Apache's error logs have 2 new errors, and 0 are allowed" in problem
    assert "Segmentation fault" in problem
    assert "client denied" not in problem
    assert ask(since=before["sample"], max_log_errors=2)["problems"] == []


# What Apache 2.4 writes where a client, or anybody who asks for an address, has brought it about.
STRANGERS = [
    "[t] [proxy_fcgi:error] [pid 7:tid 9] [client 192.0.2.9:4711] AH01071: Got error 'Primary script unknown'\n",
    "[t] [proxy_fcgi:error] [pid 7] [client ::1:1] AH01071: Got error 'Primary script unknown\\n', referer: x\n",
    "[t] [proxy_fcgi:error] [pid 7:tid 9] [client 192.0.2.7:1] AH01071: Got error 'PHP message: handoff-app: This host "
    "is out of service for now. (/var/www/handoff-app/public/health.php:19)'\n",
    "[t] [core:error] [pid 7:tid 9] [client 192.0.2.9:1] AH00126: Invalid URI in request GET /exit signal HTTP/1.1\n",
    "[t] [core:info] [pid 7] [client 192.0.2.9:1] AH00128: File does not exist: /AH00052: child pid 9 exit signal x\n",
    "[t] [proxy_fcgi:error] [pid 7:tid 9] (104)Connection reset by peer: [client 192.0.2.9:4711] AH01075: Error "
    "dispatching request to : (reading input brigade)\n",
    "[t] [proxy_fcgi:error] [pid 7:tid 9] (32)Broken pipe: [client 192.0.2.9:4711] AH01075: Error dispatching request "
    "to fcgi://localhost: (passing brigade to output filters)\n",
]
# The same modules, and nobody outside has a part in it.
OURS = [
    "[t] [proxy_fcgi:error] [pid 7:tid 9] [client 192.0.2.9:4711] AH01071: Got error 'PHP message: PHP Fatal error'\n",
    "[t] [proxy_fcgi:error] [pid 7:tid 9] [client 192.0.2.9:4711] AH01071: Got error 'PHP message: Primary script "
    "unknown'\n",
    "[t] [proxy_fcgi:error] [pid 7:tid 9] (70007)The timeout specified has expired: [client 192.0.2.9:4711] AH01075: "
    "Error dispatching request to : (polling)\n",
    "[t] [core:notice] [pid 1:tid 1] AH00051: child pid 9 exit signal Aborted (6), possible coredump in /tmp\n",
]


@pytest.mark.parametrize(("line", "counts"), [(line, 0) for line in STRANGERS] + [(line, 1) for line in OURS])
def test_a_stranger_cannot_write_what_undoes_a_rollout(ask, daemon, line, counts):
    before = ask()
    with daemon.log.open("a") as log:
        log.write(line)
    problems = ask(since=before["sample"])["problems"]
    assert [re.findall("have ([0-9]+) new errors", problem) for problem in problems] == [["1"]] * counts


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_daemon_is_asked_where_its_configuration_says(run_module, tmp_path, monkeypatch, family):
    monkeypatch.setattr(FakeDaemon, "family", family)
    daemon = FakeDaemon(tmp_path)
    host, port = daemon.server.getsockname()[:2]
    (tmp_path / "config.toml").write_text(f'[metrics]\nlisten = "{f"[{host}]" if ":" in host else host}:{port}"\n')
    found = run_module("host_health", config=str(tmp_path / "config.toml"), logs=[], units=[])
    daemon.server.close()
    assert (found["streams"], found["problems"]) == (3, [])


def test_a_daemon_that_cannot_be_counted_is_no_problem_until_somebody_judges_by_it(run_module, tmp_path):
    (tmp_path / "config.toml").write_text('[metrics]\nlisten = "off"\n')
    given = {"config": str(tmp_path / "config.toml"), "logs": [], "units": []}
    before = run_module("host_health", **given)
    assert before["problems"] == []
    refused = run_module("host_health", since=before["sample"], fail=True, **given)
    assert "streaming_daemon_metrics_listen is off, so nobody can count what becomes of streams" in refused["msg"]


def test_where_no_configuration_says_it_the_daemon_is_asked_where_it_is_by_default(run_module, tmp_path):
    found = run_module("host_health", config=str(tmp_path / "none"), logs=[], units=[])
    assert found["problems"] == ["the daemon does not answer on /run/streaming-daemon/metrics.sock"]


def test_a_log_that_was_rotated_is_read_from_its_beginning(ask, daemon):
    before = ask()
    daemon.log.rename(f"{daemon.log}.1")
    # It has grown beyond the old one already.
    daemon.log.write_text(ERROR + NOISE * 5)
    assert "1 new errors" in ask(since=before["sample"])["problems"][0]


def test_units_that_do_not_run_and_restarts_of_systemd_are_named(ask, daemon):
    before = ask()
    daemon.units = {"apache2.service": ("failed", 0), "streaming-daemon.service": ("active", 5)}
    later = ask(since=before["sample"])
    assert later["problems"] == [
        "apache2.service is failed (see systemctl status apache2.service)",
        "systemd has restarted streaming-daemon.service 3 times, because it crashed",
    ]


def test_a_daemon_that_does_not_answer_is_a_problem_and_no_crash(ask, daemon):
    before = ask()
    daemon.server.close()
    Path(daemon.path).unlink()
    refused = ask(since=before["sample"], fail=True)
    assert f"the daemon does not answer on {daemon.path}" in refused["msg"]
    assert refused["streams"] == 0


@pytest.mark.parametrize("answer", ["[]", "{}", '{"started": 1}', '{"values": {}}', '{"started": 1, "values": 7}'])
def test_who_answers_like_no_daemon_is_none(ask, daemon, answer):
    before = ask()
    daemon.answer = answer
    assert f"the daemon does not answer on {daemon.path}" in ask(since=before["sample"])["problems"]


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("systemctl", 60), FileNotFoundError("systemctl")])
def test_a_systemd_that_does_not_answer_is_a_problem_and_no_crash(run_module, monkeypatch, tmp_path, error):
    def hang(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", hang)
    found = run_module("host_health", config=str(tmp_path / "none"), logs=[], units=["apache2.service"])
    assert "apache2.service is not known to systemd" in found["problems"]
