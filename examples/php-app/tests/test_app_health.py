"""health.php: what a load balancer asks every few seconds, answered by the daemon and never by a backend."""

from __future__ import annotations

import pytest
from php_server import Server


def test_head_is_handed_off_without_a_login_and_without_a_question(own_app: Server) -> None:
    response = own_app.client().request("HEAD", "/health.php")
    assert response.handoff == {"request_id": "health"}
    assert response.header("Set-Cookie") is None
    assert list(own_app.sessions.iterdir()) == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_would_be_a_question_to_a_backend_is_405(app: Server, method: str) -> None:
    response = app.client().request(method, "/health.php")
    assert (response.status, response.error["type"]) == (405, "method_not_allowed")
    assert response.header("Allow") == "HEAD"


def test_a_host_in_maintenance_is_503_until_the_file_is_gone(own_app: Server) -> None:
    marker = own_app.config.with_name("maintenance")
    marker.touch()
    response = own_app.client().request("HEAD", "/health.php")
    assert (response.status, response.header("X-Socket-Handoff")) == (503, None)
    assert response.header("Retry-After") == "60"
    # It is asked all the time, and what is meant is no error: a rollout that drains by it judges by the error log.
    assert "out of service" not in own_app.log.read_text()
    # Who is there goes on being served: only the load balancer shall send no more.
    assert own_app.logged_in().ask({"prompt": "hello"}).handoff["prompt"] == "hello"
    marker.unlink()
    assert own_app.client().request("HEAD", "/health.php").status == 200


def test_an_unusable_configuration_is_no_health(own_app: Server) -> None:
    own_app.write_config(target="")
    assert own_app.client().request("HEAD", "/health.php").status == 500
