# SPDX-License-Identifier: Apache-2.0
"""With PHP itself: PHP-FPM under every MPM, mod_php under prefork."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from handoff_httpd import MPM, ErrorLog, Httpd, wait_until
from handoff_standin import Client, Daemon, fetch, response

SCRIPTS = {
    "stream.php": """<?php
header('X-Socket-Handoff: ' . $_GET['t']);
header('X-Handoff-Data: ' . json_encode(['prompt' => $_GET['q'] ?? '', 'method' => $_SERVER['REQUEST_METHOD'],
    'seen' => $_SERVER['HTTP_X_SOCKET_HANDOFF'] ?? null, 'body' => strlen(file_get_contents('php://input'))]));
header('Content-Type: text/event-stream');
""",
    "working.php": """<?php
header('X-Socket-Handoff: ' . $_GET['t']);
header('X-Handoff-Data: {}');
echo str_repeat('x', 20000);
flush();
usleep(50000);
echo 'and more';
flush();
register_shutdown_function(function () { file_put_contents($_GET['mark'], 'done'); });
""",
    "plain.php": "<?php echo 'plain php';",
    "sorry.php": """<?php
header('X-Sorry: yes');
echo 'sorry: ', $_SERVER['REDIRECT_STATUS'], ' ', $_SERVER['REQUEST_URI'];
""",
    "failing.php": """<?php
header('X-Socket-Handoff: ' . $_GET['t']);
http_response_code(404);
echo 'not here';
""",
}


@pytest.fixture(scope="module", params=["fpm", "mod_php"] if MPM == "prefork" else ["fpm"])
def php(request: pytest.FixtureRequest, built: None, run_dir: Path) -> Iterator[Httpd]:
    """A server whose *.php files are run, by a PHP-FPM of our own or by mod_php."""
    server = Httpd(mpm=MPM, run=run_dir)
    fpm: subprocess.Popen[bytes] | None = None
    try:
        port = server.port("main")
        for name, text in SCRIPTS.items():
            (server.root / "htdocs" / name).write_text(text)
        if request.param == "fpm":
            fpm, wiring = start_fpm(server)
        else:
            wiring = mod_php(server)
        server.start(f"""
{server.load("status")}
Listen 127.0.0.1:{port}
DocumentRoot {server.root}/htdocs
CustomLog {server.root}/logs/access "%q st=%>s b=%b X=%X O=%O"
SocketHandoffAllowedPrefix {run_dir}/ok/
<Directory {server.root}/htdocs>
    Require all granted
</Directory>
<If "%{{QUERY_STRING}} =~ /errorpage/">
    ErrorDocument 503 /sorry.php
</If>
{wiring}
""")
        yield server
    finally:
        server.stop()
        if fpm is not None:
            fpm.send_signal(signal.SIGTERM)
            fpm.wait(10)


@pytest.fixture
def httpd(php: Httpd) -> Httpd:
    """The error log that must stay clean is this server's."""
    return php


