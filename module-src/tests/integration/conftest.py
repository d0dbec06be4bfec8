# SPDX-License-Identifier: Apache-2.0
"""Fixtures: one httpd for the whole run, a daemon per test, and an error log that must stay clean.

The MPM under test comes from the environment, MPM=event (the default), worker or prefork.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from handoff_httpd import BUILD, MPM, ROOM, ErrorLog, Httpd, writable_run
from handoff_standin import Daemon, answer_ok


def _config(httpd: Httpd) -> str:
    """The virtual hosts, one per kind of connection. What a test needs of them is said there."""
    root, run = httpd.root, httpd.run
    port = httpd.port
    handler = "<LocationMatch ^/(t|off|deflate|always|page|loop|text)$>\nSetHandler handoff-test\n</LocationMatch>\n"
    modules = [
        "deflate",
        "filter",
        "headers",
        "include",
        "remoteip",
        "reqtimeout",
        "status",
        "dumpio",
        "asis",
        "proxy",
        "proxy_http",
        "proxy_fcgi",
        "proxy_balancer",
        "lbmethod_byrequests",
        "slotmem_shm",
        "socache_shmcb",
        "ssl",
        "rewrite",
        "reflector",
        "cache",
        "cache_disk",
    ]
    if httpd.mpm != "prefork":
        modules.append("http2")
    return f"""
{httpd.load(*modules)}
LogFormat "%<q st=%>s b=%b X=%X O=%O target=%<{{handoff-target}}n result=%<{{handoff-result}}n" t
CustomLog {root}/logs/access t
DocumentRoot {root}/htdocs
ExtendedStatus On
SSLSessionCache none
SocketHandoffAllowedPrefix {run}/ok/
{handler}
<Directory {root}/htdocs>
    AllowOverride All
    Options +Includes
    Require all granted
    AddType text/html .shtml
    AddOutputFilter INCLUDES .shtml
</Directory>
<Files sent.bin>
    EnableSendfile On
</Files>
<Directory {root}/htdocs/listed>
    AllowOverride None
    AllowOverrideList SocketHandoffEnabled SocketHandoffAllow
</Directory>
<Location /off>
    SocketHandoffEnabled Off
</Location>
<Location /deflate>
    SetOutputFilter DEFLATE
</Location>
<Location /always>
    Header always set X-Socket-Handoff {run}/ok/d.sock
    Header always set X-Handoff-Data stolen
    Header set X-Socket-Handoff {run}/ok/d.sock
</Location>
<Location /page>
    ErrorDocument 403 /refused.html
    ErrorDocument 404 /sorry.html
    ErrorDocument 503 /sorry.html
</Location>
<Location /text>
    ErrorDocument 503 "come back later"
</Location>
<Location /loop>
    ErrorDocument 503 /loop?t={run}/ok/none.sock
</Location>
<Location /missing>
    ErrorDocument 404 /t?t={run}/ok/d.sock&d=from-errordocument
</Location>
<Location /reflect>
    SetHandler reflector
    ReflectorHeader X-Foo X-Socket-Handoff
    ReflectorHeader X-Bar X-Handoff-Data
</Location>
CacheQuickHandler off
CacheRoot {root}/logs
CacheHeader on
CacheMinExpire 3600
<Location /cached>
    CacheEnable disk
    Header set X-Socket-Handoff {run}/ok/d.sock
    Header set X-Handoff-Data stolen
</Location>
<Location /kept>
    CacheEnable disk
</Location>
<LocationMatch "^/backend/.*[.]php$">
    SetHandler "proxy:fcgi://127.0.0.1:1"
</LocationMatch>
<Location /dying>
    SetHandler handoff-test
    ErrorDocument 500 /t?t={run}/ok/d.sock&d=again
</Location>
<Location /status>
    SetHandler server-status
</Location>

Listen 127.0.0.1:{port("main")}
Listen 127.0.0.1:{port("proxy")}
ProxyPass /backend http://127.0.0.1:{httpd.backend}/
<Proxy balancer://both>
    BalancerMember http://127.0.0.1:{httpd.backend}
</Proxy>
ProxyPass /balanced balancer://both/
<VirtualHost 127.0.0.1:{port("proxy")}>
    RemoteIPProxyProtocol On
</VirtualHost>

Listen 127.0.0.1:{port("tls")}
<VirtualHost 127.0.0.1:{port("tls")}>
    SSLEngine On
    SSLCertificateFile {root}/conf/server.pem
    SSLCertificateKeyFile {root}/conf/server.key
    {"Protocols h2 http/1.1" if httpd.mpm != "prefork" else ""}
</VirtualHost>

Listen 127.0.0.1:{port("h2c")}
<VirtualHost 127.0.0.1:{port("h2c")}>
    {"Protocols h2c http/1.1" if httpd.mpm != "prefork" else ""}
</VirtualHost>

Listen 127.0.0.1:{port("dumpio")}
<VirtualHost 127.0.0.1:{port("dumpio")}>
    DumpIOOutput On
    LogLevel dumpio:trace7
</VirtualHost>

Listen 127.0.0.1:{port("narrow")}
<VirtualHost 127.0.0.1:{port("narrow")}>
    SocketHandoffAllowedPrefix {run}/ok/only.sock
