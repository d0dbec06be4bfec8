"""Encrypted credentials: by a stand-in for systemd-creds that shows what it was told, and by the real one."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

# "Encrypts" by writing down name, key and value, so that a test can read what a file holds.
STAND_IN = """\
#!/bin/sh
echo "$*" >>"$CALLS"
case $1 in
    encrypt)
        [ "$3" = --with-key=tpm2 ] && { echo 'No TPM2 support' >&2; exit 1; }
        printf '%s\\n%s\\n' "$2" "$3"; cat ;;
    decrypt) [ "$(head -n 1 "$3")" = "$2" ] || exit 1; tail -n +3 "$3" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/systemd-creds"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


@pytest.fixture
def keep(run_module, tmp_path):
    def run(value="s3cr3t", check=False, name="api_key", **more):
        return run_module(
            "systemd_credential", check=check, name=name, value=value, path=str(tmp_path / "c.cred"), **more
        )

    return run


@pytest.mark.usefixtures("calls")
def test_a_value_is_written_once_and_again_when_it_changes(keep, tmp_path):
    path = tmp_path / "c.cred"
    assert keep()["reason"] == "it was not there"
    assert path.read_text() == "--name=api_key\n--with-key=auto\ns3cr3t"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.stat().st_ino
    assert keep()["changed"] is False
    assert path.stat().st_ino == before
    assert keep("c0ff33")["reason"] == "its value is another"
    assert path.read_text().endswith("\nc0ff33")
    assert keep("c0ff33", name="renamed")["reason"] == "it could not be decrypted here"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bin", "c.cred", "calls"]


def test_check_mode_says_the_same_and_writes_nothing(keep, calls, tmp_path):
    assert keep(check=True)["changed"] is True
    assert not (tmp_path / "c.cred").exists()
    keep()
    assert keep(check=True)["changed"] is False
    assert keep("c0ff33", check=True)["changed"] is True
    assert (tmp_path / "c.cred").read_text().endswith("\ns3cr3t")
    assert calls.read_text().count("encrypt") == 1


def test_the_value_is_in_no_argument_and_in_no_answer(keep, calls):
    answers = [keep(), keep(), keep("s3cr3t2")]
    assert "s3cr3t" not in calls.read_text()
    assert "s3cr3t" not in repr(answers)


@pytest.mark.usefixtures("calls")
def test_a_key_that_cannot_be_used_is_an_error_and_what_was_there_stays(keep, tmp_path):
    keep()
    answer = keep("c0ff33", key="tpm2")
    assert answer["msg"] == "systemd-creds cannot encrypt api_key with key=tpm2: No TPM2 support"
    assert (tmp_path / "c.cred").read_text().endswith("\ns3cr3t")


@pytest.mark.usefixtures("calls")
def test_a_link_is_not_followed(keep, tmp_path):
    (tmp_path / "c.cred").symlink_to(tmp_path / "elsewhere")
    assert "is no regular file" in keep()["msg"]
    assert not (tmp_path / "elsewhere").exists()


def test_systemd_itself_decrypts_what_was_written(keep, tmp_path):
    assert shutil.which("systemd-creds"), "this machine has no systemd-creds: it is part of Debian's systemd"
    if os.geteuid() != 0:
        pytest.skip("the host's key is root's: run as root")
    key = Path("/var/lib/systemd/credential.secret")
    made_here = not key.exists()
    try:
        assert keep(key="host")["reason"] == "it was not there"
        assert b"s3cr3t" not in (tmp_path / "c.cred").read_bytes()
        assert keep(key="host")["changed"] is False
        assert keep("c0ff33", key="host")["reason"] == "its value is another"
    finally:
        if made_here:
            key.unlink(missing_ok=True)
