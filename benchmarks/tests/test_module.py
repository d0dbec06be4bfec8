# SPDX-License-Identifier: Apache-2.0
"""benchmarks/module measures what it says it measures. Nothing here looks at speed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from benchlib.figures import figure, ratio
from benchlib.module import CONTENDERS, INSTRUCTION_ROWS, MPMS, QUICK, Bench
from benchlib.tools import BenchmarkError, Generator, answer_body, build

BENCHMARKS = Path(__file__).resolve().parents[1]


def test_a_figure_is_the_median_with_the_quartiles_as_its_spread() -> None:
    value = figure([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (value.low, value.median, value.high, value.rounds) == (2.0, 3.0, 4.0, 5)


def test_a_ratio_is_formed_within_each_round() -> None:
    """A machine that was twice as slow for one round changes nothing."""
    value = ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0])
    assert (value.low, value.median, value.high) == (2.0, 2.0, 2.0)


def test_rounds_that_do_not_pair_are_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "wrong",
    [{"handoffs": 9}, {"handoffs": 11}, {"message_bytes": 1999}, {"failures": 1}],
    ids=["a client is missing", "a client too many", "data is missing", "an answer failed"],
)
def test_a_receiver_that_did_not_get_every_client_with_its_data_is_an_error(wrong: dict[str, int]) -> None:
    contender = next(c for c in CONTENDERS if c.key == "seqpacket")
    right = {"handoffs": 10, "answers": 10, "message_bytes": 2000, "payload_bytes": 0, "failures": 0}
    Bench._check(contender, 10, right)
    with pytest.raises(BenchmarkError, match="seqpacket"):
        Bench._check(contender, 10, right | wrong)


def test_an_unknown_contender_or_mpm_is_named_with_what_there_is() -> None:
    for argument, allowed in ((["--mpm", "eventful"], "prefork"), (["--only", "speed"], "payload")):
        done = subprocess.run([str(BENCHMARKS / "module"), *argument], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert argument[1] in done.stderr and allowed in done.stderr


def test_the_command_leaves_every_figure_of_every_contender_under_every_mpm(tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "module"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    document = json.loads((tmp_path / "module.json").read_text())
    assert set(document["mpms"]) == set(MPMS)
    for mpm, result in document["mpms"].items():
        assert result["missing"] == {}
        assert set(result["samples"]) == {c.key for c in CONTENDERS}
        for key, cells in result["samples"].items():
            for what in ("requests_per_second", "p50_us", "p99_us", "client_cpu_us"):
                values = cells[str(QUICK.connections[0])][what]
                assert len(values) == QUICK.rounds and all(value > 0 for value in values), (mpm, key, what)
            assert len(cells[str(QUICK.connections[0])]["reopened"]) == QUICK.rounds
        for row, _, _, servers in INSTRUCTION_ROWS:
            assert all(result["instructions"][row][server] > 1000 for server in servers), (mpm, row)
    report = (tmp_path / "module.md").read_text()
    for contender in CONTENDERS:
        assert contender.key == "null" or report.count(f"| {contender.title}") >= len(MPMS), contender.key
    assert report.count("| met |") + report.count("| **missed** |") == 10 * len(MPMS)


@contextmanager
def closing_server(after: int) -> Iterator[int]:
    """Answers on kept connections and closes each when it has read its `after`th request; yields the port."""
    answer = answer_body()
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            # The generator ends its connections by a reset.
            with connection, suppress(ConnectionResetError):
                for _ in range(after - 1):
                    connection.recv(4096)
                    connection.sendall(whole)
                connection.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_request_that_meets_the_end_of_a_kept_connection_is_sent_again() -> None:
    build("module", module=False)
    with closing_server(after=4) as port:
        load = Generator(os.sched_getaffinity(0)).run(port, "/", connections=1, amount="30x", keep_alive=True)
    assert (load.requests, load.reopened) == (30, 9)


def test_a_connection_that_never_answered_is_a_failure() -> None:
    build("module", module=False)
    with closing_server(after=1) as port, pytest.raises(BenchmarkError, match="'cut': 1"):
        Generator(os.sched_getaffinity(0)).run(port, "/", connections=1, amount="1x", keep_alive=True)
