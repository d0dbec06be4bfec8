"""What a browser sees of two web hosts behind the load balancer ``edge``, and what an operator does there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import testinfra
from browser import Browser
from conftest import PASSWORD
from operator_runs import PROJECT, changes, playbook
from testinfra.host import Host

WEB = ("default12", "default13")
AwaitTrue = Callable[..., None]
LOG = "journalctl --no-pager --output cat -t haproxy"
PHP = "$(basename /lib/systemd/system/php*-fpm.service)"
WRONG = (
    "systemctl stop streaming-daemon.socket streaming-daemon",
    "systemctl kill -s STOP streaming-daemon",
    f"systemctl stop {PHP}",
    "touch /etc/handoff-app/maintenance",
)
MENDED = (
    "systemctl start streaming-daemon.socket streaming-daemon",
    "systemctl kill -s CONT streaming-daemon",
    f"systemctl start {PHP}",
    "rm -f /etc/handoff-app/maintenance",
)
ASK_HEALTH = (
    "python3 -c \"import http.client as h;c=h.HTTPConnection('127.0.0.1');c.request('HEAD','/health.php');"
    'print(c.getresponse().status)"'
)
# What a runtime command needs and a host has: Python.
RUNTIME = (
    "python3 -c \"import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect('/run/haproxy/admin.sock');"
    "s.sendall(sys.argv[1].encode()+b'\\n');print(b''.join(iter(lambda:s.recv(65536),b'')).decode())\" '{}'"
)


def machine(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(PROJECT / ".cache/ssh/config"), sudo=True)


@pytest.fixture(scope="module")
def host() -> Host:
    """Not one of the scenario's web hosts, to which --hosts leads all other tests here."""
    return machine("edge")


@pytest.fixture(scope="module")
def web() -> dict[str, Host]:
    return {name: machine(name) for name in WEB}


