"""An OpenAI-compatible server in miniature that remembers what it was asked.

It streams what such servers really send: a role without text, text with escapes and characters of four bytes, the calls
of a tool, the reason for the end, and at last the usage, without a choice. A question "status-N" is refused so.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXTS = ["", "A wide", ' one, "30 mm"\n', "at least 🚲 日本語"]
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}


@dataclass(slots=True)
class OpenAIServer:
    """``asked``: the bodies of the requests, the last one last."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def chunks(self, model: str, tools: bool) -> Iterator[dict[str, Any]]:
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": model}
        deltas: list[dict[str, Any]] = [{"content": text} for text in TEXTS]
        deltas[0]["role"] = "assistant"
        deltas += [{"tool_calls": [CALL]}] if tools else []
        for delta in deltas:
            yield base | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
        yield base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if tools else "stop"}]}
        yield base | {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}}

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        one = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                one.asked.append(body)
                question = body["messages"][-1]["content"]
                if isinstance(question, str) and question.startswith("status-"):
                    self.refuse(int(question.removeprefix("status-")))
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for chunk in one.chunks(body["model"], "tools" in body):
                    self.piece(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
                self.piece(b"data: [DONE]\n\n")
                self.piece(b"")

            def piece(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

            def refuse(self, status: int) -> None:
                body = json.dumps({"error": {"message": "no", "type": "test", "param": None, "code": None}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Retry-After", "3")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: the tests say what went wrong."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}/v1"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()
