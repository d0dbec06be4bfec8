"""The suite itself: red for a daemon that is wrong, loud where a compiler is missing. And the examples' units."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "conformance" / "run"
EXAMPLES = ROOT / "examples" / "daemons"
UNITS = sorted((EXAMPLES / "systemd").iterdir())


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def rude(tmp_path: Path) -> Iterator[Path]:
    """A daemon that answers everybody with something that is no response, and does not linger."""
    path = tmp_path / "rude.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(16)

    def serve() -> None:
        while True:
            try:
                apache, _ = listener.accept()
            except OSError:
                return
            with apache:
                _, fds, _, _ = socket.recv_fds(apache, 1 << 18, 4)
            for fd in fds:
                with socket.socket(fileno=fd) as client:
                    client.send(b"hello\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_somebody_elses_daemon_that_is_wrong_is_told_so(rude: Path) -> None:
    done = run("--socket", rude, "--case", "status line")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "FAILED yours, direct: status line and headers of a stream, plain\n  not a status line: 'hello'" in done.stdout
    )
    assert "0 passed, 2 failed, 0 not applicable" in done.stdout


def test_somebody_elses_daemon_that_is_right_passes(tmp_path: Path) -> None:
    path = tmp_path / "right.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    launcher = ROOT / "tests" / "conformance" / "daemons.py"
    command = [
        sys.executable,
        str(launcher),
        str(listener.fileno()),
        "/usr/bin/python3",
        str(EXAMPLES / "test_daemon.py"),
    ]
    with listener:
        daemon = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        done = run("--socket", path, "--case", "chunks of 1")
    finally:
        daemon.terminate()
        daemon.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 0 failed, 0 not applicable" in done.stdout


def test_what_a_daemon_cannot_is_not_counted_as_passed(rude: Path) -> None:
    done = run("--socket", rude, "--can", "plain", "--case", "chunks of 1")
    assert done.returncode == 1, done.stdout
    assert "0 passed, 0 failed, 2 not applicable" in done.stdout
    assert "yours: echo: not in --can: answers with the words of the prompt (1)" in done.stdout


def test_a_capability_that_does_not_exist_is_refused(rude: Path) -> None:
    done = run("--socket", rude, "--can", "plain,fly")
    assert done.returncode == 2
    assert "--can: ['fly']; allowed are plain, envelope" in done.stderr


def test_a_missing_compiler_is_named_before_anything_runs(tmp_path: Path) -> None:
    done = run("--through", "direct", PATH=str(tmp_path))
    assert done.returncode == 2, done.stdout
    assert "go needs go, of Debian's package golang-go" in done.stderr
    assert "php needs php, of Debian's package php-cli" in done.stderr
    assert done.stdout == ""


def test_the_ten_lines_of_the_protocol_are_the_same_in_every_language() -> None:
    found = {}
    for path in (
        EXAMPLES / name for name in ("test_daemon.py", "streaming_daemon.go", "streaming_daemon.php", "handoff_exec.c")
    ):
        lines = re.findall(r"^(?://| \*)?\s*(\d+)\.\s+(.+)$", path.read_text(), re.MULTILINE)
        # The flag is the language's own way to write one; handoff_exec leaves the response to its program.
        found[path.name] = [re.sub(r"\(here: -{1,2}a(ck)?\)", "", text) for number, text in lines if number != "7"]
        assert len(lines) == 10, path
    assert len({tuple(lines) for lines in found.values()}) == 1, found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_every_unit_has_its_other_half(unit: Path) -> None:
    other = unit.with_suffix(".socket" if unit.suffix == ".service" else ".service")
    assert other in UNITS
    text = unit.read_text()
    if unit.suffix == ".service":
        assert f"Requires={other.name}\n" in text
        named = re.findall(r"/usr/local/lib/handoff/([\w.]+)", text)
        built = {"streaming_daemon": "streaming_daemon.go", "handoff_exec": "handoff_exec.c"}
        assert named and all((EXAMPLES / built.get(name, name)).exists() for name in named)


def test_systemd_accepts_the_units_and_finds_them_shut(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOTHING TESTED: systemd-analyze is not installed (Debian's package systemd)")
    for unit in UNITS:
        # Here nothing is installed where the units say.
        text = re.sub(r"^ExecStart=.*$", "ExecStart=/usr/bin/true", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *sorted(map(str, tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for service in sorted(tmp_path.glob("*.service")):
        # Ten times the exposure level: 0 is none, 10 is an ordinary service of root's.
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=10", str(service)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
