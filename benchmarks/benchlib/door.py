# SPDX-License-Identifier: Apache-2.0
"""Whole web servers, each with one way to answer a stream: what `benchmarks/run point` compares.

Everything is Debian's and has a configuration of its own below one temporary directory, on loopback. Where a setting is
not said here it is the package's default. All PHP-FPM pools and all Apaches of one size are set alike and grow from a
few processes to their limit, as they do on a host; but where PHP streams itself all of its processes are there from the
start: it would take seconds to fork them, and those are not what is asked.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchlib import apache, daemon, tools
from benchlib.apache import Apache, apxs, free_port
from benchlib.cpu import tree
from benchlib.publisher import Publisher
from benchlib.tools import BENCHMARKS, BUILD, ROOT, BenchmarkError, accepts, kill_all, spawn, wait_until

THREADS = 25
"""Of one process of the event MPM, Debian's default."""

AS_ROOT = os.geteuid() == 0
PHP_MODULES = "LoadModule proxy_module {lib}/mod_proxy.so\nLoadModule proxy_fcgi_module {lib}/mod_proxy_fcgi.so\n"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to answer a stream. ``request`` is what a client sends, with {tokens} and {pace}."""

    key: str
    title: str
    request: str
    needs: tuple[str, ...]  # of SERVERS, in the order in which they are started
    note: str
    ends: bool = True  # whether its answers have an end at all
    timed: bool = True  # whether each stream's events come at intervals that its own first event begins
    rate: float = math.inf  # new streams per second that it can take; asked faster it loses some


def get(path: str) -> str:
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: benchmark\r\nAccept: */*\r\n"
        f"Cookie: user=user-@@@@@@@@; proof={proof()}\r\nConnection: close\r\n\r\n"
    )


def proof() -> str:
    """What php/user.php wants to see: an HMAC over "streams" with its KEY."""
    return hmac.new(b"benchmark", b"streams", hashlib.sha256).hexdigest()


def chat(path: str) -> str:
    """A question to the model itself."""
    body = '{"model":"{pace}x{tokens}","stream":true,"messages":[{"role":"user","content":"hello"}]}'
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: benchmark\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {{length}}\r\nConnection: close\r\n\r\n{body}"
    )


CONTENDERS = (
    Contender("mod_php", "PHP streams, mod_php", get("/stream.php?tokens={tokens}&pace={pace}"), ("mod_php",),
              "Apache prefork; the PHP script writes the events and sleeps between them"),
    Contender("php-fpm", "PHP streams, PHP-FPM", get("/stream.php?tokens={tokens}&pace={pace}"), ("fpm", "apache"),
              "the same script in PHP-FPM behind Apache event"),
    Contender("proxy", "mod_proxy_http", chat("/model"), ("fpm", "apache"),
              "Apache event fetches the answer from the model; no PHP decides who may ask"),
    Contender("fdpass", "mod_proxy_fdpass", get("/fdpass"), ("fpm", "null", "apache"),
              "httpd's own module passes the client to a C program that only writes; no PHP decides who may ask",
              ends=False),
    Contender("x-accel", "nginx X-Accel-Redirect", get("/accel.php?tokens={tokens}&pace={pace}"), ("fpm", "nginx"),
              "PHP-FPM behind nginx decides, nginx fetches the answer from the model; no Apache"),
    Contender("pushpin", "Pushpin", get("/grip.php?tokens={tokens}&pace={pace}"), ("fpm", "apache", "pushpin"),
              "PHP-FPM behind Apache event behind Pushpin decides; Pushpin holds the client and is told each event; "
              "asked for 300 streams per second at most, because it loses some at a thousand; when its events are due "
              "the publisher's clock says and not the stream's first event, so none can be called late or missing",
              ends=False, timed=False, rate=300.0),
    Contender("handoff", "handoff, relayed", get("/handoff.php?tokens={tokens}&pace={pace}"),
              ("fpm", "daemon", "apache"),
              "PHP-FPM behind Apache event decides and hands off; the daemon fetches the answer from the model"),
    Contender("handoff-own", "handoff, own text", get("/handoff.php?tokens={tokens}&pace={pace}&backend=demo"),
              ("fpm", "daemon", "apache"), "the same, but the daemon makes the text itself, as the PHP script does"),
)  # fmt: skip


def request(text: str, tokens: int, pace: float) -> bytes:
    """A contender's request for an answer of so many events per second."""
    text = text.replace("{tokens}", str(tokens)).replace("{pace}", f"{pace:g}")
    return text.replace("{length}", str(len(text.partition("\r\n\r\n")[2]))).encode()


