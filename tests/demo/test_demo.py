"""script/demo keeps README's promises in a clone of its own: a stream, quick again, no trace after --down."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    print("$", *command)
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    print(done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {**os.environ, "HANDOFF_DEMO_PORT": str(port), "HANDOFF_DEMO_NAME": "demo-test"}


def test_the_demo_from_clone_to_clean(tmp_path: Path, environment: dict[str, str]) -> None:
    clone = tmp_path / "clone"
    url = f"http://127.0.0.1:{environment['HANDOFF_DEMO_PORT']}/"
    assert run("git", "clone", "--quiet", ROOT, clone, cwd=tmp_path, environment=environment).returncode == 0
    try:
        first = run("script/demo", cwd=clone, environment=environment)
        assert first.returncode == 0
        assert first.stdout.count("\ndata: {") > 20
        assert "\ndata: [DONE]" in first.stdout
        assert "TASK [" in first.stdout, "the demo runs site.yml, and shows it"
        busy = re.search(r"While 20 streams were running, (\d+) of Apache's (\d+) workers were busy", first.stdout)
        assert busy and int(busy[1]) == 0, first.stdout[-2000:]
        assert url in first.stdout
        with urllib.request.urlopen(url, timeout=10) as page:
            assert page.status == 200
        # Set, not the lowest of its ports: another host that goes does not hold up what is open to this one.
        shown = ("podman", "network", "inspect", "--format", "{{.NetworkInterface}}", "socket-handoff")
        bridge = run(*shown, cwd=clone, environment=environment).stdout.strip()
        assert Path(f"/sys/class/net/{bridge}/addr_assign_type").read_text().strip() == "3"

        browser = run(*browser_tests(), cwd=clone, environment=browser_environment(clone, url, environment))
        assert browser.returncode == 0

        second = run("script/demo", cwd=clone, environment=environment)
        assert second.returncode == 0
        assert "TASK [" not in second.stdout, "nothing changed, so nothing is applied again"
        assert "\ndata: [DONE]" in second.stdout
    finally:
        down = run("script/demo", "--down", cwd=clone, environment=environment)
    assert down.returncode == 0
    left = run("podman", "ps", "--all", "--format", "{{.Names}}", cwd=clone, environment=environment).stdout.split()
    assert "socket-handoff-demo-test" not in left
    # Test hosts of your own keep what they are reached with; the demo's own state goes in any case.
    others = [name for name in left if name.startswith("socket-handoff-")]
    assert not (clone / ".cache" / "demo" if others else clone / ".cache").exists()


def browser_tests() -> list[object]:
    results = ROOT / ".cache" / "results" / "browser.xml"
    return [sys.executable, "-m", "pytest", "-q", ROOT / "tests" / "browser", f"--junitxml={results}"]


def browser_environment(clone: Path, url: str, environment: dict[str, str]) -> dict[str, str]:
    """The page of the running demo in a real browser; how to break and mend the daemon behind it."""
    ssh = f"ssh -F {clone}/.cache/ssh/config {environment['HANDOFF_DEMO_NAME']} sudo systemctl"
    units = "streaming-daemon.socket streaming-daemon.service"
    return {
        **environment,
        "HANDOFF_BASE_URL": url,
        "HANDOFF_USER": "demo",
        "HANDOFF_PASSWORD": (clone / ".cache" / "demo" / "password").read_text().strip(),
        "HANDOFF_STOP_DAEMON": f"{ssh} stop {units}",
        "HANDOFF_KILL_DAEMON": f"{ssh} stop {units}; {ssh} kill --kill-whom=all --signal=KILL streaming-daemon.service",
        "HANDOFF_START_DAEMON": f"{ssh} reset-failed; {ssh} start {units}",
        "HANDOFF_SCREENSHOTS": str(ROOT / ".cache" / "screenshots"),
    }


def test_a_port_that_is_taken_is_named(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environment["HANDOFF_DEMO_PORT"]))):
        refused = run("script/demo", cwd=ROOT, environment=environment)
    assert refused.returncode != 0
    assert f"something else listens on 127.0.0.1:{environment['HANDOFF_DEMO_PORT']}" in refused.stderr
    assert "what to do:" in refused.stderr


def test_an_impossible_port_is_named(environment: dict[str, str]) -> None:
    refused = run("script/demo", cwd=ROOT, environment={**environment, "HANDOFF_DEMO_PORT": "http"})
    assert refused.returncode != 0 and "HANDOFF_DEMO_PORT is 'http'" in refused.stderr
