"""A real OpenAI-compatible server behind the chain, and OpenAI's own client in front of it: nothing here is a stand-in.

llama.cpp's server with a model of random weights (model.py): its words are nonsense, its protocol is not.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "examples"))

from chain import Chain, chain, complaints, free_port, openai_api_wiring, wait_until  # noqa: E402  (see above)
from handoff_standin import PATIENCE  # noqa: E402  (of the module's tests, where chain.py has led to)
from model import vocabulary  # noqa: E402  (beside this file)
from model import write as write_model  # noqa: E402

TOKEN = "sk-example-4711"
QUESTION = [{"role": "user", "content": "What does the worker do? 🚲"}]


@dataclass(slots=True)
class LlamaServer:
    """One process, that may be killed and started again on its port."""

    binary: str
    model: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(self.binary, "--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)),
                    # Text without end where it is asked for, two answers at once.
                    *("--ctx-size", "4096", "--parallel", "2", "--context-shift", "--threads", "1", "--no-webui"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self.healthy, "llama-server is ready")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def healthy(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text(errors="replace")
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def busy(self) -> int:
        """How many answers it is writing."""
        return sum(bool(slot["is_processing"]) for slot in self.get("/slots")[1])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    binary = os.environ.get("LLAMA_SERVER")
    assert binary, "LLAMA_SERVER is not set: script/test openai_server builds llama.cpp's server and says where"
    directory = tmp_path_factory.mktemp("llama")
    write_model(directory / "nonsense.gguf")
    one = LlamaServer(binary, directory / "nonsense.gguf", free_port(), directory / "log")
    one.start()
    yield one
    one.kill()


@pytest.fixture(scope="session")
def site(llama: LlamaServer) -> Iterator[Chain]:
    url, tokens = f"http://127.0.0.1:{llama.port}/v1", {"API_TOKENS": "{state}/api-tokens.php"}
    with chain(url, directives=openai_api_wiring(), environment=tokens) as one:
        one.install(ROOT / "examples" / "php-helper" / "src" / "SocketHandoff.php")
        endpoint = (ROOT / "examples" / "openai-api" / "chat-completions.php").read_text()
        # What an operator decides: which models, and how long an answer may get. Here one has to last.
        for given, wanted in (("['gpt-4o-mini']", "['nonsense']"), ("TOKENS_MAX = 4096", "TOKENS_MAX = 100000000")):
            assert endpoint.count(given) == 1
            endpoint = endpoint.replace(given, wanted)
        (one.docroot / "chat-completions.php").write_text(endpoint)
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        (one.state / "api-tokens.php").write_text(f"<?php return ['{digest}' => 'ada'];")
        one.install(under="normalised")
        (one.docroot / "normalised" / "ask.php").write_text(
            "<?php require '../SocketHandoff.php';"
            "$asked = json_decode(file_get_contents('php://input'), true);"
            "SocketHandoff\\SocketHandoff::to('model')->with($asked)->send();"
        )
        yield one
        assert not complaints(one)


@pytest.fixture(scope="session")
def openai() -> Any:
    sys.path.append(os.environ["OPENAI_PACKAGE"])
    return importlib.import_module("openai")


@pytest.fixture
def client(openai: Any, site: Chain) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE)


def ask(client: Any, tokens: int, **more: Any) -> Any:
    """A stream; at temperature 0 and without what the server remembers the same question has the same answer."""
    members = {"model": "nonsense", "messages": QUESTION, "temperature": 0, "seed": 1, "max_tokens": tokens}
    return client.chat.completions.create(**members | more, stream=True)


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks if chunk["choices"])


def test_the_client_gets_what_the_server_says_chunk_for_chunk(openai: Any, client: Any, llama: LlamaServer) -> None:
    direct = openai.OpenAI(base_url=f"http://127.0.0.1:{llama.port}/v1", api_key="none", max_retries=0)
    answers = []
    # Left to itself it would say the same few words for ever; this it likes to say in between.
    party = {str(number): 2.5 for number, (token, _) in enumerate(vocabulary()) if token in ("▁🎉", "▁日本語")}
    for one, more in ((client, {}), (direct, {"stream_options": {"include_usage": True}})):
        chunks = [chunk.model_dump() for chunk in ask(one, 200, logit_bias=party, **more)]
        for chunk in chunks:
            for name in ("id", "created", "timings"):  # of this answer, and no other
                chunk.pop(name, None)
            (chunk["usage"] or {}).pop("prompt_tokens_details", None)  # the second time it remembers the question
        answers.append(chunks)
    assert answers[0] == answers[1]
    assert len(answers[0]) > 100
    assert answers[0][-1]["usage"]["completion_tokens"] == 200
    said = text(answers[0])
    assert "🎉" in said and len(set(said.split())) > 3, said


def test_our_own_events_have_the_same_text(client: Any, site: Chain) -> None:
    through = text([chunk.model_dump() for chunk in ask(client, 100)])
    body = {"messages": QUESTION, "temperature": 0, "seed": 1, "max_tokens": 100}
    assert site.client().post("/normalised/ask.php", body).answer == through


def test_a_client_that_leaves_sets_the_server_free(client: Any, llama: LlamaServer) -> None:
    stream = ask(client, 100_000_000)
    next(iter(stream))
    assert llama.busy() == 1
    stream.close()
    wait_until(lambda: llama.busy() == 0, "the server stops writing for nobody")


def test_two_answers_are_written_at_once(client: Any, llama: LlamaServer) -> None:
    first, second = ask(client, 100_000_000), ask(client, 100_000_000)
    next(iter(first)), next(iter(second))
    assert llama.busy() == 2
    first.close()
    second.close()
    wait_until(lambda: llama.busy() == 0, "the server is free")


def test_a_question_too_long_for_the_model_is_refused_before_the_stream(openai: Any, client: Any) -> None:
    # Of the server's own 400 only the daemon's journal tells more: its text may quote what is nobody's business.
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, 5, messages=[{"role": "user", "content": "socket " * 8000}])
    assert (caught.value.status_code, caught.value.type) == (502, "backend_error")
    assert "refused the request" in str(caught.value)


def test_a_server_that_is_killed_in_the_middle_is_an_error_and_no_end(
    openai: Any, client: Any, llama: LlamaServer
) -> None:
    stream = ask(client, 100_000_000)
    try:
        next(iter(stream))
        llama.kill()
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, 5)
        assert caught.value.status_code in (502, 503)
    finally:
        llama.start()
    assert list(ask(client, 5)), "and is asked again once it is there"
