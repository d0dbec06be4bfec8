"""What a release is: an archive with one digest for one commit, that works from a project that is not this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# Of what git tracks, only a developer needs these.
DEVELOPERS = re.compile(
    r"[.].*|galaxy[.]yml|ruff[.]toml|(benchmarks|molecule|script|tests|changelogs/fragments)/.*|changelogs/README[.]md"
    r"|(daemon-src/(tests|tools)|examples/php-(app|helper)/tests|module-src/tests)/.*|module-src/[.]clang-tidy"
)


def run(*command: str | Path, cwd: Path, succeeds: bool = True, **environment: str) -> str:
    """Run a program with the pinned tools and nothing of this checkout's settings; return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


def tracked() -> list[str]:
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's clone: other times, other umask, files of a working day beside what git tracks."""
    target = tmp_path_factory.mktemp("elsewhere") / "clone"
    for name in [*tracked(), "galaxy.yml"]:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name, follow_symlinks=False)
            if not (target / name).is_symlink():
                (target / name).chmod(0o750 if os.access(ROOT / name, os.X_OK) else 0o600)
                os.utime(target / name, (1, 1))
    (target / "notes.txt").write_text("mine\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    run("git", "init", "-q", cwd=target)
    run("git", "add", *tracked(), cwd=target)
    run("git", *identity, "commit", "-qm", "x", cwd=target)
    return target


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What script/package builds here."""
    out = tmp_path_factory.mktemp("package")
    printed = run(sys.executable, ROOT / "script/package", out, cwd=ROOT, SOURCE_DATE_EPOCH="1700000000")
    (built,) = out.glob("*.tar.gz")
    assert str(built) in printed
    return built


def test_the_archive_has_one_digest_whoever_builds_it(archive, clone, tmp_path):
    run(sys.executable, clone / "script/package", tmp_path, cwd=clone, SOURCE_DATE_EPOCH="1700000000")
    assert (tmp_path / archive.name).read_bytes() == archive.read_bytes()
    run(sys.executable, clone / "script/package", tmp_path, cwd=clone, SOURCE_DATE_EPOCH="1700000001")
    assert (tmp_path / archive.name).read_bytes() != archive.read_bytes(), "the moment is not in the archive"


def test_the_archive_has_what_git_tracks_but_for_what_only_developers_need(archive):
    with tarfile.open(archive) as content:
        members = content.getmembers()
    files = {member.name for member in members if not member.isdir()}
    wanted = {name for name in tracked() if not DEVELOPERS.fullmatch(name) and (ROOT / name).exists()}
    assert files == wanted | {"MANIFEST.json", "FILES.json"}
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(1700000000, 0, 0, "")}
    assert {member.mode & 0o777 for member in members} <= {0o644, 0o755}


@pytest.fixture(scope="module")
def project(archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody else's with the collection installed, and none of this checkout's settings."""
    home = tmp_path_factory.mktemp("project")
    run("ansible-galaxy", "collection", "install", "--offline", "-p", home / "collections", archive, cwd=home)
    (home / "ansible.cfg").write_text(f"[defaults]\ncollections_path = {home}/collections\n")
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (home / "hosts.yml").write_text(yaml.safe_dump({"web_hosts": {"hosts": {"localhost": host}}}))
    return home


def test_every_installed_file_is_the_one_that_was_packed(project):
    checked = run("ansible-galaxy", "collection", "verify", "--offline", "socket_handoff.fleet", cwd=project)
    assert "Successfully verified that checksums" in checked
    readme = project / "collections/ansible_collections/socket_handoff/fleet/README.md"
    before = readme.read_bytes()
    readme.write_text("changed\n")
    run("ansible-galaxy", "collection", "verify", "--offline", "socket_handoff.fleet", cwd=project, succeeds=False)
    readme.write_bytes(before)


def play(project: Path, text: str, *arguments: str, succeeds: bool = True) -> str:
    (project / "play.yml").write_text(text)
    return " ".join(
        run("ansible-playbook", "-i", "hosts.yml", *arguments, "play.yml", cwd=project, succeeds=succeeds).split()
    )


FACTS = """\
    - ansible.builtin.set_fact:
        {distribution: Debian, distribution_major_version: '13', service_mgr: systemd, cacheable: true}
"""
ROLES = f"""\
- hosts: web_hosts
  gather_facts: false
  tasks:
{FACTS}
    - ansible.builtin.import_role:
        name: socket_handoff.fleet.streaming_daemon
        tasks_from: assert
    - ansible.builtin.import_role:
        name: socket_handoff.fleet.apache_handoff
        tasks_from: assert
    - ansible.builtin.include_role:
        name: socket_handoff.fleet.handoff_app
        tasks_from: assert
"""
PLUGINS = """\
- hosts: web_hosts
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg: >-
          {{ ['x.conf'] | socket_handoff.fleet.apache_links('mods') | map(attribute='path') | first }}
          {{ query('socket_handoff.fleet.unknown_variables') | join }}
          {{ lookup('socket_handoff.fleet.playbook_options', 'deploy').streaming_daemon_ack.type }}
          {{ lookup('socket_handoff.fleet.source_tree', sources, patterns=['*.py']).files | first }}
      vars:
        sources: collections/ansible_collections/socket_handoff/fleet/daemon-src/streaming_daemon
    - socket_handoff.fleet.handoff_probe:
        url: http://127.0.0.1:9
        timeout: 1
"""


def test_roles_work_by_their_full_names_from_another_project(project):
    password = ["-e", "handoff_app_password=correct-horse"]
    assert "failed=0" in play(project, ROLES, *password)
    said = play(project, ROLES, *password, "-e", "streaming_deamon_workers=2", succeeds=False)
    assert "streaming_deamon_workers is not known; did you mean streaming_daemon_workers?" in said


def test_plugins_and_modules_work_by_their_full_names_from_another_project(project):
    said = play(project, PLUGINS, "-e", "handoff_app_prt=1", succeeds=False)
    assert "mods-enabled/x.conf handoff_app_prt is not known; did you mean handoff_app_port? bool __init__.py" in said
    assert "127.0.0.1:9" in said and "refused" in said, "the module itself has to have run"


def test_playbooks_work_by_their_full_names_from_another_project(project):
    for name in ("deploy", "verify"):
        listed = run("ansible-playbook", "-i", "hosts.yml", "--list-tasks", f"socket_handoff.fleet.{name}", cwd=project)
        assert "Check the inputs of this playbook" in listed
    said = run(
        *("ansible-playbook", "-i", "hosts.yml", "socket_handoff.fleet.deploy", "-e", "streaming_daemon_ack=perhaps"),
        cwd=project,
        succeeds=False,
    )
    assert "argument 'streaming_daemon_ack' is of type str" in " ".join(said.split())
    assert "changed=0" in said


def test_the_changelog_is_what_its_fragments_say():
    run(sys.executable, "script/changelog", "--check", cwd=ROOT)


def test_a_changelog_edited_by_hand_is_noticed_and_a_release_keeps_every_word(clone):
    """In the clone: a line of somebody's own, then a release as script/changelog makes it."""
    changelog = clone / "CHANGELOG.md"
    before = changelog.read_text()
    changelog.write_text(f"{before}- by hand\n")
    said = run(sys.executable, "script/changelog", "--check", cwd=clone, succeeds=False)
    assert "write a fragment below changelogs/fragments" in said and "-- by hand" in said
    run(sys.executable, "script/changelog", "--release", cwd=clone)
    after = changelog.read_text()
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    assert "## Unreleased" not in after and f"## {version} - " in after
    assert list((clone / "changelogs/fragments").glob("*.yml")) == []
    assert sorted(before.split("## Unreleased")[1].splitlines()) == sorted(after.split(" - ", 1)[1][10:].splitlines())
    run(sys.executable, "script/changelog", "--check", cwd=clone)


def test_a_wrong_fragment_is_refused(clone):
    (clone / "changelogs/fragments/wrong.yml").write_text("novelties:\n  - something\n")
    said = run(sys.executable, "script/changelog", "--check", cwd=clone, succeeds=False)
    assert "novelties" in said
    (clone / "changelogs/fragments/wrong.yml").unlink()


def test_production_rules_hold_without_an_exception():
    config = yaml.safe_load((ROOT / ".ansible-lint").read_text())
    assert config["profile"] == "production"
    assert not {"skip_list", "warn_list", "mock_roles", "mock_modules"} & set(config)
    assert not (ROOT / ".ansible-lint-ignore").exists()
    rooms = re.compile(r"(roles|playbooks|molecule)/.*[.]yml|site[.]yml|galaxy[.]yml|meta/.*")
    for name in filter(rooms.fullmatch, tracked()):
        assert not re.search(r"#\s*noqa|skip_ansible_lint|yamllint disable", (ROOT / name).read_text()), name


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(document: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    text = document.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def core_lines(python: tuple[int, int]) -> set[str]:
    """The lines of ansible-core that the tests run with on a machine with this Python."""
    found = set()
    for name in ("requirements.txt", "requirements-second-core.txt"):
        for line in (ROOT / "script" / name).read_text().splitlines():
            pinned = re.match(r"ansible-core==(\d+[.]\d+)[.]\d+(?:; python_version (<|>=) '(\d+)[.](\d+)')?$", line)
            if pinned:
                limit = (int(pinned[3]), int(pinned[4])) if pinned[2] else None
                if limit is None or (python < limit) == (pinned[2] == "<"):
                    found.add(pinned[1])
    return found


def test_the_controllers_that_are_called_proven_are_those_that_the_tests_use():
    head, *rows = table(ROOT / "COMPATIBILITY.md", "Controllers")
    assert head[:3] == ["ansible-core", "Python", "checks of inputs, playbooks, archive"]
    proven = {row[0].split()[0] for row in rows if row[2] == "x"}
    assert proven == core_lines((3, 11)), "Debian 12, where all lanes run"
    assert {row[0].split()[0] for row in rows} >= core_lines((3, 13))
    assert [row[0] for row in rows if row[3] == "x"] == ["2.19 (pinned)"]
    lowest = min(tuple(map(int, row[0].split()[0].split("."))) for row in rows)
    asked = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["requires_ansible"]
    assert asked == ">=" + ".".join(map(str, lowest)) + ".0"


def test_the_hosts_that_are_called_proven_are_those_of_the_scenarios():
    head, *rows = table(ROOT / "COMPATIBILITY.md", "Hosts")
    releases = re.findall(r"Debian (\d+)", " ".join(head))
    for role in (ROOT / "roles").iterdir():
        assert f"in {releases}" in (role / "tasks/assert.yml").read_text(), role.name
    scenarios = {"event": "default", "prefork": "prefork"}
    for row in rows:
        for release, mark in zip(releases, row[1:], strict=True):
            mpm = re.search(r"MPM (\w+)", row[0])
            balancer = row[0].startswith("load balancer")
            scenario = "default" if balancer else scenarios.get(mpm[1]) if mpm else None
            hosts = ROOT / f"molecule/{scenario}/inventory/hosts.yml"
            group = yaml.safe_load(hosts.read_text())["load_balancers" if balancer else "web_hosts"] if scenario else {}
            proven = {"test_host_debian_release": int(release)} in group.get("hosts", {}).values()
            assert mark == ("x" if proven else "(x)"), (row[0], release)


def test_the_manifest_names_what_galaxy_shows(archive):
    with tarfile.open(archive) as content:
        stream = content.extractfile("MANIFEST.json")
        assert stream
        info = json.load(stream)["collection_info"]
    assert (info["namespace"], info["name"], info["license"]) == ("socket_handoff", "fleet", ["Apache-2.0"])
    assert info["dependencies"] == {}
