"""Without descriptors: who may have the last ones, and that a lack of them never looks like somebody else's fault."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeDaemon, MakeLLM
from daemon_harness import SOURCE, Daemon, Response, wait_for
from llm_server import SSE_HEAD
from llm_server import Request as LLMRequest
from streaming_daemon import descriptors
from streaming_daemon.siblings import Passed, Siblings
from streaming_daemon.wheel import TimerWheel

httptools = pytest.importorskip("httptools")

from streaming_daemon.backends.http_client import Client, NoDescriptorError  # noqa: E402 - needs httptools

QUESTION = {"prompt": "hello"}


@contextmanager
def at_most(limit: int, pid: int = 0) -> Iterator[None]:
    """So low a limit for this process, or for another one, which does not hear of it."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def limit_with(free: int, pid: int) -> int:
    """The limit under which ``pid`` has so many descriptors left."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    number = left = 0
    while left < free:
        left += number not in used
        number += 1
    return number


def test_the_regions_follow_one_another_whatever_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (32, 64, 100, 1024, 20_000, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        last = (1 << 30) if limit == resource.RLIM_INFINITY else limit
        assert 0 < last // 2 < descriptors.ceiling() < descriptors.end() < last
        # A peer, its client and its payload.
        assert last - descriptors.end() >= 3


def test_what_is_reserved_is_what_is_opened_next() -> None:
    kept = descriptors.Reservation(3, 1 << 20)
    numbers = list(kept._fds)
    assert descriptors.lowest() not in numbers
    kept.release()
    kept.release()
    pair = socket.socketpair()
    assert sorted(sock.fileno() for sock in pair) == sorted(numbers)[:2]
    for sock in pair:
        sock.close()


def test_a_reservation_beyond_its_bound_fails_counts_and_keeps_nothing() -> None:
    lowest, count = descriptors.lowest(), descriptors.shortages.count
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
        descriptors.Reservation(2, lowest + 1)
    assert caught.value.errno == errno.EMFILE
    assert descriptors.lowest() == lowest
    assert descriptors.shortages.count == count + 1
    with at_most(lowest + 1):
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            descriptors.Reservation(2, 1 << 20)
        held = descriptors.Reservation(1, 1 << 20)
        assert descriptors.lacking_since(count)
        assert descriptors.lowest() >= descriptors.end()
        held.release()
    assert descriptors.lowest() == lowest


def connect(url: str, fail: Exception, *, noted: bool = False, addresses: Any = None) -> tuple[BaseException, int]:
    """What becomes of a connection where the resolver, or what follows it, fails so; and how often it was tried."""

    async def play() -> tuple[BaseException, int]:
        loop = asyncio.get_running_loop()
        client = Client(url, loop, TimerWheel(loop), connect_timeout=5, most_idle=1)
        tries = 0

        async def broken(*_: Any, **__: Any) -> Any:
            nonlocal tries
            tries += 1
            if noted:
                # Somebody else of this process finds a shortage meanwhile, and it is over when the answer is here.
                descriptors.shortages.note()
            raise fail

        loop.getaddrinfo = broken
        loop.create_connection = broken
        try:
            await client.connect()
        except Exception as error:
            return error, tries
        raise AssertionError("connected")

    return asyncio.run(play())


NAMELESS = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
UNKNOWN = ssl.SSLCertVerificationError(1, "unable to get local issuer certificate")


@pytest.mark.parametrize(
    ("url", "error"), [("http://name.invalid", NAMELESS), ("https://192.0.2.1", UNKNOWN)], ids=["name", "certificate"]
)
def test_what_fails_in_a_shortage_is_put_down_to_it_even_when_that_is_over(url: str, error: OSError) -> None:
    assert type(connect(url, error)[0]) is type(error)
    assert type(connect(url, error, noted=True)[0]) is NoDescriptorError


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_host_without_files_is_no_fault_of_the_backend(number: int) -> None:
    assert type(connect("http://192.0.2.1", OSError(number, "x"))[0]) is NoDescriptorError


def test_a_backend_that_refuses_during_a_shortage_has_refused() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert type(connect("http://192.0.2.1", refused, noted=True)[0]) is ConnectionRefusedError


def test_to_hand_a_client_to_another_worker_takes_a_descriptor_and_none_is_no_fault_of_ours(tmp_path: Path) -> None:
    here = Siblings(tmp_path / "answers")
    (tmp_path / "answers" / "key").symlink_to("worker-1")
    with at_most(descriptors.lowest()):
        assert here.pass_on("key", b"x", [0]) is Passed.BUSY
    # There is no such worker.
    assert here.pass_on("key", b"x", [0]) is Passed.NOBODY
    here.sock.close()
    here.close()


def silent(request: LLMRequest) -> None:
    request.send(SSE_HEAD)
    request.wait_closed()


def names(response: Response) -> str:
    return f"{response.status} {response.json['error']['type']}"


PATIENT = "first_event_timeout = 0.5\nconnect_timeout = 20"


def openai(url: str) -> str:
    return f'[backend]\ndefault = "b"\n[backends.b]\ntype = "openai"\nbase_url = "{url}"\n{PATIENT}\n'


@pytest.fixture
def trusting(certificate: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which the certificate is in a directory, as Debian has it: it is opened when it is needed."""
    directory = tmp_path / "certs"
    directory.mkdir()
    shutil.copy(certificate, directory / "c.pem")
    subprocess.run(["openssl", "rehash", str(directory)], check=True, capture_output=True)
    return {"SSL_CERT_DIR": str(directory), "SSL_CERT_FILE": str(tmp_path / "none")}


