"""A whole chain on one host, without containers: Apache with the module, PHP, the daemon; HAProxy where asked.

Four Apache workers and four PHP processes, so that a stream that held one would soon be noticed. One daemon serves both
targets: `llm` answers with the demo's text, or by the paths in ECHO with the very data that it got; `model` passes on
what an OpenAI-compatible server says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "module-src" / "tests" / "integration"), str(ROOT / "tests" / "conformance")]

from daemons import Daemon, Running  # noqa: E402  (of the conformance suite)
from handoff_httpd import PROBLEM, Httpd, free_port, wait_until, writable_run  # noqa: E402  (of the module's tests)

PACES = {"demo": 200.0, "slow": 100.0, "endless": 1.0}
"""Events per second of the demo's answer, some 250 events. Below /slow/, and in WordPress, somebody can watch it; below
/endless/ it does not end while a test runs."""
FPM_CHILDREN = 4
ECHO = [
    "/post-body.php",
    "/history.php",
    "/rate-limit.php",
    "/session-lock.php",
    "/framework.php",
    "/wp-admin/admin-ajax.php/echo",
]
"""What is asked here is answered with the data that the application sent, as the daemon got it."""


def daemon_config(model_url: str) -> str:
    paces = "".join(f'[backends.{name}]\ntype = "demo"\ntokens_per_second = {pace}\n' for name, pace in PACES.items())
    return f"""
[backend]
default = "demo"
[[routes]]
path = {json.dumps(ECHO)}
backend = "echo"
[[routes]]
path = ["/normalised/"]
backend = "model"
output = "normalised"
[[routes]]
target = ["model"]
backend = "model"
[[routes]]
path = ["/slow/", "/wp-admin/"]
backend = "slow"
[[routes]]
path = ["/endless/"]
backend = "endless"
{paces}
[backends.echo]
type = "exec"
command = ["/usr/bin/cat"]
[backends.model]
type = "openai"
base_url = "{model_url}"
model = "unless-the-application-says"
output = "passthrough"
"""


@dataclass(slots=True)
class Reply:
    """One response as a browser sees it: status, headers in lower case, text."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def events(self) -> list[str]:
        """The data of each event."""
        return [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]

    @property
    def answer(self) -> str:
        """The text of a complete answer."""
        assert self.status == 200, self
        assert self.events[-1:] == ["[DONE]"], self
        return "".join(json.loads(event)["content"] for event in self.events[:-1])

    @property
    def data(self) -> Any:
        """What the daemon got from the application, where it answers with that."""
        return json.loads(self.answer)

    @property
    def error(self) -> str:
        """The type of a refusal that PHP has made, without a trace of a handoff."""
        assert not [name for name in self.headers if name.startswith("x-handoff") or name == "x-socket-handoff"], self
        return str(json.loads(self.text)["error"]["type"])


@dataclass(slots=True)
class Client:
    """A browser without a screen: keeps its cookies."""

    port: int
    cookies: dict[str, str] = field(default_factory=dict)

    def open(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """A response whose body is still coming. Closing it hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())} if self.cookies else {}
        connection.request(method, path, body, {**sent, **(headers or {})})
        response = connection.getresponse()
        for line in response.headers.get_all("Set-Cookie") or []:
            name, _, rest = line.partition("=")
            self.cookies[name] = rest.partition(";")[0]
        return response

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        response = self.open(method, path, body, headers)
        with response:
            text = response.read().decode()
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, text)

    def get(self, path: str, **query: str) -> Reply:
        return self.ask("GET", f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def post(self, path: str, body: object, **headers: str) -> Reply:
        """JSON; names of headers with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        text = json.dumps(body, ensure_ascii=False).encode()
        return self.ask("POST", path, text, {"Content-Type": "application/json", **named})


@dataclass(slots=True)
class Chain:
    """What is running. ``docroot`` is served; ``state`` can be written by PHP; ``balancer``: where asked for."""

    httpd: Httpd
    daemon: Running
    state: Path
    balancer: Balancer | None = None

    @property
    def docroot(self) -> Path:
        return self.httpd.root / "htdocs"

    @property
    def port(self) -> int:
        return self.httpd.port("main")

    @property
    def https(self) -> str:
        """The address of the balancer."""
        assert self.balancer is not None
        return f"https://localhost:{self.balancer.port}"

    def client(self) -> Client:
        return Client(self.port)

    def install(self, *sources: Path, under: str = "") -> None:
        """Copy files and whole directories into the document root, as somebody would who tries an example."""
        target = self.docroot / under
        target.mkdir(exist_ok=True)
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, target / source.name, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)

    def kill_streams(self) -> None:
        """As a crash would: the daemon's workers end without a word to anybody. Its supervisor starts new ones."""
        for pid in self.daemon.pids():
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert children, "the daemon has no worker"
            for child in children:
                os.kill(int(child), signal.SIGKILL)


