"""An OpenAI-compatible server in miniature, to be run on a test host: answers one model, for one key.

usage: openai_standin.py PORT SHA256-OF-THE-KEY
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if hashlib.sha256(key.encode()).hexdigest() != sys.argv[2]:
            self.refuse(401, "invalid_api_key")
        elif self.path != "/v1/chat/completions" or request.get("stream") is not True:
            self.refuse(404, "unknown_request")
        else:
            self.stream([request["model"], " was asked: ", request["messages"][-1]["content"], " \U0001f600"])

    def refuse(self, status: int, code: str) -> None:
        body = json.dumps({"error": {"message": code, "code": code}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, texts: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in texts:
            self.chunk(f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n")
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
