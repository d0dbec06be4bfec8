"""What is refused, with which status, and that it is said once in Apache's error log."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

import pytest
from front_door import Answer, Connection
from testinfra.host import Host

HandOff = Callable[..., Answer]
UNDECLARED = [
    "gpt",
    "LLM",
    "llm.sock",
    "/etc/passwd",
    "/tmp/evil.sock",
    "/run/../etc/passwd",
    "/run/streaming-daemon.sock/../../etc/passwd",
    "/run/streaming-daemon.socket",
    "run/streaming-daemon.sock",
]


def error_log(host: Host) -> list[str]:
    return list(host.check_output("cat /var/log/apache2/error.log /var/log/apache2/handoff-app-error.log").splitlines())


def refused_with(host: Host, hand_off: HandOff, target: str, status: int) -> Answer:
    before = len(error_log(host))
    answer = hand_off(target)
    assert answer.status == status, (target, answer.status, answer.body)
    assert b"the body of PHP" not in answer.body
    assert answer.header("X-Socket-Handoff") is None and answer.header("X-Handoff-Data") is None
    lines = [line for line in error_log(host)[before:] if "socket_handoff" in line]
    assert len(lines) == 1, lines
    return answer


@pytest.mark.parametrize("target", UNDECLARED)
def test_what_is_no_declared_target_is_forbidden(host: Host, hand_off: HandOff, target: str) -> None:
    refused_with(host, hand_off, target, 403)


@pytest.mark.parametrize("target", ["llm", "/run/streaming-daemon.sock", "/var/run/streaming-daemon.sock"])
def test_a_target_is_forbidden_where_nobody_permitted_it(host: Host, hand_off: HandOff, target: str) -> None:
    refused_with(host, lambda name: hand_off(name, page="other.php"), target, 403)
    assert hand_off(target, json.dumps({"prompt": "x", "demo": {"tokens": 2}})).status == 200


def test_apache_hands_nobody_to_any_other_socket_that_listens_on_the_host(host: Host, hand_off: HandOff) -> None:
    """Not a list of suspects: whatever listens, systemd's, PHP's and the daemon's own control socket among them."""
    table = host.check_output("cat /proc/net/unix").splitlines()[1:]
    # Flags 00010000: it listens (unix(7)). Abstract names begin with @ and are no paths.
    paths = {row.split()[7] for row in table if row.split()[3] == "00010000" and " /" in row}
    declared = "/run/streaming-daemon.sock"
    assert declared in paths and len(paths) > 5, paths
    for path in sorted(paths - {declared}):
        refused_with(host, hand_off, path, 403)


def test_apaches_user_reaches_only_the_declared_socket_of_the_daemon(host: Host) -> None:
    probe = (
        "import glob, os, socket, stat\n"
        "for path in ['/run/streaming-daemon.sock', *PATHS]:\n"
        "    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM):\n"
        "        try:\n"
        "            socket.socket(socket.AF_UNIX, kind).connect(path)\n"
        "            print(path)\n"
        "        except OSError:\n"
        "            pass\n"
    )
    own = host.check_output("find /run/streaming-daemon -type s").splitlines()
    assert "/run/streaming-daemon/metrics.sock" in own
    host.check_output(f"cat >/tmp/handoff-reach.py <<'SOURCE'\n{probe.replace('*PATHS', repr(own)[1:-1])}\nSOURCE")
    try:
        reached = {
            user: host.run(f"runuser -u {user} -- python3 /tmp/handoff-reach.py") for user in ("www-data", "root")
        }
    finally:
        host.check_output("rm /tmp/handoff-reach.py")
    assert reached["www-data"].stdout.split() == ["/run/streaming-daemon.sock"], reached["www-data"]
    assert set(reached["root"].stdout.split()) == {"/run/streaming-daemon.sock", *own}, (
        "the probe cannot fail otherwise"
    )


def test_another_site_of_the_host_may_not_hand_off(
    host: Host, address: str, await_true: Callable[[Callable[[], object], str], None]
) -> None:
    """Permission is for one script of one site; the module is loaded for all of them."""
    root, site = "/var/www/chain-test-site", "/etc/apache2/sites-enabled/chain-test.conf"
    handler = host.check_output("grep -h SetHandler /etc/apache2/sites-enabled/handoff-app.conf").strip()
    permission = "SocketHandoffAllow llm"
    lines = ["<VirtualHost *:80>", "ServerName other.example", f"DocumentRoot {root}", f"<Directory {root}>"]
    lines += ["Require all granted", "# permission", "</Directory>", '<FilesMatch "[.]php$">', handler, "</FilesMatch>"]
    code = "<?php header('X-Socket-Handoff: llm'); header('X-Handoff-Data: {\"demo\":{\"tokens\":2}}');"
    request = b"GET /stream.php HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n"
    seen: list[int] = []

    def answers(status: int) -> bool:
        # A graceful restart returns before the last process with the old configuration has gone.
        seen.append(Connection(address, request).read_to_end().status)
        return seen[-1] == status

    try:
        host.check_output(f"mkdir {root} && echo {shlex.quote(code)} >{root}/stream.php")
        host.check_output(f"echo {shlex.quote(chr(10).join([*lines, '</VirtualHost>']))} >{site}")
        host.check_output("apache2ctl graceful")
        await_true(lambda: answers(403), "the site is refused")
        # 401 is the application, which answered for the site until then.
        assert set(seen) <= {401, 403}, seen
        host.check_output(f"sed -i 's/# permission/{permission}/' {site} && apache2ctl graceful")
        await_true(lambda: answers(200), "the site may hand off: the refusal above was for no other reason")
    finally:
        host.check_output(f"rm -r {root} {site}; apache2ctl graceful")


def test_a_symlink_in_the_place_of_the_socket_is_forbidden(host: Host, hand_off: HandOff) -> None:
    """The declared name itself becomes a link to another socket that listens."""
    host.check_output("systemctl stop streaming-daemon.socket streaming-daemon.service")
    try:
        host.check_output("rm -f /run/streaming-daemon.sock && ln -s /run/systemd/notify /run/streaming-daemon.sock")
        refused_with(host, hand_off, "llm", 403)
    finally:
        host.check_output("rm -f /run/streaming-daemon.sock && systemctl start streaming-daemon.socket")


@pytest.mark.usefixtures("daemon_runs")
def test_a_dead_daemon_is_503_with_retry_after(
    host: Host, hand_off: HandOff, await_true: Callable[[Callable[[], object], str], None]
) -> None:
    host.check_output("systemctl stop streaming-daemon.socket streaming-daemon.service")
    # Its workers take handoffs for three seconds more, in case this was a restart.
    await_true(lambda: host.run("pgrep --uid streaming-daemon").stdout == "", "the workers left")
    answer = refused_with(host, hand_off, "llm", 503)
    assert int(answer.header("Retry-After") or "0") >= 1


@pytest.mark.parametrize("data", ["[1, 2", "[1, 2]", '{"prompt": 7}'])
def test_unusable_data_is_400_before_a_byte_is_streamed(hand_off: HandOff, data: str) -> None:
    answer = hand_off("llm", data)
    assert answer.status == 400, (answer.status, answer.body)
    assert json.loads(answer.body)["error"]["message"]


def test_a_user_of_the_host_cannot_reach_the_socket(host: Host) -> None:
    """0660 root:www-data: who is not Apache cannot inject a client."""
    probe = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('/run/streaming-daemon.sock')"
    result = host.run(f'runuser -u nobody -- python3 -c "{probe}"')
    assert result.rc != 0 and "PermissionError" in result.stderr, result.stderr
