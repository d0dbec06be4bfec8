"""What a client hears that is one too many, and that the others do not notice."""

from __future__ import annotations

import os
from typing import Any

from conftest import MakeDaemon, MakeLLM
from daemon_harness import Client, Daemon, Response, envelope, shaped, socket_pair, tcp_pair, wait_for
from llm_server import SSE_HEAD
from llm_server import Request as LLMRequest


def start(daemon: Daemon, **more: Any) -> Client:
    client = daemon.hand(shaped(1000, 1, **more))
    client.read_until(b"Hello")
    return client


def check(response: Response, status: int, kind: str) -> None:
    assert (response.status, response.json["error"]["type"]) == (status, kind)
    assert int(response.headers["retry-after"]) > 0


def test_a_user_has_so_many_streams_and_others_have_theirs(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[limits]\nstreams_per_user = 2").start()
    running = [start(daemon, user="ada", request_id=f"ada-{number}") for number in range(2)]
    check(daemon.ask(shaped(1, user="ada")), 429, "too_many_streams")
    assert daemon.ask(shaped(1, user="eve")).complete
    assert daemon.ask(shaped(1)).complete
    # Apache's user counts where the application names none.
    check(daemon.ask(envelope(shaped(1), user="ada")), 429, "too_many_streams")
    running[0].close()
    daemon.wait_log("stream id=ada-0 .*outcome=client_gone")
    assert daemon.ask(shaped(1, user="ada")).complete
    running[1].close()


def test_an_address_has_so_many_streams_as_the_envelope_says_whose(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[limits]\nstreams_per_address = 1").start()

    def asked_by(address: str, tokens: int = 1) -> bytes:
        return envelope(shaped(tokens, 1), client={"addr": address, "port": 4711})

    running = daemon.hand(asked_by("2001:db8::1", 1000))
    running.read_until(b"Hello")
    check(daemon.ask(asked_by("2001:db8::2:2")), 429, "too_many_streams")
    assert daemon.ask(asked_by("2001:db8:0:1::1")).complete
    assert daemon.ask(asked_by("192.0.2.1")).complete
    running.close()


def test_a_plain_message_counts_for_the_connection_s_address(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[limits]\nstreams_per_address = 1").start()
    running = daemon.hand(shaped(1000, 1), pair=tcp_pair)
    running.read_until(b"Hello")
    check(daemon.ask(shaped(1), pair=tcp_pair), 429, "too_many_streams")
    assert daemon.ask(shaped(1), pair=socket_pair).complete
    running.close()


def test_who_asks_too_often_waits(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[limits]\nuser_rate = 0.01\nuser_burst = 3").start()
    answers = [daemon.ask(shaped(1, user="ada")) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert 90 <= int(answers[3].headers["retry-after"]) <= 100
    assert daemon.ask(shaped(1, user="eve")).complete
    daemon.wait_log("outcome=overloaded status=429")


def test_the_largest_slow_client_goes_when_memory_is_short(make_llm: MakeLLM, make_daemon: MakeDaemon) -> None:
    def script(request: LLMRequest) -> None:
        request.send(SSE_HEAD)
        kilobytes = int(request.json["messages"][0]["content"])
        for _ in range(kilobytes):
            request.event("x" * 1024)
        request.end()

    llm = make_llm(script)
    config = f'[limits]\nmax_buffered = 700000\n[backends.llm]\ntype = "openai"\nbase_url = "{llm.url}"\n'
    daemon = make_daemon(config + "[server]\nwrite_timeout = 60").start()
    # Each is read until 64 KiB wait for its client, however little one read brings: twelve are above the limit.
    clients = [daemon.hand({"prompt": "2000", "request_id": f"slow-{number}"}) for number in range(12)]
    daemon.wait_log("outcome=buffer_full")
    wait_for(lambda: len(llm.requests) == 12, "all of them to be asked for")
    fast = daemon.ask({"prompt": "0"})
    assert fast.status in (200, 503)
    dropped = daemon.log().count("outcome=buffer_full")
    assert 1 <= dropped < 12
    for client in clients:
        client.close()
    wait_for(lambda: daemon.log().count("stream id=slow-") == 12, "all streams to end")


def test_without_descriptors_clients_are_told_503_and_it_recovers(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[server]\nlinger_timeout = 1.0").start(descriptors=100)
    clients = [daemon.hand(shaped(1000, 1, request_id=f"many-{number}")) for number in range(150)]
    # Everybody is answered at once: with a stream, or with 503 and when to come back.
    streams = [client for client in clients if b" 200 " in client.read_until(b"\r\n\r\n")[:20]]
    refused = [client for client in clients if client not in streams]
    assert 30 < len(streams) < 100
    for client in refused:
        check(client.finish(), 503, "overloaded")
    for client in streams:
        client.close()
    wait_for(lambda: daemon.ask(shaped(1)).complete, "a stream again")
    [worker] = daemon.workers()
    wait_for(lambda: len(os.listdir(f"/proc/{worker}/fd")) < 40, "the descriptors to be free again")
    assert "Traceback" not in daemon.log()