def start_fpm(httpd: Httpd, state: Path, *, with_ini: bool) -> subprocess.Popen[bytes]:
    """PHP-FPM on fpm.sock. ``with_ini``: with the extensions that Debian switches on, else what is built in."""
    found = [path for path in map(shutil.which, ("php-fpm8.4", "php-fpm8.2")) if path]
    if not found:
        raise RuntimeError("PHP-FPM is not installed (apt install php-fpm)")
    path = httpd.run / "fpm.sock"
    user = "user = www-data\ngroup = www-data\n" if os.geteuid() == 0 else ""
    config = httpd.root / "conf" / "fpm.conf"
    config.write_text(
        f"[global]\nerror_log = {httpd.root}/fpm.log\ndaemonize = no\n"
        f"[www]\n{user}listen = {path}\nlisten.mode = 0666\npm = static\npm.max_children = {FPM_CHILDREN}\n"
        f"catch_workers_output = yes\nphp_admin_value[session.save_path] = {state}\n"
        f"php_admin_value[error_log] = /dev/stderr\nphp_admin_flag[log_errors] = on\n"
        "php_admin_flag[display_errors] = off\n"
    )
    command = [found[0], *([] if with_ini else ["-n"]), "-F", "-y", str(config)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(httpd.root / "fpm-stderr.log").open("wb")
    )
    wait_until(lambda: path.is_socket() or process.poll() is not None, "PHP-FPM listens")
    if process.poll() is not None:
        raise RuntimeError((httpd.root / "fpm-stderr.log").read_text())
    return process


FPM_WIRING = """
<FilesMatch "\\.php$">
    SetHandler "proxy:unix:{run}/fpm.sock|fcgi://localhost"
</FilesMatch>
"""


def mod_php(httpd: Httpd, state: Path) -> str:
    """Apache's lines for PHP in its own processes."""
    found = sorted(httpd.modules.glob("libphp*.so"))
    if not found:
        raise RuntimeError("mod_php is not installed (apt install libapache2-mod-php)")
    return (
        f"LoadModule php_module {found[-1]}\n"
        '<FilesMatch "\\.php$">\nSetHandler application/x-httpd-php\n</FilesMatch>\n'
        f"php_admin_value session.save_path {state}\nphp_admin_flag display_errors off\nphp_admin_flag log_errors on\n"
    )


