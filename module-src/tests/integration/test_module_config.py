# SPDX-License-Identifier: Apache-2.0
"""Directives: nonsense is refused by configtest with the value, the allowed form and the fix."""

from __future__ import annotations

import re
import subprocess

import pytest
from handoff_httpd import BUILD, ROOM, Httpd


@pytest.fixture(scope="module")
def idle(httpd: Httpd) -> Httpd:
    """A server to ask for configtests."""
    return httpd


@pytest.mark.parametrize(
    "config",
    [
        "",
        "SocketHandoffEnabled On",
        "SocketHandoffEnabled off",
        "SocketHandoffAllowedPrefix /var/run/",
        "SocketHandoffAllowedPrefix /run",
        "SocketHandoffAllowedPrefix /run/streaming-daemon.sock",
        "SocketHandoffAllowedPrefix /run/a.sock /run/b/\nSocketHandoffAllowedPrefix /var/run/c",
        "SocketHandoffConnectTimeoutMs 1",
        "SocketHandoffConnectTimeoutMs 10000",
        "SocketHandoffSendTimeoutMs 500",
        "SocketHandoffMaxRetries 0",
        "SocketHandoffMaxRetries 10",
        "<VirtualHost *:1>\nSocketHandoffAllowedPrefix /run/x\nSocketHandoffMaxRetries 1\n"
        "SocketHandoffEnabled Off\n</VirtualHost>",
        "<Location /stream>\nSocketHandoffEnabled On\n</Location>",
        "<Directory /srv>\nSocketHandoffEnabled Off\n</Directory>",
    ],
)
def test_what_is_documented_loads(idle: Httpd, config: str) -> None:
    result = idle.configtest(config)
    assert result.returncode == 0, result.stderr


def test_the_example_configuration_loads(idle: Httpd) -> None:
    """Also with every commented directive switched on."""
    text = (ROOM / "conf" / "socket_handoff.conf").read_text()
    assert idle.configtest(text).returncode == 0
    active = re.sub(r"^#(?=SocketHandoff)", "", text, flags=re.MULTILINE)
    assert active.count("\nSocketHandoff") == 5
    assert idle.configtest(active).returncode == 0


PREFIX = (
    'must be /run, /var/run or an absolute path below them without empty, "." or ".." '
    "components, such as /run/ or /run/streaming-daemon.sock; let the daemon listen below "
    "/run and name that place here"
)
MS = "must be a whole number of milliseconds from 1 to 10000, without a unit; "
ON_OFF = 'must be On or Off; write "SocketHandoffEnabled On"'


@pytest.mark.parametrize(
    ("directive", "value", "message"),
    [
        ("SocketHandoffEnabled", "yes", ON_OFF),
        ("SocketHandoffEnabled", "1", ON_OFF),
        ("SocketHandoffAllowedPrefix", "/tmp/", "is not below /run or /var/run; " + PREFIX),
        ("SocketHandoffAllowedPrefix", "/", "is not below /run or /var/run; " + PREFIX),
        ("SocketHandoffAllowedPrefix", "/runner/", "is not below /run or /var/run; " + PREFIX),
        ("SocketHandoffAllowedPrefix", "run/llm", "is not absolute; " + PREFIX),
        ("SocketHandoffAllowedPrefix", "/run/../tmp", "component; " + PREFIX),
        ("SocketHandoffAllowedPrefix", "/run//llm", "component; " + PREFIX),
        ("SocketHandoffConnectTimeoutMs", "0", MS + "150 is the default"),
        ("SocketHandoffConnectTimeoutMs", "-5", MS),
        ("SocketHandoffConnectTimeoutMs", "100ms", MS),
        ("SocketHandoffConnectTimeoutMs", "1.5", MS),
        ("SocketHandoffConnectTimeoutMs", "10001", MS),
        ("SocketHandoffConnectTimeoutMs", "99999999999999999999", MS),
        ("SocketHandoffSendTimeoutMs", "soon", MS + "100 is the default"),
        ("SocketHandoffSendTimeoutMs", "+5", MS),
        ("SocketHandoffMaxRetries", "11", "must be a whole number of attempts from 0 to 10"),
        ("SocketHandoffMaxRetries", "two", "2 is the default, 0 tries once"),
    ],
)
def test_nonsense_is_refused_with_value_form_and_fix(idle: Httpd, directive: str, value: str, message: str) -> None:
    result = idle.configtest(f"{directive} {value}")
    assert result.returncode != 0
    assert f'{directive} "{value}": ' in result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(
    "directive",
    [
        "SocketHandoffAllowedPrefix /run/x",
        "SocketHandoffConnectTimeoutMs 10",
        "SocketHandoffSendTimeoutMs 10",
        "SocketHandoffMaxRetries 1",
    ],
)
def test_what_belongs_to_the_server_is_refused_in_a_location(idle: Httpd, directive: str) -> None:
    result = idle.configtest(f"<Location /x>\n{directive}\n</Location>")
    assert result.returncode != 0
    assert "not allowed in <Location> context" in result.stderr


def test_the_version_is_in_the_binary_and_written_once() -> None:
    header = (ROOM / "handoff_version.h").read_text()
    match = re.search(r'#define HANDOFF_VERSION "([0-9.]+)"', header)
    assert match is not None
    binary = (BUILD / "mod_socket_handoff.so").read_bytes()
    assert f"mod_socket_handoff/{match[1]}\0".encode() in binary


def test_a_missing_apxs_is_told_with_the_package_and_the_variable() -> None:
    result = subprocess.run(
        ["make", "-C", str(ROOM), "APXS=/nowhere/apxs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    for word in ("/nowhere/apxs", "apt install apache2-dev", "make APXS="):
        assert word in result.stderr
