"""The module that drains and enables servers, against a stand-in for HAProxy's socket that answers as 2.6 does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

BITS = {"ready": 0, "maint": 1, "configured maint": 4, "drain": 8, "found down": 0}
COLUMNS = "be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight"


class Haproxy:
    """One backend ``web`` with the servers ``web1`` and ``web2``; each connection is one command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = {"web1": "ready", "web2": "ready"}
        self.status = {"web1": "UP", "web2": "UP"}
        # What web1 has at each look, the last for ever.
        self.sessions = [0]
        self.commands: list[str] = []
        self.refusal = ""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer:
                command = peer.makefile().readline().strip()
                self.commands.append(command)
                peer.sendall(self.answer(command).encode())

    def answer(self, command: str) -> str:
        match command.split():
            case ["show", "servers", "state", "web"]:
                rows = "".join(
                    f"3 web {n} {name} 10.0.0.{n} 2 {BITS[state]} 1\n"
                    for n, (name, state) in enumerate(self.state.items())
                )
                return f"1\n# {COLUMNS}\n{rows}\n"
            case ["show", "servers", "state", _]:
                return "Can't find backend.\n\n"
            case ["show", "stat", *_]:
                count = self.sessions.pop(0) if len(self.sessions) > 1 else self.sessions[0]
                rows = "".join(f"web,{name},0,0,{count},9,status,{self.status[name]},\n" for name in self.state)
                return f"# pxname,svname,qcur,qmax,scur,smax,mode,status,\n{rows}\n"
            case ["set", "server", name, "state", state]:
                if not self.refusal:
                    self.state[name.partition("/")[2]] = state
                return self.refusal + "\n"
            case ["shutdown", "sessions", "server", _]:
                self.sessions = [0]
                return "\n"
        return "Unknown command.\n\n"

    def changes(self) -> list[str]:
        return [command for command in self.commands if not command.startswith("show ")]

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Haproxy]:
    running = Haproxy(tmp_path / "admin.sock")
    yield running
    running.close()


@pytest.fixture
def call(run_module, haproxy):
    def run(state: str, check: bool = False, **more):
        wanted = {"backend": "web", "server": "web1", "state": state, "socket": str(haproxy.path)}
        return run_module("haproxy_server", check=check, **{**wanted, **more})

    return run


@pytest.mark.parametrize("state", ["ready", "drain", "maint"])
@pytest.mark.parametrize("before", ["ready", "drain", "maint"])
def test_a_state_is_set_once_and_of_this_server_alone(haproxy, call, before, state):
    haproxy.state["web1"] = before
    report = call(state)
    assert (report["before"], report["state"], report["changed"]) == (before, state, before != state)
    assert haproxy.changes() == ([f"set server web/web1 state {state}"] if before != state else [])
    assert haproxy.state == {"web1": state, "web2": "ready"}
    assert call(state)["changed"] is False


def test_a_server_that_haproxy_cfg_has_disabled_is_in_maintenance(haproxy, call):
    haproxy.state["web1"] = "configured maint"
    assert call("maint")["changed"] is False
    assert call("ready")["changed"] is True


@pytest.mark.parametrize(
    ("other", "up"),
    [
        *(("UP", True), ("UP 1/3", True), ("no check", True)),
        *(("DOWN", False), ("DOWN 1/2", False), ("MAINT", False), ("DRAIN", False), ("NOLB", False)),
    ],
)
def test_who_gets_new_requests_is_told(haproxy, call, other, up):
    haproxy.status["web2"] = other
    assert call("ready")["up"] == ["web1", "web2"][: 1 + up]


def test_a_server_that_is_down_is_still_one_that_nobody_has_taken_out(haproxy, call):
    haproxy.status["web1"] = "DOWN"
    report = call("ready")
    assert (report["changed"], report["status"]) == (False, "DOWN")


def test_check_mode_asks_and_tells_but_neither_sets_nor_waits(haproxy, call):
    haproxy.sessions = [3]
    report = call("drain", check=True, wait=600)
    assert report["changed"] is True and report["sessions"] == 3 and report["timed_out"] is False
    assert report["diff"] == {"before": "web/web1 ready\n", "after": "web/web1 drain\n"}
    assert haproxy.changes() == []


def test_a_drain_waits_until_the_last_session_has_ended(haproxy, call):
    haproxy.sessions = [2, 1, 0]
    report = call("drain", wait=60)
    assert (report["sessions"], report["timed_out"]) == (0, False)
    assert len([command for command in haproxy.commands if command.startswith("show stat")]) == 3


def test_streams_that_outlast_the_deadline_are_reported_and_left_alone(haproxy, call):
    haproxy.sessions = [2]
    report = call("drain", wait=0.1)
    assert not report.get("failed") and (report["sessions"], report["timed_out"]) == (2, True)
    assert haproxy.changes() == ["set server web/web1 state drain"]


def test_streams_that_outlast_the_deadline_are_a_failure_or_are_closed_where_the_caller_says_so(haproxy, call):
    haproxy.sessions = [2]
    report = call("drain", wait=0.1, at_deadline="fail")
    assert report["failed"] and "2 sessions left" in report["msg"]
    report = call("drain", wait=0.1, at_deadline="shutdown")
    assert report["changed"] is True
    assert haproxy.changes()[-1] == "shutdown sessions server web/web1"


def test_who_comes_back_is_awaited_until_it_is_healthy_and_must_be(haproxy, call):
    haproxy.state["web1"] = "drain"
    haproxy.status["web1"] = "DOWN 1/2"
    report = call("ready", wait=0.1)
    assert report["failed"] and "web1 is DOWN 1/2 after" in report["msg"]
    haproxy.status["web1"] = "UP 1/2"  # as a server leaves its maintenance, before it was asked
    assert call("ready", wait=0.1)["failed"]
    haproxy.status["web1"] = "UP"
    report = call("ready", wait=60)
    assert (report["changed"], report["status"]) == (False, "UP")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server": "web3"}, "server web3 is not in backend web; allowed is one of: web1, web2"),
        ({"backend": "api"}, "backend api is unknown to HAProxy (Can't find backend.); allowed is"),
        ({"server": "web1;shutdown"}, "server is 'web1;shutdown'; allowed is a name"),
        ({"wait": -1}, "wait is -1.0; allowed is a number from 0 to 86400"),
        ({"socket": "/nonexistent/admin.sock"}, "socket /nonexistent/admin.sock does not answer"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(haproxy, call, given, said):
    report = call("drain", **given)
    assert report["failed"] and said in report["msg"]
    assert haproxy.changes() == []


def test_a_refusal_of_haproxy_is_passed_on(haproxy, call):
    haproxy.refusal = "Permission denied"
    report = call("drain")
    assert report["failed"] and "level admin" in report["msg"]
    haproxy.refusal = "Something else."
    assert "Something else." in call("drain")["msg"]
