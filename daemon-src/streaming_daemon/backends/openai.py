"""OpenAI's two APIs, and everybody's who speaks one of them: vLLM, Ollama, llama.cpp, hosted services.

What the application sends has the form of chat completions, whichever API answers: for the other one it is rewritten
here, member by member. What is passed on is listed in CHAT and RESPONSES; docs/backends.md shows the lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ..config import OpenAIConfig
from ..handoff import Handoff, HandoffError
from ..wheel import TimerWheel
from .base import Sink
from .llm import Model, ModelCall, passed_on, system_text

# Passed on as they are, beside model, messages (or prompt), system, max_tokens and temperature.
CHAT = (
    "max_completion_tokens",
    "top_p",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "response_format",
    "reasoning_effort",
    "verbosity",
    "modalities",
    "metadata",
    "service_tier",
)
RESPONSES = (
    "top_p",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "text",
    "include",
    "previous_response_id",
    "store",
    "truncation",
    "metadata",
    "service_tier",
)
# Rewritten for the responses API.
RESPONSES_REWRITTEN = ("max_tokens", "tools", "response_format", "reasoning_effort")


def _headers(key: str | None) -> str:
    return f"Authorization: Bearer {key}\r\n" if key else ""


class OpenAIBackend(Model):
    """Type ``openai``."""

    config: OpenAIConfig
    rewritten = frozenset(RESPONSES_REWRITTEN)

    def __init__(self, name: str, config: OpenAIConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> None:
        path = "/responses" if config.api == "responses" else "/chat/completions"
        super().__init__(name, config, loop, wheel, path=path, headers=_headers)

    def body(self, handoff: Handoff) -> Mapping[str, Any]:
        body: dict[str, Any] = {"model": handoff.model or self.config.model}
        if self.config.api == "responses":
            body.update(_responses(handoff))
        else:
            messages = handoff.conversation()
            system = system_text(handoff)
            body["messages"] = [{"role": "system", "content": system}, *messages] if system else messages
            if handoff.max_tokens is not None:
                body["max_tokens"] = handoff.max_tokens
            body.update(passed_on(handoff, CHAT))
            if self.config.include_usage:
                body["stream_options"] = {"include_usage": True}
        if handoff.temperature is not None:
            body["temperature"] = handoff.temperature
        body.update(passed_on(handoff, self.config.extra))
        body["stream"] = True
        return body

    def call(self, sink: Sink, request: bytes) -> ModelCall:
        kind = ResponsesCall if self.config.api == "responses" else ChatCall
        return kind(self, sink, request)


class ChatCall(ModelCall):
    """Reads the chunks of chat completions."""

    __slots__ = ()

    def on_event(self, name: str, value: dict[str, Any]) -> None:
        if value.get("object") == "error":
            # vLLM in mid-stream.
            self.reject(value)
            return
        usage = value.get("usage")
        if isinstance(usage, dict):
            self.spent(usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("total_tokens"))
        choices = value.get("choices")
        # The chunk with the usage figures has no choices at all.
        choice = choices[0] if isinstance(choices, list) and choices else None
        # Of several answers side by side (member n) there is only one stream to put into.
        if not isinstance(choice, dict) or choice.get("index"):
            return
        self.answered()
        delta = choice.get("delta")
        if isinstance(delta, dict):
            text = delta.get("content")
            if text:
                self.say(text)
            # A refusal is an answer too, and the only one there is.
            elif delta.get("refusal"):
                self.say(delta["refusal"])
            for member in ("tool_calls", "function_call"):
                if delta.get(member):
                    self.say_event({member: delta[member]})
        if choice.get("finish_reason"):
            self.finish()


class ResponsesCall(ModelCall):
    """Reads the events of the responses API."""

    __slots__ = ()

    def on_event(self, name: str, value: dict[str, Any]) -> None:
        kind = value.get("type") or name
        self.answered()
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            self.say(value.get("delta"))
        elif kind == "response.output_item.added":
            item = value.get("item")
            if isinstance(item, dict) and item.get("type") == "function_call":
                arguments = item.get("arguments") or ""
                self.call_tool(value.get("output_index"), item.get("call_id"), item.get("name"), arguments)
        elif kind == "response.function_call_arguments.delta":
            self.go_on_with_tool(value.get("output_index"), value.get("delta"))
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            response = value.get("response")
            if isinstance(response, dict):
                usage = response.get("usage")
                if isinstance(usage, dict):
                    self.spent(usage.get("input_tokens"), usage.get("output_tokens"), usage.get("total_tokens"))
            if kind == "response.failed":
                self.reject(response)
            else:
                self.finish(done=True)
        elif kind == "error":
            self.reject(value)


def _responses(handoff: Handoff) -> dict[str, Any]:
    """The members of a request to the responses API."""
    body: dict[str, Any] = {"input": []}
    for message in handoff.conversation():
        body["input"] += _items(message)
    system = system_text(handoff)
    if isinstance(system, str):
        body["instructions"] = system
    elif system:
        body["input"].insert(0, {"role": "system", "content": [_part(part, "system") for part in system]})
    if handoff.max_tokens is not None:
        body["max_output_tokens"] = handoff.max_tokens
    body.update(passed_on(handoff, RESPONSES))
    tools = handoff.members.get("tools")
    if isinstance(tools, list):
        body["tools"] = [_flat(tool, "function") for tool in tools]
    if isinstance(body.get("tool_choice"), dict):
        body["tool_choice"] = _flat(body["tool_choice"], "function")
    form = handoff.members.get("response_format")
    if form is not None and "text" not in body:
        body["text"] = {"format": _flat(form, "json_schema")}
    effort = handoff.members.get("reasoning_effort")
    if effort is not None and "reasoning" not in body:
        body["reasoning"] = {"effort": effort}
    return body


def _flat(value: Any, name: str) -> Any:
    """``{"type": name, name: {...}}`` as ``{"type": name, ...}``; anything else as it is."""
    if isinstance(value, dict) and value.get("type") == name and isinstance(value.get(name), dict):
        return {"type": name, **value[name]}
    return value


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message as items of input: what calls of tools are part of a message becomes items of its own."""
    role, content = message["role"], message.get("content")
    if role == "tool":
        return [{"type": "function_call_output", "call_id": message.get("tool_call_id"), "output": content}]
    items: list[dict[str, Any]] = []
    if isinstance(content, list):
        items.append({"role": role, "content": [_part(part, role) for part in content]})
    elif content:
        items.append({"role": role, "content": content})
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise HandoffError("messages", "with tool_calls of another form", "an array")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            items.append({"type": "function_call", "call_id": call.get("id"), **function})
    return items


def _part(part: dict[str, Any], role: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "output_text" if role == "assistant" else "input_text", "text": part.get("text")}
    image = part.get("image_url")
    if kind == "image_url" and isinstance(image, dict):
        detail = {"detail": image["detail"]} if "detail" in image else {}
        return {"type": "input_image", "image_url": image.get("url"), **detail}
    return part
