"""The APIs of language models, in memory: what is asked of them, and what is made of their events."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import Callable
from typing import Any, cast

import pytest

pytest.importorskip("httptools")

from streaming_daemon.backends import json_codec, llm
from streaming_daemon.backends.anthropic import AnthropicBackend
from streaming_daemon.backends.base import Failure, Usage
from streaming_daemon.backends.http_client import Client
from streaming_daemon.backends.openai import OpenAIBackend
from streaming_daemon.config import AnthropicConfig, ModelConfig, OpenAIConfig
from streaming_daemon.handoff import HandoffError, parse_data
from streaming_daemon.wheel import TimerWheel


class Heard:
    """A sink that remembers; ``hook`` is called whenever something of the answer was heard."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.failure: Failure | None = None
        self.spent: Usage | None = None
        self.complete = False
        self.hook: Callable[[], None] = lambda: None

    @property
    def texts(self) -> list[str]:
        return [item for item in self.all if isinstance(item, str)]

    @property
    def raw(self) -> list[bytes]:
        return [item for item in self.all if isinstance(item, bytes)]

    @property
    def tools(self) -> list[Any]:
        return [json.loads(item.removeprefix(b"data: "))["tool_calls"] for item in self.raw]

    def content(self, texts: list[str]) -> None:
        assert not self.complete
        assert self.failure is None
        self.all += texts
        self.hook()

    def events(self, events: list[bytes]) -> None:
        assert not self.complete
        assert self.failure is None
        self.all += events
        self.hook()

    def usage(self, usage: Usage) -> None:
        assert self.spent is None
        assert not self.complete
        self.spent = usage

    def done(self) -> None:
        assert not self.complete
        assert self.failure is None
        self.complete = True

    def failed(self, failure: Failure) -> None:
        assert not self.complete
        assert self.failure is None
        self.failure = failure


class Line:
    """A connection in name only."""

    def __init__(self) -> None:
        self.sent = b""
        self.fate = ""

    def carry(self, call: object, request: bytes) -> None:
        self.sent += request

    def abort(self) -> None:
        self.fate = "aborted"

    def release(self) -> None:
        self.fate = "released"


class Bench:
    """One call of one backend, without a server."""

    def __init__(self, config: ModelConfig, data: dict[str, Any] | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        wheel = TimerWheel(self.loop)
        self.model: llm.Model
        if isinstance(config, OpenAIConfig):
            self.model = OpenAIBackend("m", config, self.loop, wheel)
        else:
            self.model = AnthropicBackend("m", cast(AnthropicConfig, config), self.loop, wheel)
        self.line = Line()
        cast(Any, self.model.client).take_idle = lambda: self.line
        self.sink = Heard()
        handoff = parse_data(json.dumps(data or {"prompt": "p"}).encode())
        self.call = self.model.start(handoff, None, cast(Any, self.sink))

    def __del__(self) -> None:
        self.loop.close()

    @property
    def head(self) -> str:
        return self.line.sent.partition(b"\r\n\r\n")[0].decode("ascii")

    @property
    def body(self) -> Any:
        return json.loads(self.line.sent.partition(b"\r\n\r\n")[2])

    def hear(self, stream: bytes | str, *, step: int = 0, end: bool = True) -> Heard:
        data = stream.encode() if isinstance(stream, str) else stream
        self.call.on_head(200, [(b"Content-Type", b"text/event-stream; charset=utf-8")])
        for start in range(0, len(data), step or len(data) or 1):
            self.call.on_body(data[start : start + (step or len(data))])
            self.call.received(False)
        if end and not self.line.fate:
            self.call.received(True)
        return self.sink


def sse(*values: Any) -> str:
    return "".join(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values)


def named(*values: dict[str, Any]) -> str:
    return "".join(f"event: {value['type']}\ndata: {json.dumps(value)}\n\n" for value in values)


def delta(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members}]}


STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
CHAT = OpenAIConfig()
RESPONSES = OpenAIConfig(api="responses")
MESSAGES = AnthropicConfig()
WEATHER = {"type": "function", "function": {"name": "w", "description": "d", "parameters": {"type": "object"}}}
IMAGE = "data:image/png;base64,QUJD"
CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": IMAGE}}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"x":1}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


