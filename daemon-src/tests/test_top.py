"""``top`` shows the same numbers as the metrics, to people and to scripts."""

from __future__ import annotations

import copy
import json
import os
import pty
import signal
import subprocess
import time
from typing import Any

import pytest

from conftest import MakeDaemon
from daemon_harness import Daemon, shaped, wait_for
from streaming_daemon import board as b
from streaming_daemon import metrics, top
from streaming_daemon.board import Board, backend_block, observe
from streaming_daemon.top import quantile, screen


def status(board: Board, when: float) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(json.dumps(metrics.report(board)))
    report["time"] = report["started"] + when
    return report


def later(board: Board) -> list[str]:
    """The screen of two seconds in which something happened."""
    before = status(board, 90000)
    slot = board.slot(1)
    slot[b.ACCEPTING] = 1
    slot[b.ACTIVE] = 1234
    slot[b.HANDOFFS] += 30
    slot[b.BYTES_SENT] += 5_000_000
    slot[b.STREAM_ERRORS["timeout"]] += 3
    block = backend_block(slot, "openai")
    slot[block + b.BACKEND_REQUESTS] += 10
    slot[block + b.TOKENS_COMPLETION] += 400
    for _ in range(100):
        observe(slot, b.FIRST_EVENT, 0.3)
    return screen(before, status(board, 90002))


def row(lines: list[str], begin: str) -> str:
    (line,) = (line for line in lines if line.startswith(begin))
    return " ".join(line.split())


def test_the_screen_shows_what_is_and_rates_of_what_changed() -> None:
    board, _ = Board.private()
    board.slot(1)[b.HANDOFFS] = 1_000_000
    lines = later(board)
    assert "up 1 d 01:00:02" in lines[0]
    assert "1 workers" in lines[0]
    assert "1,234 running" in row(lines, "streams")
    assert row(lines, "rates/s") == "rates/s 15.0 handoffs 0 events 200 tokens 2.5 MB sent"
    assert "1.5 errors" in row(lines, "trouble/s")
    assert row(lines, "  openai").startswith("openai 5.0 0.0 0 200 - - -")
    p50 = row(lines, "  first token").split()[2]
    assert 256 <= float(p50) <= 512


def test_a_restarted_service_has_rates_since_its_start_and_no_negative_ones() -> None:
    board, _ = Board.private()
    board.slot(1)[b.HANDOFFS] = 20
    now = status(board, 10)
    before = copy.deepcopy(now)
    before["started"] -= 1000
    before["values"]["daemon_handoffs_total"] = 1e9
    assert row(screen(before, now), "rates/s").startswith("rates/s 2.0 handoffs")


def test_a_service_that_takes_no_handoffs_says_so_first() -> None:
    board, _ = Board.private()
    assert "NOBODY TAKES HANDOFFS" in screen(status(board, 1), status(board, 2))[0]


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ([0, 0, 0], 0.5, None),
        ([10, 0, 0], 0.5, 0.5),
        ([0, 10, 0], 0.5, 1.5),
        ([5, 5, 0], 0.99, 1.98),
        ([0, 0, 10], 0.5, 2.0),
    ],
)
def test_quantiles_are_estimated_within_buckets(counts: list[int], q: float, expected: float | None) -> None:
    assert quantile([1.0, 2.0], counts, q) == (None if expected is None else pytest.approx(expected))


def started(make_daemon: MakeDaemon) -> Daemon:
    daemon = make_daemon("")
    daemon.config.write_text(f'[server]\nworkers = 2\n[metrics]\nlisten = "unix:{daemon.directory}/m.sock"')
    daemon.start()

    def accepting() -> bool:
        workers = top.fetch(f"{daemon.directory}/m.sock")["workers"]
        return [worker["state"] for worker in workers] == ["accepting", "accepting"]

    wait_for(accepting, "both workers to take handoffs")
    return daemon


def test_once_is_one_block_of_plain_text(make_daemon: MakeDaemon) -> None:
    daemon = started(make_daemon)
    done = daemon.run("top", "--config", str(daemon.config), "--once", "--interval", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("streaming_daemon ")
    assert "\x1b" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if " accepting " in line]) == 2


def test_json_is_every_number(make_daemon: MakeDaemon) -> None:
    daemon = started(make_daemon)
    assert daemon.ask(shaped(3)).complete
    done = daemon.run("top", "--connect", f"unix:{daemon.directory}/m.sock", "--json")
    assert json.loads(done.stdout)["values"]["daemon_handoffs_total"] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--connect", "unix:/nonexistent"], "/nonexistent: No such file or directory: is the service running"),
        (["--connect", "off"], "off: nothing to connect to"),
        (["--connect", "nonsense"], "nonsense: nothing to connect to"),
        (["--config", "/nonexistent"], "/nonexistent: cannot be read"),
    ],
)
def test_a_service_that_cannot_be_asked_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert top.main(arguments) == 1
    assert capsys.readouterr().err.startswith(expected)


def test_an_interval_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        top.main(["--interval", "0"])
    assert "allowed is a number from 0.1 to 3600" in capsys.readouterr().err


def test_on_a_terminal_the_screen_is_redrawn_until_interrupted_and_given_back(make_daemon: MakeDaemon) -> None:
    daemon = started(make_daemon)
    ours, theirs = pty.openpty()
    command = daemon.command("top", "--connect", f"unix:{daemon.directory}/m.sock", "--interval", "0.1")
    # A shell that runs the tests in the background lets them ignore SIGINT, and that is inherited. PLW1509: this
    # thread is the only one that could hold a lock here.
    process = subprocess.Popen(
        command,
        env=daemon.environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 10
    try:
        while seen.count(b"\x1b[H\x1b[J") < 3 and time.monotonic() < deadline:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() is not None, "the end of top")
        assert process.returncode == 0
        seen += os.read(ours, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert seen.startswith(b"\x1b[?1049h")
    assert b"\x1b[?1049l" in seen
