# SPDX-License-Identifier: Apache-2.0
"""Instructions of one request, counted by valgrind's callgrind in one httpd process (-X).

Virtual machines often have no counters for `perf stat -e instructions:u`; callgrind counts the same, in user space,
and gives the same number again on any machine with the same binaries. It does not see the kernel.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

from benchlib.apache import Apache
from benchlib.tools import BenchmarkError, Generator

WARM_UP = 40
CONFIG = "<Location /count>\nSetHandler bench-count\n</Location>\n"


def available() -> bool:
    return shutil.which("valgrind") is not None


@dataclass(slots=True)
class Callgrind:
    """An httpd under callgrind. Start it, ask `per_request` any number of times, stop it."""

    apache: Apache
    _dumps: int = 0

    def start(self) -> None:
        self.apache.config += CONFIG
        out = self.apache.root / "logs" / "callgrind"
        self.apache.start(under=("valgrind", "-q", "--vgdb=no", "--tool=callgrind", f"--callgrind-out-file={out}"))

    def stop(self) -> None:
        self.apache.stop()

    def _dump(self, generator: Generator) -> int:
        """Instructions of all threads since the last time."""
        generator.run(self.apache.port, "/count", connections=1, amount="1x")
        self._dumps += 1
        dump = self.apache.root / "logs" / f"callgrind.{self._dumps}"
        found = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE) if dump.exists() else None
        if found is None:
            raise BenchmarkError(f"callgrind left no total in {dump.name}: {self.apache.complaints()}")
        return int(found[1])

    def per_request(self, generator: Generator, uri: str, requests: int, *, keep_alive: bool = False) -> float:
        """The difference of two counts, which is rid of the requests that ask for them."""

        def count(amount: int) -> int:
            generator.run(self.apache.port, uri, connections=1, amount=f"{amount}x", keep_alive=keep_alive)
            return self._dump(generator)

        count(WARM_UP)
        return (count(3 * requests) - count(requests)) / (2 * requests)
