"""Sessions: who is logged in, for how long, and that nobody else can be made to be."""

from __future__ import annotations

import re

import pytest
from php_server import PASSWORD, Client, Server, StartServer, password_hash


def test_a_login_is_answered_with_303_and_shows_the_page(app: Server) -> None:
    client = app.client()
    assert 'action="/login.php"' in client.get("/").body
    response = client.log_in()
    assert (response.status, response.header("Location")) == (303, "/")
    page = client.get("/").body
    assert 'id="ask"' in page
    assert 'action="/login.php"' not in page
    assert client.session()["user"] == "demo"


def test_a_login_works_with_the_token_of_the_html_form(app: Server) -> None:
    client = app.client()
    token = re.search(r'name="csrf" value="([0-9a-f]{64})"', client.get("/").body)
    assert token is not None
    form = {"user": "demo", "password": PASSWORD, "csrf": token[1]}
    assert client.request("POST", "/login.php", form).status == 303


@pytest.mark.parametrize(
    ("user", "password"),
    [("demo", "wrong"), ("nobody", PASSWORD), ("", PASSWORD), ("demo", ""), ("DEMO", PASSWORD), ("demo\0", PASSWORD)],
)
def test_wrong_credentials_are_401_with_the_form_and_the_same_words(app: Server, user: str, password: str) -> None:
    client = app.client()
    response = client.log_in(user, password)
    assert response.status == 401
    assert "User name or password is wrong." in response.body
    assert 'action="/login.php"' in response.body
    assert client.session()["user"] is None


def test_fields_that_are_arrays_are_wrong_credentials_not_an_error(app: Server) -> None:
    client = app.client()
    client.session()
    form = {"user[]": "demo", "password[]": PASSWORD, "csrf": client.csrf}
    assert client.request("POST", "/login.php", form).status == 401


def test_the_typed_name_comes_back_escaped(app: Server) -> None:
    body = app.client().log_in('"><script>alert(1)</script>').body
    assert "<script>alert" not in body
    assert "&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in body


@pytest.mark.parametrize("token", [None, "", "0" * 64, "other"])
def test_a_login_without_this_sessions_token_is_403(app: Server, token: str | None) -> None:
    client = app.client()
    client.session()
    if token == "other":
        token = app.client().session()["csrf"]
    form = {"user": "demo", "password": PASSWORD} | ({} if token is None else {"csrf": token})
    response = client.request("POST", "/login.php", form)
    assert response.status == 403
    assert "too old" in response.body
    assert client.session()["user"] is None


def test_a_login_form_posted_without_a_cookie_is_403(app: Server) -> None:
    token = app.client().session()["csrf"]
    response = app.client().request("POST", "/login.php", {"user": "demo", "password": PASSWORD, "csrf": token})
    assert response.status == 403


def test_a_session_id_chosen_by_somebody_else_is_never_used(app: Server) -> None:
    client = app.client()
    client.cookies["handoff"] = chosen = "attackerchosen0123456789ab"
    client.session()
    assert client.cookies["handoff"] != chosen


def test_a_session_id_known_before_the_login_is_worth_nothing_after_it(own_app: Server) -> None:
    client = own_app.client()
    client.session()
    known = client.cookies["handoff"]
    token = client.csrf
    client.log_in()
    assert client.cookies["handoff"] != known
    assert client.csrf != token
    assert [path.name for path in own_app.sessions.iterdir()] == ["sess_" + client.cookies["handoff"]]
    attacker = Client(own_app.port, {"handoff": known}, token)
    assert attacker.get("/stream.php?prompt=hello").status == 401
    assert attacker.session()["user"] is None


def test_an_unknown_name_takes_as_long_as_a_wrong_password(own_app: Server) -> None:
    own_app.write_config(password_hash=password_hash(cost=11))
    client = own_app.client()
    client.session()

    def computed(user: str) -> float:
        before = own_app.cpu_seconds()
        for _ in range(3):
            form = {"user": user, "password": "wrong", "csrf": client.csrf}
            assert client.request("POST", "/login.php", form).status == 401
        return own_app.cpu_seconds() - before

    assert computed("nobody") > computed("demo") / 2


