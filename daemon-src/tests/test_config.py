from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from daemon_harness import SOURCE
from streaming_daemon.config import (
    AccessLogConfig,
    AnthropicConfig,
    Config,
    DemoConfig,
    ExecConfig,
    HttpConfig,
    LimitsConfig,
    ListenConfig,
    LogConfig,
    MetricsConfig,
    OpenAIConfig,
    ResumeConfig,
    Route,
    ServerConfig,
    load,
    loads,
    warnings_of,
)
from streaming_daemon.toml_table import ConfigError


def errors_of(text: str) -> list[str]:
    """The errors, without the lines, which have tests of their own."""
    return [re.sub(r"^c\.toml:\d+:", "c.toml:", error) for error in lined_errors_of(text)]


def lined_errors_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loads(text, "c.toml")
    return caught.value.errors


def test_an_empty_file_is_the_demo_with_all_defaults() -> None:
    assert loads("", "c.toml") == Config()


def test_the_example_file_shows_every_key_with_its_default() -> None:
    config = load(SOURCE / "config.example.toml")
    assert config.server == ServerConfig()
    assert config.listen == ListenConfig()
    assert config.limits == LimitsConfig()
    assert config.resume == ResumeConfig()
    assert config.log == LogConfig()
    assert config.access_log == AccessLogConfig()
    assert config.metrics == MetricsConfig()
    assert config.default_backend == "demo"
    assert config.allow_choice == ()
    assert config.backends == {
        "demo": DemoConfig(),
        "openai": OpenAIConfig(api_key_credential="openai_api_key"),
        "anthropic": AnthropicConfig(api_key_credential="anthropic_api_key"),
        "program": ExecConfig(command=("/usr/bin/cat", "-u")),
        "upstream": HttpConfig(url="http://127.0.0.1:8080/", path_prefix="/files/", api_key_credential="upstream_key"),
    }
    assert config.routes == (Route("demo", ("llm",), ("/chat/",), ("alice", "bob"), ("gpt-*",), "normalised"),)
    text = (SOURCE / "config.example.toml").read_text()
    for cls in (
        ServerConfig,
        ListenConfig,
        LimitsConfig,
        ResumeConfig,
        LogConfig,
        AccessLogConfig,
        MetricsConfig,
        DemoConfig,
        OpenAIConfig,
        AnthropicConfig,
        ExecConfig,
        HttpConfig,
        Route,
    ):
        for name in cls.__dataclass_fields__:
            assert f"\n{name} = " in text


def test_workers_0_means_one_per_core() -> None:
    assert loads("[server]\nworkers = 0", "c.toml").server.worker_count >= 1
    assert loads("[server]\nworkers = 3", "c.toml").server.worker_count == 3


