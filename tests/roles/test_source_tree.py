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


@pytest.fixture
def mirror(sources, write, tmp_path):
    """A mirror whose host had a file of somebody else at the place of main.py; remove it with absent()."""
    return Mirror(sources, write, tmp_path)


class Mirror:
    def __init__(self, sources: Path, write, tmp_path: Path) -> None:
        self.sources, self.write = sources, write
        self.dest, self.foreign = tmp_path / "host/release", tmp_path / "state/foreign"
        self.manifest = tmp_path / "state/manifest.json"
        self.dest.mkdir(parents=True)
        self.main = self.dest / "main.py"
        self.copy = self.foreign / str(self.main).lstrip("/")
        self.main.write_text("somebody else's")
        self.main.chmod(0o640)

    def present(self, **more):
        return self.run(pack(self.sources)["parcel"], **more)

    def absent(self, **more):
        return self.run(None, state="absent", **more)

    def run(self, parcel, **more):
        return self.write(parcel, kind="mirror", manifest=str(self.manifest), foreign=str(self.foreign), **more)


def test_a_removed_mirror_gives_back_what_it_replaced(mirror):
    mirror.present()
    assert mirror.main.read_text() == "print('hello')\n"
    report = mirror.absent()
    assert (report["written"], report["removed"], report["kept"]) == (["main.py"], ["package/part.py"], [])
    assert mirror.main.read_text() == "somebody else's"
    assert mirror.main.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in mirror.dest.iterdir()) == ["main.py"]
    assert not mirror.copy.exists()
    assert not mirror.manifest.exists()
    assert mirror.absent()["changed"] is False


@pytest.mark.parametrize("stop_at", ["unlink", "rmdir", "rename", "fsync"])
@pytest.mark.parametrize("text", ["somebody else's", "print('hello')\n"])
def test_a_removal_cut_off_anywhere_and_run_again_loses_no_foreign_file(mirror, monkeypatch, stop_at, text):
    """Also where the foreign file has the very bytes of ours."""
    mirror.main.write_text(text)
    mirror.present()
    real = getattr(os, stop_at)
    for survived in range(20):
        left = survived

        def cut(*arguments, **more):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real(*arguments, **more)

        monkeypatch.setattr(os, stop_at, cut)
        try:
            mirror.absent()
        except KeyboardInterrupt:
            ended = False
        else:
            ended = True
        monkeypatch.setattr(os, stop_at, real)
        mirror.absent()
        assert mirror.main.read_text() == text, survived
        assert mirror.main.stat().st_mode & 0o777 == 0o640
        assert sorted(path.name for path in mirror.dest.iterdir()) == ["main.py"]
        assert not mirror.copy.exists()
        if ended:
            break
        mirror.present()
    else:
        raise AssertionError("no removal came to its end")
    assert survived > 0


def test_a_file_that_somebody_replaced_since_stays_and_is_named(mirror):
    mirror.present()
    mirror.main.write_text("by hand, later")
    (mirror.dest / "package/part.py").write_text("by hand, later")
    report = mirror.absent()
    assert report["kept"] == ["main.py", "package/part.py"]
    assert (report["written"], report["removed"]) == ([], [])
    assert mirror.main.read_text() == "by hand, later"
    assert (mirror.dest / "package/part.py").read_text() == "by hand, later"
    assert mirror.copy.read_text() == "somebody else's", "what is not back at its place stays where it is kept"


def test_what_somebody_wrote_after_a_removal_is_kept_as_well(mirror):
    mirror.present()
    mirror.main.write_text("by hand, later")
    mirror.absent()
    mirror.present()
    mirror.absent()
    assert mirror.main.read_text() == "by hand, later"
    assert mirror.copy.with_name("main.py.1").read_text() == "somebody else's"


def test_an_empty_directory_of_somebody_else_stays(mirror):
    mirror.present()
    (mirror.dest / "uploads").mkdir()
    (mirror.dest / "package/cache").mkdir()
    mirror.absent()
    assert (mirror.dest / "uploads").is_dir()
    assert (mirror.dest / "package/cache").is_dir()


def test_a_file_that_the_parcel_no_longer_has_gives_back_what_it_replaced(mirror):
    mirror.present()
    (mirror.sources / "main.py").unlink()
    report = mirror.present()
    assert (report["written"], report["removed"]) == (["main.py"], [])
    assert mirror.main.read_text() == "somebody else's"
    assert mirror.absent()["kept"] == []
    assert mirror.main.read_text() == "somebody else's"


def test_a_link_of_somebody_else_comes_back_as_a_link(mirror):
    mirror.main.unlink()
    mirror.main.symlink_to("elsewhere.py")
    mirror.present()
    assert not mirror.main.is_symlink()
    mirror.absent()
    assert os.readlink(mirror.main) == "elsewhere.py"


def test_a_run_cut_off_before_its_end_does_not_take_its_own_files_for_foreign(mirror, monkeypatch):
    real, done = os.rename, []

    def cut(source, target):
        if done:
            raise KeyboardInterrupt
        if str(target).endswith(".py") and str(mirror.foreign) not in str(target):
            done.append(target)
        return real(source, target)

    monkeypatch.setattr(os, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        mirror.present()
    monkeypatch.setattr(os, "rename", real)
    (mirror.sources / "package/part.py").write_text("# newer\n")
    mirror.present()
    assert mirror.absent()["kept"] == []
    assert mirror.main.read_text() == "somebody else's"
    assert not (mirror.dest / "package").exists()


def test_nobody_else_can_reach_what_is_kept(mirror):
    before = os.umask(0o022)
    try:
        mirror.present()
    finally:
        os.umask(before)
    assert mirror.copy.stat().st_mode & 0o777 == 0o640
    folder = mirror.copy.parent
    while folder != mirror.foreign.parent:
        assert folder.stat().st_mode & 0o777 == 0o700, folder
        folder = folder.parent
    assert folder.stat().st_mode & 0o777 == 0o755, "the notes beside it are no secret"


def test_the_owner_is_kept_and_comes_back(mirror, monkeypatch):
    owners = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, **_more: owners.append((str(path), uid, gid)))
    theirs = (os.getuid(), os.getgid())
    mirror.present()
    kept = list(owners)
    owners.clear()
    mirror.absent()
    assert [owner[1:] for owner in kept] == [theirs]
    assert [owner[1:] for owner in owners] == [theirs]


def test_check_mode_of_a_removal_says_the_same_and_changes_nothing(mirror):
    mirror.present()
    before = sorted(mirror.dest.rglob("*")), mirror.manifest.read_bytes()
    predicted = mirror.absent(check=True)
    assert (sorted(mirror.dest.rglob("*")), mirror.manifest.read_bytes()) == before
    assert mirror.copy.exists()
    assert mirror.absent() == predicted


def test_a_list_of_an_earlier_release_is_understood(mirror):
    mirror.present()
    mirror.manifest.write_text('["main.py", "package/part.py"]')
    assert mirror.absent()["removed"] == ["package/part.py"]
    assert mirror.main.read_text() == "somebody else's"


@pytest.mark.parametrize("text", ["nonsense", "7", '{"main.py": "x"}'])
def test_a_manifest_of_another_form_is_refused_and_nothing_is_removed(mirror, text):
    mirror.present()
    mirror.manifest.write_text(text)
    assert "is not the list this module writes" in mirror.absent()["msg"]
    assert mirror.main.read_text() == "print('hello')\n"
