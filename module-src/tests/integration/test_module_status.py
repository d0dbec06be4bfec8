# SPDX-License-Identifier: Apache-2.0
"""The status page: numbers of all processes together, in four formats that say the same."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from handoff_httpd import MPM, ROOM, ErrorLog, Httpd, wait_until
from handoff_standin import Answer, Client, Daemon, answer_ok, fetch

PROCESSES = 4
ODD = "<b>&\"it's\\\xe4.sock"
"""A file name that means something in each of the formats; its last letter is not UTF-8."""


def targets(run: Path, *more: str) -> str:
    lines = [
        f"SocketHandoffTarget llm unix:{run}/ok/d.sock backup=standby maxfails=0",
        f"SocketHandoffTarget standby unix:{run}/ok/standby.sock maxfails=0 retries=0",
        f"SocketHandoffTarget fragile unix:{run}/ok/fragile.sock maxfails=3 retry=1s retries=0",
        *more,
    ]
    return "\n".join(lines) + "\n"


def odd_target(run: Path) -> str:
    quoted = re.sub(r'(["\\])', r"\\\1", f"unix:{run}/ok/{ODD}")
    return f'SocketHandoffTarget odd "{quoted}" user=root transport=stream backup=llm'


def config(server: Httpd) -> str:
    several = (
        f"StartServers {PROCESSES}\nMinSpareServers {PROCESSES}\nMaxSpareServers {PROCESSES}\nMaxRequestWorkers 8\n"
        if server.mpm == "prefork"
        # Room in the scoreboard for the processes that a graceful restart leaves, or httpd says that it is full.
        else f"ServerLimit {PROCESSES * 4}\nStartServers {PROCESSES}\nThreadsPerChild 4\n"
        f"MaxRequestWorkers {PROCESSES * 4}\nMinSpareThreads {PROCESSES * 4}\nMaxSpareThreads {PROCESSES * 4}\n"
    )
    return f"""
{several}
Listen 127.0.0.1:{server.port("main")}
{server.load("log_config")}
Include {server.root}/conf/targets.conf
SocketHandoffAllow All
SocketHandoffMaxPayload 1000
CustomLog {server.root}/logs/access "%P %<q target=%<{{handoff-target}}n result=%<{{handoff-result}}n"
<Location /t>
    SetHandler handoff-test
</Location>
<Location /excused>
    SetHandler handoff-test
    ErrorDocument 503 /t?text=excuse&body=0
</Location>
<Location /status>
    SetHandler socket-handoff-status
</Location>
<Location /forbidden>
    SetHandler handoff-test
    SocketHandoffAllow None
</Location>
"""


def write_targets(server: Httpd, text: str) -> None:
    (server.root / "conf" / "targets.conf").write_bytes(text.encode("latin-1"))


@pytest.fixture(scope="module")
def counting(built: None, run_dir: Path) -> Iterator[Httpd]:
    """A server of several processes."""
    server = Httpd(mpm=MPM, run=run_dir)
    try:
        text = config(server)
        write_targets(server, targets(run_dir, odd_target(run_dir)))
        server.start(text)
        wait_until(lambda: len(server.children()) >= PROCESSES, "several processes")
        yield server
    finally:
        server.stop()


@pytest.fixture
def httpd(counting: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return counting


def status(httpd: Httpd, query: str = "", **options: str) -> Answer:
    return fetch(httpd.port("main"), f"/status{query}", **options)


def board(httpd: Httpd) -> dict[str, dict[str, Any]]:
    """The rows by name, as JSON tells them."""
    answer = status(httpd, "?json")
    assert answer.status == 200
    return {row["name"]: row for row in json.loads(answer.body)["targets"]}


def results(httpd: Httpd, name: str) -> dict[str, int]:
    return {word: count for word, count in board(httpd)[name]["results"].items() if count}


def added(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {word: count - before.get(word, 0) for word, count in after.items() if count != before.get(word, 0)}


def graceful(httpd: Httpd) -> None:
    """A graceful restart, waited for until only new processes are there."""
    process = httpd._process
    assert process is not None
    old = set(httpd.children())
    process.send_signal(signal.SIGUSR1)
    wait_until(
        lambda: not old & set(httpd.children()) and len(httpd.children()) >= PROCESSES,
        "a graceful restart replaces the processes",
    )


def hand_off(httpd: Httpd, times: int, target: str = "llm", data: str = "hello", served_by: str = "") -> None:
    """So many clients at once; each gets the daemon's answer, and a moment later is counted."""
    server = served_by or target
    before = results(httpd, server).get("sent", 0)

    def one(_: int) -> bytes:
        with Client(httpd.port("main")) as client:
            return client.get(f"/t?t={target}&d={data}").rest()

    with ThreadPoolExecutor(12) as pool:
        for answer in pool.map(one, range(times)):
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
            assert f"data: {data}".encode() in answer
    wait_until(lambda: results(httpd, server).get("sent", 0) == before + times, f"{times} more were counted")