def check_every_shortage(daemon: Daemon, otherwise: str, *, many: bool) -> None:
    """However few descriptors are left, nothing but a lack of them is ever blamed; and then all is well again.
    ``many``: what it takes besides a peer and its client; a single one may be what the peer has just given back."""
    [worker] = daemon.workers()
    seen = []
    # Two are the peer and its client, who can be told no less than that.
    for free in range(2, 20):
        with at_most(limit_with(free, worker), worker):
            response = daemon.ask(QUESTION)
            seen.append(names(response))
            if response.status == 503:
                assert int(response.headers["retry-after"]) > 0
    assert set(seen) <= {"503 backend_exhausted", otherwise}, seen
    assert not many or seen[0] == "503 backend_exhausted"
    assert seen[-1] == otherwise
    assert names(daemon.ask(QUESTION)) == otherwise
    assert ("limit=descriptors" in daemon.log()) == ("503 backend_exhausted" in seen)


@pytest.mark.parametrize(("host", "many"), [("127.0.0.1", False), ("localhost", True)])
def test_on_the_way_to_a_backend_a_lack_of_descriptors_is_told_as_one(
    make_daemon: MakeDaemon, make_llm: MakeLLM, host: str, many: bool
) -> None:
    llm = make_llm(silent)
    daemon = make_daemon(openai(f"http://{host}:{llm.port}/v1")).start()
    check_every_shortage(daemon, "504 backend_timeout", many=many)


def test_so_it_is_in_the_middle_of_tls(
    make_daemon: MakeDaemon, make_llm: MakeLLM, certificate: Path, trusting: dict[str, str]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    llm = make_llm(silent, tls=context)
    daemon = make_daemon(openai(f"https://127.0.0.1:{llm.port}/v1"), environ=trusting).start()
    check_every_shortage(daemon, "504 backend_timeout", many=True)


def test_so_it_is_for_a_local_proxy(make_daemon: MakeDaemon, make_llm: MakeLLM, tmp_path: Path) -> None:
    make_llm(silent, path=tmp_path / "s")
    check_every_shortage(make_daemon(openai(f"unix:{tmp_path}/s:/v1")).start(), "504 backend_timeout", many=False)


def test_so_it_is_for_a_program(make_daemon: MakeDaemon) -> None:
    command = json.dumps([sys.executable, "-c", "import sys; sys.exit(3)"])
    text = f'[backend]\ndefault = "b"\n[backends.b]\ntype = "exec"\ncommand = {command}\n'
    check_every_shortage(make_daemon(text).start(), "502 backend_error", many=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_crowd_gets_answers_or_is_told_to_come_back(make_daemon: MakeDaemon, make_llm: MakeLLM, host: str) -> None:
    llm = make_llm(lambda request: request.wait_closed())
    text = openai(f"http://{host}:{llm.port}/v1").replace("0.5", "4")
    daemon = make_daemon(f"[server]\nhead_after = 0\n{text}")
    with at_most(100):
        daemon.start()
    responses = [client.finish() for client in [daemon.hand(QUESTION) for _ in range(120)]]
    seen = {(names(each), each.headers.get("retry-after")) for each in responses}
    # 504: those that had a connection, to a server that says nothing.
    assert seen <= {
        ("503 backend_exhausted", "5"),
        ("503 overloaded", "5"),
        ("504 backend_timeout", None),
    }, seen
    assert {status[:3] for status, _ in seen} == {"503", "504"}
    wait_for(lambda: names(daemon.ask(QUESTION)) == "504 backend_timeout", "a place again")


def table_size(pid: int | str = "self") -> int:
    """Descriptors that the kernel has room for without enlarging the process's table (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nFDSize:")[1].split()[0])


def test_a_workers_table_has_room_for_all_its_streams_before_the_first_comes(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nworkers = 1\nmax_streams = 1500\n")
    daemon.start()
    assert table_size(daemon.workers()[0]) >= 2 * 1500


MAKE_TABLE = """
import os, resource, sys
from streaming_daemon import descriptors
soft, taken, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
if taken:
    os.dup2(0, taken)
before = sorted(os.listdir("/proc/self/fd"))
descriptors.make_table(wanted)
assert sorted(os.listdir("/proc/self/fd")) == before, "a descriptor came or went"
print(open("/proc/self/status").read().split("FDSize:")[1].split()[0])
"""


@pytest.mark.parametrize(
    ("soft", "taken", "wanted", "least"),
    [(4096, 0, 3000, 3000), (1024, 0, 100_000, 1024), (1024, 1023, 1024, 1024), (1024, 1022, 1023, 1023)],
    ids=["as asked for", "more than is allowed", "the last is taken", "the one it would take is taken"],
)
def test_the_table_is_made_large_and_nothing_in_it_changes(soft: int, taken: int, wanted: int, least: int) -> None:
    command = [sys.executable, "-c", MAKE_TABLE, str(soft), str(taken), str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=SOURCE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= least