def start_fpm(server: Httpd) -> tuple[subprocess.Popen[bytes], str]:
    found = [path for path in map(shutil.which, ("php-fpm8.4", "php-fpm8.2")) if path]
    if not found:
        pytest.skip("NOT TESTED: PHP-FPM is not installed (apt install php-fpm)")
    path = server.run / "fpm.sock"
    config = server.root / "conf" / "fpm.conf"
    user = "user = www-data\ngroup = www-data\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"[global]\nerror_log = {server.root}/fpm.log\ndaemonize = no\n"
        f"[www]\n{user}listen = {path}\nlisten.mode = 0666\npm = static\npm.max_children = 2\n"
    )
    command = [found[0], "-n", "-F", "-y", str(config)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(path.is_socket, "PHP-FPM listens")
    return process, (
        f"{server.load('proxy', 'proxy_fcgi')}\n"
        f'<FilesMatch "\\.php$">\nSetHandler "proxy:unix:{path}|fcgi://localhost"\n</FilesMatch>\n'
    )


def mod_php(server: Httpd) -> str:
    found = sorted(server.modules.glob("libphp*.so"))
    if not found:
        pytest.skip("NOT TESTED: mod_php is not installed (apt install libapache2-mod-php)")
    return (
        f"LoadModule php_module {found[-1]}\n"
        '<FilesMatch "\\.php$">\nSetHandler application/x-httpd-php\n</FilesMatch>\n'
    )


def test_a_script_that_sets_the_headers_and_ends_is_handed_off(httpd: Httpd, daemon: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get(f"/stream.php?t={daemon.path}&q=hello", "X-Socket-Handoff: /run/evil")
        handoff = daemon.next()
        assert json.loads(handoff.data) == {
            "prompt": "hello",
            "method": "GET",
            "seen": None,
            "body": 0,
        }
        handoff.finish(response(b"data: hi\n\n"))
        assert client.rest() == response(b"data: hi\n\n")


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_a_posted_body_is_read_by_php_and_not_left_for_the_daemon(httpd: Httpd, daemon: Daemon, size: int) -> None:
    with Client(httpd.port("main")) as client:
        client.post(f"/stream.php?t={daemon.path}", b"p" * size)
        handoff = daemon.next()
        data = json.loads(handoff.data)
        assert (data["method"], data["body"]) == ("POST", size)
        assert handoff.readable() == b""
        handoff.finish(response(b"ok"))
        assert client.rest() == response(b"ok")


def test_a_script_that_flushes_and_works_on_is_not_killed(httpd: Httpd, daemon: Daemon) -> None:
    mark = httpd.root / "logs" / "mark"
    with Client(httpd.port("main")) as client:
        client.get(f"/working.php?t={daemon.path}&mark={mark}")
        daemon.next().finish(response(b"ok"))
        assert client.rest() == response(b"ok")
    wait_until(lambda: mark.exists() and mark.read_text() == "done", "the script ran to its end")
    mark.unlink()
    line = httpd.access_line("mark=")
    assert "st=200 b=- X=- O=0" in line


def test_a_plain_page_and_a_head_request_are_served_as_ever(httpd: Httpd, daemon: Daemon) -> None:
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
    answer = fetch(httpd.port("main"), f"/stream.php?t={daemon.path}", method="HEAD")
    assert answer.status == 200
    assert daemon.count == 0


def test_a_script_with_an_error_status_is_handed_off_nevertheless(httpd: Httpd, daemon: Daemon) -> None:
    with Client(httpd.port("main")) as client:
        client.get(f"/failing.php?t={daemon.path}")
        daemon.next().finish(response(b"ok"))
        assert client.rest() == response(b"ok")


def test_a_refused_path_and_a_missing_daemon_are_told_to_the_client(httpd: Httpd, log: ErrorLog, target: Path) -> None:
    assert fetch(httpd.port("main"), "/stream.php?t=/tmp/x").status == 403
    log.expect("handoff refused: the path")
    answer = fetch(httpd.port("main"), f"/stream.php?t={target}")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"].startswith("text/html")
    log.expect("there is no such socket")


def test_twelve_streams_leave_apache_and_php_free(httpd: Httpd, daemon: Daemon) -> None:
    clients = [Client(httpd.port("main")).get(f"/stream.php?t={daemon.path}&q={n}") for n in range(12)]
    handoffs = [daemon.next() for _ in clients]
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
    for handoff in handoffs:
        handoff.finish(response(json.loads(handoff.data)["prompt"].encode()))
    for n, client in enumerate(clients):
        assert client.rest() == response(b"%d" % n)
        client.sock.close()


@pytest.mark.parametrize("again", range(3))
def test_an_errordocument_may_be_a_php_page(httpd: Httpd, log: ErrorLog, target: Path, again: int) -> None:
    """Under mod_php the page runs while the first script's handler is still being called."""
    answer = fetch(httpd.port("main"), f"/stream.php?t={target}&errorpage={again}")
    assert answer.status == 503
    assert answer.headers.get("x-sorry") == "yes"
    assert answer.body == f"sorry: 503 /stream.php?t={target}&errorpage={again}".encode()
    log.expect("there is no such socket")
    assert fetch(httpd.port("main"), "/plain.php").body == b"plain php"
