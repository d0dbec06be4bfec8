"""Pages: methods, headers, and what is said when the server is not set up right."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from php_server import APP, Server, StartServer, password_hash

HTML = ["/", "/plain.php"]


class Elements(HTMLParser):
    """Start tags with their attributes; knows which ones a label names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open_labels = 0
        self.labelled: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "label":
            self.open_labels += 1
        elif self.open_labels:
            self.labelled.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self.open_labels -= 1


@pytest.mark.parametrize("path", HTML)
def test_a_page_is_html_and_head_has_no_body(app: Server, path: str) -> None:
    page = app.client().get(path)
    assert (page.status, page.header("Content-Type")) == (200, "text/html; charset=utf-8")
    head = app.client().request("HEAD", path)
    assert (head.status, head.body) == (200, "")


@pytest.mark.parametrize("path", [*HTML, "/session.php"])
def test_everything_php_answers_itself_has_the_security_headers(app: Server, path: str) -> None:
    response = app.client().get(path)
    policy = dict(part.strip().split(" ", 1) for part in (response.header("Content-Security-Policy") or "").split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert response.header("X-Content-Type-Options") == "nosniff"
    assert response.header("Referrer-Policy") == "no-referrer"
    assert response.header("Cache-Control") == "no-store"
    assert response.header("X-Powered-By") is None


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        ("/", "POST", "GET, HEAD"),
        ("/plain.php", "POST", "GET, HEAD"),
        ("/session.php", "POST", "GET, HEAD"),
        ("/login.php", "PUT", "GET, HEAD, POST"),
        ("/logout.php", "GET", "POST"),
    ],
)
def test_other_methods_are_405(app: Server, path: str, method: str, allow: str) -> None:
    response = app.client().request(method, path)
    assert (response.status, response.header("Allow")) == (405, allow)
    assert allow in response.body


def test_reloading_the_address_of_a_failed_login_leads_back_to_the_form(app: Server) -> None:
    response = app.client().get("/login.php")
    assert (response.status, response.header("Location")) == (303, "/")


def test_the_plain_page_is_small_and_needs_no_session_and_no_configuration(own_app: Server) -> None:
    own_app.config.unlink()
    page = own_app.client().get("/plain.php")
    assert page.status == 200
    assert 200 < len(page.body) < 1000
    assert page.header("Set-Cookie") is None


def test_session_says_who_and_the_token(app: Server) -> None:
    client = app.client()
    session = client.session()
    assert set(session) == {"user", "csrf"}
    assert session["user"] is None
    assert client.session() == session
    assert client.get("/session.php").header("Content-Type") == "application/json"


@pytest.mark.parametrize("logged_in", [False, True])
def test_the_page_obeys_its_own_policy_and_names_every_control(app: Server, logged_in: bool) -> None:
    client = app.logged_in() if logged_in else app.client()
    page = Elements(client.get("/").body)
    labels = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag != "style"
        if tag == "script":
            assert (attributes.get("src") or "").startswith("/")
        if tag == "img":
            assert "alt" in attributes
        if tag in ("input", "textarea") and attributes.get("type") != "hidden":
            assert attributes.get("id") in labels or attributes in page.labelled, (tag, attributes)
    assert ("html", {"lang": "en"}) in page.tags


@pytest.mark.parametrize("name", ["app.js", "handoff-stream.js", "style.css", "icon.svg"])
def test_the_files_that_the_page_names_are_served(app: Server, name: str) -> None:
    response = app.client().get(f"/{name}")
    assert response.status == 200
    assert response.body == (APP / "public" / name).read_text()


@pytest.mark.parametrize(
    "path", ["/lib.php", "/page.php", "/handoff.php", "/config.example.php", "/../lib.php", "/README.md"]
)
def test_nothing_outside_public_is_served(app: Server, path: str) -> None:
    assert app.client().get(path).status == 404


# The server is not set up right ---------------------------------------------------------------------------------------

