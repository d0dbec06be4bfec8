#!/usr/bin/env python3
"""Users of a fleet that never stop asking, and a ledger of what each of them got.

Theory of operation. It knows the front door and nothing else: no inventory, no Ansible, no host behind the load
balancer but by the cookie that the balancer itself sets. Each user logs in, opens a stream, reads it to its end, and
begins again. A user whose host was drained is sent to another, where it has no session: it logs in again, as a browser
would, and that is no loss. Everything else that is not a whole answer is one:

    whole       all events, the last one [DONE], the body ended as HTTP says
    truncated   it began, and did not come to its end
    refused     no answer, or a status that is neither 200 nor a login's
    wrong       it came to its end, and is not what was asked for
    late        it was whole, and stood still for LATE seconds

One line of JSON per stream on standard output, when it ends: host, outcome, events, the longest time between two of
them, what went wrong. SIGTERM lets the streams that run come to their end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

TIMEOUT = 60.0
# A second is nothing on a machine that compiles beside it; nobody waits ten for the next word.
LATE = 10.0
# How often in a row a user who has just logged in may hear that it has not.
AGAIN = 5
STICKY = "__Host-handoff-host"
# Streams that one browser asks for.
STAYS = 2


class User(threading.Thread):
    """One browser. What it learns goes to the ledger."""

    def __init__(self, number: int, options: argparse.Namespace, stop: threading.Event, lock: threading.Lock) -> None:
        super().__init__(name=f"user-{number}")
        self.options, self.stop, self.lock = options, stop, lock
        self.cookies: dict[str, str] = {}
        self.csrf = ""

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[http.client.HTTPConnection, Any]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection(self.options.address, timeout=TIMEOUT)
        if not self.options.plain:
            # A certificate that the scenario has made for itself.
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(self.options.address, timeout=TIMEOUT, context=context)
        headers = {"Host": self.options.host, "Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items())}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
        except BaseException:  # whatever it is, it goes on, without leaving a connection open
            connection.close()
            raise
        for name, value in response.getheaders():
            if name.lower() == "set-cookie":
                key, _, rest = value.partition("=")
                self.cookies[key.strip()] = rest.partition(";")[0]
        return connection, response

    def page(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection, response = self.ask(method, path, body)
        try:
            return response.status, response.read()
        finally:
            connection.close()

    def log_in(self) -> None:
        """As the page does it. Raises RuntimeError with the status that was in the way."""
        status, content = self.page("GET", "/session.php")
        if status != 200:
            raise RuntimeError(f"GET /session.php: {status}")
        form = {"user": "demo", "password": self.options.password, "csrf": json.loads(content)["csrf"]}
        status, _ = self.page("POST", "/login.php", urlencode(form))
        # 403: between the two requests the host was drained, and another one knows nothing of the token.
        if status not in (303, 403):
            raise RuntimeError(f"POST /login.php: {status}")

    def read(self, response: Any, line: dict[str, Any]) -> None:
        """Read one stream to its end."""
        latest, rest, last = time.monotonic(), b"", ""
        while piece := response.read1(65536):
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                if not block.startswith(b"data: "):
                    continue
                moment = time.monotonic()
                line["gap"], latest = max(line["gap"], moment - latest), moment
                last = block[6:].decode()
                if last != "[DONE]":
                    line["events"] += 1
                    if "content" not in json.loads(last):
                        line.update(outcome="wrong", said=last[:200])
        if last != "[DONE]":
            line.update(outcome="truncated", said=f"the last event is {last[:200]!r}")
        elif line["events"] != self.options.tokens and line["outcome"] == "whole":
            line.update(outcome="wrong", said=f"{line['events']} events of {self.options.tokens}")
        elif line["gap"] > LATE and line["outcome"] == "whole":
            line.update(outcome="late", said=f"{line['gap']:.1f} s between two events")

    def stream(self) -> dict[str, Any] | None:
        """Open one stream; None where the user had to log in first."""
        query = urlencode({"prompt": self.name, "tokens": self.options.tokens, "pace": self.options.pace})
        line: dict[str, Any] = {"began": time.time(), "outcome": "whole", "events": 0, "gap": 0.0, "said": ""}
        try:
            connection, response = self.ask("GET", f"/stream.php?{query}")
        except (OSError, http.client.HTTPException) as error:
            return {**line, "outcome": "refused", "said": repr(error), "host": self.cookies.get(STICKY, "")}
        line["host"] = self.cookies.get(STICKY, "")
        try:
            if response.status == 401:
                return None
            if response.status != 200:
                return {**line, "outcome": "refused", "said": f"{response.status} {response.read()[:200]!r}"}
            self.read(response, line)
        except (OSError, ValueError, http.client.HTTPException) as error:
            line.update(outcome="truncated", said=repr(error))
        finally:
            connection.close()
        return line

    def run(self) -> None:
        logged_in, streams, sent_away = False, 0, 0
        while not self.stop.is_set():
            if self.options.unless and self.options.unless.exists():
                self.stop.wait(0.1)
                continue
            line: dict[str, Any] | None
            try:
                if not logged_in:
                    self.log_in()
                line = self.stream()
                logged_in = line is not None
            except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as error:
                line, logged_in = {"began": time.time(), "outcome": "refused", "said": repr(error)}, False
                line.update(events=0, gap=0.0, host=self.cookies.get(STICKY, ""))
            sent_away = sent_away + 1 if line is None else 0
            if line is None and sent_away < AGAIN:
                continue
            if line is None:
                line = {"began": time.time(), "outcome": "refused", "said": f"no login holds, {AGAIN} times in a row"}
                line.update(events=0, gap=0.0, host=self.cookies.get(STICKY, ""))
            line.update(user=self.name, ended=time.time(), gap=round(line["gap"], 3))
            with self.lock:
                print(json.dumps(line), flush=True)
            streams += 1
            if streams % STAYS == 0:
                # Somebody new, whom the balancer sends to any host, also to one that has just come back.
                self.cookies, logged_in = {}, False
            if line["outcome"] == "refused":
                self.stop.wait(0.5)  # a user who is refused does not ask a thousand times a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("address")
    parser.add_argument("--plain", action="store_true", help="HTTP without TLS, where there is no load balancer")
    parser.add_argument("--unless", type=Path, help="open nothing new while this file is there: the host is drained")
    parser.add_argument("--host", default="chat.example.com")
    parser.add_argument("--password", required=True)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--pace", type=float, default=10.0)
    options = parser.parse_args()
    stop, lock = threading.Event(), threading.Lock()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    users = [User(number, options, stop, lock) for number in range(options.users)]
    for user in users:
        user.start()
    for user in users:
        while user.is_alive():
            user.join(0.2)  # a signal is handled between two joins
    sys.exit(0)


if __name__ == "__main__":
    main()
