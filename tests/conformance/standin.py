"""A stand-in for an OpenAI-compatible server, for daemons that have a backend.

It answers POST …/chat/completions with the words of the last message, at the pace of the request's "demo", as a daemon
with the vocabulary would do itself (README.md). "backend_does" makes it misbehave: "abort after N" breaks the
connection after N words, "finish REASON" ends with that reason, "status N" answers with that status instead.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from exchange import echo


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


class _Handler(BaseHTTPRequestHandler):
    # One request per connection: what is kept for the next one would look like a descriptor that was forgotten.
    protocol_version = "HTTP/1.0"
    wbufsize = 0

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the cases say what went wrong."""

    def do_POST(self) -> None:
        try:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except OSError:  # the daemon has lost its client, and says so by hanging up
            self.close_connection = True

    def _answer(self, body: dict[str, Any]) -> None:
        does, _, number = body.get("backend_does", "finish stop").rpartition(" ")
        if does == "status":
            text = json.dumps({"error": {"message": "no", "type": "test"}}).encode()
            self.send_response(int(number))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        demo = body.get("demo") or {}
        pieces = echo({"prompt": body["messages"][-1]["content"], "demo": demo})
        if does == "abort after":
            pieces = pieces[: int(number)]
        for piece in pieces:
            self._event({"delta": {"content": piece}, "finish_reason": None})
            time.sleep(1 / demo.get("tokens_per_second", 10000))
        if does != "abort after":
            self._event({"delta": {}, "finish_reason": number})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice: dict[str, Any]) -> None:
        chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]}
        event = b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
        # In parts that end within characters and within escapes; long ones only once, or they would be very many.
        step = 7 if len(event) < 300 else len(event) // 2 + 1
        for start in range(0, len(event), step):
            self.wfile.write(event[start : start + step])


class StandIn:
    """Serves until ``close``; ``port`` 0: any."""

    def __init__(self, port: int = 0) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