def test_hundreds_of_handoffs_of_several_processes_are_counted_exactly(httpd: Httpd, answering: Daemon) -> None:
    before = board(httpd)["llm"]
    lines = len((httpd.root / "logs" / "access").read_text().splitlines())
    hand_off(httpd, 400, data="x" * 50)

    def logged() -> list[str]:
        text = (httpd.root / "logs" / "access").read_text().splitlines()[lines:]
        return [line for line in text if "target=llm result=sent" in line]

    wait_until(lambda: len(logged()) == 400, "400 lines in the access log")
    assert len({line.split()[0] for line in logged()}) > 1, "more than one process served"
    after = board(httpd)["llm"]
    assert added(before["results"], after["results"]) == {"sent": 400}
    assert after["data_bytes"] - before["data_bytes"] == 400 * 50
    assert answering.count == 400
    assert after["duration_seconds"]["count"] - before["duration_seconds"]["count"] == 400
    assert after["duration_seconds"]["count"] == after["results"]["sent"]
    assert after["duration_seconds"]["sum"] > before["duration_seconds"]["sum"]
    up_to = list(after["duration_seconds"]["up_to"].values())
    assert up_to == sorted(up_to) and up_to[-1] == after["results"]["sent"]


def test_a_graceful_restart_keeps_the_numbers(httpd: Httpd, answering: Daemon) -> None:
    hand_off(httpd, 5)
    before = {name: row["results"] for name, row in board(httpd).items()}
    graceful(httpd)
    assert {name: row["results"] for name, row in board(httpd).items()} == before
    hand_off(httpd, 7)
    assert added(before["llm"], results(httpd, "llm")) == {"sent": 7}


def test_targets_that_come_and_go_leave_the_numbers_of_the_others(
    httpd: Httpd, run_dir: Path, answering: Daemon, log: ErrorLog
) -> None:
    hand_off(httpd, 3)
    before = board(httpd)
    try:
        more = [f"SocketHandoffTarget new{n} unix:{run_dir}/ok/new{n}.sock" for n in range(50)]
        write_targets(httpd, "\n".join(more) + "\n" + targets(run_dir))
        graceful(httpd)
        now = board(httpd)
        assert "odd" not in now and set(now["new49"]["results"].values()) == {0}
        assert now["llm"]["results"] == before["llm"]["results"]
        write_targets(httpd, targets(run_dir, *(line.replace("new", "newer") for line in more)))
        graceful(httpd)
        assert board(httpd)["llm"]["results"] == before["llm"]["results"]
    finally:
        write_targets(httpd, targets(run_dir, odd_target(run_dir)))
        graceful(httpd)
    assert board(httpd)["odd"]["results"] == before["odd"]["results"]


@pytest.fixture
def other_layout(tmp_path: Path) -> Path:
    """The module of another version, whose memory looks different."""
    room = tmp_path / "module-src"
    room.mkdir()
    for source in [ROOM / "Makefile", *ROOM.glob("*.[ch]")]:
        shutil.copy(source, room)
    header = room / "handoff_counters.h"
    text = header.read_text()
    changed = text.replace("ROW_COUNT 128", "ROW_COUNT 256").replace("LAYOUT (1000", "LAYOUT (2000")
    assert len(changed) == len(text) and changed.count("256") > text.count("256") and "(2000" in changed
    header.write_text(changed)
    subprocess.run(["make", "-s", "-C", str(room), "all"], check=True, timeout=180)
    return room / "build" / "mod_socket_handoff.so"


