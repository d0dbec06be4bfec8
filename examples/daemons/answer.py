#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""A program for handoff_exec: it prints a response and is done. Its standard output is the client.

No socket, no loop, no deadline: all that is handoff_exec's. The data is on descriptor 3, and has the form
{"prompt": "…", "demo": {"tokens": n, "tokens_per_second": r}}: that many words of the prompt, at that pace.
"""

import json
import os
import re
import signal
import sys
import time


def head(status: str, kind: str, more: str) -> None:
    sys.stdout.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n")


def refuse(message: str) -> None:
    body = json.dumps({"error": {"type": "bad_request", "message": message}})
    head("400 Bad Request", "application/json", f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n")
    if wants_body:
        sys.stdout.write(body)
    sys.exit()


def refuse_constant(constant: str) -> None:
    raise ValueError


def of(kind: type | tuple[type, ...], value: object, low: float, high: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a client that has left ends this program
sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")
wants_body = os.environ.get("REQUEST_METHOD") != "HEAD"
with open(3, "rb") as source:
    data = source.read().strip(b"\0 \t\r\n")
try:
    asked = json.loads(data.decode(), parse_constant=refuse_constant) if data else {}
except (ValueError, RecursionError):
    asked = None
if not isinstance(asked, dict):
    refuse("the data must be a JSON object in UTF-8")
prompt, demo = asked.get("prompt"), asked.get("demo")
if not isinstance(prompt, str | None):
    refuse("prompt must be a string")
if not isinstance(demo, dict | None):
    refuse("demo must be an object")
words = re.findall(r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+$", prompt or "Hello from a daemon of one file.")
demo = {"tokens": len(words), "tokens_per_second": 20, **{k: v for k, v in (demo or {}).items() if v is not None}}
if not of(int, demo["tokens"], 1, 100_000):
    refuse("demo.tokens must be an integer from 1 to 100000")
if not of((int, float), demo["tokens_per_second"], 0.1, 10_000):
    refuse("demo.tokens_per_second must be a number from 0.1 to 10000")

head("200 OK", "text/event-stream; charset=utf-8", "X-Accel-Buffering: no\r\n" + os.environ["HANDOFF_RESPONSE_HEADERS"])
if wants_body:
    for index in range(demo["tokens"]):
        content = json.dumps({"content": words[index % len(words)]}, ensure_ascii=False, separators=(",", ":"))
        sys.stdout.write(f"data: {content}\n\n")
        sys.stdout.flush()
        # The pace that was asked for; what a real program computes takes its own time.
        time.sleep(1 / demo["tokens_per_second"])
    sys.stdout.write("data: [DONE]\n\n")