@pytest.mark.parametrize("change", [{"password_hash": password_hash(cost=5)}, {"user": "somebody"}])
def test_changing_the_user_or_the_password_ends_every_session(own_app: Server, change: dict[str, str]) -> None:
    client = own_app.logged_in()
    own_app.write_config(**change)
    assert client.get("/stream.php?prompt=hello").status == 401
    assert client.session()["user"] is None


def test_logging_out_ends_the_session_on_both_sides(own_app: Server) -> None:
    client = own_app.logged_in()
    before = dict(client.cookies)
    response = client.request("POST", "/logout.php", {"csrf": client.csrf})
    assert (response.status, response.header("Location")) == (303, "/")
    cookies = [value for name, value in response.headers if name.lower() == "set-cookie"]
    assert any("handoff=deleted" in cookie and "Max-Age=0" in cookie for cookie in cookies), cookies
    assert list(own_app.sessions.iterdir()) == []
    assert Client(own_app.port, before).get("/stream.php?prompt=hello").status == 401


def test_logging_out_needs_the_token(app: Server) -> None:
    client = app.logged_in()
    response = client.request("POST", "/logout.php", {"csrf": "0" * 64})
    assert response.status == 403
    assert "text/html" in (response.header("Content-Type") or "")
    assert client.session()["user"] == "demo"


def cookie_attributes(client: Client) -> tuple[str, set[str]]:
    cookie = client.get("/session.php").header("Set-Cookie")
    assert cookie is not None
    name, *attributes = cookie.split("; ")
    return name.partition("=")[0], {attribute.lower() for attribute in attributes}


def test_the_cookie_is_httponly_and_samesite_strict(app: Server) -> None:
    assert cookie_attributes(app.client()) == ("handoff", {"path=/", "httponly", "samesite=strict"})


def test_behind_tls_the_cookie_is_secure_and_bound_to_the_host(start_server: StartServer) -> None:
    server = start_server(prepend="$_SERVER['HTTPS'] = 'on';")
    expected = ("__Host-handoff", {"path=/", "secure", "httponly", "samesite=strict"})
    assert cookie_attributes(server.client()) == expected
    assert server.logged_in().get("/stream.php?prompt=hello").handoff["user"] == "demo"


def test_https_off_is_not_https(start_server: StartServer) -> None:
    server = start_server(prepend="$_SERVER['HTTPS'] = 'off';")
    assert cookie_attributes(server.client())[0] == "handoff"


def test_a_header_from_the_client_cannot_claim_tls(app: Server) -> None:
    cookie = app.client().get("/session.php", HTTPS="on", X_Forwarded_Proto="https").header("Set-Cookie")
    assert cookie is not None
    assert cookie.startswith("handoff=")


def test_a_link_from_another_site_does_not_sign_the_user_out(app: Server) -> None:
    # The browser keeps the Strict cookie back, so PHP sees a stranger; a new session would overwrite the user's.
    response = app.client().get("/", Sec_Fetch_Site="cross-site")
    assert response.header("Set-Cookie") is None
    assert response.header("Refresh") == "0; url=/"
    assert 'action="/login.php"' in app.client().get("/", Sec_Fetch_Site="same-origin").body


def test_a_session_that_another_application_wrote_is_not_a_login(own_app: Server) -> None:
    client = own_app.client()
    client.session()
    (path,) = own_app.sessions.iterdir()
    path.write_text('login|a:1:{i:0;s:1:"x";}csrf|b:1;user|s:4:"demo";')
    assert client.get("/stream.php?prompt=hello").status == 401
    assert client.session()["user"] is None
    assert re.fullmatch("[0-9a-f]{64}", client.csrf)
