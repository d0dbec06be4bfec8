"""The class of examples/php-helper, as Composer installs it and as Apache and the daemon see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chain import ROOT, Chain, Client
from conftest import HELPER

PACKAGE = ROOT / "examples" / "php-helper"
HANDOFF = ROOT / "examples" / "php-app" / "handoff.php"


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "COMPOSER_ALLOW_SUPERUSER": "1", "COMPOSER_HOME": str(cwd / "composer-home")}
    # Whoever asks the network is told no. (COMPOSER_DISABLE_NETWORK does so only where PHP has curl.)
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_composer_installs_it_without_a_network_and_loads_it(tmp_path: Path) -> None:
    run("composer", "validate", "--strict", "--no-check-version", str(PACKAGE / "composer.json"), cwd=tmp_path)
    # As the README says it.
    shutil.copytree(PACKAGE, tmp_path / "lib" / "php-helper")
    project = (PACKAGE / "README.md").read_text().split("```json\n")[1].split("```")[0]
    (tmp_path / "composer.json").write_text(project)
    run("composer", "install", "--no-interaction", "--no-progress", cwd=tmp_path)
    code = "require 'vendor/autoload.php'; echo json_encode(SocketHandoff\\SocketHandoff::to('llm')->headers());"
    assert json.loads(run("php", "-r", code, cwd=tmp_path)) == {"X-Socket-Handoff": "llm", "X-Handoff-Data": "{}"}


@pytest.mark.parametrize("length", [0, 5_500, 6_000, 40_000, 7_000_000])
def test_send_hands_off_whatever_was_printed_before(site: Chain, client: Client, length: int) -> None:
    (site.docroot / "send.php").write_text(
        "<?php require 'SocketHandoff.php'; ob_start(); echo 'printed before'; setcookie('seen', 'yes');"
        "SocketHandoff\\SocketHandoff::to('llm')->with(['prompt' => str_repeat('é', (int) $_GET['n'])])->send();"
    )
    response = client.open("GET", f"/send.php?n={length // 2}")
    with response:
        first = response.read(200).decode()
    assert response.status == 200 and "text/event-stream" in response.headers["Content-Type"]
    assert client.cookies["seen"] == "yes", "the application's cookies arrive"
    assert "data: {" in first and "printed before" not in first


def test_a_handoff_that_comes_too_late_is_an_error_and_no_broken_answer(site: Chain, client: Client) -> None:
    (site.docroot / "late.php").write_text(
        "<?php require 'SocketHandoff.php'; echo 'x'; flush();"
        "try { SocketHandoff\\SocketHandoff::to('llm')->send(); } catch (LogicException $e) { echo $e->getMessage(); }"
    )
    reply = client.get("/late.php")
    assert reply.text.startswith("xoutput started in ") and "too late to hand the connection off" in reply.text


DATA = [
    "[]",
    "['prompt' => 'a', 'temperature' => 1.0]",
    "['prompt' => \"\\x7f naïve 日本語 🎉 / \\\\ \\r\\n\"]",
    "['prompt' => str_repeat('x', 5969)]",
    "['prompt' => str_repeat('x', 5970)]",
    "['prompt' => str_repeat('x', 5971)]",
    "['prompt' => str_repeat('é', 9000)]",
]


@pytest.mark.parametrize("data", DATA)
def test_the_reference_applications_function_sends_the_same_bytes(
    site: Chain, client: Client, tmp_path: Path, data: str
) -> None:
    """Two ways to copy the same thing: handoff() of examples/php-app and the class must not drift apart."""
    said = []
    for file, call in (
        (HANDOFF, f"handoff('llm', {data});"),
        (HELPER, f"SocketHandoff\\SocketHandoff::to('llm')->with({data})->send();"),
    ):
        script = tmp_path / "one.php"
        script.write_text(f"<?php require '{file}'; {call}")
        environment = {"REDIRECT_STATUS": "1", "SCRIPT_FILENAME": str(script), "GATEWAY_INTERFACE": "CGI/1.1"}
        environment |= {"REQUEST_METHOD": "GET", "PATH": os.environ["PATH"]}
        said.append(subprocess.run(["php-cgi"], env=environment, capture_output=True, check=True).stdout)
    assert b"X-Socket-Handoff: llm" in said[0]
    assert said[0] == said[1]


def test_the_readmes_snippet_hands_off(site: Chain, client: Client) -> None:
    (snippet,) = [part.split("```")[0] for part in (PACKAGE / "README.md").read_text().split("```php\n")[1:2]]
    site.install(HELPER, under="vendor")
    (site.docroot / "vendor" / "SocketHandoff.php").rename(site.docroot / "vendor" / "autoload.php")
    (site.docroot / "readme.php").write_text(snippet)
    assert client.ask("POST", "/readme.php", "prompt=Why").status == 401
    (site.docroot / "enter.php").write_text("<?php session_start(); $_SESSION['user'] = $_GET['user'];")
    client.get("/enter.php", user="ada")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.ask("POST", "/readme.php", "prompt=Why", form).answer
    assert client.get("/readme.php", prompt="Why").status == 405
    assert client.ask("POST", "/readme.php", "prompt=Why", {**form, "Sec-Fetch-Site": "cross-site"}).status == 403
    for body in ("", "prompt[]=Why", "prompt=%C0%80", "prompt=" + "x" * 20_001):
        assert client.ask("POST", "/readme.php", body, form).status == 422


@pytest.mark.parametrize("length", [5, 50_000])
def test_a_framework_sends_it_as_any_response(site: Chain, client: Client, length: int) -> None:
    """The README's lines in a controller, with Symfony's Response and Request, as Laravel has them too."""
    controller = (PACKAGE / "README.md").read_text().split("## Frameworks")[1].split("```php\n")[1].split("```")[0]
    (site.docroot / "framework.php").write_text(
        "<?php require '/usr/share/php/Symfony/Component/HttpFoundation/autoload.php'; require 'SocketHandoff.php';\n"
        "use SocketHandoff\\SocketHandoff; use Symfony\\Component\\HttpFoundation\\{Cookie, Request, Response};\n"
        "$user = new class { function getUserIdentifier(): string { return 'ada'; } };\n"
        "function controller($prompt, $user): Response {\n" + controller + "}\n"
        "$request = Request::createFromGlobals();\n"
        "$response = controller(str_repeat('x', $request->query->getInt('n')), $user);\n"
        "$response->headers->setCookie(Cookie::create('seen', 'yes'));\n"
        "$response->prepare($request)->send();\n"
    )
    data = client.get("/framework.php", n=str(length)).data
    assert data == {"prompt": "x" * length, "user": "ada"}
    assert client.cookies["seen"] == "yes"
