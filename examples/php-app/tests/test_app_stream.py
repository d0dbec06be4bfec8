"""stream.php: every answer it can give, and the bytes it gives to the daemon."""

from __future__ import annotations

import json
import re
import socket
import urllib.parse

import pytest
from php_server import Client, Server, StartServer

LINE_MAX = 6000  # of the whole header line; see handoff.php
BODY_MAX = 4194304  # of a request; see stream.php
AWKWARD = {
    "all of latin-1": "".join(map(chr, range(256))),
    "header injection": 'x\r\nX-Socket-Handoff: /run/other.sock\r\n\r\n<b>"\\',
    "beyond the first plane": "naïve 日本語 🎉\u2028\u2029\ufeff\U0010ffff",
    "nothing but DEL": "\x7f",
    "what looks escaped": r"\u007f \n \" \\",
    "white space around": "  question \n",
}


@pytest.fixture(scope="module")
def user(app: Server) -> Client:
    return app.logged_in()


# Who and from where ---------------------------------------------------------------------------------------------------


def test_post_hands_off_with_the_question_and_the_user(user: Client) -> None:
    data = user.ask({"prompt": "hello"}).handoff
    assert re.fullmatch("[0-9a-f]{16}", data.pop("request_id"))
    assert data == {"prompt": "hello", "user": "demo"}


def test_get_hands_off_for_eventsource(user: Client) -> None:
    assert user.get("/stream.php?prompt=hello+world", Sec_Fetch_Site="same-origin").handoff["prompt"] == "hello world"


def test_json_hands_off(user: Client) -> None:
    assert user.ask_json({"prompt": "hello"}).handoff["prompt"] == "hello"
    charset = user.ask('{"prompt": "hello"}', Content_Type="application/json; charset=utf-8")
    assert charset.handoff["prompt"] == "hello"


def test_a_handoff_sets_the_two_headers_and_nothing_else_of_its_own(user: Client) -> None:
    names = {name.lower() for name, _ in user.ask({"prompt": "hello"}).headers}
    assert {"x-socket-handoff", "x-handoff-data"} <= names
    # What is left is the built-in server's and PHP's default type; the daemon sends the response's real headers.
    assert names - {"x-socket-handoff", "x-handoff-data"} <= {"host", "date", "connection", "content-type"}


def test_what_the_client_claims_about_itself_is_not_passed_on(user: Client) -> None:
    data = user.ask_json({"prompt": "hello", "user": "root", "request_id": "mine", "demo": {"tokens": 9}}).handoff
    assert data["user"] == "demo"
    assert data["request_id"] != "mine"
    assert "demo" not in data


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nobody_is_401_and_gets_no_session(own_app: Server, method: str) -> None:
    response = own_app.client().request(method, "/stream.php?prompt=hello")
    assert (response.status, response.error["type"]) == (401, "not_logged_in")
    assert response.header("Set-Cookie") is None
    assert list(own_app.sessions.iterdir()) == []


def test_a_session_without_login_is_401_even_with_its_token(app: Server) -> None:
    client = app.client()
    client.session()
    assert client.ask({"prompt": "hello"}).status == 401


def test_an_expired_session_is_401(own_app: Server) -> None:
    client = own_app.logged_in()
    for path in own_app.sessions.iterdir():
        path.unlink()
    response = client.ask({"prompt": "hello"})
    assert (response.status, response.error["type"]) == (401, "not_logged_in")


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_post_with_a_wrong_token_is_403(user: Client, token: str) -> None:
    response = user.ask({"prompt": "hello"}, X_CSRF_Token=token)
    assert (response.status, response.error["type"]) == (403, "csrf")


def test_post_without_the_header_is_403_even_with_the_token_in_the_form(user: Client) -> None:
    response = user.request("POST", "/stream.php", {"prompt": "hello", "csrf": user.csrf})
    assert (response.status, response.error["type"]) == (403, "csrf")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "", "Same-Origin"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_from_anywhere_but_our_own_pages_is_403(user: Client, method: str, site: str) -> None:
    headers = {"Sec-Fetch-Site": site, "X-CSRF-Token": user.csrf}
    response = user.request(method, "/stream.php?prompt=hello", None, headers)
    assert (response.status, response.error["type"]) == (403, "cross_site")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_405_and_name_the_right_ones(user: Client, method: str) -> None:
    response = user.request(method, "/stream.php?prompt=hello")
    assert (response.status, response.header("Allow")) == (405, "GET, HEAD, POST")
    assert response.header("X-Socket-Handoff") is None
    assert response.error["type"] == "method_not_allowed"


