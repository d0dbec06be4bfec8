from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daemon_harness import SOURCE
from streaming_daemon.config import Config, ConfigError, DemoConfig, OpenAIConfig, ServerConfig, load, loads


def errors_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loads(text, "c.toml")
    return caught.value.errors


def test_an_empty_file_is_the_demo_with_all_defaults() -> None:
    assert loads("", "c.toml") == Config()


def test_the_example_file_shows_every_key_with_its_default() -> None:
    config = load(SOURCE / "config.example.toml")
    assert config.server == ServerConfig()
    assert config.log_level == Config().log_level
    assert config.default_backend == "demo"
    assert config.backends == {"demo": DemoConfig(), "openai": OpenAIConfig(api_key_credential="openai_api_key")}
    text = (SOURCE / "config.example.toml").read_text()
    for cls in (ServerConfig, DemoConfig, OpenAIConfig):
        for name in cls.__dataclass_fields__:
            assert f"\n{name} = " in text


def test_workers_0_means_one_per_core() -> None:
    assert loads("[server]\nworkers = 0", "c.toml").server.worker_count >= 1
    assert loads("[server]\nworkers = 3", "c.toml").server.worker_count == 3


OPENAI = '[backends.x]\ntype = "openai"\n'
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
    ("server = 1", "c.toml: server = 1: allowed is a table, written as [server]"),
    (
        '[log]\nlevel = "warn"',
        'log.level = "warn": allowed is one of "debug", "info", "warning", "error" (did you mean',
    ),
    ('[backend]\ndefault = "gpt"', 'c.toml: backend.default = "gpt": allowed is one of "demo"'),
    ("[backends.x]\nmodel = 1", 'c.toml: backends.x.type: is missing: allowed is one of "demo", "openai"'),
    (
        '[backends.x]\ntype = "opnai"',
        'backends.x.type = "opnai": allowed is one of "demo", "openai" (did you mean "openai"?)',
    ),
    ("[backends]", "c.toml: backends: is empty: allowed is at least one table like [backends.demo]"),
    ('[backends."a b"]\ntype = "demo"', "c.toml: backends.a b: allowed are names of letters"),
    (
        '[backends.x]\ntype = "demo"\ntokens_per_second = 0',
        "backends.x.tokens_per_second = 0: allowed is a number from 0.1",
    ),
    (
        '[backends.x]\ntype = "demo"\nmodel = "m"',
        "c.toml: backends.x.model: unknown key; allowed here: type, tokens_per_second",
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
    ("[server", "c.toml: not valid TOML: "),
]


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_an_error_names_file_key_value_and_allowed_form(text: str, expected: str) -> None:
    assert any(expected in error for error in errors_of(text)), errors_of(text)


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
    assert [line.startswith(f"{path}: server.") for line in done.stderr.splitlines()] == [True, True]


def test_check_of_a_missing_file_exits_with_2(tmp_path: Path) -> None:
    done = check(tmp_path / "none.toml")
    assert (done.returncode, done.stderr) == (2, f"{tmp_path}/none.toml: cannot be read: No such file or directory\n")
