"""JSON of backends, read: every token of every answer passes through here.

``msgspec`` or ``orjson`` takes a quarter of the time of the standard library and is used where it is installed. What
either refuses, the standard library is asked about, so that the results are the same: it knows halves of surrogate
pairs, which servers do send that cut an emoji in two, and decides what an error is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from typing import Any


def fast() -> tuple[str, Callable[[str], Any]] | None:
    """The fastest decoder that is installed."""
    with contextlib.suppress(ImportError):
        return "msgspec", importlib.import_module("msgspec").json.Decoder().decode
    with contextlib.suppress(ImportError):
        return "orjson", importlib.import_module("orjson").loads
    return None


def loader(found: tuple[str, Callable[[str], Any]] | None) -> Callable[[str], Any]:
    """The function ``loads``; raises ValueError or RecursionError for what is no JSON."""
    if found is None:
        return json.loads
    decode = found[1]

    def loads(text: str) -> Any:
        try:
            return decode(text)
        except Exception:
            # Each library has errors of its own, and msgspec's are no ValueError. What is wrong, the standard one says.
            return json.loads(text)

    return loads


_found = fast()
NAME = _found[0] if _found else "json"
loads = loader(_found)
