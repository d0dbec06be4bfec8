"""Builds that the controller keeps: which are found, which are refused, and which host builds for which."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleError
from ansible.plugins.loader import lookup_loader
from in_process import ASSERT, refusals, sentences

WANTED = {"debian": "12", "architecture": "amd64", "mmn": "20120211:142", "sources": "5" * 64}


def shelve(root: Path, name: str, age: int = 0, content: bytes = b"\x7fELF", **entries: Any) -> Path:
    """Put a finished build on the shelf, so many seconds old; return its directory."""
    folder = root / "debian12-amd64" / name
    folder.mkdir(parents=True)
    (folder / "mod_socket_handoff.so").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = {**WANTED, "key": name, "version": "0.1.0", "sha256": sha256, "module": "mod_socket_handoff", **entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.utime(folder / "manifest.json", (1_700_000_000 - age,) * 2)
    return folder


def find(root: Path, **match: str) -> list[dict[str, Any]]:
    lookup = lookup_loader.get("socket_handoff.fleet.artefacts")
    found: list[dict[str, Any]] = lookup.run([str(root)], variables={}, match=match)
    return found


def test_builds_that_match_are_found_the_newest_first(tmp_path):
    shelve(tmp_path, "old", age=60)
    new = shelve(tmp_path, "new")
    shelve(tmp_path, "other", mmn="20120211:141")
    found = find(tmp_path, **WANTED)
    assert [manifest["key"] for manifest in found] == ["new", "old"]
    assert found[0]["path"] == str(new / "mod_socket_handoff.so")


def test_what_is_not_finished_is_not_there(tmp_path):
    assert find(tmp_path / "nowhere") == []
    (shelve(tmp_path, "cut-off") / "manifest.json").unlink()
    assert find(tmp_path) == []


def test_a_damaged_build_is_refused_with_both_checksums_and_others_are_left_alone(tmp_path):
    folder = shelve(tmp_path, "damaged")
    (folder / "mod_socket_handoff.so").write_bytes(b"\x7fELf")
    assert find(tmp_path, debian="13") == []
    with pytest.raises(AnsibleError) as refusal:
        find(tmp_path, **WANTED)
    for digest in (hashlib.sha256(b"\x7fELf").hexdigest(), hashlib.sha256(b"\x7fELF").hexdigest()):
        assert digest in str(refusal.value)
    assert f"Remove {folder}" in str(refusal.value)
    (folder / "mod_socket_handoff.so").unlink()
    with pytest.raises(AnsibleError, match="No such file"):
        find(tmp_path, **WANTED)


@pytest.mark.parametrize("entries", [{"version": "../../../x"}, {"key": "/etc"}, {"key": ""}])
def test_a_manifest_that_would_choose_the_path_on_the_hosts_is_refused(tmp_path, entries):
    shelve(tmp_path, "x", **entries)
    with pytest.raises(AnsibleError, match=rf"is no manifest of a build \({next(iter(entries))}\)"):
        find(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    folder = shelve(tmp_path, "x")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(AnsibleError, match=r"is no manifest of a build .*allowed is a JSON object with the texts"):
        find(tmp_path)


FACTS = {
    "builder12": {},
    "builder13": {"distribution_major_version": "13"},
    "builder12arm": {"architecture": "aarch64"},
    "ubuntu": {"distribution": "Ubuntu"},
}


def answers(work: Path, builders: list[str], **facts: str) -> str:
    """What the host web is told; empty where nothing is refused."""
    given = {"apache_handoff_build": "build_host", "apache_handoff_build_hosts": builders}
    hosts = {"web": given, **{name: {} for name in FACTS}}
    answer = refusals(ASSERT.format(role="apache_handoff"), hosts, work, {**FACTS, "web": facts})["web"]
    return sentences(answer) if answer else ""


def test_a_host_like_one_of_the_build_hosts_is_content(tmp_path):
    assert answers(tmp_path / "a", ["builder13", "builder12"]) == ""
    assert answers(tmp_path / "b", ["builder12", "builder12arm"], architecture="aarch64") == ""
    assert answers(tmp_path / "c", ["builder13"], distribution_major_version="13") == ""


@pytest.mark.parametrize(
    ("builders", "facts", "platform", "named"),
    [
        (["builder13"], {}, "Debian 12 on amd64", "builder13 (Debian 13 on amd64)"),
        (["builder12"], {"architecture": "aarch64"}, "Debian 12 on arm64", "builder12 (Debian 12 on amd64)"),
        (["builder12"], {"architecture": "riscv64"}, "Debian 12 on riscv64", "builder12 (Debian 12 on amd64)"),
        (["ubuntu"], {}, "Debian 12 on amd64", "ubuntu (Ubuntu 12 on amd64)"),
        ([], {}, "Debian 12 on amd64", "none"),
    ],
)
def test_a_host_like_none_of_them_is_refused_and_both_are_named(tmp_path, builders, facts, platform, named):
    said = answers(tmp_path / "work", builders, **facts)
    assert f"the host is {platform}, and apache_handoff_build_hosts names {named}; allowed is" in said
    assert "Nothing was changed" in said


def test_a_package_for_the_hosts_release_and_architecture_is_looked_for_on_the_controller(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/libapache2-mod-socket-handoff_0.1.0~deb12_amd64.deb").write_bytes(b"")
    given = {"apache_handoff_build": "package", "apache_handoff_package_dir": str(tmp_path / "packages")}
    facts = {"trixie": {"distribution_major_version": "13"}, "arm": {"architecture": "aarch64"}}
    hosts = dict.fromkeys(("bookworm", *facts), given)
    found = refusals(ASSERT.format(role="apache_handoff"), hosts, tmp_path / "work", facts)
    assert found["bookworm"] is None
    for host, name in (("trixie", "0.1.0~deb13_amd64.deb"), ("arm", "0.1.0~deb12_arm64.deb")):
        answer = found[host]
        assert answer and f"{name} is not there for Debian" in sentences(answer)
