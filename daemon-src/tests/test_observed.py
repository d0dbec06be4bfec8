"""A whole daemon, seen from outside: metrics, health, access log, over deaths and generations of workers."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import Daemon, Response, envelope, shaped, wait_for
from test_metrics import families, read, sample

pytest.importorskip("prometheus_client")


def ask(daemon: Daemon, path: str) -> Response:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(daemon.directory / "m.sock"))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return read(sock)


def config(tail: str = "", workers: int = 3, log: str = "json") -> str:
    return f"""
[server]
workers = {workers}
{tail}
[metrics]
listen = "unix:metrics.sock"
[access_log]
path = "{{directory}}/access.log"
format = "{log}"
"""


def start(make_daemon: MakeDaemon, text: str) -> Daemon:
    daemon = make_daemon("")
    text = text.format(directory=daemon.directory).replace("unix:metrics.sock", f"unix:{daemon.directory}/m.sock")
    daemon.config.write_text(text)
    daemon.start()
    workers = int(re.findall(r"workers = (\d+)", text)[0])
    wait_for(lambda: ask(daemon, "/readyz").json["workers"] == workers, "all workers to take handoffs")
    return daemon


def scraped(daemon: Daemon) -> dict[str, Any]:
    response = ask(daemon, "/metrics")
    assert response.status == 200, response.raw
    return families(response.body.decode())


def counters(daemon: Daemon) -> dict[tuple[Any, ...], float]:
    return {
        (each.name, *sorted(each.labels.items())): each.value
        for family in scraped(daemon).values()
        if family.type in ("counter", "histogram")
        for each in family.samples
    }


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (daemon.directory / "access.log").read_text().splitlines()]


def test_every_stream_is_counted_once_whichever_workers_answer_it_and_the_scrape(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config())
    clients = [daemon.hand(shaped(5)) for _ in range(30)]
    assert all(client.finish().complete for client in clients)
    wait_for(lambda: sample(scraped(daemon), "daemon_streams_total", outcome="done") == 30, "30 streams in the metrics")
    found = scraped(daemon)
    assert sample(found, "daemon_handoffs_total") == sample(found, "daemon_connections_total") == 30
    assert sample(found, "daemon_chunks_sent_total") == 150
    assert sample(found, "daemon_backend_requests_total", backend="demo") == 30
    assert sample(found, "daemon_backend_duration_seconds_count", backend="demo") == 30
    assert sample(found, "daemon_stream_duration_seconds_count") == 30
    assert sample(found, "daemon_time_to_first_token_seconds_count") == 30
    assert sample(found, "daemon_handoff_duration_seconds_count") == 30
    assert sample(found, "daemon_active_streams") == 0
    assert sample(found, "daemon_workers", state="accepting") == 3
    assert sample(found, "daemon_bytes_sent_total") == sum(len(client.received) for client in clients)
    assert len(lines(daemon)) == 30
    assert {line["pid"] for line in lines(daemon)} <= set(daemon.workers())


def test_no_total_goes_back_over_a_killed_worker_and_three_reloads(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config("drain_timeout = 60"))
    running = [daemon.hand(shaped(100000, 50)) for _ in range(6)]
    for client in running:
        client.read_until(b"data: ")
    for client in [daemon.hand(shaped(5)) for _ in range(9)]:
        client.finish()
    before = counters(daemon)
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: sample(scraped(daemon), "daemon_workers_died_total") == 1, "the death in the metrics")
    after = counters(daemon)
    assert {name for name, value in before.items() if after.get(name, -1) < value} == set()
    for number in (2, 3, 4):
        before = after
        assert daemon.reload().returncode == 0
        assert sample(scraped(daemon), "daemon_generation") == number
        after = counters(daemon)
        assert {name for name, value in before.items() if after.get(name, -1) < value} == set()
    found = scraped(daemon)
    lost = sample(found, "daemon_streams_lost_total")
    active = sample(found, "daemon_active_streams")
    assert lost + active == 6
    assert sample(found, "daemon_draining_streams") == active
    assert sample(found, "daemon_generations_total") == 4
    for client in running:
        client.close()


def test_a_release_that_does_not_start_is_counted_and_serves_no_metrics(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=1))
    good = daemon.config.read_text()
    daemon.config.write_text(good + "\n[nonsense]\n")
    assert daemon.reload().returncode == 1
    found = scraped(daemon)
    assert sample(found, "daemon_generations_refused_total") == 1
    assert sample(found, "daemon_workers", state="accepting") == 1


def test_workers_that_only_finish_their_streams_leave_the_metrics_to_others(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=1))
    client = daemon.hand(shaped(100000, 50))
    client.read_until(b"data: ")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0

    def refused() -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(daemon.directory / "m.sock")) == errno.ECONNREFUSED

    wait_for(refused, "nobody to listen for scrapes")
    client.read_until(b"data: ")
    client.close()


def test_health_follows_the_service(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config("max_streams = 1", workers=1))
    assert ask(daemon, "/readyz").json == {"status": "ready", "workers": 1, "room": 1}
    client = daemon.hand(shaped(100000, 50))
    client.read_until(b"data: ")
    assert ask(daemon, "/healthz").json["active_streams"] == 1
    assert ask(daemon, "/readyz").json["status"] == "full"
    client.close()
    wait_for(lambda: ask(daemon, "/readyz").status == 200, "room again")
    assert daemon.ask(shaped(2)).complete


def test_the_status_names_every_worker_and_its_memory(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=2))
    status = ask(daemon, "/status").json
    assert len(status["workers"]) == 2
    assert {worker["state"] for worker in status["workers"]} == {"accepting"}
    assert all(worker["resident"] > 1_000_000 for worker in status["workers"])


def test_a_refused_stream_is_in_metrics_and_access_log_with_its_limit(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config("max_streams = 1", workers=1))
    client = daemon.hand(shaped(100000, 50))
    client.read_until(b"data: ")
    assert daemon.ask(shaped(1)).status == 503
    found = scraped(daemon)
    assert sample(found, "daemon_limits_refused_total", limit="streams") == 1
    assert sample(found, "daemon_connections_rejected_total") == 1
    client.close()
    (line,) = lines(daemon)[:1]
    assert (line["status"], line["outcome"], line["limit"]) == (503, "overloaded", "streams")


def test_the_access_log_has_the_true_client_and_what_apache_passes_of_the_request(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=1, log="combined"))
    headers = [["Referer", "https://chat.example/?q=s3cr3t"], ["User-Agent", 'a "quoted" agent']]
    message = envelope({**shaped(2), "prompt": "s3cr3t"}, headers=headers, user="alice")
    response = daemon.ask(message)
    assert response.complete
    line = wait_for((daemon.directory / "access.log").read_text, "a line")
    assert re.fullmatch(
        r'203\.0\.113\.9 - alice \[[^]]+\] "GET /stream\.php HTTP/1\.1" 200 \d+ '
        r'"https://chat\.example/" "a \\"quoted\\" agent"\n',
        line,
    ), line
    assert "s3cr3t" not in daemon.log() + line


@pytest.mark.parametrize("asked", [False, True])
def test_a_question_is_logged_only_where_that_is_asked_for(make_daemon: MakeDaemon, asked: bool) -> None:
    daemon = make_daemon(f'[server]\nworkers = 1\n[log]\nlevel = "debug"\ncontent = {str(asked).lower()}').start()
    assert daemon.ask({**shaped(2), "prompt": "s3cr3t question", "request_id": "r-9"}).complete
    daemon.wait_log("stream id=r-9")
    assert ("s3cr3t question" in daemon.log()) is asked
    assert ("question id=r-9 " in daemon.log()) is asked


def test_an_access_log_that_is_moved_away_is_begun_anew(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=1))
    assert daemon.ask(shaped(1)).complete
    path = daemon.directory / "access.log"
    wait_for(lambda: len(lines(daemon)) == 1, "the first line")
    path.rename(daemon.directory / "access.log.1")
    assert daemon.reload().returncode == 0
    assert daemon.ask(shaped(1)).complete
    wait_for(path.exists, "a new file")
    wait_for(lambda: len(lines(daemon)) == 1, "its first line")


def test_a_full_disk_disturbs_no_stream_and_is_reported_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon('[server]\nworkers = 1\n[access_log]\npath = "/dev/full"\n[metrics]\nlisten = "off"').start()
    for _ in range(5):
        assert daemon.ask(shaped(2)).complete
    daemon.wait_log(r"access log /dev/full cannot be written: No space left on device")
    assert daemon.log().count("cannot be written") == 1


def test_metrics_that_cannot_be_served_cost_no_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon('[server]\nworkers = 1\n[metrics]\nlisten = "unix:/nonexistent/m.sock"').start()
    assert daemon.ask(shaped(2)).complete
    assert (
        "metrics.listen = unix:/nonexistent/m.sock: No such file or directory: /metrics is not served" in daemon.log()
    )


def test_without_the_library_the_daemon_serves_all_but_metrics(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("")
    (daemon.directory / "prometheus_client.py").write_text("raise ImportError\n")
    daemon.environ["PYTHONPATH"] += f":{daemon.directory}"
    daemon.config.write_text(f'[server]\nworkers = 1\n[metrics]\nlisten = "unix:{daemon.directory}/m.sock"')
    daemon.start()
    assert daemon.ask(shaped(2)).complete
    assert ask(daemon, "/metrics").status == 503
    assert ask(daemon, "/healthz").status == 200


def test_a_moved_metrics_socket_needs_a_restart_and_the_reload_says_so(make_daemon: MakeDaemon) -> None:
    daemon = start(make_daemon, config(workers=1))
    daemon.config.write_text(daemon.config.read_text().replace("m.sock", "n.sock"))
    done = daemon.reload()
    assert done.returncode == 0
    assert "n.sock needs a restart" in done.stdout + daemon.log()
    assert ask(daemon, "/metrics").status == 200
