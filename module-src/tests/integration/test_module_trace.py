# SPDX-License-Identifier: Apache-2.0
"""What the kernel saw: strace(1) of httpd's children while a client is handed off."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handoff_httpd import Httpd, wait_until
from handoff_standin import Client, Daemon, Handoff, response

Uri = Callable[..., str]


class Trace:
    """The calls of all children that name a descriptor, in the order in which they began; `-y` writes the inode behind
    each number, so that a number used again for something else is not mistaken."""

    def __init__(self, pids: list[int], path: Path) -> None:
        self.path = path
        command = ["strace", "-f", "-y", "-s", "32", "-e", "trace=%desc,%network", "-o", str(path)]
        self._process = subprocess.Popen(
            [*command, *(word for pid in pids for word in ("-p", str(pid)))],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for _ in pids:
            line = self._process.stderr.readline()
            assert "attached" in line, line + self._process.stderr.read()

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=10)


@pytest.fixture
def trace(httpd: Httpd, tmp_path: Path) -> Iterator[Trace]:
    if shutil.which("strace") is None:
        pytest.skip("NOT TESTED: strace is not installed (apt install strace)")
    trace = Trace(httpd.children(), tmp_path / "trace")
    yield trace
    trace.stop()


def sent_with(inode: str) -> re.Pattern[str]:
    return re.compile(rf"sendmsg\(.*SCM_RIGHTS, cmsg_data=\[(\d+)<{re.escape(inode)}>")


def split_at_sending(trace: Trace, inode: str) -> tuple[int, list[str], list[str]]:
    """The client's number in Apache, the calls up to the sendmsg that carries it, and those after."""
    lines = trace.lines()
    carrying = [(i, m) for i, line in enumerate(lines) if (m := sent_with(inode).search(line))]
    assert len(carrying) == 1, "\n".join(lines[-40:])
    index, match = carrying[0]
    return int(match[1]), lines[:index], lines[index + 1 :]


def inode_of(handoff: Handoff) -> str:
    return str(Path(f"/proc/self/fd/{handoff.client.fileno()}").readlink())


def closed(trace: Trace, number: int) -> bool:
    """Apache has closed what is now behind the client's number."""
    lines = trace.lines()
    return any(re.search(rf"\bclose\({number}<", line) for line in lines[-50:])


@pytest.mark.parametrize("kind", ["alone", "keepalive", "post", "pipelined", "sendfile"])
def test_after_the_message_apache_makes_one_call_on_the_client_and_that_takes_it_away(
    httpd: Httpd, daemon: Daemon, uri: Uri, trace: Trace, kind: str
) -> None:
    with Client(httpd.port("main")) as client:
        if kind == "keepalive":
            client.get("/plain.html").answer()
        if kind == "pipelined":
            client.get("/t")
        if kind == "sendfile":
            client.get("/sent.bin").answer()
        if kind == "post":
            client.post(uri(d="x"), b"body")
        else:
            client.get(uri(d="x"))
        handoff = daemon.next()
        inode = inode_of(handoff)
        wait_until(lambda: any(sent_with(inode).search(line) for line in trace.lines()), "the trace of the handoff")
        number, before, _ = split_at_sending(trace, inode)
        wait_until(lambda: closed(trace, number), "Apache ends its side of the connection")

        # The daemon's own time with the client: Apache must sleep through it.
        handoff.finish(response(b"data: x\n\n"))
        if kind == "pipelined":
            client.answer()
        assert client.rest() == response(b"data: x\n\n")
    wait_until(httpd.idle, "the server is quiet")
    _, _, after = split_at_sending(trace, inode)

    assert any(f"{number}<{inode}>" in line for line in before), "the trace shows the client's inode"
    assert kind != "sendfile" or any(f"sendfile({number}<{inode}>" in line for line in before)
    touching = [line for line in after if inode in line]
    assert len(touching) == 1, touching
    assert re.search(rf"dup3\(\d+<socket:\[\d+\]>, {number}<{re.escape(inode)}>, O_CLOEXEC", touching[0]), touching

    # From there on the number is a dead socket, and is closed like any other.
    rest = after[after.index(touching[0]) + 1 :]
    assert any(re.search(rf"\bclose\({number}<socket:", line) for line in rest), rest

    everything = before + after
    assert not [line for line in everything if re.search(r"\w\(-1[,)<]", line)], "a call on descriptor -1"
    assert not [line for line in everything if inode in line and re.search(r"shutdown\(|SO_LINGER", line)]


def test_a_refused_client_is_never_sent(httpd: Httpd, uri: Uri, trace: Trace, run_dir: Path) -> None:
    """The trace sees what it should: an answer of Apache's own is written to the client, and it is shut down."""
    with Client(httpd.port("main")) as client:
        number_of_lines = len(trace.lines())
        client.get("/plain.html", "Connection: close")
        assert client.answer().status == 200
        client.expect_reset_or_fin()
    wait_until(lambda: any("shutdown(" in line for line in trace.lines()[number_of_lines:]), "the lingering close")
    assert not [line for line in trace.lines() if "SCM_RIGHTS" in line]