def test_a_version_with_another_layout_begins_anew(httpd: Httpd, answering: Daemon, other_layout: Path) -> None:
    """Upgraded, and taken back, by graceful restarts."""
    path = httpd.root / "conf" / "httpd.conf"
    config = path.read_text()
    other = re.sub(r"\S+/mod_socket_handoff\.so", str(other_layout), config)
    hand_off(httpd, 2)
    try:
        for text in (other, config, other):
            path.write_text(text)
            graceful(httpd)
            assert results(httpd, "llm") == {}
            hand_off(httpd, 4)
            assert results(httpd, "llm") == {"sent": 4}
    finally:
        path.write_text(config)
        graceful(httpd)


def kill_one(httpd: Httpd) -> None:
    """Kills a process as the kernel's out-of-memory killer would. (httpd says nothing of that one signal.)"""
    victim = httpd.children()[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in httpd.children() and len(httpd.children()) >= 2, "the killed process is gone")


def test_a_killed_process_loses_nothing(httpd: Httpd, answering: Daemon) -> None:
    before = results(httpd, "llm")
    for n in range(1, 4):
        hand_off(httpd, 20)
        kill_one(httpd)
        assert added(before, results(httpd, "llm")) == {"sent": 20 * n}
    hand_off(httpd, 10)
    assert added(before, results(httpd, "llm")) == {"sent": 70}


def ask(httpd: Httpd, uri: str) -> int:
    return fetch(httpd.port("main"), uri).status


def test_failures_are_counted_by_cause_where_they_happened(
    httpd: Httpd, log: ErrorLog, target: Path, run_dir: Path
) -> None:
    before = board(httpd)
    with Daemon(run_dir / "ok" / "standby.sock", answer=answer_ok):
        hand_off(httpd, 6, served_by="standby")  # nobody at llm's own socket
    log.expect("handoff to llm failed: there is no such socket.*its backup standby is tried", times=6)
    assert ask(httpd, "/t?t=llm") == 503
    log.expect("handoff to llm failed: there is no such socket", times=7)
    log.expect("handoff to standby failed: there is no such socket")
    (run_dir / "ok" / "standby.sock").touch()
    assert ask(httpd, "/t?t=standby") == 403
    log.expect("that is not a socket")
    (run_dir / "ok" / "standby.sock").unlink()
    with Daemon(run_dir / "ok" / "standby.sock", mode=0o600):
        assert ask(httpd, "/t?t=standby") == (503 if os.geteuid() == 0 else 200)
    log.expect("Apache's user may not write to the socket")
    assert ask(httpd, "/forbidden?t=llm") == 403
    assert ask(httpd, "/t?t=/run/elsewhere.sock") == 403
    log.expect("handoff refused", times=2)
    after = board(httpd)
    assert added(before["llm"]["results"], after["llm"]["results"]) == {"no-daemon": 7}
    assert added(before["standby"]["results"], after["standby"]["results"]) == {
        "sent": 6,
        "no-daemon": 1,
        "refused-path": 1,
        "no-permission": 1,
    }
    refused = added(before["none"]["results"], after["none"]["results"]).get("refused-path", 0)
    assert refused + added(before["llm"]["results"], after["llm"]["results"]).get("refused-path", 0) == 2


@pytest.mark.parametrize("err", ["", "&err=1"])
@pytest.mark.parametrize("output", ["", "&body=9&flush=1"])
@pytest.mark.parametrize(("path", "status"), [("/t", 500), ("/t", 404), ("/excused", 503)])
def test_an_application_that_fails_after_it_asked_is_counted_and_logged(
    httpd: Httpd, answering: Daemon, path: str, status: int, output: str, err: str
) -> None:
    """Before and after its first output; its own error is the answer, also as an ErrorDocument."""
    before = board(httpd)
    marker = f"{path[1:]}-{status}-{len(output)}-{len(err)}"
    answer = fetch(httpd.port("main"), f"{path}?t=llm&d={marker}{output}{err}&ret={status}")
    assert answer.status == status
    assert (answer.body == b"excuse") == (path == "/excused")
    wait_until(
        lambda: added(before["llm"]["results"], results(httpd, "llm")) == {"application-failed": 1}, "it is counted"
    )
    assert answering.count == 0
    assert httpd.access_line(f"d={marker}&" if output or err else f"d={marker}").endswith(
        " target=llm result=application-failed"
    )


