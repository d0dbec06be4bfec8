"""The gate in front of ansible-pull, with real repositories and real signatures: what may run on a host, and what not.

In the place of ansible-pull stands a program that writes down how it was called: here it is about whether it is, and
with what. tests/pull has the rest.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generate_readme import ROOT

PROGRAM = ROOT / "roles/release_puller/files/pull-release"
HASH = "0123456789abcdef0123456789abcdef01234567"


def loaded() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("pull_release", str(PROGRAM))
    spec = importlib.util.spec_from_loader("pull_release", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["pull_release"] = module
    loader.exec_module(module)
    return module


gate = loaded()


def entry(release: str = "2.0", commit: str = HASH) -> str:
    return f'release = "{release}"\ncommit = "{commit}"\n'


def ring(name: str, chosen: str, release: str) -> str:
    return f'[[ring]]\nname = "{name}"\n{chosen}\n{entry(release)}'


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("", None),
        ("# nobody\n", None),
        ("[fleet]\n" + entry(), ("2.0", "fleet")),
        (ring("canary", 'hosts = ["web1"]', "3.0"), ("3.0", "canary")),
        (ring("canary", 'hosts = ["web2"]', "3.0"), None),
        (ring("canary", 'hosts = ["web2"]', "3.0") + "[fleet]\n" + entry(), ("2.0", "fleet")),
        (ring("a", 'hosts = ["web1"]', "3.0") + ring("b", "percent = 100", "4.0"), ("3.0", "a")),
        (ring("a", "percent = 0", "3.0") + ring("b", "percent = 100", "4.0"), ("4.0", "b")),
        (ring("nobody", "", "3.0"), None),
    ],
)
def test_the_first_ring_that_holds_a_host_decides_and_then_the_fleet(text, meant):
    found = gate.approved_for("web1", text)
    assert (found and (found.release, found.ring)) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[fleet", "no TOML"),
        ("[fleet]\n" + entry() + "[fleet]\n" + entry(), "no TOML"),
        (entry(), "allowed are [fleet] and [[ring]]"),
        ('fleet = "2.0"', "allowed is a table with release and commit"),
        ('[fleet]\nrelease = "2.0"', "commit = None"),
        ("[fleet]\n" + entry(commit="main"), "the full hash of a commit"),
        ("[fleet]\n" + entry(commit=HASH[:12]), "the full hash of a commit"),
        ("[fleet]\n" + entry(commit=HASH + "\\n"), "the full hash of a commit"),
        ("[fleet]\n" + entry(release="--full"), "a letter or digit first"),
        ("[fleet]\n" + entry(release="turn"), "neither turn nor previous"),
        ("[fleet]\n" + entry() + "percent = 5\n", "fleet has percent"),
        ("[ring]\n" + entry(), "double brackets"),
        (ring("a b", "percent = 5", "2.0"), "a name of its own"),
        (ring("a", "percent = 5", "2.0") * 2, "a name of its own"),
        (ring("a", "percent = 101", "2.0"), "a number from 0 to 100"),
        (ring("a", "percent = nan", "2.0"), "a number from 0 to 100"),
        (ring("a", "percent = true", "2.0"), "a number from 0 to 100"),
        (ring("a", 'hosts = "web1"', "2.0"), "a list of names"),
        # Also behind a ring that decides already.
        (ring("a", 'hosts = ["web1"]', "2.0") + ring("b", "percent = -1", "2.0"), "ring b has percent"),
    ],
)
def test_a_file_that_is_wrong_anywhere_approves_nothing(text, said):
    with pytest.raises(gate.Refused) as refused:
        gate.approved_for("web1", text)
    assert said in str(refused.value)


def test_places_are_spread_and_a_ring_that_grows_lets_nobody_go():
    places = [gate.place_of(f"web{number}.example.com") for number in range(1000)]
    assert all(0 <= place < 100 for place in places)
    # 1000 hosts of a fair coin of 5 %: 50, and 6.9 of deviation. These names are always the same.
    assert 25 < sum(place < 5 for place in places) < 75
    # Written down, because a host must not change its ring with a release of this program.
    assert [round(gate.place_of(name), 4) for name in ("web1", "web2")] == [PLACES["web1"], PLACES["web2"]]


PLACES = {"web1": 39.6889, "web2": 7.9791}


class Fleet:
    """A repository as an operator has one, and a host that pulls from it."""

    def __init__(self, work: Path, *, verify: bool) -> None:
        self.work, self.origin = work, work / "origin"
        self.calls = work / "calls"
        for name in ("ada", "eve"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(work / name)]
            subprocess.run(command, check=True)
        (work / "signers").write_text(f"ada {(work / 'ada.pub').read_text()}")
        programs = work / "programs"
        programs.mkdir()
        recorder = f'import json, sys\nopen({str(self.calls)!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")\n'
        (programs / "ansible-pull").write_text(f"#!{sys.executable}\n{recorder}")
        (programs / "ansible-pull").chmod(0o755)
        self.config: dict[str, Any] = {
            **{"name": "web1", "repository": f"file://{self.origin}", "branch": "approved", "file": "approved.toml"},
            **{"inventory": "inventory", "playbook": "playbooks/pull.yml", "verify": verify, "state": str(work / "s")},
            **{"programs": str(programs), "signers": str(work / "signers"), "variables": "/v.yml"},
            **{"known_hosts": "/k", "ssh_key": "/i"},
        }
        self.git("init", "--quiet", "--initial-branch=main", str(self.origin))

    def git(self, *arguments: str) -> str:
        author = {f"GIT_{who}_{what}": "ada" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        inside = ["-C", str(self.origin)] if arguments[0] != "init" else []
        environment = {**os.environ, **author, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *inside, "-c", "gpg.format=ssh", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, branch: str, path: str, text: str, by: str = "ada") -> str:
        """Commit one file to a branch, signed by somebody or nobody; return the hash."""
        exists = self.git("branch", "--list", branch)
        self.git("checkout", "--quiet", *([branch] if exists else ["--orphan", branch]))
        (self.origin / path).write_text(text)
        self.git("add", path)
        signed = ["-c", f"user.signingKey={self.work / by}", "commit", "-S"] if by else ["commit"]
        self.git(*signed, "--quiet", "--allow-empty", "-m", text[:20] or "empty")
        return self.git("rev-parse", "HEAD")

    def release(self, text: str, by: str = "ada") -> str:
        return self.commit("main", "release", text, by)

    def approve(self, commit: str, release: str = "1.0", by: str = "ada") -> None:
        self.commit("approved", "approved.toml", f"[fleet]\n{entry(release, commit)}", by)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in self.config.items())
        (self.work / "config.toml").write_text(text)
        command = [sys.executable, str(PROGRAM), "--config", str(self.work / "config.toml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def pulled(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls.read_text().splitlines()] if self.calls.exists() else []


@pytest.fixture
def signed(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, verify=True)


def refused(fleet: Fleet, *said: str) -> None:
    before = fleet.pulled()
    done = fleet.run()
    assert done.returncode == 1
    for words in (*said, "Nothing was changed"):
        assert words in done.stderr
    assert fleet.pulled() == before


def test_the_approved_commit_is_pulled_from_what_was_checked_and_verified_again(signed):
    commit = signed.release("one")
    signed.approve(commit)
    signed.release("two")  # newer, and approved by nobody
    done = signed.run()
    assert done.returncode == 0, done.stderr
    (call,) = signed.pulled()
    said = dict(itertools.pairwise(call))
    assert said["--checkout"] == commit
    assert said["--url"] == f"file://{signed.work}/s/repository.git"
    assert said["--limit"] == "web1"
    assert "--verify-commit" in call
    given = [value for key, value in itertools.pairwise(call) if key == "--extra-vars"]
    assert given[0] == "@/v.yml"
    assert json.loads(given[1]) == {"pull_release": "1.0", "pull_commit": commit, "pull_retry": False}
    assert call[-1] == "playbooks/pull.yml"


def test_show_says_what_is_approved_and_pulls_nothing(signed):
    signed.approve(signed.release("one"))
    done = signed.run("--show")
    assert (done.returncode, signed.pulled()) == (0, [])
    assert "1.0" in done.stdout


def test_retry_is_passed_on(signed):
    signed.approve(signed.release("one"))
    assert signed.run("--retry").returncode == 0
    assert '"pull_retry": true' in " ".join(signed.pulled()[0])


def test_nothing_happens_where_the_file_or_the_entry_is_missing(signed):
    signed.release("one")
    signed.commit("approved", "other", "x")
    done = signed.run()
    assert (done.returncode, signed.pulled()) == (0, [])
    assert "Nothing is approved for web1" in done.stdout
    signed.commit("approved", "approved.toml", "# nobody yet\n")
    done = signed.run()
    assert (done.returncode, signed.pulled()) == (0, [])
    assert "Nothing is approved for web1" in done.stdout


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(signed):
    signed.release("one")
    signed.commit("approved", "approved.toml", "[fleet")
    refused(signed, "approved.toml of branch approved approves nothing", "no TOML")


def test_a_branch_or_a_repository_that_is_not_there_is_an_error(signed):
    signed.release("one")
    refused(signed, "git cannot fetch", "approved")


@pytest.mark.parametrize("by", ["", "eve"])
def test_an_approval_that_no_signer_signed_approves_nothing(signed, by):
    signed.approve(signed.release("one"), by=by)
    refused(signed, "the newest commit of branch approved is not signed")


@pytest.mark.parametrize("by", ["", "eve"])
def test_a_release_that_no_signer_signed_is_not_pulled(signed, by):
    signed.approve(signed.release("one", by=by))
    refused(signed, "of release 1.0 is not signed")


def test_without_verification_signatures_are_not_asked_for(tmp_path):
    fleet = Fleet(tmp_path, verify=False)
    fleet.approve(fleet.release("one", by=""), by="")
    assert fleet.run().returncode == 0
    (call,) = fleet.pulled()
    assert "--verify-commit" not in call


def test_an_old_approval_cannot_be_played_back(signed):
    old = signed.release("one")
    signed.approve(old)
    stale = signed.git("rev-parse", "approved")
    signed.approve(signed.release("two"), "2.0")
    assert signed.run().returncode == 0
    signed.git("checkout", "--quiet", "main")
    signed.git("branch", "--force", "approved", stale)
    refused(signed, "does not follow from what this host knows already")


def test_the_server_is_who_the_role_says_and_nobody_whom_the_machine_knows(signed):
    command = shlex.split(gate.Puller(signed.config).environment()["GIT_SSH_COMMAND"])
    asked = subprocess.run([*command, "-G", "git.example.com"], capture_output=True, text=True, check=True).stdout
    found = dict(line.split(" ", 1) for line in asked.lower().splitlines() if " " in line)
    assert found["globalknownhostsfile"] == "/dev/null"
    assert (found["userknownhostsfile"], found["stricthostkeychecking"]) == ("/k", "true")
    assert command[command.index("-F") + 1] == "none"


@pytest.mark.parametrize("by", ["", "eve"])
def test_what_no_signer_signed_leaves_nothing_behind_once_it_is_taken_back(signed, by):
    """Else whoever may push, and nothing more, keeps every host from every later approval."""
    signed.approve(signed.release("one"))
    good = signed.git("rev-parse", "approved")
    assert signed.run("--show").returncode == 0
    signed.approve(HASH, "6.6", by=by)
    refused(signed, "the newest commit of branch approved is not signed")
    signed.git("checkout", "--quiet", "main")
    signed.git("branch", "--force", "approved", good)
    done = signed.run("--show")
    assert (done.returncode, "1.0" in done.stdout) == (0, True), done.stderr


def test_a_signature_of_another_kind_than_the_signers_keys_counts_for_nothing(signed):
    """What gpg and its like trust is up to the machine's own settings and keys, and not to release_puller_signers."""
    gpg = signed.work / "gpg"
    good = "[GNUPG:] NEWSIG\\n[GNUPG:] GOODSIG 0123456789ABCDEF eve\\n"
    made = "-----BEGIN PGP SIGNATURE-----\\n\\nQQ==\\n-----END PGP SIGNATURE-----\\n"
    gpg.write_text(
        f"#!/bin/sh\ncat >/dev/null\ncase $* in *--verify*) printf '{good}' ;; "
        f"*) printf -- '{made}'; printf '\\n[GNUPG:] SIG_CREATED \\n' >&2 ;; esac\n"
    )
    gpg.chmod(0o755)
    openpgp = ("-c", "gpg.format=openpgp", "-c", f"gpg.program={gpg}", "-c", "user.signingKey=eve")
    signed.approve(signed.release("one"))
    assert signed.run("--show").returncode == 0
    # As a gpg would be that fetches the keys it does not know.
    subprocess.run(["git", f"--git-dir={signed.work}/s/repository.git", "config", "gpg.program", str(gpg)], check=True)
    signed.git(*openpgp, "commit", "-S", "--quiet", "--allow-empty", "-m", "eve")
    assert "BEGIN PGP" in signed.git("cat-file", "commit", "approved")
    refused(signed, "the newest commit of branch approved is not signed")