class Balancer:
    """HAProxy that speaks TLS and HTTP/2 to browsers, as the role handoff_lb sets it up."""

    def __init__(self, httpd: Httpd) -> None:
        self.port = free_port()
        self._directory = httpd.root / "haproxy"
        self._directory.mkdir()
        pem, key, certificate = (self._directory / name for name in ("site.pem", "key", "certificate"))
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        pem.write_text(certificate.read_text() + key.read_text())
        (self._directory / "haproxy.cfg").write_text(f"""
global
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    option http-no-delay
    option http-server-close
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen site
    bind 127.0.0.1:{self.port} ssl crt {pem} alpn h2,http/1.1
    server web 127.0.0.1:{httpd.port("main")}
""")
        self.start()

    def start(self) -> None:
        with (self._directory / "log").open("wb") as log:
            command = ["/usr/sbin/haproxy", "-db", "-f", str(self._directory / "haproxy.cfg")]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(self._answers, "HAProxy listens")

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError((self._directory / "log").read_text())
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill(self) -> None:
        """Every connection through it breaks."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def chain(
    model_url: str = "http://127.0.0.1:1/v1",
    *,
    directives: str = "",
    allow: str = "All",
    balancer: bool = False,
    with_ini: bool = False,
    php: str = "fpm",
    environment: dict[str, str] | None = None,
) -> Iterator[Chain]:
    """Everything, started; ``directives`` are those of the site's <VirtualHost>, ``allow``: which targets any script
    may use; ``environment`` is PHP's, with {state} for the directory that it can write to. ``php``: fpm under event, or
    mod_php under prefork. As root: sockets lie below /run."""
    parent = writable_run()
    if parent is None:
        raise RuntimeError("neither /run nor /run/user/<uid> is writable for this user")
    run = Path(tempfile.mkdtemp(prefix="handoff-examples-", dir=parent))
    run.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        only_plain = dict.fromkeys(("ack", "hasty"), "one daemon is enough here")
        command = ("/usr/bin/python3", "-P", "-m", "streaming_daemon", "--config", "{build}/{variant}.toml")
        daemon = Running(Daemon("daemon", command, cannot=only_plain, config=daemon_config(model_url)), run / "d", "")
        stack.callback(daemon.close)
        daemon.start()

        httpd = Httpd(mpm="event" if php == "fpm" else "prefork", run=run)
        stack.callback(httpd.stop)
        state = httpd.root / "state"
        state.mkdir(mode=0o700)
        Httpd.chown(state)
        main = httpd.port("main")
        variables = {"HANDOFF_STATE": str(state), "HANDOFF_APP_CONFIG": f"{state}/app.php", **(environment or {})}
        variables = {name: value.replace("{state}", str(state)) for name, value in variables.items()}
        if php == "fpm":
            fpm = start_fpm(httpd, state, with_ini=with_ini)
            stack.callback(lambda: (fpm.send_signal(signal.SIGTERM), fpm.wait(10)))
            wiring = f"{httpd.load('proxy', 'proxy_fcgi')}\n" + FPM_WIRING.format(run=run)
        else:
            wiring = mod_php(httpd, state)
        # As the READMEs say it for both: PHP-FPM gets them with each request.
        wiring += "".join(f'SetEnv {name} "{value}"\n' for name, value in variables.items())
        targets = "".join(
            f"SocketHandoffTarget {name} unix:{daemon.path('plain')} envelope=on timeout=10s\n"
            for name in ("llm", "model")
        )
        httpd.start(f"""
{httpd.load("status", "rewrite", "setenvif", "env")}
Listen 127.0.0.1:{main}
DocumentRoot {httpd.root}/htdocs
DirectoryIndex index.php index.html
AddType text/javascript .js
AddType text/html .html
AddType text/css .css
AddType image/svg+xml .svg
{targets}
<Directory {httpd.root}/htdocs>
    Require all granted
    SocketHandoffAllow {allow}
    <Files "ready.php">
        SocketHandoffAllow llm
    </Files>
</Directory>
<Location /status>
    SetHandler server-status
</Location>
{wiring}
# As Debian serves every site. What such a one does not inherit, or may not have, shows here.
<VirtualHost 127.0.0.1:{main}>
{directives}
</VirtualHost>
""")
        one = Chain(httpd, daemon, state)
        if balancer:
            one.balancer = Balancer(httpd)
            stack.callback(one.balancer.kill)
        wait_for_daemon(one)
        yield one


def wait_for_daemon(one: Chain) -> None:
    """Until a question is answered: systemd's socket would hold it back, here the daemon just has to be there."""
    (one.docroot / "ready.php").write_text(
        "<?php header('X-Socket-Handoff: llm'); header('X-Handoff-Data: {\"request_id\": \"ready\"}');"
    )
    deadline = time.monotonic() + 30
    while one.client().ask("HEAD", "/ready.php").status != 200:
        if time.monotonic() > deadline or one.daemon.ended():
            raise RuntimeError(f"no answer from the daemon: {one.daemon.log()}\n{one.httpd.error_log()}")
        time.sleep(0.05)  # between two attempts, until the deadline
    one.httpd.take_log()


def complaints(one: Chain) -> list[str]:
    """What Apache's error log says that no example may cause."""
    return [line for line in one.httpd.take_log() if PROBLEM.search(line)]


def readme_apache(example: str) -> list[str]:
    """The blocks of Apache's configuration in the README of an example, in their order."""
    readme = (ROOT / "examples" / example / "README.md").read_text()
    return [part.split("```")[0] for part in readme.split("```apache\n")[1:]]


def allowed(*scripts: str) -> str:
    """Directives by which these scripts, and no others, may name the target ``llm``."""
    names = "|".join(re.escape(name) for name in scripts)
    return f'<FilesMatch "^({names})$">\n    SocketHandoffAllow llm\n</FilesMatch>\n'


def snippets_wiring() -> str:
    """What the README of examples/php-snippets tells to put into a site."""
    target, of_the_site = readme_apache("php-snippets")
    assert target.startswith("SocketHandoffTarget llm ")
    return of_the_site


def openai_api_wiring() -> str:
    """What the README of examples/openai-api tells to put into a site. The target, of the server, is the chain's."""
    target, of_the_site = readme_apache("openai-api")
    assert target.startswith("SocketHandoffTarget model ")
    return of_the_site