BROKEN = {
    "no file": (None, "missing"),
    "a syntax error": ("<?php return [", "line 1"),
    "not an array": ("<?php return 7;", "'target'"),
    "nothing returned": ("<?php $config = [];", "'target'"),
    "no target": ("<?php return ['user' => 'demo', 'password_hash' => '$2y$x'];", "'target'"),
    "a relative path": (
        "<?php return ['target' => 'run/x', 'user' => 'demo', 'password_hash' => '$2y$x'];",
        "'target'",
    ),
    "a name that is too long": (
        "<?php return ['target' => str_repeat('x', 65), 'user' => 'demo', 'password_hash' => '$2y$x'];",
        "'target'",
    ),
    "a name with a line end": (
        "<?php return ['target' => \"llm\\r\\nX-A: b\", 'user' => 'demo', 'password_hash' => '$2y$x'];",
        "'target'",
    ),
    "a path with a line end, under its old name": (
        "<?php return ['socket' => \"/run/x\\r\\nX-A: b\", 'user' => 'demo', 'password_hash' => '$2y$x'];",
        "'target'",
    ),
    "no user": ("<?php return ['socket' => '/run/x', 'user' => '', 'password_hash' => '$2y$x'];", "'user'"),
    "the example's empty hash": ((APP / "config.example.php").read_text(), "'password_hash'"),
    "a password instead of its hash": (
        "<?php return ['socket' => '/run/x', 'user' => 'demo', 'password_hash' => 'secret'];",
        "'password_hash'",
    ),
}


@pytest.mark.parametrize(("text", "word"), BROKEN.values(), ids=BROKEN)
def test_a_broken_configuration_is_a_500_that_names_the_file_and_what_is_wrong(
    own_app: Server, text: str | None, word: str
) -> None:
    if text is None:
        own_app.config.unlink()
    else:
        own_app.config.write_text(text)
    stream = own_app.client().get("/stream.php?prompt=hello")
    assert (stream.status, stream.error["type"]) == (500, "not_configured")
    page = own_app.client().get("/")
    assert (page.status, page.header("Content-Type")) == (500, "text/html; charset=utf-8")
    for message in (stream.error["message"], page.body.replace("&#039;", "'"), own_app.log.read_text()):
        assert str(own_app.config) in message
        assert word in message
    assert "secret" not in page.body + stream.body


def test_the_configuration_is_at_its_fixed_place_unless_moved(start_server: StartServer) -> None:
    server = start_server(prepend="putenv('HANDOFF_APP_CONFIG');")
    path = "/etc/handoff-app/config.php"
    response = server.client().get("/stream.php?prompt=hello")
    # On a host where the file is there, the request simply gets one step further.
    assert path in response.body or response.status == 401


def test_setenv_in_apache_moves_the_configuration(start_server: StartServer) -> None:
    server = start_server(prepend="$_SERVER['HANDOFF_APP_CONFIG'] = '/nonexistent/by-setenv.php';")
    assert "/nonexistent/by-setenv.php" in server.client().get("/stream.php").error["message"]


def test_a_client_cannot_move_the_configuration(app: Server) -> None:
    response = app.client().get("/stream.php", HANDOFF_APP_CONFIG="/etc/passwd")
    assert response.status == 401


def test_sessions_that_cannot_be_stored_are_a_clear_500(start_server: StartServer) -> None:
    server = start_server(ini={"session.save_path": "/nonexistent/sessions"})
    response = server.client().get("/session.php")
    assert (response.status, response.error["type"]) == (500, "no_session")
    assert "session.save_path" in response.error["message"]
    assert json.loads(response.body)["error"]["type"] == "no_session"


def test_a_bug_is_a_500_without_details_and_a_log_line_with_them(start_server: StartServer) -> None:
    server = start_server(prepend="if (isset($_COOKIE['bug'])) { $_SERVER['CONTENT_TYPE'] = []; }")
    client = server.logged_in()
    client.cookies["bug"] = "1"
    response = client.ask("x")
    assert (response.status, response.error["type"]) == (500, "internal_error")
    assert "preg_match" not in response.body
    assert "preg_match" in server.log.read_text()


def test_any_crypt_hash_that_php_verifies_will_do(own_app: Server) -> None:
    own_app.write_config(password_hash=password_hash().replace("$2y$", "$2b$"))
    own_app.logged_in()


@pytest.mark.parametrize("config", [{"target": "/run/x.sock"}, {"target": None, "socket": "/run/x.sock"}])
def test_a_path_does_instead_of_a_name(own_app: Server, config: dict[str, str | None]) -> None:
    client = own_app.logged_in()
    own_app.write_config(**config)
    assert client.ask({"prompt": "hello"}).header("X-Socket-Handoff") == "/run/x.sock"
