"""Anthropic's messages API.

What the application sends has the form of chat completions and is rewritten here, or is the API's own already: content
blocks, tools and choices that chat completions do not know go on as they are. docs/backends.md shows the members.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from ..config import AnthropicConfig
from ..handoff import Handoff, HandoffError, kind_of
from ..wheel import TimerWheel
from .base import Sink
from .json_codec import loads
from .llm import Model, ModelCall, count, passed_on, system_text

# Passed on as they are, beside model, messages (or prompt), system, max_tokens and temperature.
MESSAGES = ("top_p", "top_k", "stop_sequences", "thinking", "metadata", "service_tier", "container")
# Rewritten where they have the form of chat completions.
MESSAGES_REWRITTEN = ("stop", "tools", "tool_choice", "parallel_tool_calls")
_VERSION = "2023-06-01"
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]+);base64,(.*)", re.IGNORECASE | re.DOTALL)
_CHOICES = {"auto": "auto", "required": "any", "none": "none"}


def _headers(key: str | None) -> str:
    return f"anthropic-version: {_VERSION}\r\n" + (f"x-api-key: {key}\r\n" if key else "")


class AnthropicBackend(Model):
    """Type ``anthropic``."""

    config: AnthropicConfig
    rewritten = frozenset(MESSAGES_REWRITTEN)

    def __init__(self, name: str, config: AnthropicConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        super().__init__(name, config, loop, wheel, path="/messages", headers=_headers)

    def body(self, handoff: Handoff) -> Mapping[str, Any]:
        members = handoff.members
        if members.get("response_format") is not None:
            raise HandoffError("response_format", "", "is there: the backend that is to answer has no such thing")
        body: dict[str, Any] = {
            "model": handoff.model or self.config.model,
            # The API insists on it.
            "max_tokens": handoff.max_tokens or self.config.max_tokens,
            "messages": [],
        }
        system: list[Any] = []
        if (said := system_text(handoff)) is not None:
            system.append(said)
        for message in handoff.conversation():
            if message["role"] in ("system", "developer"):
                system.append(message["content"])
            else:
                _append(body["messages"], _message(message))
        if system:
            body["system"] = system[0] if len(system) == 1 else [part for said in system for part in _blocks(said)]
        if handoff.temperature is not None:
            body["temperature"] = handoff.temperature
        body.update(passed_on(handoff, MESSAGES))
        stop = members.get("stop")
        if stop is not None and "stop_sequences" not in body:
            body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
        tools = members.get("tools")
        if isinstance(tools, list):
            body["tools"] = [_tool(tool) for tool in tools]
            choice = _choice(members.get("tool_choice"))
            if members.get("parallel_tool_calls") is False:
                choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
            if choice is not None:
                body["tool_choice"] = choice
        body.update(passed_on(handoff, self.config.extra))
        body["stream"] = True
        return body

    def call(self, sink: Sink, request: bytes) -> ModelCall:
        return MessagesCall(self, sink, request)


class MessagesCall(ModelCall):
    """Reads the events of the messages API."""

    __slots__ = ("_prompt",)

    def __init__(self, model: Model, sink: Sink, request: bytes) -> None:
        super().__init__(model, sink, request)
        self._prompt: int | None = None

    def on_event(self, name: str, value: dict[str, Any]) -> None:
        kind = value.get("type") or name
        if kind == "ping":
            return
        if kind == "error":
            self.reject(value)
            return
        self.answered()
        if kind == "content_block_delta":
            self._delta(value.get("index"), value.get("delta"))
        elif kind == "content_block_start":
            self._block(value.get("index"), value.get("content_block"))
        elif kind == "message_start":
            message = value.get("message")
            self._spent(message.get("usage") if isinstance(message, dict) else None)
        elif kind == "message_delta":
            self._spent(value.get("usage"))
            delta = value.get("delta")
            if isinstance(delta, dict) and delta.get("stop_reason"):
                self.finish()
        elif kind == "message_stop":
            self.finish(done=True)

    def _block(self, index: object, block: object) -> None:
        if isinstance(block, dict):
            if block.get("type") == "tool_use":
                self.call_tool(index, block.get("id"), block.get("name"))
            elif block.get("type") == "text":
                self.say(block.get("text"))

    def _delta(self, index: object, delta: object) -> None:
        if isinstance(delta, dict):
            if delta.get("type") == "text_delta":
                self.say(delta.get("text"))
            elif delta.get("type") == "input_json_delta":
                self.go_on_with_tool(index, delta.get("partial_json"))

    def _spent(self, usage: object) -> None:
        if isinstance(usage, dict):
            parts = [
                count(usage.get(name))
                for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
            ]
            # What came from a cache was part of the prompt all the same.
            if parts[0] is not None:
                self._prompt = sum(part or 0 for part in parts)
            self.spent(self._prompt, usage.get("output_tokens"))


def _blocks(content: Any) -> list[Any]:
    """Content as an array of blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or ())


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Results of tools that were called together belong into one message."""
    last = messages[-1] if messages else None
    if last is not None and _only_results(last) and _only_results(message):
        last["content"] = [*last["content"], *message["content"]]
    else:
        messages.append(message)


def _only_results(message: dict[str, Any]) -> bool:
    content = message["content"]
    return isinstance(content, list) and bool(content) and all(part.get("type") == "tool_result" for part in content)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if role == "tool":
        result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
        return {"role": "user", "content": [result]}
    if isinstance(content, list):
        content = [_part(part) for part in content]
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise HandoffError("messages", "with tool_calls of another form", "an array")
    if calls:
        content = [*_blocks(content), *(_tool_use(call) for call in calls)]
    return {"role": role, "content": content}


def _tool_use(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise HandoffError("messages", "with tool_calls of another form", 'objects with "id" and "function"')
    try:
        arguments = loads(function.get("arguments") or "{}")
    except (ValueError, TypeError, RecursionError) as error:
        raise HandoffError("messages", "with arguments of a tool that are not valid JSON", "a JSON object") from error
    return {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": arguments}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    image = part.get("image_url")
    if part.get("type") != "image_url" or not isinstance(image, dict):
        return part
    url = str(image.get("url") or "")
    inline = _DATA_URL.fullmatch(url)
    if inline is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    return {"type": "image", "source": {"type": "base64", "media_type": inline[1], "data": inline[2]}}


def _tool(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        return tool
    result = {"name": function.get("name"), "input_schema": function.get("parameters") or {"type": "object"}}
    if "description" in function:
        result["description"] = function["description"]
    return result


def _choice(choice: Any) -> Any:
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise HandoffError("tool_choice", "another string", "one of auto, required, none, or an object")
        return {"type": _CHOICES[choice]}
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if isinstance(function, dict):
        return {"type": "tool", "name": function.get("name")}
    if choice is not None and not isinstance(choice, dict):
        raise HandoffError("tool_choice", kind_of(choice), "one of auto, required, none, or an object")
    return choice