@pytest.fixture(scope="module")
def me() -> str:
    """This machine's address as the test hosts see it."""
    command = [str(PROJECT / "script/host"), "gateway", "edge"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def browser(address: str, tmp_path: Path) -> Browser:
    found = Browser(address, tmp_path / "jar")
    found.log_in(PASSWORD)
    return found


@pytest.fixture(scope="module")
def at(address: str, tmp_path_factory: pytest.TempPathFactory, host: Host) -> dict[str, Browser]:
    """A logged-in browser for each web host, by HAProxy's own cookie."""
    found: dict[str, Browser] = {}
    cookies = dict(
        re.findall(r"^ *server (\S+) .* cookie (\S+)", host.file("/etc/haproxy/haproxy.cfg").content_string, re.M)
    )
    for name in WEB:
        jar = tmp_path_factory.mktemp(name) / "jar"
        jar.write_text(f"#HttpOnly_{address}\tFALSE\t/\tTRUE\t0\t__Host-handoff-host\t{cookies[name]}\n")
        found[name] = Browser(address, jar)
        found[name].log_in(PASSWORD)
    return found


def status(host: Host) -> dict[str, str]:
    """What HAProxy says of each web host: UP, DOWN, MAINT, DRAIN, without the count of checks."""
    text = host.check_output(RUNTIME.format("show stat -1 4 -1"))
    rows = [line.split(",") for line in text.splitlines() if line.startswith("web,")]
    return {row[1]: row[17].split()[0] for row in rows}


@pytest.fixture(scope="module", autouse=True)
def found_again(host: Host, await_true: AwaitTrue) -> None:
    """The tests before had told HAProxy to keep away."""
    await_true(lambda: set(status(host).values()) == {"UP"}, "HAProxy finds all web hosts healthy", 60)


@pytest.fixture
def all_up(host: Host, web: dict[str, Host], await_true: AwaitTrue) -> Iterator[None]:
    """Everybody serves, before and after a test that takes somebody out."""
    await_true(lambda: set(status(host).values()) == {"UP"}, "every web host is up", 30)
    yield
    # The one that the tests here break.
    web["default12"].run("; ".join(MENDED))
    host.run(RUNTIME.format("; ".join(f"set server web/{name} state ready" for name in WEB)))
    await_true(lambda: set(status(host).values()) == {"UP"}, "every web host is up again", 30)


@pytest.mark.parametrize("http", ["--http2", "--http1.1"])
def test_every_event_leaves_when_it_comes(browser: Browser, http: str) -> None:
    browser.http = http
    stream = browser.stream(40, 20)
    stream.read_to_done(40)
    # Two seconds of events. A proxy that collects them brings all at once; a busy machine may bring a few together.
    moments = [after for before, after in zip(stream.times, stream.times[1:], strict=False) if after - before > 0.005]
    assert stream.times[-1] - stream.times[0] > 0.5
    assert len(moments) > 5, stream.times


def test_browsers_get_http_2_and_a_redirect_to_it(browser: Browser, address: str) -> None:
    assert browser.get("/plain.php").protocol == "2"
    for path in ("/plain.php?a=b", "/stream.php"):
        reply = browser.get(f"http://{address}{path}", "--request", "POST")
        assert (reply.status, dict(reply.headers)["location"]) == (308, f"https://{address}{path}")


def test_old_tls_is_refused(address: str) -> None:
    command = ["openssl", "s_client", "-connect", f"{address}:443", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
    assert "Cipher is (NONE)" in subprocess.run(command, capture_output=True, text=True, input="", check=False).stdout
    done = subprocess.run([*command[:4], "-tls1_2"], capture_output=True, text=True, input="", check=False)
    assert "Cipher is ECDHE" in done.stdout


def test_cookies_are_for_tls_alone_and_a_browser_stays_with_its_host(browser: Browser) -> None:
    cookies = browser.cookies()
    assert {"__Host-handoff", "__Host-handoff-host"} <= set(cookies)
    for name in ("__Host-handoff", "__Host-handoff-host"):
        assert cookies[name][3] == "TRUE", "secure"
    # The other host does not know the session.
    for _ in range(6):
        assert '"user":"demo"' in browser.get("/session.php").body


def test_the_clients_address_is_right_in_all_three_logs(
    host: Host, browser: Browser, web: dict[str, Host], me: str, await_true: AwaitTrue
) -> None:
    # Whatever it says about itself.
    lies = [
        option for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP") for option in ("-H", f"{name}: 192.0.2.66")
    ]
    browser.stream(3, 100, *lies, "-H", "User-Agent: three-logs").read_to_done(3)
    for each in web.values():
        each.check_output("journalctl --sync")
    (name,) = [
        n for n, each in web.items() if each.run("grep three-logs /var/log/apache2/handoff-app-access.log").rc == 0
    ]
    apache = web[name].check_output("grep three-logs /var/log/apache2/handoff-app-access.log")
    assert apache.startswith(f"{me} ") and "192.0.2.66" not in apache
    handoff = apache.split()[-1]
    line = f"journalctl --no-pager --output cat -u streaming-daemon | grep 'stream id={handoff} '"
    await_true(lambda: web[name].run(line).rc == 0, "the daemon's access log")
    assert f" client={me}:" in web[name].check_output(line)
    wanted = re.compile(rf"{re.escape(me)}:\d+ \[.*\] https~ web/{name} .*/stream.php")
    await_true(lambda: wanted.search(host.check_output(LOG)), "HAProxy's log")


def test_what_clients_say_about_their_address_never_arrives(
    address: str, browser: Browser, web: dict[str, Host]
) -> None:
    page = "/var/www/handoff-app/public/edge-test.php"
    for each in web.values():
        each.check_output("printf '%s' '<?php echo json_encode($_SERVER);' > " + page)
    try:
        names = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Proxy")
        seen = browser.get("/edge-test.php", *[part for name in names for part in ("-H", f"{name}: spoofed")]).body
        assert "spoofed" not in seen
        assert '"HTTP_X_FORWARDED_PROTO":"https"' in seen and '"HTTPS":"on"' in seen
        assert "__Host-handoff-host" not in seen, "HAProxy's own cookie is for HAProxy"
    finally:
        for each in web.values():
            each.check_output(f"rm {page}")


def test_the_health_check_is_for_the_load_balancer_alone(host: Host, browser: Browser, web: dict[str, Host]) -> None:
    assert browser.get("/health.php", "--head").status == 404
    # Spelt otherwise it passes HAProxy, and Apache knows whom it is for.
    assert browser.get("/%68ealth.php", "--head").status == 403
    for name, each in web.items():
        address = each.check_output("hostname -I").split()[0]
        assert browser.get(f"http://{address}/health.php", "--head").status == 403
        assert each.check_output(ASK_HEALTH) == "200", name


@pytest.mark.usefixtures("all_up")
@pytest.mark.parametrize("number", range(len(WRONG)), ids=["daemon stopped", "daemon hangs", "no PHP", "maintenance"])
def test_a_host_that_cannot_stream_is_taken_out_and_comes_back(
    host: Host, web: dict[str, Host], at: dict[str, Browser], await_true: AwaitTrue, number: int
) -> None:
    running = at["default13"].stream(30, 10)
    running.read_first()
    web["default12"].check_output(WRONG[number])
    await_true(lambda: status(host) == {"default12": "DOWN", "default13": "UP"}, f"DOWN behind {WRONG[number]}", 30)
    # The others stream, and who belongs to this one is sent to them.
    at["default13"].stream(3, 100).read_to_done(3)
    assert at["default12"].get("/plain.php").status == 200
    running.read_to_done(30)
    web["default12"].check_output(MENDED[number])
    await_true(lambda: status(host) == {"default12": "UP", "default13": "UP"}, f"UP behind {MENDED[number]}", 30)
    at["default12"].log_in(PASSWORD)
    at["default12"].stream(3, 100).read_to_done(3)


DRAIN = """\
- hosts: default12
  gather_facts: false
  become: true
  tasks:
    - ansible.builtin.include_role:
        name: socket_handoff.fleet.handoff_lb
        tasks_from: {entry}
      vars:
        handoff_lb_drain_timeout: {timeout}
"""


def enter(tmp_path: Path, entry: str, *arguments: str, timeout: float = 0) -> str:
    play = tmp_path / f"{entry}.yml"
    play.write_text(DRAIN.format(entry=entry, timeout=timeout))
    done = playbook("default12", *arguments, play=str(play))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("all_up")
def test_a_drained_host_gets_nothing_new_and_finishes_what_it_has(
    host: Host, at: dict[str, Browser], web: dict[str, Host], tmp_path: Path
) -> None:
    assert "web/default12 maint" in enter(tmp_path, "drain", "--check", "--diff")
    assert status(host)["default12"] == "UP"
    running = at["default12"].stream(150, 10)
    running.read_first()
    assert changes(enter(tmp_path, "drain"))
    assert status(host) == {"default12": "MAINT", "default13": "UP"}

    def lines() -> int:
        return int(web["default12"].check_output("wc -l < /var/log/apache2/handoff-app-access.log"))

    before = lines()
    for browser in at.values():
        browser.log_in(PASSWORD)
        browser.stream(3, 100).read_to_done(3)
    assert lines() == before
    said = enter(tmp_path, "drain", timeout=60)
    assert changes(said) == [] and "0 requests" in said
    running.read_to_done(150)
    enter(tmp_path, "enable")
    assert status(host) == {"default12": "UP", "default13": "UP"}


@pytest.mark.usefixtures("all_up")
def test_a_reload_loses_no_stream_and_forgets_no_drain(
    host: Host, at: dict[str, Browser], await_true: AwaitTrue
) -> None:
    streams = [browser.stream(40, 10) for browser in at.values()]
    for stream in streams:
        stream.read_first()
    main = host.check_output("systemctl show -p MainPID --value haproxy")
    workers = host.check_output(f"pgrep -P {main}").split()
    host.check_output(RUNTIME.format("set server web/default12 state maint"))
    host.check_output("systemctl reload haproxy")
    await_true(lambda: set(host.check_output(f"pgrep -P {main}").split()) - set(workers), "a new worker")
    await_true(lambda: status(host).get("default12") == "MAINT", "still in maintenance")
    assert host.check_output("systemctl show -p MainPID --value haproxy") == main
    at["default13"].stream(3, 100).read_to_done(3)
    for stream in streams:
        stream.read_to_done(40)