def test_head_hands_off_as_get_does(user: Client) -> None:
    response = user.request("HEAD", "/stream.php?prompt=hello", None, {"Sec-Fetch-Site": "same-origin"})
    assert response.handoff["prompt"] == "hello"
    assert user.request("HEAD", "/stream.php").status == 422


# What is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "prompt=", "prompt=%20%0A%09", "prompt[]=hello", "Prompt=hello", "=", "prompt"])
def test_a_question_that_is_not_there_is_422(user: Client, form: str) -> None:
    for response in (
        user.get(f"/stream.php?{form}"),
        user.ask(form, Content_Type="application/x-www-form-urlencoded"),
    ):
        assert (response.status, response.error["type"]) == (422, "prompt_missing")


@pytest.mark.parametrize("value", [{}, [], {"prompt": None}, {"prompt": 7}, {"prompt": ["a"]}, ["prompt"]])
def test_json_without_a_question_is_422(user: Client, value: object) -> None:
    response = user.ask_json(value)
    assert (response.status, response.error["type"]) == (422, "prompt_missing")


@pytest.mark.parametrize("body", ["", "{", "null", '"prompt"', "7", '{"prompt": "\xff"}', "[" * 9 + "]" * 9])
def test_a_body_that_is_no_json_object_is_422(user: Client, body: str) -> None:
    response = user.ask(body.encode("latin-1"), Content_Type="application/json")
    assert (response.status, response.error["type"]) == (422, "invalid_json")


def test_a_body_of_another_type_has_no_question(user: Client) -> None:
    response = user.ask('{"prompt": "hello"}', Content_Type="text/plain")
    assert (response.status, response.error["type"]) == (422, "prompt_missing")


@pytest.mark.parametrize("raw", ["%ff", "a%c3", "%ed%a0%80"])
def test_a_question_that_is_not_utf8_is_422(user: Client, raw: str) -> None:
    response = user.get(f"/stream.php?prompt={raw}")
    assert (response.status, response.error["type"]) == (422, "prompt_not_utf8")


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", value) for value in ("0", "100001", "-1", "1.5", "x", "", "1e3", "0x10")]
    + [("pace", value) for value in ("0", "0.09", "10001", "x", "", "nan", "inf", "-1")],
)
def test_a_number_out_of_range_is_422_and_names_the_range(user: Client, field: str, value: str) -> None:
    response = user.ask({"prompt": "hello", field: value})
    assert (response.status, response.error["type"]) == (422, f"{field}_invalid")
    assert "from 1 to 100000" in response.error["message"] or "from 0.1 to 10000" in response.error["message"]


