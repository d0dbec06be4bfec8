"""A host is turned to an OpenAI-compatible server by the playbook, while streams run, and its key stays secret."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import PASSWORD
from exposure import assert_baseline
from front_door import Connection, Session, assert_complete
from operator_runs import playbook
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
    # What no variable of its own says, in the words of the daemon's own file.
    "streaming_daemon_extra_config": {
        "server": {"max_duration": 600},
        "limits": {"streams_per_user": 500},
        "backends": {"prepared": {"type": "demo", "tokens_per_second": 1000}},
        "routes": [{"path": "/stream.php/prepared", "backend": "prepared"}],
    },
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


# Reads the command line and the environment of every process, again and again, until it is stopped. Who shows a secret
# in either is named, never the secret.
WATCHER = r"""
import os, re, time
secret = re.compile(rb"sk-chain-tes[t]-9c41|chain-test-passwor[d]")
print("watching", flush=True)
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if secret.search(text):
                print("seen in", name, secret.sub(b"...", text)[:200], flush=True)
    time.sleep(0.02)  # leaves the machine to the run that is watched
"""


@pytest.fixture
def watched_processes(
    host: Host, await_true: Callable[[Callable[[], object], str], None]
) -> Iterator[Callable[[], str]]:
    """What a watcher has said since the test began: who showed a secret where every user of the host may read it."""
    unit, program = "handoff-watcher.service", "/run/handoff-watcher.py"
    host.check_output(f"cat >{program} <<'SOURCE'\n{WATCHER}\nSOURCE")
    host.check_output(f"systemd-run --unit={unit} --nice=10 /usr/bin/python3 {program}")

    def said() -> str:
        return str(host.check_output(f"journalctl --sync; journalctl --no-pager -o cat -t python3 -u {unit}"))

    await_true(lambda: "watching" in said(), "the watcher watches")
    yield said
    host.check_output(f"systemctl stop {unit}; rm {program}")


@pytest.fixture
def encrypted(host: Host) -> bool:
    """Whether this host is to keep its credentials encrypted: one does, the other does not."""
    return int(host.check_output("systemctl --version").split()[1]) > 252


@pytest.mark.usefixtures("server")
def test_answers_come_from_the_configured_server(
    host: Host, session: Session, name: str, watched_processes: Callable[[], str], encrypted: bool
) -> None:
    variables = VARIABLES | {"streaming_daemon_encrypt_credentials": "always" if encrypted else "auto"}
    credential = "/etc/streaming-daemon/credentials/openai_api_key" + (".cred" if encrypted else "")
    old = session.open_stream(tokens=400, pace=10)
    old.read_until(b"data: ")
    try:
        applied = playbook(name, "--diff", "-vvv", "--skip-tags", "verify", "--extra-vars", json.dumps(variables))
        assert applied.returncode == 0, applied.stdout[-4000:]
        assert_baseline(host, "streaming-daemon.service", "-with-network")
        text = assert_complete(session.open_stream("Why?", tokens=1, pace=1).read_to_end(), 4)
        assert text == "chain-model was asked: Why? \U0001f600"

        long = "begin " + "0123456789" * 100_000 + " end"
        form = urlencode({"prompt": long}).encode()
        request = session.request("POST", "/stream.php", form, {"X-CSRF-Token": session.csrf})
        text = assert_complete(Connection(session.address, request).read_to_end(), 4)
        assert text == f"chain-model was asked: {long} \U0001f600", (len(text), text[:100], text[-100:])

        prepared = session.request("GET", "/stream.php/prepared?" + urlencode({"prompt": "By route?", "tokens": 30}))
        assert "By route?" in assert_complete(Connection(session.address, prepared).read_to_end(), 30)

        assert KEY not in applied.stdout + applied.stderr
        assert PASSWORD not in applied.stdout + applied.stderr
        # Everything but where it belongs, and where Ansible's own temporary files and the backups would be.
        everywhere = "/etc /opt /var/lib /var/cache /var/log /var/www /var/tmp /tmp /home /root /usr/local"
        found = host.run(f"grep -rlE '{KEY_PATTERN}|chain-test-passwor[d]' {everywhere}").stdout.splitlines()
        assert found == ([] if encrypted else [credential])
        assert host.run(f"journalctl --no-pager | grep -E '{KEY_PATTERN}|chain-test-passwor[d]'").stdout == ""
        pids = host.check_output(
            "cat /sys/fs/cgroup/*/system.slice/streaming-daemon.service/cgroup.procs "
            "/sys/fs/cgroup/system.slice/streaming-daemon.service/cgroup.procs 2>/dev/null || true"
        )
        for pid in set(pids.split()):
            assert KEY not in host.run(f"cat /proc/{pid}/cmdline /proc/{pid}/environ | tr '\\0' ' '").stdout
        assert host.run(f"runuser -u nobody -- cat {credential}").rc != 0
    finally:
        restored = playbook(name, "--diff", "-vvv")
    assert restored.returncode == 0, restored.stdout[-4000:]
    assert KEY not in restored.stdout + restored.stderr
    assert PASSWORD not in restored.stdout + restored.stderr
    assert watched_processes().splitlines() == ["watching"]
    assert host.run(f"grep -rlE '{KEY_PATTERN}' {everywhere}").stdout == ""
    assert not host.file(credential).exists, "a key that is not declared goes"
    assert_complete(old.read_to_end(), 400)
