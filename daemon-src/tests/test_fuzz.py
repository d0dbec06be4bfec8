"""The fuzzer that does not fuzz says so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "fuzz/run.py"


def run(hidden: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without atheris, whether it is installed or not."""
    (hidden / "atheris.py").write_text("raise ImportError\n")
    path = os.pathsep.join(filter(None, [str(hidden), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(RUN), "sse", "--seconds", "1", "--work", str(hidden), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.version_info >= (3, 14),
    reason="NOT TESTED: there are no wheels of atheris for this machine or this Python",
)
def test_without_the_fuzzer_that_should_be_there_the_lane_fails(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "atheris is not installed: run script/bootstrap test" in done.stderr


def test_who_asks_for_guesses_gets_them(tmp_path: Path) -> None:
    done = run(tmp_path, "--guess")
    assert done.returncode == 0, done.stderr
    assert "sse: without atheris; hypothesis tried " in done.stdout
