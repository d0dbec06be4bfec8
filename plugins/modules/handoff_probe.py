#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module handoff_probe: stream one real answer through a front door and check it to the last byte."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handoff_probe
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Stream one real answer through a front door and check it to the last byte
description:
  - Does what a user does. Logs in where told to, asks for a stream and reads it to its end.
  - Fails unless the status is 200, the type is C(text/event-stream), no handoff header is visible in any response,
    every event is valid, the last one is C([DONE]) and the connection is closed without a reset.
  - Uses the Python standard library only and runs where the task runs, that is on the host itself unless delegated.
options:
  url:
    description: Address of the front door, C(http://host[:port]) or C(https://host[:port]), without a path.
    type: str
    default: http://127.0.0.1
  server_name:
    description: With C(https), the name that the certificate has to be for, and that is asked for, where O(url) does
      not carry it.
    type: str
  ca_file:
    description: With C(https), a file of certificates to trust, in place of the host's own.
    type: path
  validate_certs:
    description: With C(https), whether the certificate has to be good. Without, anybody in between can pass for the
      front door.
    type: bool
    default: true
  host_header:
    description: Value of the C(Host) header, when the virtual host has a name that O(url) does not carry.
    type: str
  stream_path:
    description: Path of the endpoint that hands off.
    type: str
    default: /stream.php
  method:
    description:
      - V(POST) sends the prompt as JSON with the CSRF token, as the page does with C(fetch()).
      - V(GET) sends it in the query, as C(EventSource) does.
    type: str
    choices: [GET, POST]
    default: POST
  user:
    description: User to log in as, by C(/session.php) and C(/login.php). Without it no login is tried.
    type: str
  password:
    description: Password of O(user).
    type: str
  prompt:
    description: What to ask.
    type: str
    default: Are you there?
  tokens:
    description: Ask the demo backend for an answer of this many tokens. Other backends ignore it.
    type: int
  pace:
    description: Ask the demo backend for this many tokens a second. Other backends ignore it.
    type: float
  minimum_events:
    description: Fail when fewer events arrive.
    type: int
    default: 1
  expect:
    description: A regular expression that the text of the answer has to contain somewhere.
    type: str
  maximum_first_event:
    description: Seconds from the request to the first event, at most. 0 permits any.
    type: float
    default: 0
  maximum_gap:
    description: Seconds between two events, or the last and the final C([DONE]), at most. 0 permits any.
    type: float
    default: 0
  timeout:
    description: Seconds for everything together.
    type: float
    default: 60
attributes:
  check_mode:
    description: A probe changes nothing, but it asks a backend that may cost money, so check mode skips it.
    support: full
  diff_mode:
    description: Nothing changes.
    support: none
"""

EXAMPLES = r"""
- name: Stream through the front door of this host
  socket_handoff.fleet.handoff_probe:
    url: http://127.0.0.1:80
    host_header: chat.example.com
    user: demo
    password: "{{ handoff_app_password }}"
    tokens: 20
  register: probe

- name: Show how fast it was
  ansible.builtin.debug:
    msg: "{{ probe.events }} events, first one after {{ probe.time_to_first_event }} s"
"""

RETURN = r"""
status:
  description: HTTP status of the stream.
  type: int
  returned: success
events:
  description: Events with content, the final C([DONE]) not counted.
  type: int
  returned: always
bytes:
  description: Bytes of the body.
  type: int
  returned: always
time_to_first_event:
  description: Seconds from sending the request to the first event with content.
  type: float
  returned: success
longest_gap:
  description: Seconds, the longest time between two pieces that brought events, or the final C([DONE]).
  type: float
  returned: success
duration:
  description: Seconds from sending the request to the end of the stream.
  type: float
  returned: success
text:
  description: The first 200 characters of the answer.
  type: str
  returned: success
"""

import http.client
import json
import re
import ssl
import time
from urllib.parse import quote, urlencode, urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.socket_handoff.fleet.plugins.module_utils.event_stream import AnswerReader, BadStream

FORBIDDEN = ("x-socket-handoff", "x-handoff-data", "x-handoff-data-from")

ADVICE = {
    401: "The login did not take: does handoff_app_password match what the role installed?",
    403: "Refused: Apache's error log names the target and what is missing, SocketHandoffTarget or SocketHandoffAllow.",
    404: "No such page: is the virtual host enabled, and does another one answer for this name? See apache2ctl -S.",
    500: "See Apache's error log.",
    503: "The daemon could not be reached: systemctl status streaming-daemon.socket streaming-daemon.service.",
}


class ProbeFailed(Exception):
    """The front door does not stream; the text says what was seen and where to look."""


class FrontDoor:
    """One browser, so to speak: cookies, a deadline, and a sharp eye on headers."""

    def __init__(self, module):
        parts = urlsplit(module.params["url"])
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ProbeFailed(
                f"url is {module.params['url']!r}; allowed is http://host[:port] or https://host[:port] without a "
                "path, "
                "for example http://127.0.0.1:8080. Apache hands off from plain HTTP connections only; https is for a "
                "load "
                "balancer in front of it."
            )
        try:
            self.address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        except ValueError as error:
            raise ProbeFailed(f"url is {module.params['url']!r}: {error}") from error
        self.tls = tls_context(module.params) if parts.scheme == "https" else None
        self.server_name = module.params["server_name"] or parts.hostname
        self.host = module.params["host_header"] or parts.netloc
        self.deadline = time.monotonic() + module.params["timeout"]
        self.timeout = module.params["timeout"]
        self.cookies = {}
        self.socket = None

    def remaining(self):
        """Return the seconds left; raise when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise ProbeFailed(f"not finished after {self.timeout:g} s")
        return left

    def ask(self, method, path, body=None, headers=None):
        """Send one request on a fresh connection; return (connection, response)."""
        connection = http.client.HTTPConnection(*self.address, timeout=self.remaining())
        sent = {"Host": self.host, "Accept": "text/event-stream, application/json, text/html", **(headers or {})}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            connection.connect()
            if self.tls is not None:
                connection.sock = self.tls.wrap_socket(connection.sock, server_hostname=self.server_name)
            # http.client forgets its socket once it knows that the answer ends with the connection; deadlines need it.
            self.socket = connection.sock
            connection.request(method, path, body=body, headers=sent)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ProbeFailed(
                f"{method} {path} at {self.address[0]}:{self.address[1]}: {error or type(error).__name__}. "
                "Is Apache running? See systemctl status apache2 and Apache's error log."
            ) from error
        for name, value in response.getheaders():
            if name.lower() in FORBIDDEN:
                connection.close()
                raise ProbeFailed(
                    f"{method} {path} answered {response.status} and shows the client the header {name}: "
                    f"{value[:120]!r}. mod_socket_handoff is not in this virtual host's way: "
                    "is it loaded and SocketHandoffEnabled On?"
                )
            if name.lower() == "set-cookie":
                key, separator, rest = value.partition("=")
                if separator:
                    self.cookies[key.strip()] = rest.partition(";")[0]
        return connection, response

    def page(self, method, path, expected, body=None, headers=None):
        """Send one request for an ordinary page; return its body."""
        connection, response = self.ask(method, path, body, headers)
        try:
            content = response.read(65536)
        except (OSError, http.client.HTTPException) as error:
            raise ProbeFailed(f"{method} {path}: the answer broke off: {error}") from error
        finally:
            connection.close()
        if response.status != expected:
            raise ProbeFailed(unexpected(method, path, response.status, expected, content))
        return content

    def session(self):
        """Return who is logged in and the token for POST requests."""
        content = self.page("GET", "/session.php", 200)
        try:
            session = json.loads(content)
            return session["user"], session["csrf"]
        except (ValueError, TypeError, KeyError) as error:
            raise ProbeFailed(f"GET /session.php did not answer with user and csrf: {content[:200]!r}") from error

    def log_in(self, user, password):
        """Log in as the page's form does; return the token for POST requests."""
        token = self.session()[1]
        form = urlencode({"user": user, "password": password, "csrf": token})
        self.page("POST", "/login.php", 303, form, {"Content-Type": "application/x-www-form-urlencoded"})
        found, token = self.session()
        if found != user:
            raise ProbeFailed(f"logged in as {user!r}, but /session.php says {found!r}. Are session cookies kept?")
        return token


def tls_context(params):
    """Return what a connection to the front door has to satisfy."""
    try:
        context = ssl.create_default_context(cafile=params["ca_file"])
    except (OSError, ssl.SSLError) as error:
        raise ProbeFailed(
            f"ca_file is {params['ca_file']!r} ({error}); allowed is a PEM file of certificates on the host that probes"
        ) from error
    if not params["validate_certs"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def unexpected(method, path, status, expected, content):
    """Return the message for a status that was not expected."""
    advice = ADVICE.get(status, "See Apache's error log and journalctl -u streaming-daemon.")
    answer = content[:400].decode(errors="replace")
    return f"{method} {path} answered {status}, expected {expected}. {advice} The answer was: {answer!r}"


def read_stream(door, response, reader, started):
    """Read the stream to its end; return seconds to the first event, and the longest between two, the last included."""
    first, latest, gap = None, started, 0.0
    while True:
        door.socket.settimeout(door.remaining())
        try:
            chunk = response.read1(65536)
        except TimeoutError:
            raise ProbeFailed(
                f"silence: not finished after {door.timeout:g} s, {reader.events} events so far"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ProbeFailed(
                f"the connection broke after {reader.events} events, {reader.bytes} bytes: {error}"
            ) from error
        if not chunk:
            reader.finish()
            return first, gap
        events, done = reader.events, reader.done
        reader.feed(chunk)
        # A user who waits for the end waits as for any other word.
        if reader.events > events or (events and reader.done and not done):
            moment = time.monotonic()
            if first is None:
                first = moment - started
            else:
                gap = max(gap, moment - latest)
            latest = moment
        door.remaining()


def judge(params, reader, first, gap):
    """Raise ProbeFailed where a complete answer is not the one that was asked for, or not in time."""
    if params["expect"] and not re.search(params["expect"], reader.text):
        raise ProbeFailed(
            f"the answer does not contain what expect says, {params['expect']!r}. It begins: {reader.text[:200]!r}"
        )
    for name, found in (("maximum_first_event", first or 0.0), ("maximum_gap", gap)):
        if 0 < params[name] < found:
            what = "the first event came after" if name == "maximum_first_event" else "between two events were"
            raise ProbeFailed(f"too slow: {what} {found:.3f} s, and {name} permits {params[name]:g} s")


def probe(params, door, reader):
    """Do what a user does; return the facts."""
    token = door.log_in(params["user"], params["password"]) if params["user"] else None
    question = {"prompt": params["prompt"]}
    question.update({name: params[name] for name in ("tokens", "pace") if params[name] is not None})
    path, body, headers = params["stream_path"], None, {}
    if params["method"] == "POST":
        body = json.dumps(question)
        headers = {"Content-Type": "application/json"}
        if token:
            headers["X-CSRF-Token"] = token
    else:
        path += "?" + urlencode(question, quote_via=quote)
    started = time.monotonic()
    connection, response = door.ask(params["method"], path, body, headers)
    try:
        if response.status != 200:
            raise ProbeFailed(
                unexpected(params["method"], params["stream_path"], response.status, 200, response.read(65536))
            )
        kind = response.getheader("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "text/event-stream":
            raise ProbeFailed(
                f"the answer's Content-Type is {kind!r}, expected text/event-stream. "
                "Did the daemon answer, or the application?"
            )
        first, gap = read_stream(door, response, reader, started)
    except OSError as error:
        raise ProbeFailed(f"the connection broke: {error}") from error
    finally:
        response.close()
        connection.close()
    if reader.events < params["minimum_events"]:
        raise ProbeFailed(f"{reader.events} events arrived, expected at least {params['minimum_events']}")
    judge(params, reader, first, gap)
    return {
        "status": response.status,
        "longest_gap": round(gap, 4),
        "time_to_first_event": None if first is None else round(first, 4),
        "duration": round(time.monotonic() - started, 4),
        "text": reader.text[:200],
    }


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1"},
            "host_header": {"type": "str"},
            "stream_path": {"type": "str", "default": "/stream.php"},
            "method": {"type": "str", "choices": ["GET", "POST"], "default": "POST"},
            "user": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "prompt": {"type": "str", "default": "Are you there?"},
            "tokens": {"type": "int"},
            "pace": {"type": "float"},
            "minimum_events": {"type": "int", "default": 1},
            "server_name": {"type": "str"},
            "ca_file": {"type": "path"},
            "validate_certs": {"type": "bool", "default": True},
            "expect": {"type": "str"},
            "maximum_first_event": {"type": "float", "default": 0},
            "maximum_gap": {"type": "float", "default": 0},
            "timeout": {"type": "float", "default": 60},
        },
        required_together=[("user", "password")],
        supports_check_mode=True,
    )
    reader = AnswerReader()
    try:
        re.compile(module.params["expect"] or "")
    except re.error as error:
        module.fail_json(
            msg=f"handoff_probe: expect is {module.params['expect']!r} ({error}); allowed is a regular expression of "
            "Python's"
        )
    if module.check_mode:
        module.exit_json(
            skipped=True, msg="A probe asks the backend for a real answer; check mode does not.", events=0, bytes=0
        )
    try:
        facts = probe(module.params, FrontDoor(module), reader)
    except (ProbeFailed, BadStream) as failure:
        module.fail_json(msg=f"handoff_probe: {failure}", events=reader.events, bytes=reader.bytes)
    module.exit_json(changed=False, events=reader.events, bytes=reader.bytes, **facts)


if __name__ == "__main__":
    main()
