"""Where the text comes from."""

from __future__ import annotations

import asyncio

from ..config import BackendConfig, DemoConfig
from ..wheel import TimerWheel
from .base import Backend, BackendSetupError
from .demo import DemoBackend


def create(name: str, config: BackendConfig, loop: asyncio.AbstractEventLoop, wheel: TimerWheel) -> Backend:
    """Build the backend of one ``[backends.*]`` table; raises BackendSetupError."""
    if isinstance(config, DemoConfig):
        return DemoBackend(name, config, loop, wheel)
    try:
        # Here and not above: a host that only runs the demo does without python3-httptools.
        from .openai import OpenAIBackend  # noqa: PLC0415
    except ImportError as error:
        raise BackendSetupError(
            f"backends.{name}: type openai needs the Python module {error.name}: install the package python3-httptools"
        ) from error
    return OpenAIBackend(name, config, loop, wheel)
