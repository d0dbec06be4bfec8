"""A host is turned to an OpenAI-compatible server by the playbook, while streams run, and its key stays secret."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import playbook
from front_door import Connection, Session, assert_complete
from testinfra.host import Host

KEY = "sk-chain-test-9c41"
# sudo logs every command of these tests, so none may hold the key itself: a pattern that does not match its own text.
KEY_PATTERN = "sk-chain-tes[t]-9c41"
VARIABLES = {
    "streaming_daemon_backend": "llm",
    "streaming_daemon_backends": [
        {
            "name": "llm",
            "type": "openai",
            "base_url": "http://127.0.0.1:9100/v1",
            "model": "chain-model",
            "api_key_credential": "openai_api_key",
        }
    ],
    "streaming_daemon_credentials": {"openai_api_key": KEY},
}
STANDIN = Path(__file__).with_name("openai_standin.py")


@pytest.fixture
def server(host: Host, await_true: Callable[[Callable[[], object], str], None]) -> Iterator[None]:
    host.check_output(f"cat >/root/openai_standin.py <<'SOURCE'\n{STANDIN.read_text()}\nSOURCE")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    host.check_output(f"systemd-run --unit=openai-standin /usr/bin/python3 /root/openai_standin.py 9100 {digest}")
    await_true(lambda: host.socket("tcp://127.0.0.1:9100").is_listening, "the stand-in listens")
    yield
    host.check_output("systemctl stop openai-standin; rm /root/openai_standin.py")


@pytest.mark.usefixtures("server")
def test_answers_come_from_the_configured_server(host: Host, session: Session, name: str) -> None:
    old = session.open_stream(tokens=400, pace=10)
    old.read_until(b"data: ")
    try:
        applied = playbook(name, "--diff", "--skip-tags", "verify", "--extra-vars", json.dumps(VARIABLES))
        assert applied.returncode == 0, applied.stdout[-4000:]
        text = assert_complete(session.open_stream("Why?", tokens=1, pace=1).read_to_end(), 4)
        assert text == "chain-model was asked: Why? \U0001f600"

        long = "begin " + "0123456789" * 100_000 + " end"
        form = urlencode({"prompt": long}).encode()
        request = session.request("POST", "/stream.php", form, {"X-CSRF-Token": session.csrf})
        text = assert_complete(Connection(session.address, request).read_to_end(), 4)
        assert text == f"chain-model was asked: {long} \U0001f600", (len(text), text[:100], text[-100:])

        assert KEY not in applied.stdout + applied.stderr
        everywhere = "/etc/systemd /etc/streaming-daemon/config.toml /opt/streaming-daemon /var/log"
        assert host.run(f"grep -rl {KEY_PATTERN} {everywhere}").stdout == ""
        assert host.run(f"journalctl --no-pager | grep {KEY_PATTERN}").stdout == ""
        pids = host.check_output(
            "cat /sys/fs/cgroup/*/system.slice/streaming-daemon.service/cgroup.procs "
            "/sys/fs/cgroup/system.slice/streaming-daemon.service/cgroup.procs 2>/dev/null || true"
        )
        for pid in set(pids.split()):
            assert KEY not in host.run(f"cat /proc/{pid}/cmdline /proc/{pid}/environ | tr '\\0' ' '").stdout
        assert host.run("runuser -u nobody -- cat /etc/streaming-daemon/credentials/openai_api_key").rc != 0
    finally:
        restored = playbook(name)
    assert restored.returncode == 0, restored.stdout[-4000:]
    assert not host.file("/etc/streaming-daemon/credentials/openai_api_key").exists, "a key that is not declared goes"
    assert_complete(old.read_to_end(), 400)