OPENAI = '[backends.x]\ntype = "openai"\n'
EXEC = '[backends.x]\ntype = "exec"\n'
HTTP = '[backends.x]\ntype = "http"\n'
BAD = [
    ("[server]\nworkers = 65", "c.toml: server.workers = 65: allowed is an integer from 0 to 64"),
    ("[server]\nworkers = true", "c.toml: server.workers = true: allowed is an integer from 0 to 64"),
    ("[server]\nworkers = 1.5", "c.toml: server.workers = 1.5: allowed is an integer from 0 to 64"),
    ('[server]\nmax_streams = "many"', 'c.toml: server.max_streams = "many": allowed is an integer from 1 to 1000000'),
    ("[server]\nhandoff_timeout = 0", "c.toml: server.handoff_timeout = 0: allowed is a number from 0.1 to 60"),
    ("[server]\nheartbeat = nan", "c.toml: server.heartbeat = nan: allowed is a number from 0 to 3600"),
    ("[server]\nwrite_timeout = inf", "c.toml: server.write_timeout = inf: allowed is a number from 0.1 to 3600"),
    ("[server]\nwrite_timeout = 2026-01-01", "server.write_timeout = a date or time: allowed is a number"),
    (
        "[server]\nmax_stream = 1",
        'c.toml: server.max_stream: unknown key (did you mean "max_streams"?); allowed here: ',
    ),
    ("[sever]\nworkers = 1", 'c.toml: sever: unknown key (did you mean "server"?)'),
    ('[listen]\nmessage = "json"', 'c.toml: listen.message = "json": allowed is one of "auto", "envelope", "plain"'),
    ("[listen]\nack = 1", "c.toml: listen.ack = 1: allowed is true or false"),
    ("[listen]\nmax_payload = -1", "c.toml: listen.max_payload = -1: allowed is an integer from 0 to 1073741824"),
    ("[server]\nmax_duration = -1", "c.toml: server.max_duration = -1: allowed is a number from 0 to 604800"),
    ("[limits]\nstreams_per_user = -1", "limits.streams_per_user = -1: allowed is an integer from 0 to 1000000"),
    ("[limits]\nuser_burst = 0", "c.toml: limits.user_burst = 0: allowed is an integer from 1 to 10000"),
    ("[limits]\nper_user = 1", "c.toml: limits.per_user: unknown key"),
    ("[resume]\nkeep = 1e9", "c.toml: resume.keep = 1000000000.0: allowed is a number from 0 to 3600"),
    ("server = 1", "c.toml: server = 1: allowed is a table, written as [server]"),
    (
        '[log]\nlevel = "warn"',
        'log.level = "warn": allowed is one of "debug", "info", "warning", "error" (did you mean',
    ),
    ('[backend]\ndefault = "gpt"', 'c.toml: backend.default = "gpt": allowed is one of "demo"'),
    ("[backends.x]\nmodel = 1", 'c.toml: backends.x.type: is missing: allowed is one of "demo", "openai"'),
    (
        '[backends.x]\ntype = "opnai"',
        'backends.x.type = "opnai": allowed is one of "demo", "openai", "anthropic", "exec", "http" (did',
    ),
    ("[backends]", "c.toml: backends: is empty: allowed is at least one table like [backends.demo]"),
    ('[backends."a b"]\ntype = "demo"', "c.toml: backends.a b: allowed are names of letters"),
    (
        '[backends.x]\ntype = "demo"\ntokens_per_second = 0',
        "backends.x.tokens_per_second = 0: allowed is a number from 0.1",
    ),
    (
        '[backends.x]\ntype = "demo"\nmodel = "m"',
        "c.toml: backends.x.model: unknown key; allowed here: type, tokens_per_second, fallback",
    ),
    (OPENAI + 'base_url = "ftp://h/"', 'base_url = "ftp://h/": allowed is a URL like "https://host/v1"'),
    (OPENAI + 'base_url = "https://h:99999/"', 'base_url = "https://h:99999/": allowed is a URL'),
    (OPENAI + 'base_url = "https://"', 'base_url = "https://": allowed is a URL'),
    (OPENAI + 'base_url = "http://h/a b"', 'base_url = "http://h/a b": allowed is a URL'),
    (OPENAI + 'model = ""', 'c.toml: backends.x.model = "": allowed is a string of 1 to 200 printable characters'),
    (
        OPENAI + 'api_key_credential = "../key"',
        'api_key_credential = "../key": allowed is the name of a systemd credential',
    ),
    ('[log]\ncontent = "yes"', 'c.toml: log.content = "yes": allowed is true or false'),
    ('[access_log]\npath = "access.log"', 'access_log.path = "access.log": allowed is an absolute path'),
    ('[access_log]\nformat = "common"', 'access_log.format = "common": allowed is one of "combined", "json", "pairs"'),
    ('[metrics]\nlisten = "0.0.0.0:9464"', 'metrics.listen = "0.0.0.0:9464": allowed is "off", "unix:" and a path'),
    ('[metrics]\nlisten = "127.0.0.1"', 'metrics.listen = "127.0.0.1": allowed is "off"'),
    ('[metrics]\nlisten = "127.0.0.1:0"', 'metrics.listen = "127.0.0.1:0": allowed is "off"'),
    ('[metrics]\nlisten = "unix:"', 'metrics.listen = "unix:": allowed is "off"'),
    (OPENAI + 'base_url = "unix:run/x.sock"', 'base_url = "unix:run/x.sock": allowed is a URL like'),
    (OPENAI + 'output = "raw"', 'backends.x.output = "raw": allowed is one of "normalised", "passthrough"'),
    (OPENAI + 'api = "completions"', 'backends.x.api = "completions": allowed is one of "chat", "responses"'),
    (OPENAI + 'extra = ["stream"]', 'backends.x.extra = "stream": allowed is an array of names of members'),
    (OPENAI + 'extra = "top_k"', "allowed is an array of names of members"),
    (OPENAI + 'fallback = ["y"]', 'backends.x.fallback = "y": allowed is an array of the names of other backends, of'),
    (
        OPENAI + 'fallback = ["why"]\n[backends.y]\ntype = "demo"',
        'backends.x.fallback = "why": allowed is an array of the names of (other) backends: "y"',
    ),
    (OPENAI + 'fallback = ["x"]', 'backends.x.fallback = "x": allowed is '),
    (EXEC, "c.toml: backends.x.command: is missing: allowed is an array of strings, the first of them the absolute"),
    (EXEC + "command = []", "c.toml: backends.x.command = an array: allowed is an array of strings"),
    (EXEC + 'command = "/bin/sh -c x"', 'backends.x.command = "/bin/sh -c x": allowed is an array of strings'),
    (EXEC + 'command = ["cat"]', 'backends.x.command = ["cat", ...]: allowed is an array of strings'),
    (EXEC + 'command = ["/x", 1]', "backends.x.command = 1: allowed is an array of strings"),
    (EXEC + 'command = ["/x"]\nformat = "json"', 'format = "json": allowed is one of "text", "lines", "sse"'),
    (
        EXEC + 'command = ["/x"]\n[backends.x.environment]\nA = 1',
        "backends.x.environment: (values not shown): allowed is a table of strings",
    ),
    (HTTP, "c.toml: backends.x.url: is missing: allowed is a URL"),
    (HTTP + 'url = "http://h"\nmethod = "PUT"', 'method = "PUT": allowed is one of "GET", "POST"'),
    (HTTP + 'url = "http://h"\npath_prefix = "/files"', 'path_prefix = "/files": allowed is a path that begins and'),
    (HTTP + 'url = "http://h"\npath_prefix = "/a/../"', 'path_prefix = "/a/../": allowed is a path'),
    (HTTP + 'url = "http://h"\nheaders = ["Host"]', 'headers = "Host": allowed is an array of names of headers'),
    ('[backend]\nallow_choice = ["llm"]', 'backend.allow_choice = "llm": allowed is an array of the names of'),
    ("routes = 1", "c.toml: routes = 1: allowed is an array of tables, each written as [[routes]]"),
    ("[[routes]]", 'c.toml: routes[1].backend: is missing: allowed is one of "demo"'),
    ('[[routes]]\nbackend = "x"', 'c.toml: routes[1].backend = "x": allowed is one of "demo"'),
    ('[[routes]]\nbackend = "demo"\npath = "x"', 'routes[1].path = "x": allowed is a string or an array of strings'),
    ('[[routes]]\nbackend = "demo"\nmodel = ""', 'routes[1].model = "": allowed is a string or an array of strings'),
    ('[[routes]]\nbackend = "demo"\nuser = [1]', "routes[1].user = 1: allowed is a string or an array of strings"),
    ('[[routes]]\nbackend = "demo"\nuri = "/"', "c.toml: routes[1].uri: unknown key"),
    ("[server", "c.toml: not valid TOML: "),
]


