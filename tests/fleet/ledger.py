"""Users that stream without a pause, and what each of them got. See prober.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ledger:
    """Every stream that users have opened, as they saw it."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def close(self) -> list[dict[str, Any]]:
        """Let the users finish; return all their streams."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, f"the users ended with {self.process.returncode}"
        self.lines = [json.loads(line) for line in out.splitlines()]
        # Users of whom nothing is known have lost nothing.
        assert self.lines
        print(f"users: {dict(self.outcomes())}, at most {max(line['gap'] for line in self.lines)} s between two events")
        return self.lines

    def outcomes(self) -> Counter[str]:
        return Counter(line["outcome"] for line in self.lines)

    def lost(self, without: str = "") -> list[dict[str, Any]]:
        """Streams that were not whole, but for those on one host, by the name that the balancer's cookie has for it."""
        return [
            line for line in self.close() if line["outcome"] != "whole" and (not without or line["host"] != without)
        ]


@contextmanager
def streaming(address: str, password: str, *options: str) -> Iterator[Ledger]:
    """Users of a front door, from now until their ledger is asked for."""
    prober = Path(__file__).with_name("prober.py")
    command = [sys.executable, str(prober), address, "--password", password, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Ledger(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
