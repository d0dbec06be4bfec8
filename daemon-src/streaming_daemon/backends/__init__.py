"""Where the answers come from."""

from __future__ import annotations

import asyncio

from ..config import AnthropicConfig, BackendConfig, DemoConfig, ExecConfig, OpenAIConfig
from ..wheel import TimerWheel
from .base import Backend, BackendSetupError
from .demo import DemoBackend


def create(name: str, config: BackendConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> Backend:
    """Build the backend of one ``[backends.*]`` table; raises BackendSetupError."""
    if isinstance(config, DemoConfig):
        return DemoBackend(name, config, loop, wheel)
    if isinstance(config, ExecConfig):
        # Here and not above: a worker without programs does without what runs them.
        from .exec import ExecBackend  # noqa: PLC0415

        return ExecBackend(name, config, loop, wheel)
    try:
        # Here and not above: a host that only runs the demo does without python3-httptools.
        if isinstance(config, OpenAIConfig):
            from .openai import OpenAIBackend  # noqa: PLC0415

            return OpenAIBackend(name, config, loop, wheel)
        if isinstance(config, AnthropicConfig):
            from .anthropic import AnthropicBackend  # noqa: PLC0415

            return AnthropicBackend(name, config, loop, wheel)
        from .passthrough import HttpBackend  # noqa: PLC0415

        return HttpBackend(name, config, loop, wheel)
    except ImportError as error:
        raise BackendSetupError(
            f"backends.{name}: its type needs the Python module {error.name}: install the package python3-httptools"
        ) from error