@pytest.mark.parametrize("listen", ["off", "unix:metrics.sock", "unix:/run/m.sock", "127.0.0.1:9464", "[::1]:9464"])
def test_metrics_may_listen_locally(listen: str) -> None:
    assert loads(f'[metrics]\nlisten = "{listen}"', "c.toml").metrics.listen == listen


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_an_error_names_file_key_value_and_allowed_form(text: str, expected: str) -> None:
    assert any(expected in error for error in errors_of(text)), errors_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# one\n\n[server]\nworkers = 65", "c.toml:4: server.workers = 65"),
        ("server.workers = 65", "c.toml:1: server.workers = 65"),
        ("\nserver = { max_streams = 1, workers = 65 }", "c.toml:2: server.workers = 65"),
        ('[log]\n"lev\\u0065l" = 3', "c.toml:2: log.level = 3"),
        ("[log]\n\nlevel = 'x'\nfoo = 1", "c.toml:4: log.foo: unknown key"),
        ("\n[sever]", "c.toml:2: sever: unknown key"),
        ("\n[backends.x]\nmodel = 1", "c.toml:2: backends.x.type: is missing"),
        ("[log]\nlevel =", "c.toml:2: not valid TOML: "),
    ],
)
def test_an_error_names_the_line(text: str, expected: str) -> None:
    assert any(error.startswith(expected) for error in lined_errors_of(text)), lined_errors_of(text)