@pytest.mark.parametrize("value", [True, False, [5], {"a": 5}])
def test_json_that_is_no_number_is_422(user: Client, value: object) -> None:
    for field in ("tokens", "pace"):
        assert user.ask_json({"prompt": "hello", field: value}).error["type"] == f"{field}_invalid"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"tokens": "1"}, {"tokens": 1}),
        ({"tokens": 100000, "pace": 10000}, {"tokens": 100000, "tokens_per_second": 10000.0}),
        ({"pace": "0.1"}, {"tokens_per_second": 0.1}),
        ({"tokens": None, "pace": 20.5}, {"tokens_per_second": 20.5}),
    ],
)
def test_numbers_shape_the_demo_answer(user: Client, sent: dict[str, object], expected: dict[str, object]) -> None:
    demo = user.ask_json({"prompt": "hello"} | sent).handoff["demo"]
    assert demo == expected
    assert {name: type(value) for name, value in demo.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_numbers_work_in_the_address_too(user: Client) -> None:
    demo = user.get("/stream.php?prompt=hello&tokens=7&pace=3").handoff["demo"]
    assert demo == {"tokens": 7, "tokens_per_second": 3.0}


# The bytes of the header ----------------------------------------------------------------------------------------------


def raw_answer(client: Client, prompt: str) -> bytes:
    body = urllib.parse.urlencode({"prompt": prompt})
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(
            f"POST /stream.php HTTP/1.0\r\nHost: x\r\nCookie: handoff={client.cookies['handoff']}\r\n"
            f"X-CSRF-Token: {client.csrf}\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("prompt", AWKWARD.values(), ids=AWKWARD)
def test_whatever_is_typed_the_header_is_legal_and_says_exactly_that(user: Client, prompt: str) -> None:
    head, _, body = raw_answer(user, prompt).partition(b"\r\n\r\n")
    assert body == b""
    lines = [line for line in head.split(b"\r\n") if line.lower().startswith(b"x-")]
    assert [line.partition(b":")[0] for line in lines] == [b"X-Socket-Handoff", b"X-Handoff-Data"]
    value = lines[1].partition(b": ")[2]
    assert re.fullmatch(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", value), value
    assert json.loads(value)["prompt"] == prompt


@pytest.mark.parametrize(("character", "bytes_each"), [("a", 1), ('"', 2), ("é", 6), ("🎉", 12)])
def test_what_is_too_long_for_the_header_is_the_body(user: Client, character: str, bytes_each: int) -> None:
    empty = len("X-Handoff-Data: ") + len(json.dumps(user.ask_json({"prompt": "a"}).handoff, separators=(",", ":"))) - 1
    fitting, rest = divmod(LINE_MAX - empty, bytes_each)
    prompt = "a" * rest + character * fitting
    value = user.ask_json({"prompt": prompt}).header("X-Handoff-Data")
    assert value is not None
    assert len("X-Handoff-Data: ") + len(value) == LINE_MAX
    response = user.ask_json({"prompt": prompt + "a"})
    assert (response.header("X-Handoff-Data"), response.header("X-Handoff-Data-From")) == (None, "response-body")
    assert response.handoff["prompt"] == prompt + "a"


@pytest.mark.parametrize("prompt", AWKWARD.values(), ids=AWKWARD)
def test_whatever_is_typed_the_body_says_exactly_that(user: Client, prompt: str) -> None:
    response = user.ask_json({"prompt": prompt * 1000})
    assert response.header("X-Handoff-Data-From") == "response-body"
    assert response.handoff["prompt"] == prompt * 1000


@pytest.mark.parametrize("size", [100_000, 1_000_000, 4_000_000])
@pytest.mark.parametrize("form", ["json", "form"])
def test_a_question_of_a_megabyte_is_handed_off_whole(user: Client, size: int, form: str) -> None:
    prompt = ("where " * (size // 6 + 1))[:size].strip()
    response = user.ask_json({"prompt": prompt}) if form == "json" else user.ask({"prompt": prompt})
    assert response.handoff["prompt"] == prompt


def test_what_was_printed_before_is_no_part_of_the_body(start_server: StartServer) -> None:
    noise = "ob_start(); echo 'garbage'; ini_set('zlib.output_compression', '1');"
    server = start_server(prepend=f"if ($_SERVER['SCRIPT_NAME'] === '/stream.php') {{ {noise} }}")
    response = server.logged_in().ask({"prompt": "a" * 10_000}, Accept_Encoding="gzip")
    assert response.handoff["prompt"] == "a" * 10_000


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_body_that_is_too_long_is_422_before_it_is_parsed(user: Client, kind: str) -> None:
    response = user.ask("prompt=" + "a" * BODY_MAX, Content_Type=kind)
    assert (response.status, response.error["type"]) == (422, "prompt_too_long")
    assert str(BODY_MAX) in response.error["message"]


def test_data_beyond_what_apache_takes_is_422(user: Client) -> None:
    response = user.ask(b"prompt=" + b"x" + b"\x01" * 2_000_000, Content_Type="application/x-www-form-urlencoded")
    assert (response.status, response.error["type"]) == (422, "prompt_too_long")
    assert "8388608" in response.error["message"]


# What the script leaves behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hello", ""])
def test_the_session_is_closed_and_warnings_are_not_shown(start_server: StartServer, prompt: str) -> None:
    # 1 is PHP_SESSION_NONE: the lock was released by the script, not by PHP's own clearing up afterwards.
    report = "header('X-Test: ' . session_status() . ini_get('display_errors'))"
    server = start_server(prepend=f"register_shutdown_function(static fn () => {report});")
    assert server.logged_in().ask({"prompt": prompt}).header("X-Test") == "10"
