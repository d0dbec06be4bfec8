"""The repository is the collection: its names resolve in a plain clone, and its archive holds what it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path) -> str:
    """Run one of Ansible's programs as a user of this directory does; return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows or would know, in a directory whose name means nothing."""
    target = tmp_path_factory.mktemp("anywhere") / "my checkout"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if not os.path.lexists(ROOT / name):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def test_full_names_resolve_in_a_plain_clone(clone):
    listed = run("ansible-doc", "--json", "socket_handoff.fleet.handoff_probe", cwd=clone)
    assert json.loads(listed)["socket_handoff.fleet.handoff_probe"]["doc"]["filename"].startswith(str(clone))


def test_every_plugin_documents_itself(clone):
    for kind, folder in (("module", "modules"), ("lookup", "lookup"), ("filter", "filter")):
        for path in sorted((ROOT / "plugins" / folder).glob("[!_]*.py")):
            name = f"socket_handoff.fleet.{path.stem}"
            text = run("ansible-doc", "--type", kind, name, cwd=clone)
            assert "EXAMPLES:" in text and "RETURN VALUES:" in text, name


@pytest.mark.parametrize("inventory", sorted(path.name for path in (ROOT / "examples/inventory").iterdir()))
def test_example_inventories_name_hosts_that_site_yml_would_deploy(clone, inventory):
    path = f"examples/inventory/{inventory}"
    assert run("ansible-playbook", "-i", path, "--syntax-check", "site.yml", cwd=clone)
    hosts = json.loads(run("ansible-inventory", "-i", path, "--list", "--limit", "web_hosts", cwd=clone))
    assert hosts["web_hosts"]["hosts"]
    assert not (clone / path / ".secrets").exists(), "looking at an inventory must not make passwords"


def test_passwords_that_ansible_makes_are_ignored_by_git():
    for path in (ROOT / "examples/inventory").iterdir():
        assert run("git", "check-ignore", str(path / ".secrets/handoff_app_password"), cwd=ROOT)


@pytest.fixture(scope="module")
def archive(clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection as ansible-galaxy builds it, beside the litter of a developer's day."""
    for litter in (".ansible/x", ".venv/x", "module-src/build/mod_socket_handoff.so", "daemon-src/.mypy_cache/x"):
        (clone / litter).parent.mkdir(parents=True, exist_ok=True)
        (clone / litter).write_text("litter")
    secret = clone / "examples/inventory/one-host/.secrets/handoff_app_password"
    secret.parent.mkdir()
    secret.write_text("s3cr3t")
    out = tmp_path_factory.mktemp("archive")
    run("ansible-galaxy", "collection", "build", "--output-path", str(out), cwd=clone)
    (built,) = out.glob("socket_handoff-fleet-*.tar.gz")
    return built


def test_the_archive_holds_what_the_roles_need_and_nothing_else(archive):
    with tarfile.open(archive) as content:
        names = {member.name for member in content.getmembers() if member.isfile()}
    assert {
        "site.yml",
        "playbooks/deploy.yml",
        "roles/apache_handoff/tasks/main.yml",
        "templates/etc/systemd/system/streaming-daemon.service.j2",
        "module-src/Makefile",
        "module-src/mod_socket_handoff.c",
        "daemon-src/streaming_daemon/__main__.py",
        "examples/php-app/public/stream.php",
        "plugins/module_utils/source_tree.py",
    } <= names
    top = {name.split("/")[0] for name in names}
    assert not top & {"tests", "molecule", "script", "benchmarks", ".config", ".ansible", ".venv", ".git", ".cache"}
    unwanted = ("/tests/", "_cache/", "__pycache__", "/build/", ".secrets")
    assert {name for name in names if any(part in name for part in unwanted)} == set()


def test_an_installed_archive_deploys_by_its_full_name(archive, tmp_path):
    run("ansible-galaxy", "collection", "install", "--offline", "-p", str(tmp_path), str(archive), cwd=tmp_path)
    (tmp_path / "ansible.cfg").write_text(f"[defaults]\ncollections_path = {tmp_path}\n")
    (tmp_path / "hosts").write_text("[web_hosts]\nchat.example.com\n")
    tasks = run("ansible-playbook", "-i", "hosts", "--list-tasks", "socket_handoff.fleet.deploy", cwd=tmp_path)
    assert "Put mod_socket_handoff and its configuration in place" in tasks


def test_without_an_inventory_no_host_is_touched_and_nothing_is_run(clone, tmp_path):
    """An empty ``inventory =`` means the directory of ansible.cfg, and Ansible runs whatever is executable in it."""
    trap, sprung = clone / "script" / "trap", tmp_path / "sprung"
    trap.write_text(f"#!/bin/sh\ntouch {sprung}\n")
    trap.chmod(0o755)
    listed = json.loads(run("ansible-inventory", "--list", cwd=clone))
    assert not sprung.exists(), "ansible-inventory executed a file of the checkout"
    assert listed["_meta"]["hostvars"] == {}
