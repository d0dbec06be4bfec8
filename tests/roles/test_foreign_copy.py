"""What somebody else wrote is kept whole, with everything that belongs to it, and never lost."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def keep(run_module: Any, tmp_path: Path) -> Any:
    def run(path: str | Path = tmp_path / "etc/app.conf", check: bool = False, directory: str | None = None) -> Any:
        kept = directory or str(tmp_path / "notes/kept")
        return run_module("foreign_copy", check=check, path=str(path), directory=kept)

    return run


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    path = tmp_path / "etc/app.conf"
    path.parent.mkdir()
    path.write_text("by hand")
    path.chmod(0o640)
    os.utime(path, (1000, 2000))
    return path


@pytest.fixture
def copy(theirs: Path, tmp_path: Path) -> Path:
    """Where the copy of theirs belongs."""
    return tmp_path / "notes/kept" / str(theirs).lstrip("/")


def test_a_copy_has_all_that_the_file_has_and_is_made_once(keep: Any, theirs: Path, copy: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(theirs, 12, 34)
    theirs.chmod(0o4750)
    assert keep()["changed"] is True
    assert copy.read_text() == "by hand"
    was, now = theirs.stat(), copy.stat()
    assert (now.st_mode, now.st_uid, now.st_gid, now.st_mtime) == (was.st_mode, was.st_uid, was.st_gid, was.st_mtime)
    assert stat.S_IMODE((tmp_path / "notes/kept").stat().st_mode) == 0o700
    assert stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
    inode = copy.stat().st_ino
    answer = keep()
    assert (answer["changed"], answer["copy"]) == (False, str(copy))
    assert copy.stat().st_ino == inode
    assert [path.name for path in copy.parent.iterdir()] == ["app.conf"]


def test_an_earlier_copy_of_something_else_stays_beside_it(keep: Any, theirs: Path, copy: Path) -> None:
    keep()
    for number, text in ((1, "again"), (2, "by hand")):
        theirs.write_text(text)
        assert keep()["earlier"] == f"{copy}.~{number}~"
    assert copy.read_text() == "by hand"
    assert Path(f"{copy}.~1~").read_text() == "by hand"
    assert Path(f"{copy}.~2~").read_text() == "again"
    # The same size and the same time are not the same content.
    theirs.write_text("by foot")
    os.utime(theirs, ns=(copy.stat().st_atime_ns, copy.stat().st_mtime_ns))
    assert keep()["changed"] is True
    assert copy.read_text() == "by foot"


def test_what_a_symlink_leads_to_is_kept(keep: Any, theirs: Path, tmp_path: Path) -> None:
    link = tmp_path / "etc/link.conf"
    link.symlink_to(theirs)
    answer = keep(link)
    kept = Path(answer["copy"])
    assert not kept.is_symlink()
    assert kept.read_text() == "by hand"


def test_check_mode_says_it_and_makes_nothing(keep: Any, theirs: Path, copy: Path, tmp_path: Path) -> None:
    assert keep(check=True)["changed"] is True
    assert not (tmp_path / "notes").exists()
    keep()
    assert keep(check=True)["changed"] is False
    theirs.write_text("again")
    assert keep(check=True)["earlier"] == f"{copy}.~1~"
    assert copy.read_text() == "by hand"
    assert not Path(f"{copy}.~1~").exists()


def test_a_copy_that_cannot_be_finished_leaves_the_earlier_one(
    keep: Any, theirs: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep()
    theirs.write_text("again")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    answer = keep()
    assert answer["failed"] is True
    assert (
        answer["msg"]
        == f"path {theirs} cannot be kept in {copy.parents[len(theirs.parts) - 2]}: No space left on device"
    )
    assert copy.read_text() == "by hand"


@pytest.mark.parametrize(
    ("path", "says"), [("etc/app.conf", "allowed is an absolute path"), ("/no/such", "is no file")]
)
def test_a_path_that_cannot_be_meant_is_refused(keep: Any, path: str, says: str) -> None:
    answer = keep(path)
    assert answer["failed"] is True
    assert path in answer["msg"]
    assert says in answer["msg"]