</VirtualHost>

Listen 127.0.0.1:{port("outside")}
<VirtualHost 127.0.0.1:{port("outside")}>
    SocketHandoffAllowedPrefix {root}/sockets/
</VirtualHost>

Listen 127.0.0.1:{port("hasty")}
<VirtualHost 127.0.0.1:{port("hasty")}>
    RequestReadTimeout header=10 body=1
</VirtualHost>

Listen 127.0.0.1:{port("patient")}
<VirtualHost 127.0.0.1:{port("patient")}>
    SocketHandoffConnectTimeoutMs 5000
    SocketHandoffMaxRetries 10
</VirtualHost>
"""


def _make_site(httpd: Httpd) -> None:
    htdocs = httpd.root / "htdocs"
    (htdocs / "plain.html").write_text("plain page\n")
    (htdocs / "sorry.html").write_text("sorry page\n")
    (htdocs / "refused.html").write_text("refused page\n")
    for name in ("big.bin", "sent.bin"):
        (htdocs / name).write_bytes(bytes(range(256)) * 12_000)
    (httpd.root / "sockets").mkdir()
    target = f"{httpd.run}/ok/d.sock"
    (htdocs / "page.shtml").write_text(f'before <!--#include virtual="/t?t={target}&d=included&body=3" --> after\n')
    for name in ("owner", "enabling", "asis", "asistype", "listed", "cached", "kept"):
        (htdocs / name).mkdir()
        (htdocs / name / "file.txt").write_text("static\n")
    (htdocs / "kept" / "again.txt").write_text("static\n")
    (htdocs / "owner" / ".htaccess").write_text(
        f"Header set X-Socket-Handoff {target}\nHeader set X-Handoff-Data stolen\n"
    )
    (htdocs / "enabling" / ".htaccess").write_text("SocketHandoffEnabled On\n")
    (htdocs / "asis" / ".htaccess").write_text("SetHandler send-as-is\n")
    (htdocs / "asistype" / ".htaccess").write_text("ForceType httpd/send-as-is\n")
    for name in ("asis", "asistype"):
        (htdocs / name / "file.txt").write_text(
            f"Status: 200 OK\nX-Socket-Handoff: {target}\nContent-Type: text/plain\n\nas it is\n"
        )
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-keyout",
            str(httpd.root / "conf/server.key"),
            "-out",
            str(httpd.root / "conf/server.pem"),
        ],
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """The module and its test handler, compiled from what lies here now."""
    build = BUILD.relative_to(ROOM) if BUILD.is_relative_to(ROOM) else BUILD
    made = ["all", f"{build}/mod_handoff_test.so", f"{build}/small_buffers.so"]
    subprocess.run(["make", "-s", "-C", str(ROOM), f"B={build}", *made], check=True)


@pytest.fixture(scope="session")
def run_dir() -> Iterator[Path]:
    """A directory of our own below /run, where the default prefix lets sockets be."""
    parent = writable_run()
    if parent is None:
        pytest.skip("NOTHING TESTED: neither /run nor /run/user/<uid> is writable for this user")
    path = Path(tempfile.mkdtemp(prefix="handoff-test-", dir=parent))
    path.chmod(0o755)
    (path / "ok").mkdir()
    (path / "elsewhere").mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def httpd(built: None, run_dir: Path) -> Iterator[Httpd]:
    """The running server."""
    server = Httpd(mpm=MPM, run=run_dir)
    try:
        _make_site(server)
        server.start(_config(server))
        yield server
    finally:
        server.stop()


@pytest.fixture
def log(httpd: Httpd) -> ErrorLog:
    return ErrorLog(httpd)


@pytest.fixture(autouse=True)
def clean_error_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """A line of level warn or worse, or a crash, that the test did not expect fails it. A line that comes too late for
    its own test fails the next one."""
    if "httpd" not in request.fixturenames:
        yield
        return
    log: ErrorLog = request.getfixturevalue("log")
    yield
    reports = log.httpd.sanitizer_reports()
    assert not reports, reports
    assert not log.unexpected()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the server said meanwhile."""
    report = yield
    server = getattr(item, "funcargs", {}).get("httpd")
    if report.failed and server is not None:
        report.sections.append(("error log", "\n".join(server.new_log_lines()[-40:])))
    return report


@pytest.fixture
def target(run_dir: Path) -> Path:
    """Where the daemon of this test listens."""
    return run_dir / "ok" / "d.sock"


@pytest.fixture
def daemon(target: Path) -> Iterator[Daemon]:
    """A daemon whose clients the test answers itself."""
    with Daemon(target) as standin:
        yield standin


@pytest.fixture
def answering(target: Path) -> Iterator[Daemon]:
    """A daemon that answers everybody with their own data."""
    with Daemon(target, answer=answer_ok) as standin:
        yield standin


@pytest.fixture
def uri(target: Path) -> Callable[..., str]:
    """Builds a request to the test handler that asks for a handoff to the daemon."""

    def build(path: str = "/t", **arguments: object) -> str:
        query = {"t": target, **arguments}
        return path + "?" + "&".join(f"{k}={v}" for k, v in query.items() if v is not None)

    return build
