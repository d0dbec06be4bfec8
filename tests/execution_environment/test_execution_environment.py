"""The execution environment builds from this checkout, and runs its playbooks: no name, no home, no checkout."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = sorted(path.name.removesuffix(".meta.yml") for path in (ROOT / "playbooks").glob("*.meta.yml"))
INVENTORY = "web_hosts:\n  hosts:\n    web1:\n      handoff_app_password: correct horse battery\n"


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="module")
def image() -> str:
    base = run(ROOT / "script/image", "13").stdout.split()[-1]
    built = run(ROOT / "script/execution-environment", "--build-arg", f"EE_BASE_IMAGE={base}")
    return built.stdout.split()[-1]


def podman(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What the project's scripts call podman: root's, with the settings for this machine."""
    words = '. "$0"/lib.sh; podman "$@"'
    return run("bash", "-c", words, ROOT / "script", *command, check=check)


def inside(image: str, work: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command as any user of the group root, as OpenShift and AWX do."""
    mount = f"{work}:/runner/project:ro"
    return podman(
        *("run", "--rm", "--user", "1234:0", "--network", "none", "--volume", mount, image),
        *command,
        check=check,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "hosts.yml").write_text(INVENTORY)
    tmp_path.chmod(0o755)
    return tmp_path


def test_it_has_the_ansible_core_that_the_scripts_pin_and_this_checkouts_collection(image, project):
    pinned = re.search(r"^ansible-core==(\S+)", (ROOT / "script/requirements.txt").read_text(), re.M)
    assert pinned
    assert f"[core {pinned[1]}]" in inside(image, project, "ansible", "--version").stdout
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    listed = inside(image, project, "ansible-galaxy", "collection", "list", "socket_handoff.fleet").stdout
    assert re.search(rf"socket_handoff\.fleet\s+{re.escape(version)}\s", listed), listed


@pytest.mark.parametrize("name", PLAYBOOKS)
def test_it_reads_every_playbook_of_the_collection(image, project, name):
    playbook = f"socket_handoff.fleet.{name}"
    inventory = "/runner/project/hosts.yml"
    inside(image, project, "ansible-playbook", "-i", inventory, "--syntax-check", playbook)


def test_it_runs_a_playbook_as_far_as_a_machine_alone_can(image, project):
    """To the refusal of an input, which needs the collection's own plugins and its specs."""
    command = ["ansible-playbook", "-i", "/runner/project/hosts.yml", "socket_handoff.fleet.rollout"]
    refused = inside(image, project, *command, "-e", '{"rollout_release": "1 0"}', check=False)
    assert refused.returncode == 2
    assert 'rollout_release is "1 0"; allowed are' in " ".join(refused.stdout.split())
    # A release that is right goes on to the hosts, which this machine alone has not.
    right = inside(image, project, *command, "-e", "rollout_release=1.0", check=False)
    assert "is not known" not in right.stdout
    assert "UNREACHABLE" in right.stdout


def test_what_awx_and_ansible_themselves_need_is_there(image, project):
    for program in ("ansible-runner", "git", "ssh", "dumb-init"):
        assert inside(image, project, "sh", "-c", f"command -v {program}").stdout.strip()