# What is asked


def test_chat_gets_every_member_it_knows_as_it_came_and_no_other() -> None:
    known = {
        "model": "m-2",
        "messages": CONVERSATION,
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"1": 2},
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "w"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "reasoning_effort": "low",
        "metadata": {"k": "v"},
    }
    strange = {"user": "alice", "backend": "x", "stream": False, "n": 3, "top_k": 4, "chat_id": 7, "logprobs": None}
    bench = Bench(CHAT, {**known, **strange})
    assert bench.body == {**known, "stream": True, "stream_options": {"include_usage": True}}
    assert bench.head.startswith("POST /v1/chat/completions HTTP/1.1\r\nHost: api.openai.com\r\n")


def test_what_more_is_passed_on_and_whether_usage_is_asked_for_is_configuration() -> None:
    bench = Bench(OpenAIConfig(extra=("top_k", "min_p"), include_usage=False), {"prompt": "p", "top_k": 4, "x": 1})
    assert bench.body == {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "p"}],
        "top_k": 4,
        "stream": True,
    }


def test_system_goes_before_the_conversation() -> None:
    bench = Bench(CHAT, {"prompt": "p", "system": "s"})
    assert bench.body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    with pytest.raises(HandoffError, match="system is of another type"):
        Bench(CHAT, {"prompt": "p", "system": 1})


