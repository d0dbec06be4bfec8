"""A program's output is an answer, from inside the sandbox of the daemon's unit."""

from __future__ import annotations

import json
from urllib.parse import urlencode

from front_door import Connection, Session, assert_complete


def test_a_program_gets_the_handoff_data_and_its_output_is_the_answer(session: Session) -> None:
    request = session.request("GET", "/stream.php/program?" + urlencode({"prompt": "By a program? \U0001f600"}))
    said = json.loads(assert_complete(Connection(session.address, request).read_to_end(), 1))
    assert (said["prompt"], said["user"]) == ("By a program? \U0001f600", "demo")
