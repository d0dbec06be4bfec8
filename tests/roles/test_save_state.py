"""What HAProxy's reload is told of its servers: their states, and no port that the configuration has left."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from jinja2 import Environment

TEMPLATE = Path(__file__).resolve().parents[2] / "templates/etc/haproxy/socket-handoff/save-state.j2"
# be_id be_name srv_id srv_name srv_addr, then states and counts; the nineteenth is srv_port.
ROW = "4 web 1 {name} 192.0.2.11 0 1 1 1 100 15 3 4 6 0 0 0 - {port} - 0 0 - - 0"
STATES = "1\n# be_id be_name srv_id srv_name …\n" + "\n".join(
    ROW.format(name=n, port=p) for n, p in (("a", 80), ("b", 80))
)


@pytest.fixture
def save(tmp_path: Path):
    environment = Environment(keep_trailing_newline=True)
    environment.filters["comment"] = lambda text: f"# {text}"
    text = environment.from_string(TEMPLATE.read_text()).render(
        ansible_managed="managed",
        __handoff_lb_state=str(tmp_path / "state"),
        __handoff_lb_socket=str(tmp_path / "admin.sock"),
        __handoff_lb_config=str(tmp_path / "haproxy.cfg"),
    )
    (tmp_path / "save-state").write_text(text)
    (tmp_path / "haproxy.cfg").write_text(
        "backend web\n    server a 192.0.2.11:8080 check\n    server b 192.0.2.12:80 check\n"
    )
    (tmp_path / "state").write_text("of the reload before\n")
    command = [sys.executable, "-I", str(tmp_path / "save-state")]
    return lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def answer(listening: socket.socket) -> None:
    peer, _ = listening.accept()
    with peer:
        assert peer.recv(100) == b"show servers state\n"
        peer.sendall(STATES.encode() + b"\n")


def test_states_are_kept_and_ports_are_the_configurations(save, tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "admin.sock"))
        listening.listen()
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        done = save()
        thread.join()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state").read_text() == STATES.replace(
        "a 192.0.2.11 0 1 1 1 100 15 3 4 6 0 0 0 - 80", "a 192.0.2.11 0 1 1 1 100 15 3 4 6 0 0 0 - 8080"
    ) + "\n"


def test_where_nothing_can_be_saved_nothing_old_is_left(save, tmp_path):
    assert save().returncode != 0
    assert not (tmp_path / "state").exists()