def test_an_approval_that_cannot_be_read_is_an_error_and_not_an_approval_of_nothing(signed):
    signed.approve(signed.release("one"))
    signed.git("checkout", "--quiet", "approved")
    # A submodule in the file's place is one way; a repository that is damaged is another.
    signed.git("update-index", "--cacheinfo", f"160000,{HASH},approved.toml")
    signed.git("-c", f"user.signingKey={signed.work / 'ada'}", "commit", "-S", "--quiet", "-m", "no file")
    refused(signed, "approved.toml of branch approved cannot be read")


def test_bytes_that_are_no_text_are_an_error_in_words(signed):
    commit = signed.release("one")
    signed.approve(commit)
    (signed.origin / "approved.toml").write_bytes(b"# Zo\xeb\n[fleet]\n" + entry("1.0", commit).encode())
    signed.git("-c", f"user.signingKey={signed.work / 'ada'}", "commit", "-S", "--quiet", "--all", "-m", "Latin-1")
    refused(signed, "approved.toml of branch approved approves nothing: it is no UTF-8")


def play_that_writes(text: str, path: Path) -> str:
    task = {"ansible.builtin.copy": {"content": text, "dest": str(path)}}
    return json.dumps([{"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [task]}])


def test_a_branch_that_is_called_like_the_approved_commit_brings_nothing(signed):
    """Ansible's git module takes a branch for what is meant, and then verifies the commit of that name."""
    written = signed.work / "written"
    (signed.work / "variables.yml").write_text("{}\n")
    own = {"programs": str(Path(sys.executable).parent), "variables": str(signed.work / "variables.yml")}
    signed.config |= {**own, "inventory": "hosts", "playbook": "release"}
    signed.commit("main", "hosts", "web1\n")
    good = signed.release(play_that_writes("ada", written))
    signed.approve(good)
    signed.git("checkout", "--quiet", "-b", "eves", "main")
    bad = signed.commit("eves", "release", play_that_writes("eve", written), by="")
    # Not git branch, which refuses such a name; a push may bring it all the same.
    for kind in ("heads", "tags"):
        signed.git("update-ref", f"refs/{kind}/{good}", bad)
    done = signed.run()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert written.read_text() == "ada"


def test_ansible_pull_finds_one_branch_whatever_was_there_before(signed):
    commit = signed.release("one")
    signed.git("tag", "0.9")
    signed.approve(commit)
    assert signed.run().returncode == 0
    mirror = ("git", f"--git-dir={signed.work}/s/repository.git")
    for name in (f"refs/heads/{commit}", "refs/heads/main", f"refs/tags/{commit}"):
        subprocess.run([*mirror, "update-ref", name, "refs/candidate"], check=True)
    assert signed.run().returncode == 0
    listed = [*mirror, "for-each-ref", "--format=%(refname) %(objectname)", "refs/heads", "refs/tags"]
    found = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == [f"refs/heads/release {commit}"]


def test_a_release_whose_name_git_would_take_for_another_commit_is_pulled(signed):
    signed.release("one")
    commit = signed.release("two")
    signed.git("tag", "1.0")
    signed.approve(commit, "1.0~1")
    assert signed.run("--show").returncode == 0


def test_a_tag_with_a_text_of_its_own_means_its_commit(signed):
    signed.approve(signed.release("one"))
    signed.git("tag", "--annotate", "-m", "the first", "1.0", "main")
    assert signed.run("--show").returncode == 0
    signed.release("two")
    signed.git("tag", "--annotate", "--force", "-m", "the second", "1.0")
    refused(signed, "is not what the tag 1.0 means")


def test_a_commit_that_is_nowhere_and_a_tag_that_means_another_are_refused(signed):
    commit = signed.release("one")
    signed.approve(HASH)
    refused(signed, f"commit {HASH} of release 1.0 is on no branch")
    signed.git("tag", "1.0", "main")
    signed.approve(signed.release("two"))
    refused(signed, "is not what the tag 1.0 means", commit)


def test_two_runs_at_once_are_refused(signed):
    signed.approve(signed.release("one"))
    assert signed.run().returncode == 0
    with (signed.work / "s/lock").open("w") as held:
        gate.fcntl.flock(held, gate.fcntl.LOCK_EX)
        refused(signed, "another run is at work")


def test_settings_of_the_machine_do_not_reach_git(signed, monkeypatch):
    """A hook or an allowed key of somebody's own configuration would open the gate."""
    (signed.work / "eves").write_text(f'[gpg "ssh"]\nallowedSignersFile = {signed.work / "evil"}\n')
    (signed.work / "evil").write_text(f"eve {(signed.work / 'eve.pub').read_text()}")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(signed.work / "eves"))
    monkeypatch.setenv("GIT_NAMESPACE", "eve")
    monkeypatch.setenv("PYTHONPATH", str(signed.work))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "gpg.ssh.allowedSignersFile")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(signed.work / "evil"))
    signed.approve(signed.release("one"), by="eve")
    refused(signed, "is not signed")
    assert {"GIT_NAMESPACE", "PYTHONPATH"}.isdisjoint(gate.Puller(signed.config).environment())
