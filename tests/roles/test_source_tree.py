"""Sources travel as one parcel: the same tree has the same name everywhere, and arrives whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    (root / "package/__pycache__").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "main.py").write_text("print('hello')\n")
    (root / "package/part.py").write_text("# part\n")
    (root / "package/__pycache__/part.pyc").write_bytes(b"\0")
    (root / "tests/test_main.py").write_text("")
    (root / ".hidden.py").write_text("")
    (root / "README.md").write_text("")
    return root


def pack(root: Path) -> dict[str, object]:
    from ansible.plugins.loader import lookup_loader

    lookup = lookup_loader.get("socket_handoff.fleet.source_tree")
    (tree,) = lookup.run([str(root)], variables={}, patterns=["*.py"])
    return tree


@pytest.fixture
def write(run_module, tmp_path):
    def run(parcel, check=False, **arguments):
        return run_module("source_tree", check=check, dest=str(tmp_path / "host/release"), parcel=parcel, **arguments)

    return run


def test_only_sources_are_packed(sources):
    assert pack(sources)["files"] == ["main.py", "package/part.py"]


def test_the_digest_depends_on_paths_and_bytes_only(sources):
    before = pack(sources)["digest"]
    os.utime(sources / "main.py", (0, 0))
    (sources / "main.py").chmod(0o755)
    (sources / "package/__pycache__/more.pyc").write_bytes(b"")
    assert pack(sources)["digest"] == before
    (sources / "main.py").rename(sources / "main2.py")
    assert pack(sources)["digest"] != before


def test_a_release_arrives_whole_with_readable_modes(sources, write, tmp_path):
    before = os.umask(0o077)
    try:
        report = write(pack(sources)["parcel"], prefix="app")
    finally:
        os.umask(before)
    release = tmp_path / "host/release"
    assert report["changed"] is True
    assert (release / "app/package/part.py").read_text() == "# part\n"
    assert [
        oct(path.stat().st_mode & 0o777) for path in (release, release / "app/package", release / "app/main.py")
    ] == [
        "0o755",
        "0o755",
        "0o644",
    ]
    assert [path.name for path in release.parent.iterdir()] == ["release"], "nothing half-made may lie about"
    assert write(pack(sources)["parcel"], prefix="app")["changed"] is False


def test_byte_code_beside_a_release_is_no_damage(sources, write, tmp_path):
    write(pack(sources)["parcel"])
    (tmp_path / "host/release/__pycache__").mkdir()
    (tmp_path / "host/release/__pycache__/main.pyc").write_bytes(b"\0")
    assert write(pack(sources)["parcel"])["changed"] is False


def test_a_damaged_release_is_replaced(sources, write, tmp_path):
    write(pack(sources)["parcel"])
    (tmp_path / "host/release/main.py").write_text("edited by hand")
    (tmp_path / "host/release/extra.py").write_text("")
    report = write(pack(sources)["parcel"])
    assert (report["written"], report["removed"]) == (["main.py"], ["extra.py"])
    assert (tmp_path / "host/release/main.py").read_text() == "print('hello')\n"
    assert not (tmp_path / "host/release/extra.py").exists()


def test_check_mode_predicts_and_writes_nothing(sources, write, tmp_path):
    assert write(pack(sources)["parcel"], check=True)["written"] == ["main.py", "package/part.py"]
    assert not (tmp_path / "host").exists()


def test_a_mirror_removes_what_it_brought_and_nothing_else(sources, write, tmp_path):
    manifest = {"kind": "mirror", "manifest": str(tmp_path / "state/manifest.json")}
    write(pack(sources)["parcel"], **manifest)
    (tmp_path / "host/release/uploaded.txt").write_text("somebody else's")
    (sources / "package/part.py").unlink()
    (sources / "main.py").write_text("print('changed')\n")
    report = write(pack(sources)["parcel"], **manifest)
    assert (report["written"], report["removed"]) == (["main.py"], ["package/part.py"])
    assert (tmp_path / "host/release/uploaded.txt").exists()
    assert write(pack(sources)["parcel"], **manifest)["changed"] is False


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//b", "./a"])
def test_a_parcel_cannot_name_a_path_outside_its_tree(write, path, tmp_path):
    from ansible_collections.socket_handoff.fleet.plugins.module_utils.source_tree import pack as pack_files

    assert "outside its tree" in write(pack_files({path: b"x"}))["msg"]
    assert not (tmp_path / "host").exists()


def test_a_damaged_parcel_is_refused(write):
    assert "the parcel is damaged" in write("bm90IGEgcGFyY2Vs")["msg"]
