# SPDX-License-Identifier: Apache-2.0
"""Who tells Pushpin what to send: every channel's event, ten times a second for a tenth of them.

Stands where the model stands for others, and so runs on the cores that are not the contender's.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

PARTS = 10
EVENT = 'data: {"content":" nothing"}\n\n'


class Publisher:
    """Publishes one event per second and channel; ``channels`` may be changed at any time."""

    def __init__(self, port: int, name: Callable[[int], str], cores: set[int]) -> None:
        """``port``: where Pushpin listens for commands. ``name``: of the channel of client 0, 1, …"""
        self.channels = 0
        self.failed = ""  # why it stopped
        self._port = port
        self._name = name
        self._cores = cores
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(10)

    def items(self, part: int) -> list[dict[str, object]]:
        """What is published in one tenth of a second."""
        return [
            {"channel": self._name(number), "formats": {"http-stream": {"content": EVENT}}}
            for number in range(part, self.channels, PARTS)
        ]

    def _run(self) -> None:
        # Of this thread alone: the kernel knows threads, not processes.
        os.sched_setaffinity(0, self._cores)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        due, part = time.monotonic(), 0
        while not self._over.wait(max(0.0, due - time.monotonic())):
            items = self.items(part)
            if items:
                try:
                    connection.request("POST", "/publish/", json.dumps({"items": items}))
                    answer = connection.getresponse()
                    answer.read()
                except (OSError, http.client.HTTPException) as error:
                    # Pushpin ends before we do.
                    self.failed = "" if self._over.is_set() else str(error)
                    return
                if answer.status != 200:
                    self.failed = f"Pushpin answered {answer.status}"
                    return
            part = (part + 1) % PARTS
            due += 1 / PARTS
