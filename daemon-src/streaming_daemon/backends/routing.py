"""Which backend answers which handoff.

In this order: the backend that the application names, where ``backend.allow_choice`` lets it; the first of the
``[[routes]]`` that fits; ``backend.default``. Behind it come the backends of its ``fallback``, in their order; theirs
are not looked at. Backends that nothing leads to are not built: their keys and modules need not be there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from ..access_log import quote
from ..board import Slot
from ..config import Config, Route
from ..envelope import Request
from ..handoff import Handoff, HandoffError
from ..wheel import TimerWheel
from . import create
from .base import Backend
from .meter import Metered

# (target, path, user, model) of a handoff.
_Facts = tuple[str | None, str | None, str | None, str | None]


class Router:
    """All backends of one worker."""

    def __init__(
        self, config: Config, loop: asyncio.AbstractEventLoop, wheel: TimerWheel, slot: Slot | None = None
    ) -> None:
        """Build the backends, which count in ``slot``; raises BackendSetupError."""
        self.backends: dict[str, Backend] = {}
        for name in _reachable(config):
            self.backends[name] = create(name, config.backends[name], loop, wheel)
        self._config = config
        self._slot = slot
        self._default = self._candidates(config.default_backend, None)
        self._choices = {name: self._candidates(name, None) for name in config.allow_choice}
        self._routes = [(_matcher(route), self._candidates(route.backend, route.output)) for route in config.routes]

    def choose(self, handoff: Handoff, request: Request | None) -> list[Backend]:
        """Who may answer, the best first, never empty; the others are for a failure of the first that is retryable.
        Raises HandoffError where the application asks for a backend that it may not have."""
        # Where there is no choice, the member is the application's own business, as any other.
        if handoff.backend is not None and self._choices:
            chosen = self._choices.get(handoff.backend)
            if chosen is None:
                # What backends there are is nothing that a browser has to know.
                hint = f"asked for is {quote(handoff.backend)}, backend.allow_choice has {', '.join(self._choices)}"
                raise HandoffError("backend", "a name that is not to be chosen", "one that is", hint)
            return chosen
        if self._routes:
            facts = (
                request.target if request is not None else None,
                request.uri.partition("?")[0] if request is not None else None,
                handoff.user or (request.user if request is not None else None),
                handoff.model,
            )
            for fits, candidates in self._routes:
                if fits(facts):
                    return candidates
        return self._default

    def close(self) -> None:
        for backend in self.backends.values():
            backend.close()

    def _candidates(self, name: str, output: str | None) -> list[Backend]:
        found = [self.backends[name], *(self.backends[other] for other in self._config.backends[name].fallback)]
        if output:
            found = [_with_output(backend, output) for backend in found]
        return found if self._slot is None else [Metered(backend, self._slot) for backend in found]


def _reachable(config: Config) -> Iterable[str]:
    first = [config.default_backend, *config.allow_choice, *(route.backend for route in config.routes)]
    return dict.fromkeys([*first, *(other for name in first for other in config.backends[name].fallback)])


def _with_output(backend: Backend, output: str) -> Backend:
    """``backend`` with another form of output, where it has such."""
    variant: Callable[[str], Backend] | None = getattr(backend, "variant", None)
    return backend if variant is None else variant(output)


def _matcher(route: Route) -> Callable[[_Facts], bool]:
    exact = tuple(name for name in route.model if not name.endswith("*"))
    begin = tuple(name[:-1] for name in route.model if name.endswith("*"))

    def fits(facts: _Facts) -> bool:
        target, path, user, model = facts
        return (
            (not route.target or target in route.target)
            and (not route.path or (path is not None and path.startswith(route.path)))
            and (not route.user or user in route.user)
            and (not route.model or (model is not None and (model in exact or model.startswith(begin))))
        )

    return fits
