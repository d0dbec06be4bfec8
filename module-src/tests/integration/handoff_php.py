# SPDX-License-Identifier: Apache-2.0
"""A server that runs PHP: by a PHP-FPM of our own under every MPM, by mod_php under prefork."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from handoff_httpd import MPM, SANITIZED, Httpd, wait_until

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
    "large.php": """<?php
header('X-Socket-Handoff: rich');
header('X-Handoff-Data-From: response-body');
setcookie('sid', 'abc', ['path' => '/', 'httponly' => true]);
header('Cache-Control: no-store');
http_response_code(201);
for ($left = (int) $_GET['n']; $left > 0; $left -= 8000) {
    echo str_repeat('x', min($left, 8000));
    if (isset($_GET['flush'])) { flush(); }
}
""",
    "header.php": """<?php
header('X-Socket-Handoff: rich');
header('X-Handoff-Data: ' . str_repeat('x', (int) $_GET['n']));
""",
    "dying.php": """<?php
header('X-Socket-Handoff: ' . $_GET['t']);
if (isset($_GET['output'])) { echo str_repeat('x', 20000); }
flush();
// Apache has still to say that there is no body (FCGI_STDIN), and must find somebody there.
usleep(300000);
exec('kill -9 ' . getmypid());
""",
    "compressed.php": """<?php
ini_set('zlib.output_compression', 'On');
header('X-Socket-Handoff: rich');
header('X-Handoff-Data-From: response-body');
echo str_repeat('x', 9000);
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


@contextmanager
def php_server(kind: str, run_dir: Path, directives: str) -> Iterator[Httpd]:
    """A server whose *.php files are run, by a PHP-FPM of our own or by mod_php."""
    server = Httpd(mpm=MPM, run=run_dir)
    fpm: subprocess.Popen[bytes] | None = None
    try:
        port = server.port("main")
        for name, text in SCRIPTS.items():
            (server.root / "htdocs" / name).write_text(text)
        if kind == "fpm":
            fpm, wiring = start_fpm(server)
        else:
            wiring = mod_php(server)
        server.start(f"""
{server.load("status")}
Listen 127.0.0.1:{port}
DocumentRoot {server.root}/htdocs
CustomLog {server.root}/logs/access "%q st=%>s b=%b X=%X O=%O result=%<{{handoff-result}}n"
{directives}
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


KINDS = ["fpm", "mod_php"] if MPM == "prefork" else ["fpm"]


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
    if SANITIZED:
        pytest.skip("NOT TESTED under sanitizers: mod_php is built for the distribution's httpd")
    if not found:
        pytest.skip("NOT TESTED: mod_php is not installed (apt install libapache2-mod-php)")
    return (
        f"LoadModule php_module {found[-1]}\n"
        '<FilesMatch "\\.php$">\nSetHandler application/x-httpd-php\n</FilesMatch>\n'
    )
