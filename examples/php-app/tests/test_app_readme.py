"""handoff() on its own, as somebody copies it, and the snippets of the README."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from php_server import APP, PASSWORD, Client, StartServer

README = (APP / "README.md").read_text()


def snippet(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(<\?php.*?|url=.*?)```", README, re.DOTALL)
    return str(text)


def run_php(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["php", "-r", f"require '{APP}/handoff.php'; {code}"], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("handoff('/run/x', ['prompt' => \"\\xff\"]);", "JsonException"),
        (
            "handoff('llm', ['prompt' => str_repeat('a', 8388608)]);",
            "LengthException: 8388621 bytes of data, at most 8388608 fit",
        ),
        ("echo 'x'; flush(); handoff('llm', []);", "LogicException: output started in"),
    ],
)
def test_handoff_refuses_what_would_not_arrive(code: str, error: str) -> None:
    result = run_php(f"try {{ {code} }} catch (Throwable $e) {{ echo get_class($e), ': ', $e->getMessage(); }}")
    assert error in result.stdout, result


@pytest.mark.parametrize(
    "data", ["'my secret' . \"\\xff\"", "str_repeat('my secret', 1000000)"], ids=["bytes", "too much"]
)
def test_what_a_user_typed_is_in_no_error_and_no_trace(data: str) -> None:
    # As a developer's php.ini has it: then a trace has the arguments of every call.
    code = f"ini_set('zend.exception_ignore_args', '0'); $data = {data}; $e = null;"
    code += "try { handoff('llm', ['prompt' => $data]); } catch (Exception $e) { }"
    code += "do { echo $e->getMessage(), print_r($e->getTrace(), true); } while ($e = $e->getPrevious());"
    said = run_php(code).stdout
    assert "[function] => handoff" in said and "SensitiveParameterValue" in said, said[:3000]
    assert "secret" not in said, said[:3000]


def test_handoff_ends_the_request() -> None:
    assert run_php("handoff('/run/x', ['a' => 1]); echo 'not reached';").stdout == ""
    large = run_php("handoff('/run/x', ['a' => str_repeat('x', 7000)]); echo 'not reached';").stdout
    assert json.loads(large) == {"a": "x" * 7000}


def test_no_data_is_an_object_and_not_a_list(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "ask.php").write_text(f"<?php require '{APP}/handoff.php'; handoff('llm', []);")
    assert start_server(root=tmp_path).client().get("/ask.php").header("X-Handoff-Data") == "{}"


def test_handoff_releases_the_session_lock_of_whoever_forgot(tmp_path: Path) -> None:
    result = run_php(
        f"session_save_path('{tmp_path}'); session_start(); "
        "register_shutdown_function(fn () => print(session_status() === PHP_SESSION_NONE ? 'released' : 'held')); "
        "handoff('llm', []);"
    )
    assert result.stdout == "released", result


@pytest.fixture
def ask_php(start_server: StartServer, tmp_path: Path) -> Client:
    """A browser for the README's endpoint, as /ask.php; signed in by /enter.php."""
    shutil.copy(APP / "handoff.php", tmp_path)
    (tmp_path / "ask.php").write_text(snippet("php"))
    (tmp_path / "enter.php").write_text("<?php session_start(); $_SESSION['user'] = 'ada';")
    return start_server(root=tmp_path).client()


def test_the_php_snippet_hands_off(ask_php: Client) -> None:
    refused = ask_php.request("POST", "/ask.php", {"prompt": "hello"})
    assert (refused.status, refused.header("X-Socket-Handoff")) == (401, None)
    ask_php.get("/enter.php")
    assert ask_php.request("POST", "/ask.php", {"prompt": "hello"}).handoff == {"prompt": "hello", "user": "ada"}
    whole = ask_php.request("POST", "/ask.php", {"prompt": "x" * 20_000})
    assert (whole.status, whole.header("X-Handoff-Data-From")) == (200, "response-body")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 422),
        (b"prompt[]=hello", {}, 422),
        (b"prompt=%C0%80", {}, 422),
        (b"prompt=" + b"x" * 20_001, {}, 422),
        (b"prompt=hello", {"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_the_php_snippet_refuses_what_no_page_of_its_own_would_send(
    ask_php: Client, body: bytes, headers: dict[str, str], status: int
) -> None:
    ask_php.get("/enter.php")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused = ask_php.request("POST", "/ask.php", body, {**form, **headers})
    assert (refused.status, refused.header("X-Socket-Handoff")) == (status, None)


def test_the_php_snippet_answers_no_link(ask_php: Client) -> None:
    ask_php.get("/enter.php")
    assert ask_php.get("/ask.php?prompt=hello").status == 405


def test_the_shell_snippet_logs_in_and_asks(start_server: StartServer, tmp_path: Path) -> None:
    record = tmp_path / "headers.json"
    server = start_server(
        prepend=f"register_shutdown_function(fn () => file_put_contents('{record}', json_encode(headers_list())));"
    )
    script = snippet("sh").replace("http://127.0.0.1:8080", f"http://127.0.0.1:{server.port}").replace("…", PASSWORD)
    result = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, ""), result
    headers = dict(line.split(": ", 1) for line in json.loads(record.read_text()))
    assert json.loads(headers["X-Handoff-Data"])["prompt"] == "How does a handoff work?"


def test_the_readme_names_every_file() -> None:
    names = {path.name for path in [*APP.glob("*.php"), *(APP / "public").iterdir()]}
    assert {name for name in names if name not in README} == set()