@dataclass(slots=True)
class Door:
    """A running contender: where it is asked, and all processes that it consists of by their first one."""

    directory: Path
    workers: int
    cores: set[int]
    model: int  # its port
    contender: Contender
    port: int = 0
    roots: list[int] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    run: Path = Path()
    publisher: Publisher | None = None

    @property
    def fpm(self) -> Path:
        return self.directory / "fpm.sock"

    @property
    def htdocs(self) -> Path:
        return self.directory / "web" / "htdocs"

    def complaints(self) -> str:
        """The ends of all logs."""
        texts = (f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in self.logs if path.exists())
        return "\n".join(texts)


@contextmanager
def opened(contender: Contender, parent: Path, workers: int, cores: set[int], model: int) -> Iterator[Door]:
    """The contender, ready to answer, in a directory below ``parent``; gone afterwards with every file it made."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="door-", dir=parent))
        directory.chmod(0o755)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        run = apache.run_directory()
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        door = Door(directory, workers, cores, model, contender, run=run)
        try:
            for name in contender.needs:
                stack.enter_context(SERVERS[name](door))
            yield door
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{door.complaints()}".rstrip()) from None


def pages(door: Door) -> None:
    """PHP's files, where www-data can read them."""
    shutil.copytree(BENCHMARKS / "php", door.htdocs, dirs_exist_ok=True)
    (door.htdocs / "lib").mkdir(exist_ok=True)
    shutil.copy(ROOT / "examples" / "php-app" / "handoff.php", door.htdocs / "lib")
    for path in (door.htdocs, *door.htdocs.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def php_version(pattern: str, package: str) -> Path:
    """The newest file that matches below /usr, or a BenchmarkError that names the package."""
    found = sorted(Path("/usr").glob(pattern))
    if not found:
        raise BenchmarkError(f"/usr/{pattern} is missing: apt install {package}")
    return found[-1]


@contextmanager
def started(
    door: Door,
    name: str,
    command: list[str],
    ready: Callable[[], bool],
    environ: dict[str, str] | None = None,
    counted: bool = True,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the foreground; ends with all its children. ``counted``: it is part of the contender."""
    log = door.directory / f"{name}.log"
    door.logs.append(log)
    with log.open("wb") as out:
        process = spawn(
            command,
            door.cores,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environ,
            start_new_session=True,
        )
    try:
        wait_until(process, ready, lambda: f"{name} did not start: {' '.join(command)}")
        if counted:
            door.roots.append(process.pid)
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, after a while SIGKILL, and then SIGKILL to all that were below it when that began.

    Raises BenchmarkError where one of them stays."""
    rest = tree([process.pid])
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # The daemon's workers live on without their supervisor, as they are meant to.
    kill_all(rest)


@contextmanager
def _fpm(door: Door) -> Iterator[None]:
    """As many children as Apache has workers: more could not be asked."""
    binary = php_version("sbin/php-fpm*.*", "php-fpm")
    config = door.directory / "fpm.conf"
    owner = "user = www-data\ngroup = www-data\n" if AS_ROOT else ""
    config.write_text(
        f"[global]\nerror_log = {door.directory}/fpm-error.log\ndaemonize = no\nrlimit_files = 4096\n"
        f"[www]\n{owner}listen = {door.fpm}\nlisten.mode = 0666\n"
        f"pm = {'static' if door.contender.key == 'php-fpm' else 'dynamic'}\npm.max_children = {door.workers}\n"
        "pm.start_servers = 4\npm.min_spare_servers = 2\npm.max_spare_servers = 8\n"
    )
    door.logs.append(door.directory / "fpm-error.log")
    pages(door)
    command = [str(binary), "--nodaemonize", "--fpm-config", str(config)]
    with started(door, "php-fpm", command, door.fpm.exists):
        yield


def event_sizes(workers: int) -> str:
    """Debian's mpm_event.conf, with another MaxRequestWorkers."""
    return (
        f"StartServers {min(2, workers // THREADS)}\nMinSpareThreads {THREADS}\nMaxSpareThreads {THREADS * 3}\n"
        f"ThreadLimit 64\nThreadsPerChild {THREADS}\nServerLimit {workers // THREADS}\n"
        f"MaxRequestWorkers {workers}\nMaxConnectionsPerChild 0\n"
    )


def prefork_sizes(workers: int) -> str:
    """Debian's mpm_prefork.conf, with another MaxRequestWorkers, and all processes from the start."""
    return (
        f"StartServers {workers}\nMinSpareServers 5\nMaxSpareServers {workers}\nServerLimit {workers}\n"
        f"MaxRequestWorkers {workers}\nMaxConnectionsPerChild 0\n"
    )


@contextmanager
def _serving(door: Door, server: Apache) -> Iterator[None]:
    pages(door)
    door.port = server.port
    door.logs.append(server.root / "logs" / "error")
    try:
        server.start()
        door.roots.append(server.pid)
        yield
    finally:
        server.stop()


@contextmanager
def _mod_php(door: Door) -> Iterator[None]:
    library = php_version("lib/apache2/modules/libphp*.so", "libapache2-mod-php")
    server = Apache(
        "prefork",
        door.directory / "web",
        door.cores,
        '<FilesMatch "\\.php$">\nSetHandler application/x-httpd-php\n</FilesMatch>\n',
        sizes=prefork_sizes(door.workers),
        modules=f"LoadModule php_module {library}",
    )
    with _serving(door, server):
        yield


@contextmanager
def _apache(door: Door) -> Iterator[None]:
    """The event MPM with PHP-FPM, and what the contender needs besides."""
    lib, key = apxs("LIBEXECDIR"), door.contender.key
    modules = PHP_MODULES.format(lib=lib)
    # Without flushpackets PHP's events would wait in Apache until there are 8 KiB of them.
    config = (
        f'<FilesMatch "\\.php$">\nSetHandler "proxy:unix:{door.fpm}|fcgi://localhost/"\n</FilesMatch>\n'
        '<Proxy "fcgi://localhost/" flushpackets=on>\n</Proxy>\n'
    )
    if key == "proxy":
        modules += f"LoadModule proxy_http_module {lib}/mod_proxy_http.so\n"
        config += f"ProxyPass /model http://127.0.0.1:{door.model}/v1/chat/completions flushpackets=on\n"
    if key == "fdpass":
        modules += f"LoadModule proxy_fdpass_module {lib}/mod_proxy_fdpass.so\n"
        config += "ProxyPass /fdpass fd://null.sock\n"
    if key.startswith("handoff"):
        modules += f"LoadModule socket_handoff_module {tools.MODULE}\n"
        # As the role writes it (templates/etc/apache2/mods-available).
        config += (
            f"SocketHandoffTarget llm unix:{door.run}/daemon.sock transport=auto envelope=on ack=off\n"
            '<Files "handoff.php">\nSocketHandoffAllow llm\n</Files>\n'
        )
    server = Apache(
        "event", door.directory / "web", door.cores, config, sizes=event_sizes(door.workers), modules=modules
    )
    with _serving(door, server):
        yield


NGINX = """
{user}
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
worker_processes 1;
worker_rlimit_nofile 20000;
daemon off;
events {{ worker_connections 19000; }}
http {{
    include /etc/nginx/mime.types;
    access_log {directory}/nginx-access.log;
    client_body_temp_path {directory}/t1; proxy_temp_path {directory}/t2; fastcgi_temp_path {directory}/t3;
    uwsgi_temp_path {directory}/t4; scgi_temp_path {directory}/t5;
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        root {htdocs};
        location ~ \\.php$ {{ include /etc/nginx/fastcgi.conf; fastcgi_pass unix:{fpm}; }}
        location ~ ^/model/(?<wanted>.*)$ {{
            internal;
            rewrite ^ /v1/chat/completions break;
            proxy_method POST;
            proxy_set_header Content-Type application/json;
            proxy_set_body '{{"model":"$wanted","stream":true,"messages":[]}}';
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 1h;
            proxy_pass http://127.0.0.1:{model};
        }}
    }}
}}
"""


@contextmanager
def _nginx(door: Door) -> Iterator[None]:
    """One worker process, on the one core that everybody has."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise BenchmarkError("nginx is missing: apt install nginx")
    door.port = free_port()
    config = door.directory / "nginx.conf"
    config.write_text(
        NGINX.format(
            user="user www-data;" if AS_ROOT else "",
            directory=door.directory,
            port=door.port,
            htdocs=door.htdocs,
            fpm=door.fpm,
            model=door.model,
        )
    )
    door.logs.append(door.directory / "nginx-error.log")
    pages(door)
    with started(door, "nginx", [program, "-c", str(config)], lambda: accepts(door.port)):
        yield


ZURL = """
[General]
in_spec=ipc://{directory}/zurl-in
in_stream_spec=ipc://{directory}/zurl-in-stream
out_spec=ipc://{directory}/zurl-out
in_req_spec=ipc://{directory}/zurl-req
defpolicy=allow
allow=
deny=
max_open_requests=2000
"""

PUSHPIN = """
[global]
include={{libdir}}/internal.conf
rundir={directory}
ipc_prefix=pushpin-
[runner]
services=condure,pushpin-proxy,pushpin-handler
http_port=127.0.0.1:{port}
logdir={directory}
log_level=1
client_buffer_size=8192
client_maxconn=19000
condure_bin=condure
[proxy]
routesfile={directory}/routes
zurl_out_specs=ipc://{directory}/zurl-in
zurl_out_stream_specs=ipc://{directory}/zurl-in-stream
zurl_in_specs=ipc://{directory}/zurl-out
[handler]
push_in_spec=ipc://{directory}/push-in
push_in_sub_specs=ipc://{directory}/push-sub
push_in_http_addr=127.0.0.1
push_in_http_port={publish}
push_in_http_max_body_size=10000000
command_spec=ipc://{directory}/command
message_rate=1000000
message_hwm=1000000
"""
"""Debian's settings, but for places, the loopback that zurl may ask, and the limit of messages per second."""


@contextmanager
def _pushpin(door: Door) -> Iterator[None]:
    """In front of the Apache that is already there: three processes, and zurl, which fetches for them."""
    for program in ("pushpin", "zurl", "condure"):
        if shutil.which(program) is None:
            raise BenchmarkError(f"{program} is missing: apt install pushpin")
    behind, door.port, publish = door.port, free_port(), free_port()
    (door.directory / "routes").write_text(f"* 127.0.0.1:{behind}\n")
    (door.directory / "zurl.conf").write_text(ZURL.format(directory=door.directory))
    config = door.directory / "pushpin.conf"
    config.write_text(PUSHPIN.format(directory=door.directory, port=door.port, publish=publish))
    others = set(os.sched_getaffinity(0)) - door.cores or door.cores
    fetch = ["zurl", "--loglevel=1", f"--config={door.directory}/zurl.conf"]
    with (
        started(door, "zurl", fetch, (door.directory / "zurl-in").exists),
        started(door, "pushpin", ["pushpin", f"--config={config}"], lambda: accepts(door.port, publish)),
        Publisher(publish, lambda number: f"user-{number:08x}", others) as door.publisher,
    ):
        yield


@contextmanager
def _daemon(door: Door) -> Iterator[None]:
    """The streaming daemon of this checkout, one worker, everything on that a host has."""
    config, sock = door.directory / "config.toml", door.run / "daemon.sock"
    own = door.contender.key == "handoff-own"
    text = daemon.CONFIG.format(
        directory=door.directory,
        backend="demo" if own else "model",
        url=f"http://localhost:{door.model}/v1",
        model="1x10",
    )
    config.write_text(text)
    command = [daemon.PYTHON, "-m", "streaming_daemon", "--config", str(config), "--socket", str(sock)]
    command += ["--control", str(door.directory / "control.sock")]
    environ = {**os.environ, "PYTHONPATH": str(daemon.DAEMON)}
    log = door.directory / "daemon.log"

    def serving() -> bool:
        return sock.exists() and "serving" in log.read_text()

    with started(door, "daemon", command, serving, environ):
        # systemd does this on a host: www-data may connect.
        sock.chmod(0o666)
        yield


@contextmanager
def _null(door: Door) -> Iterator[None]:
    """For mod_proxy_fdpass, whose URL can only name a socket below ServerRoot."""
    sock = door.directory / "web" / "null.sock"
    command = [str(BUILD / "nullstream"), str(sock), "fdpass"]
    with started(door, "null", command, sock.exists):
        sock.chmod(0o666)
        yield


SERVERS: dict[str, Callable[[Door], AbstractContextManager[None]]] = {
    "fpm": _fpm,
    "mod_php": _mod_php,
    "apache": _apache,
    "nginx": _nginx,
    "pushpin": _pushpin,
    "daemon": _daemon,
    "null": _null,
}