@pytest.mark.parametrize("how", ["fail=502", "ret=500"])
def test_an_application_that_was_refused_before_it_failed_is_counted_once(
    httpd: Httpd, answering: Daemon, log: ErrorLog, how: str
) -> None:
    before = board(httpd)
    marker = f"refused-{how[:3]}"
    assert ask(httpd, f"/t?t=nobody&d={marker}&body=9&flush=1&{how}") in (403, 500)
    log.expect("is neither the name nor the path")
    httpd.access_line(f"d={marker}")
    after = board(httpd)
    assert added(before["none"]["results"], after["none"]["results"]) == {"refused-path": 1}
    assert after["llm"]["results"] == before["llm"]["results"]


def test_a_target_that_failed_too_often_is_skipped_by_all_processes_and_shown(
    httpd: Httpd, log: ErrorLog, run_dir: Path
) -> None:
    before = board(httpd)["fragile"]["results"]
    for _ in range(10):
        assert ask(httpd, "/t?t=fragile") == 503
    log.expect("handoff to fragile failed: there is no such socket", times=3)
    log.expect("target fragile failed 3 times in a row and is skipped for 1000 ms")
    row = board(httpd)["fragile"]
    assert added(before, row["results"]) == {"no-daemon": 3, "skipped": 7}
    assert row["consecutive_failures"] == 3
    assert 0 < row["skipped_ms"] <= 1000
    assert 'socket_handoff_skipped{target="fragile"} 1\n' in status(httpd, "?prometheus").body.decode()
    assert "skipped for " in status(httpd).body.decode()
    with Daemon(run_dir / "ok" / "fragile.sock", answer=answer_ok):
        wait_until(lambda: board(httpd)["fragile"]["skipped_ms"] == 0, "the time is over")
        hand_off(httpd, 1, target="fragile")
        hand_off(httpd, 20, target="fragile")
    log.expect("target fragile works again")
    row = board(httpd)["fragile"]
    assert (row["consecutive_failures"], row["skipped_ms"]) == (0, 0)