def test_all_errors_are_reported_at_once() -> None:
    text = "[server]\nworkers = 65\nmax_streams = 0\nfoo = 1\n[log]\nlevel = 3"
    assert len(errors_of(text)) == 4


@pytest.mark.parametrize(
    "text",
    [
        OPENAI + 'api_key = "sk-hunter2"',
        OPENAI + 'api_key_credential = "sk-hunter2"',
        OPENAI + 'base_url = "https://user:hunter2@host/v1"',
        OPENAI + 'base_url = "https://host/v1?key=hunter2"',
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    assert "hunter2" not in " ".join(errors_of(text))


def test_a_faulty_backend_is_not_also_called_undefined() -> None:
    assert len(errors_of('[backend]\ndefault = "x"\n[backends.x]\ntype = "nope"')) == 1


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streaming_daemon", "--check", "--config", str(path)]
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=30, check=False)


def test_check_of_a_good_file_exits_with_0() -> None:
    done = check(SOURCE / "config.example.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "backend demo" in done.stdout


def test_check_of_a_bad_file_exits_with_2_and_one_line_per_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[server]\nworker = 1\nmax_streams = 0\n")
    done = check(path)
    assert done.returncode == 2
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        [f"{path}:3", "server.max_streams = 0"],
        [f"{path}:2", "server.worker"],
    ]


def test_check_of_a_missing_file_exits_with_2(tmp_path: Path) -> None:
    done = check(tmp_path / "none.toml")
    assert (done.returncode, done.stderr) == (2, f"{tmp_path}/none.toml: cannot be read: No such file or directory\n")


KEY = '[backends.x]\ntype = "%s"\n%s = "%s"\napi_key_credential = "openai_key"\n'


@pytest.mark.parametrize(
    ("kind", "key", "url"),
    [("openai", "base_url", "http://llm.example.org/v1"), ("http", "url", "http://192.0.2.7:8000/x/")],
)
def test_a_key_that_would_cross_the_network_in_plain_text_is_a_warning(
    kind: str, key: str, url: str, tmp_path: Path
) -> None:
    text = KEY % (kind, key, url)
    assert warnings_of(loads(text, "c.toml")) == [
        f'backends.x.{key} = "{url}": the key in the credential openai_key crosses the network in plain text; '
        "use https, or a proxy on this host"
    ]
    path = tmp_path / "c.toml"
    path.write_text(text)
    done = check(path)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith(f"{path}: warning: backends.x.{key} = ")


@pytest.mark.parametrize(
    ("kind", "key", "url"),
    [
        ("openai", "base_url", "https://llm.example.org/v1"),
        ("anthropic", "base_url", "http://127.0.0.1:8000/v1"),
        ("openai", "base_url", "http://[::1]:8000/v1"),
        ("http", "url", "http://localhost:8000/"),
        ("openai", "base_url", "unix:/run/proxy.sock:/v1"),
    ],
)
def test_a_key_that_stays_on_the_host_or_is_encrypted_is_no_warning(kind: str, key: str, url: str) -> None:
    assert warnings_of(loads(KEY % (kind, key, url), "c.toml")) == []