def test_responses_get_the_same_question_in_their_own_words() -> None:
    data = {
        "messages": CONVERSATION,
        "system": "s",
        "max_tokens": 5,
        "temperature": 1,
        "top_p": 0.5,
        "tools": [WEATHER, {"type": "web_search"}],
        "tool_choice": {"type": "function", "function": {"name": "w"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
        "reasoning_effort": "low",
        "store": False,
    }
    bench = Bench(RESPONSES, data)
    assert bench.head.startswith("POST /v1/responses HTTP/1.1\r\n")
    assert bench.body == {
        "model": "gpt-4o-mini",
        "instructions": "s",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": IMAGE}],
            },
            {"type": "function_call", "call_id": "c1", "name": "w", "arguments": '{"x":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
        "max_output_tokens": 5,
        "temperature": 1.0,
        "top_p": 0.5,
        "tools": [
            {"type": "function", "name": "w", "description": "d", "parameters": {"type": "object"}},
            {"type": "web_search"},
        ],
        "tool_choice": {"type": "function", "name": "w"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
        "reasoning": {"effort": "low"},
        "store": False,
        "stream": True,
    }


def test_messages_get_the_same_question_in_their_own_words(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k").write_text("key-1\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    data = {
        "messages": [{"role": "system", "content": "s2"}, *CONVERSATION],
        "system": "s1",
        "model": "m-2",
        "temperature": 0.5,
        "top_k": 3,
        "stop": "x",
        "tools": [WEATHER, {"type": "bash_20250124", "name": "bash"}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    bench = Bench(AnthropicConfig(api_key_credential="k"), data)
    assert bench.head.startswith("POST /v1/messages HTTP/1.1\r\nHost: api.anthropic.com\r\n")
    assert "\r\nanthropic-version: 2023-06-01\r\nx-api-key: key-1\r\n" in bench.head
    assert "Authorization" not in bench.head
    assert bench.body == {
        "model": "m-2",
        "max_tokens": 4096,
        "system": [{"type": "text", "text": "s1"}, {"type": "text", "text": "s2"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
                ],
            },
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "w", "input": {"x": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
        ],
        "temperature": 0.5,
        "top_k": 3,
        "stop_sequences": ["x"],
        "tools": [
            {"name": "w", "description": "d", "input_schema": {"type": "object"}},
            {"type": "bash_20250124", "name": "bash"},
        ],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "stream": True,
    }


def test_results_of_tools_that_were_called_together_are_one_message() -> None:
    results = [{"role": "tool", "tool_call_id": call, "content": "r"} for call in ("c1", "c2")]
    body = Bench(MESSAGES, {"messages": [{"role": "user", "content": "q"}, *results]}).body
    assert [message["role"] for message in body["messages"]] == ["user", "user"]
    assert [part["tool_use_id"] for part in body["messages"][1]["content"]] == ["c1", "c2"]


def test_messages_in_the_apis_own_form_go_on_as_they_are() -> None:
    own = {
        "messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "u"}}]}],
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "max_tokens": 9,
        "tools": [{"name": "w", "input_schema": {}}],
        "tool_choice": {"type": "tool", "name": "w"},
        "thinking": {"type": "enabled", "budget_tokens": 1},
        "stop_sequences": ["x"],
    }
    assert Bench(MESSAGES, own).body == {**own, "model": MESSAGES.model, "stream": True}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"prompt": "p", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "p", "tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"prompt": "p", "tools": [WEATHER], "tool_choice": ["auto"], "parallel_tool_calls": False}, "tool_choice"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": ["x"]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "messages",
        ),
        ({}, "prompt"),
    ],
)
def test_what_messages_cannot_be_asked_is_refused_and_not_dropped(data: dict[str, Any], field: str) -> None:
    with pytest.raises(HandoffError) as caught:
        Bench(MESSAGES, data or {"messages": []})
    assert caught.value.field == field


@pytest.mark.parametrize("config", [MESSAGES, RESPONSES])
def test_calls_of_tools_that_are_no_array_are_the_applications_error(config: Any) -> None:
    with pytest.raises(HandoffError) as caught:
        Bench(config, {"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]})
    assert caught.value.field == "messages"


# What is made of the answer

CALLS = [
    {"index": 0, "id": "c1", "type": "function", "function": {"name": "w", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"a":"é'}},
    {"index": 0, "function": {"arguments": '"}'}},
]
CHAT_STREAM = ": hello\n\n" + sse(
    delta(role="assistant", content=""),
    delta(content="Hel"),
    {"choices": []},
    delta(content="lo", tool_calls=None),
    *(delta(tool_calls=[call]) for call in CALLS),
    STOP,
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}},
    "[DONE]",
)
RESPONSES_STREAM = named(
    {"type": "response.created", "response": {"id": "r", "error": None}},
    {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message"}},
    {"type": "response.output_text.delta", "output_index": 0, "delta": "Hel"},
    {"type": "response.output_text.delta", "output_index": 0, "delta": "lo"},
    {"type": "response.output_text.done", "output_index": 0, "text": "Hello"},
    {
        "type": "response.output_item.added",
        "output_index": 1,
        "item": {"type": "function_call", "id": "f", "call_id": "c1", "name": "w", "arguments": ""},
    },
    {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": '{"a":"é'},
    {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": '"}'},
    {
        "type": "response.completed",
        "response": {"error": None, "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}},
    },
)
MESSAGES_STREAM = named(
    {
        "type": "message_start",
        "message": {"usage": {"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 1}},
    },
    {"type": "ping"},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "c1", "name": "w", "input": {}},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":"é'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '"}'}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 4}},
    {"type": "message_stop"},
)
APIS = [(CHAT, CHAT_STREAM), (RESPONSES, RESPONSES_STREAM), (MESSAGES, MESSAGES_STREAM)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("config", "stream"), APIS, ids=["chat", "responses", "messages"])
def test_every_api_gives_the_same_text_tool_calls_and_usage(
    config: ModelConfig, stream: str, step: int, newline: str
) -> None:
    bench = Bench(config)
    heard = bench.hear(stream.replace("\n", newline), step=step)
    assert heard.texts == ["Hel", "lo"]
    assert heard.tools == [[call] for call in CALLS]
    assert heard.spent == Usage(3, 4, 7)
    assert heard.complete
    assert bench.line.fate == "released"


@pytest.mark.parametrize(("config", "stream"), APIS, ids=["chat", "responses", "messages"])
def test_passthrough_gives_every_event_as_it_came_and_usage_all_the_same(config: ModelConfig, stream: str) -> None:
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    bench = Bench(type(config)(**{**fields, "output": "passthrough"}))
    heard = bench.hear(stream, step=5)
    assert b"".join(heard.raw) == stream.replace(": hello\n\n", "").replace("data: [DONE]\n\n", "").encode()
    assert heard.texts == []
    assert heard.spent == Usage(3, 4, 7)
    assert heard.complete


@pytest.mark.parametrize(("config", "stream"), APIS, ids=["chat", "responses", "messages"])
def test_an_answer_that_is_cut_is_never_complete(config: ModelConfig, stream: str) -> None:
    for cut in range(0, len(stream), 13):
        # The model has said why it stopped: what was cut is the bookkeeping.
        if "finish_reason" in stream[:cut] or "stop_reason" in stream[:cut]:
            break
        heard = Bench(config).hear(stream[:cut])
        assert heard.failure is not None, stream[:cut]
        assert heard.failure.kind == "backend_aborted"
        assert heard.failure.retryable is not bool(heard.all)


def test_whitespace_in_json_and_data_on_several_lines_mean_nothing() -> None:
    stream = 'data: { "choices" : [ { "delta": { "content": "a" } } ] }\n\n'
    stream += 'data: {"choices":\ndata: [{"delta": {"content":\ndata: "b"}}]}\n\n'
    assert Bench(CHAT).hear(stream + "data:[DONE]\n\n").texts == ["a", "b"]


def test_text_and_tool_calls_keep_their_order_within_one_portion() -> None:
    heard = Bench(CHAT).hear(
        sse(delta(content="a"), delta(content="b", tool_calls=[{"index": 0}]), delta(content="c"), STOP)
    )
    assert heard.all == ["a", "b", b'data: {"tool_calls":[{"index":0}]}\n\n', "c"]


def test_a_refusal_is_text_and_a_second_choice_is_left_out() -> None:
    other = {"choices": [{"index": 1, "delta": {"content": "x"}}]}
    assert Bench(CHAT).hear(sse(delta(refusal="no"), other, STOP)).texts == ["no"]


def test_a_sink_that_cancels_hears_nothing_more() -> None:
    bench = Bench(CHAT)
    bench.sink.hook = bench.call.cancel
    heard = bench.hear(sse(delta(content="a"), delta(tool_calls=[{}]), delta(content="b"), STOP), end=False)
    assert heard.all == ["a"]
    assert not heard.complete
    assert heard.failure is None
    assert bench.line.fate == "aborted"


ERRORS = [
    (CHAT, 'data: {"error":{"message":"x","code":"boom"}}\n\n'),
    (CHAT, 'event: error\ndata: {"code":"boom","message":"x"}\n\n'),
    (CHAT, 'data: {"object":"error","message":"x","type":"boom","code":40}\n\n'.replace('"code":40', '"code":null')),
    (CHAT, 'error: {"code":"boom","message":"x","type":"server_error"}\n\n'),
    (RESPONSES, named({"type": "error", "code": "boom", "message": "x"})),
    (RESPONSES, named({"type": "response.failed", "response": {"error": {"code": "boom", "message": "x"}}})),
    (MESSAGES, named({"type": "error", "error": {"type": "boom", "message": "x"}})),
]


@pytest.mark.parametrize(("config", "stream"), ERRORS)
@pytest.mark.parametrize("output", ["normalised", "passthrough"])
def test_an_error_in_the_stream_is_a_failure_and_only_its_code_is_told(
    config: ModelConfig, stream: str, output: str
) -> None:
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    heard = Bench(type(config)(**{**fields, "output": output})).hear(stream)
    assert heard.all == []
    assert heard.failure == Failure(502, "backend_error", llm.BROKEN, "error in the stream: boom", None, retryable=True)


@pytest.mark.parametrize(
    ("status", "expected", "kind", "retryable"),
    [
        (400, 502, "backend_error", False),
        (422, 502, "backend_error", False),
        (401, 502, "backend_error", True),
        (404, 502, "backend_error", True),
        (408, 504, "backend_timeout", True),
        (429, 429, "backend_rate_limited", True),
        (500, 502, "backend_error", True),
        (503, 502, "backend_unavailable", True),
        (529, 502, "backend_unavailable", True),
    ],
)
def test_a_refusal_is_a_status_and_says_whether_another_may_do_better(
    status: int, expected: int, kind: str, retryable: bool
) -> None:
    bench = Bench(CHAT)
    bench.call.on_head(status, [(b"content-type", b"application/json"), (b"Retry-After", b"7")])
    bench.call.on_body(b'{"error":{"code":"boom","message":"key sk-1"}}')
    bench.call.received(True)
    failure = bench.sink.failure
    assert failure is not None
    assert (failure.status, failure.kind, failure.retryable) == (expected, kind, retryable)
    assert failure.detail == f"status {status} boom"


# JSON


class RefusedError(Exception):
    """A decoder's own error."""


@pytest.mark.parametrize("value", [-1, 1 << 40, (1 << 64) - 1, True, "3", None, 1.5])
def test_a_number_of_tokens_that_is_none_is_not_counted(value: object) -> None:
    assert llm.count(value) is None


def stub(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Install a stand-in for a fast decoder, as strict as the real ones; returns what it is asked."""
    asked: list[str] = []

    def decode(text: str) -> Any:
        asked.append(text)
        if "\\ud" in text.lower() or "NaN" in text or "Infinity" in text:
            raise RefusedError("as msgspec's own, which are no ValueError")
        return json.loads(text)

    module: Any = types.ModuleType(name)
    module.loads = decode
    module.json = types.SimpleNamespace(Decoder=lambda: types.SimpleNamespace(decode=decode))
    monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.parametrize("name", ["json", "orjson", "msgspec"])
def test_every_json_decoder_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("orjson", "msgspec"):
        monkeypatch.setitem(sys.modules, other, None)
    asked = [] if name == "json" else stub(monkeypatch, name)
    found = json_codec.fast()
    assert (found[0] if found else "json") == name
    monkeypatch.setattr(llm, "loads", json_codec.loader(found))
    for config, stream in APIS:
        heard = Bench(config).hear(stream)
        assert (heard.texts, heard.spent) == (["Hel", "lo"], Usage(3, 4, 7))
    assert bool(asked) is (name != "json")
    halves = 'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n'
    assert Bench(CHAT).hear(halves).texts == ["\ud83d"]
    for bad in ("{not json", "", "[1]", "nul", '{"a":' * 100000):
        failure = Bench(CHAT).hear(f"data: {bad}\n\n").failure
        assert failure is not None
        assert failure.kind == "backend_protocol"


def test_a_base_url_names_a_host_or_a_socket() -> None:
    loop = asyncio.new_event_loop()
    wheel = TimerWheel(loop)

    def client(url: str) -> tuple[str, str, str]:
        made = Client(url, loop, wheel, connect_timeout=1, most_idle=1)
        return made.where, made.authority, made.path

    assert client("https://h/v1") == ("h:443", "h", "/v1")
    assert client("http://[::1]:8000") == ("::1:8000", "[::1]:8000", "")
    assert client("unix:/run/x.sock") == ("/run/x.sock", "localhost", "")
    assert client("unix:/run/x.sock:/v1") == ("/run/x.sock", "localhost", "/v1")
    loop.close()


@pytest.mark.parametrize("config", [RESPONSES, MESSAGES], ids=["responses", "messages"])
def test_a_server_cannot_begin_tool_calls_without_end(config: ModelConfig) -> None:
    """Each is looked for among all before it, by every piece of its arguments."""

    def begin(number: int) -> dict[str, Any]:
        if config is MESSAGES:
            block = {"type": "tool_use", "id": "c", "name": "w"}
            return {"type": "content_block_start", "index": number, "content_block": block}
        item = {"type": "function_call", "call_id": "c", "name": "w"}
        return {"type": "response.output_item.added", "output_index": number, "item": item}

    bench = Bench(config)
    heard = bench.hear(named(*(begin(number) for number in range(1000))), end=False)
    assert heard.failure is not None
    assert heard.failure.kind == "backend_protocol"
    assert len(heard.tools) == llm.MOST_TOOL_CALLS
    assert bench.line.fate == "aborted"