class Tables(HTMLParser):
    """All cells of all rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "b" and tag != "script", f"<{tag}>"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """The format as its specification says it: a HELP and a TYPE before each family, all in one piece."""
    found: dict[tuple[str, str, str], float] = {}
    family = ""
    seen: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in seen and line.endswith("."), line
            seen.append(family)
            continue
        if line.startswith("# TYPE "):
            assert line.split()[2] == family and line.split()[3] in ("counter", "gauge", "histogram"), line
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        name, labels, value = match.groups()
        assert re.fullmatch(family + "(_bucket|_sum|_count)?", name), line
        pairs = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""))
        key = (name, pairs.get("target", ""), pairs.get("result") or pairs.get("le") or pairs.get("path") or "")
        assert key not in found, line
        found[key] = float(value)
    assert text.endswith("\n") and len(seen) == 8
    return found


def test_the_formats_say_the_same(httpd: Httpd, answering: Daemon) -> None:
    hand_off(httpd, 3)
    rows = board(httpd)
    text = dict(line.split(": ", 1) for line in status(httpd, "?auto").body.decode().splitlines())
    numbers = samples(status(httpd, "?prometheus").body.decode())
    cells = Tables(status(httpd).body.decode()).rows
    assert list(rows) == ["llm", "standby", "fragile", "odd", "none"]
    for name, row in rows.items():
        shown = [line for line in cells if line and line[0] == name]
        assert len(shown) == 2, cells
        for word, count in row["results"].items():
            assert int(text[f"{name}/{word}"]) == count
            assert numbers["socket_handoff_results_total", name, word] == count
            assert f"{word} {count}" in shown[0][4] or word == "sent" or count == 0
        assert int(shown[0][3]) == row["results"]["sent"]
        assert int(text[f"{name}/data-bytes"]) == row["data_bytes"] == int(shown[0][5])
        assert numbers["socket_handoff_data_bytes_total", name, ""] == row["data_bytes"]
        duration = row["duration_seconds"]
        for bound, count in duration["up_to"].items():
            assert int(text[f"{name}/duration-up-to-{bound}"]) == count
            assert numbers["socket_handoff_duration_seconds_bucket", name, bound] == count
        assert sum(map(int, shown[1][1:])) == duration["count"] == int(text[f"{name}/duration-count"])
        assert numbers["socket_handoff_duration_seconds_count", name, ""] == duration["count"]
        assert numbers["socket_handoff_duration_seconds_sum", name, ""] == duration["sum"]
        assert float(text[f"{name}/duration-sum"]) == duration["sum"]
        if row["declared"]:
            assert int(text[f"{name}/consecutive-failures"]) == row["consecutive_failures"]
            assert numbers["socket_handoff_consecutive_failures", name, ""] == row["consecutive_failures"]
    words = re.findall(r'X\(HANDOFF_\w+,\s+"([\w-]+)"\)', (ROOM / "handoff_result.h").read_text())
    assert list(rows["llm"]["results"]) == words


def test_what_an_operator_wrote_is_escaped_in_every_format(httpd: Httpd, run_dir: Path) -> None:
    path = f"{run_dir}/ok/{ODD}"
    row = board(httpd)["odd"]
    assert (row["path"], row["user"], row["transport"], row["backup"]) == (path, "root", "stream", "llm")
    page = status(httpd).body.decode()
    assert ODD not in page and "<b>" not in page and "<script" not in page
    assert html.escape(ODD, quote=False) in page or html.escape(ODD).replace("&#x27;", "'") in page
    label = path.replace("\\", "\\\\").replace('"', '\\"')
    assert f'{{target="odd",path="{label}",backup="llm"}} 1\n' in status(httpd, "?prometheus").body.decode()
    assert f"odd/path: {path}\n" in status(httpd, "?auto").body.decode()


def test_prometheus_own_parser_reads_the_page(httpd: Httpd, run_dir: Path) -> None:
    program = (
        "import json, sys\n"
        "from prometheus_client.parser import text_string_to_metric_families as parse\n"
        "print(json.dumps([[f.name, f.type, f.documentation, [[s.name, s.labels, s.value] for s in f.samples]]"
        " for f in parse(sys.stdin.read())]))\n"
    )
    text = status(httpd, "?prometheus").body.decode()
    found = subprocess.run(["/usr/bin/python3", "-c", program], input=text, capture_output=True, text=True, check=False)
    if "No module named 'prometheus_client'" in found.stderr:
        pytest.skip("NOT TESTED: Prometheus' parser is not installed (apt install python3-prometheus-client)")
    assert found.returncode == 0, found.stderr
    families = {name: (kind, samples) for name, kind, _, samples in json.loads(found.stdout)}
    assert families["socket_handoff_results"][0] == "counter"
    assert families["socket_handoff_duration_seconds"][0] == "histogram"
    paths = {sample[1]["target"]: sample[1]["path"] for sample in families["socket_handoff_target_info"][1]}
    assert paths["odd"] == f"{run_dir}/ok/{ODD}"
    assert all(documentation for _, _, documentation, _ in json.loads(found.stdout))


def test_promtool_has_nothing_to_say_about_the_names(httpd: Httpd) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("NOT TESTED: promtool is not installed (apt install prometheus)")
    text = status(httpd, "?prometheus").body
    found = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "text/html; charset=utf-8"),
        ("?", "text/html; charset=utf-8"),
        ("?auto", "text/plain; charset=utf-8"),
        ("?json", "application/json"),
        ("?prometheus", "text/plain; version=0.0.4; charset=utf-8"),
        ("?prometheus=", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_get_and_head_are_answered_and_never_stored(httpd: Httpd, query: str, kind: str) -> None:
    for method in ("GET", "HEAD"):
        answer = status(httpd, query, method=method)
        assert answer.status == 200
        assert answer.headers["content-type"].lower() == kind
        assert answer.headers["cache-control"] == "no-store"
        assert bool(answer.body) == (method == "GET")


@pytest.mark.parametrize("query", ["?xml", "?auto&json", "?autox", "?json=1", "?Auto", "?%6ason", "?="])
def test_an_unknown_format_is_refused_with_the_known_ones(httpd: Httpd, query: str) -> None:
    answer = status(httpd, query)
    assert answer.status == 400
    assert answer.headers["cache-control"] == "no-store"
    for known in ("?auto", "?json", "?prometheus"):
        assert known in answer.body.decode()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_other_methods_are_refused(httpd: Httpd, method: str) -> None:
    answer = status(httpd, method=method)
    assert answer.status in ((405,) if method != "BREW" else (405, 501))
    if answer.status == 405:
        assert {"GET", "HEAD"} <= set(re.split(r",\s*", answer.headers["allow"]))


def test_looking_changes_nothing(httpd: Httpd, uri: Callable[..., str]) -> None:
    before = board(httpd)
    for query in ("", "?auto", "?prometheus", "?json"):
        status(httpd, query)
    assert board(httpd) == before
