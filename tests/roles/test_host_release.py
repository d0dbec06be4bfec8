"""What a host runs is remembered to the byte, and comes back to the byte: on a tree that looks like a host's.

Every test says what an operator would notice: a release that is gone, a key that stays, a record that lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STORE = "var/lib/socket-handoff/rollout"
UNIT = "etc/systemd/system/streaming-daemon.service"
CONFIG = "etc/streaming-daemon/config.toml"
MODULE = "usr/lib/apache2/modules/mod_socket_handoff.so"
LOAD = "etc/apache2/mods-enabled/socket_handoff.load"
REMOTEIP = "etc/apache2/mods-enabled/remoteip.load"
PAGE = "var/www/handoff-app/public/index.php"
KEY = "etc/streaming-daemon/credentials/openai_api_key"
NOTES = "var/lib/socket-handoff/apache"
LISTED = "var/lib/socket-handoff/handoff-app.json"
Release = Callable[..., dict[str, Any]]


class FakeHost:
    """Files below a directory, as the roles would leave them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.deploy("1.0")

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
        place.chmod(mode)

    def link(self, path: str, target: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    def deploy(self, version: str) -> None:
        home = f"opt/streaming-daemon/releases/{version}"
        self.write(f"{home}/streaming_daemon/__init__.py", f"__version__ = '{version}'\n")
        # The target is a path of the host, which this directory stands for.
        self.link("opt/streaming-daemon/current", f"/{home}")
        self.write(CONFIG, f"# {version}\n")
        self.write(UNIT, f"# {version}\n")
        self.write(MODULE, f"binary {version}")
        self.link(LOAD, "../mods-available/socket_handoff.load")
        self.write(PAGE, f"<?php // {version}\n")
        self.write(LISTED, json.dumps({"public/index.php": ["x"]}))

    def see(self) -> dict[str, str]:
        """Everything outside of the store, by its path."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if name.startswith(STORE) or (path.is_dir() and not path.is_symlink()):
                continue
            mode = "" if path.is_symlink() else f" {path.stat().st_mode & 0o7777:o}"
            found[name] = (f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text()) + mode
        return found


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path / "host")


@pytest.fixture
def release(run_module: Callable[..., dict[str, Any]], host: FakeHost) -> Release:
    def call(state: str, /, **arguments: Any) -> dict[str, Any]:
        return run_module("host_release", state=state, root=str(host.root), **arguments)

    return call


def roll(release: Release, host: FakeHost, version: str, **arguments: Any) -> dict[str, Any]:
    """One turn that goes well."""
    assert "failed" not in release("begun", release=version, by="ada", rollout="r")
    host.deploy(version)
    return release("recorded", release=version, inputs=f"of {version}", by="ada", rollout="r", **arguments)


def test_a_host_that_no_rollout_has_seen_runs_an_unnamed_release_and_is_not_written_to(release, host):
    before = host.see()
    found = release("read")
    assert (found["record"], found["turn"], found["drift"], found["snapshots"]) == ({}, {}, [], [])
    assert found["parts"]["daemon"] == "1.0"
    assert host.see() == before
    assert not (host.root / STORE).exists()


def test_what_a_turn_changed_comes_back_to_the_byte(release, host):
    host.write(KEY, "old key", 0o600)
    host.write("etc/handoff-app/config.php", "<?php // hash\n", 0o640)
    before = host.see()
    release("begun", release="2.0", by="ada", rollout="r")
    host.deploy("2.0")
    host.write(KEY, "new key", 0o600)
    host.write(MODULE, "binary 2.0", 0o600)
    (host.root / "etc/handoff-app/config.php").unlink()
    (host.root / "opt/streaming-daemon/releases/1.0/streaming_daemon/__init__.py").unlink()
    back = release("restored", to="turn")
    assert "failed" not in back, back
    after = host.see()
    # The release that was brought stays beside it, where nothing uses it.
    assert {path: text for path, text in after.items() if "/releases/2.0/" not in path} == before
    assert (back["daemon"], back["apache"]) == ("restart", "restart")
    assert back["to"]["name"].startswith("unnamed-")


@pytest.mark.parametrize(
    ("changed", "daemon", "apache"),
    [
        (CONFIG, "reload", "none"),
        (UNIT, "restart", "none"),
        ("etc/systemd/system/streaming-daemon.socket", "socket", "none"),
        ("etc/apache2/mods-available/socket_handoff.conf", "none", "reload"),
        (MODULE, "none", "restart"),
        (PAGE, "none", "none"),
        (KEY, "restart", "none"),
    ],
)
def test_services_get_what_they_need_and_no_more(release, host, changed, daemon, apache):
    host.write(changed, "before")
    release("begun", release="2.0")
    host.write(changed, "after")
    back = release("restored", to="turn")
    assert back["paths"] == [f"/{changed}"]
    assert (back["daemon"], back["apache"]) == (daemon, apache)


def test_a_turn_that_was_cut_off_still_knows_what_served_before_it(release, host):
    before = host.see()
    assert release("begun", release="2.0", by="ada", rollout="one")["interrupted"] is False
    host.deploy("2.0")
    again = release("begun", release="2.1", by="bob", rollout="two")
    assert again["interrupted"] is True
    assert (again["turn"]["release"], again["turn"]["by"]) == ("2.1", "bob")
    host.deploy("2.1")
    release("restored", to="turn")
    assert {path: text for path, text in host.see().items() if "releases/2" not in path} == before


def test_a_turn_ends_with_a_record_and_without_keys(release, host):
    host.write(KEY, "s3cr3t", 0o600)
    found = roll(release, host, "2.0")
    record = found["record"]
    assert (record["release"], record["inputs"], record["by"], record["soaked"]) == ("2.0", "of 2.0", "ada", True)
    assert record["previous"]["release"].startswith("unnamed-")
    assert (found["turn"], found["drift"]) == ({}, [])
    kept = b"".join(path.read_bytes() for path in (host.root / STORE).rglob("*") if path.is_file())
    assert b"s3cr3t" not in kept


def test_nobody_but_the_owner_can_read_what_is_kept(release, host):
    roll(release, host, "2.0")
    for path in (host.root / STORE, *(host.root / STORE).rglob("*")):
        assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path
    assert (host.root / STORE).stat().st_mode & 0o777 == 0o700


def test_a_release_that_has_not_soaked_leaves_the_turn_open(release, host):
    found = roll(release, host, "2.0", soaked=False)
    assert found["record"]["soaked"] is False
    assert found["turn"]["release"] == "2.0"
    found = release("recorded", release="2.0", inputs="of 2.0", by="ada", rollout="r")
    assert found["record"]["soaked"] is True
    assert found["record"]["previous"]["release"].startswith("unnamed-")
    assert found["turn"] == {}


def test_a_failed_turn_leaves_the_record_as_it_was_and_says_so(release, host):
    roll(release, host, "2.0")
    release("begun", release="3.0", by="bob", rollout="bad")
    host.deploy("3.0")
    release("recorded", release="3.0", inputs="of 3.0", by="bob", rollout="bad", soaked=False)
    release("restored", to="turn")
    found = release("returned", by="bob", rollout="bad")
    assert found["record"]["release"] == "2.0"
    assert (found["record"]["failed"]["release"], found["record"]["failed"]["by"]) == ("3.0", "bob")
    assert (found["turn"], found["drift"]) == ({}, [])


def test_previous_and_named_releases_can_be_gone_back_to(release, host):
    roll(release, host, "2.0")
    second = host.see()
    roll(release, host, "3.0")
    release("begun", release="previous")
    assert release("restored", to="previous")["to"]["name"] == "2.0"
    assert {path: text for path, text in host.see().items() if "releases/3" not in path} == second
    found = release("recorded", release="2.0", by="ada", rollout="r")
    assert (found["record"]["release"], found["record"]["previous"]["release"]) == ("2.0", "3.0")
    release("begun", release="3.0")
    back = release("restored", to="3.0")
    assert (back["to"]["name"], host.see()[CONFIG].split()[1]) == ("3.0", "3.0")


def go_back(release: Release, to: str = "previous", only: str = "") -> str:
    """One rollback, as the playbook does it; returns why the host stays as it is, if it does."""
    begun = release("begun", release=to, kind="rollback", only=only, by="bob", rollout="back")
    assert "failed" not in begun, begun
    if not begun["stays"]:
        back = release("restored", to=begun["back_to"])
        assert "failed" not in back, back
        release("recorded", release=back["to"]["name"], kind="rollback", by="bob", rollout="back")
    return str(begun["stays"])


def serves(host: FakeHost) -> str:
    return host.see()[CONFIG].split()[1]


def test_a_second_rollback_does_not_bring_the_bad_release_back(release, host):
    roll(release, host, "2.0")
    roll(release, host, "3.0")
    assert go_back(release) == ""
    assert serves(host) == "2.0"
    assert go_back(release).startswith("it has gone back to 2.0 already, at ")
    assert serves(host) == "2.0"
    assert release("read")["turn"] == {}
    # By its name it can be had; and a rollout from there can be gone back from.
    assert go_back(release, "3.0") == ""
    assert serves(host) == "3.0"
    roll(release, host, "4.0")
    assert go_back(release) == ""
    assert serves(host) == "3.0"


def test_a_rollback_that_was_cut_off_goes_on_to_where_it_was_going(release, host):
    roll(release, host, "2.0")
    roll(release, host, "3.0")
    release("begun", release="previous", kind="rollback")
    assert go_back(release) == ""
    assert (serves(host), release("read")["record"]["release"]) == ("2.0", "2.0")


def test_a_rollout_behind_a_rollback_that_was_cut_off_does_not_make_good_what_was_left(release, host):
    roll(release, host, "2.0")
    roll(release, host, "3.0")
    release("begun", release="previous", kind="rollback")
    release("begun", release="4.0")
    host.deploy("4.0")
    assert go_back(release, only="4.0") == ""
    assert serves(host) == "2.0"


def test_a_rollout_that_was_cut_off_goes_back_to_what_served_before_it(release, host):
    roll(release, host, "2.0")
    release("begun", release="3.0")
    host.deploy("3.0")
    # The first rollback is cut off as well.
    release("begun", release="previous", kind="rollback")
    assert go_back(release, only="3.0") == ""
    assert serves(host) == "2.0"


def test_hosts_that_do_not_run_the_release_that_is_left_stay_as_they_are(release, host):
    roll(release, host, "2.0")
    digest = roll(release, host, "3.0")["digest"]
    before = host.see()
    assert go_back(release, only="2.0") == "it runs 3.0, and only hosts that run 2.0 go back"
    assert go_back(release, only=digest[:7]) != ""
    assert (host.see(), release("read")["turn"]) == (before, {})
    assert go_back(release, only=digest[:8]) == ""
    assert serves(host) == "2.0"


def test_what_cannot_be_gone_back_to_is_refused_before_the_turn_begins(release, host):
    roll(release, host, "2.0")
    refused = release("begun", release="9.9", kind="rollback")
    assert "release 9.9 is not kept on this host" in refused["msg"]
    assert release("read")["turn"] == {}


@pytest.mark.parametrize(("name", "kind"), [("turn", "rollout"), ("turn", "rollback"), ("previous", "rollout")])
def test_a_release_is_not_called_what_means_something_else(release, host, name, kind):
    assert f"release is {name}, which means something else here" in release("begun", release=name, kind=kind)["msg"]
    assert not (host.root / STORE).exists()


def test_services_are_told_of_what_an_attempt_put_back_that_was_cut_off(release, host):
    release("begun", release="2.0")
    host.deploy("2.0")
    first = release("restored", to="turn")
    second = release("restored", to="turn")
    for key in ("paths", "daemon", "apache"):
        assert second[key] == first[key], key
    assert second["changed"] is False


def test_the_notes_of_what_a_turn_wrote_go_with_it_and_older_ones_stay(release, host):
    notes = "var/lib/socket-handoff/{}.unfinished"
    host.write(notes.format("apache-handoff"), "")
    for last in ("returned", "recorded"):
        release("begun", release="2.0")
        host.write(notes.format("streaming-daemon"), "")
        release(last, release="2.0")
        assert not (host.root / notes.format("streaming-daemon")).exists(), last
        assert (host.root / notes.format("apache-handoff")).exists(), last


def test_links_that_a_later_release_made_go_and_those_of_somebody_else_stay(release, host):
    roll(release, host, "2.0")
    release("begun", release="3.0")
    host.link(REMOTEIP, "../mods-available/remoteip.load")
    host.link("etc/apache2/mods-enabled/rewrite.load", "../mods-available/rewrite.load")
    originals = [{"path": f"/{REMOTEIP}", "kind": None, "binary": False}]
    host.write("var/lib/socket-handoff/apache/original/handoff_app/index.json", json.dumps(originals))
    host.write("var/www/handoff-app/public/new.php", "new")
    host.write(LISTED, json.dumps({"public/index.php": ["x"], "public/new.php": ["y"]}))
    release("restored", to="turn")
    assert not os.path.lexists(host.root / REMOTEIP)
    assert not (host.root / "var/www/handoff-app/public/new.php").exists()
    assert os.path.lexists(host.root / "etc/apache2/mods-enabled/rewrite.load")


def note_originals(host: FakeHost, *records: dict[str, Any], name: str = "handoff_app") -> None:
    """What apache_config notes of the time before a change set."""
    folder = f"{NOTES}/original/{name}"
    for number, record in enumerate(records):
        if "content" in record:
            record.update(blob=f"{number}-x", mode=0o640)
            host.write(f"{folder}/{record['blob']}", record.pop("content"), 0o600)
    host.write(f"{folder}/index.json", json.dumps(records))


def test_what_a_later_release_is_the_first_to_change_becomes_what_it_was_before(release, host):
    """An earlier release had no business with it, so it is in no snapshot of that one."""
    site, ports = "etc/apache2/sites-enabled/000-default.conf", "etc/apache2/ports.conf"
    host.link(site, "../sites-available/000-default.conf")
    host.write(ports, "Listen 80\n", 0o640)
    before = host.see()
    release("begun", release="2.0", by="ada", rollout="r")
    host.deploy("2.0")
    (host.root / site).unlink()
    host.write(ports, "Listen 8080\n", 0o600)
    notes = [
        {"path": f"/{site}", "kind": "link", "target": "../sites-available/000-default.conf", "binary": False},
        {"path": f"/{ports}", "kind": "file", "content": "Listen 80\n", "binary": False},
    ]
    note_originals(host, *notes)
    assert "failed" not in release("restored", to="turn")
    after = {path: found for path, found in host.see().items() if not path.startswith(NOTES)}
    assert {path: after.get(path) for path in before} == before


def test_what_a_release_without_notes_has_enabled_is_not_taken_for_what_is_new(release, host):
    """They noted their last change only; without what it had enabled earlier, PHP would be sent as text."""
    fcgi = "etc/apache2/mods-enabled/proxy_fcgi.load"
    host.link(fcgi, "../mods-available/proxy_fcgi.load")
    host.write(f"{NOTES}/handoff_app/index.json", json.dumps([{"path": f"/{LOAD}", "kind": None}]))
    release("begun", release="2.0", by="ada", rollout="r")
    host.deploy("2.0")
    # As the first release with notes completes them: what bears our mark was made by us.
    new = "etc/apache2/mods-enabled/new.load"
    host.link(new, "../mods-available/new.load")
    note_originals(host, *({"path": f"/{path}", "kind": None, "binary": False} for path in (fcgi, LOAD, new)))
    assert "failed" not in release("restored", to="turn")
    assert os.readlink(host.root / fcgi) == "../mods-available/proxy_fcgi.load"
    assert not os.path.lexists(host.root / new)


def test_drift_names_the_files_that_somebody_has_touched(release, host):
    roll(release, host, "2.0")
    assert release("read")["drift"] == []
    host.write(CONFIG, "by hand")
    (host.root / LOAD).unlink()
    assert release("read")["drift"] == [f"/{LOAD}", f"/{CONFIG}"]
    (host.root / CONFIG).chmod(0o600)
    host.write(CONFIG, "# 2.0\n", 0o600)
    assert f"/{CONFIG}" in release("read")["drift"]


def test_what_a_deployment_by_site_yml_left_is_kept_before_it_is_replaced(release, host):
    roll(release, host, "2.0")
    host.write(CONFIG, "by site.yml\n")
    release("begun", release="3.0")
    host.deploy("3.0")
    assert release("restored", to="turn")["to"]["name"].startswith("unnamed-")
    assert (host.root / CONFIG).read_text() == "by site.yml\n"


def test_kept_releases_are_bounded_and_the_previous_one_is_never_among_those_that_go(release, host):
    for version in ("2.0", "3.0", "4.0", "5.0"):
        roll(release, host, version, keep=2)
    names = [each["name"] for each in release("read")["snapshots"]]
    assert names[:2] == ["5.0", "4.0"]
    assert "2.0" not in names
    assert len(names) <= 3
    objects = [path.read_text() for path in (host.root / STORE / "objects").iterdir()]
    assert "binary 2.0" not in objects
    assert "binary 4.0" in objects
    roll(release, host, "6.0", keep=1)
    assert [each["name"] for each in release("read")["snapshots"]] == ["6.0", "5.0"]
    refused = release("restored", to="2.0")
    assert "release 2.0 is not kept on this host; allowed is one that is: 6.0 (" in refused["msg"]


def test_a_damaged_copy_is_noticed_before_anything_changes(release, host):
    release("begun", release="2.0")
    host.deploy("2.0")
    before = host.see()
    for path in (host.root / STORE / "objects").iterdir():
        if path.read_text() == "binary 1.0":
            path.write_text("rotten")
    refused = release("restored", to="turn")
    assert f"what is kept of /{MODULE} is damaged or gone. Nothing was changed" in refused["msg"]
    assert host.see() == before


def test_a_release_whose_key_is_gone_is_refused(release, host):
    host.write(UNIT, f"LoadCredential=openai_api_key:/{KEY}\n")
    host.write(KEY, "key", 0o600)
    roll(release, host, "2.0")
    (host.root / KEY).unlink()
    before = host.see()
    release("begun", release="previous")
    refused = release("restored", to="previous")
    assert f"asks for the credential /{KEY}, which is not on this host any more" in refused["msg"]
    assert host.see() == before


def test_a_write_that_fails_half_way_leaves_every_file_as_it_was(release, host, monkeypatch):
    release("begun", release="2.0")
    host.deploy("2.0")
    before = host.see()
    replaced, failing = os.replace, []

    def full(source: str, target: str) -> None:
        if str(target).endswith(MODULE) and not failing:
            failing.append(target)
            raise OSError(28, "No space left on device", source)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused = release("restored", to="turn")
    assert failing
    assert "The disk is full. Every file is as it was before this attempt" in refused["msg"]
    assert host.see() == before


def test_a_disk_that_stays_full_leaves_every_file_as_it_was(release, host, monkeypatch):
    """Not one write succeeds any more, and links still do: going on with them would make a mixture."""
    release("begun", release="2.0")
    host.deploy("2.0")
    before = host.see()

    def full(descriptor: int) -> None:
        # The turn's own note is small, and may have found room.
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("/turn.json.part"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused = release("restored", to="turn")
    assert "The disk is full. Every file is as it was before this attempt" in refused["msg"]
    assert host.see() == before


def test_what_cannot_be_taken_back_is_called_a_mixture(release, host, monkeypatch):
    release("begun", release="2.0")
    host.deploy("2.0")
    replaced = os.replace

    def broken(source: str, target: str) -> None:
        if str(source).endswith(".was") or str(target).endswith(MODULE):
            raise OSError(5, "Input/output error", source)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", broken)
    refused = release("restored", to="turn")
    assert "THIS HOST HAS A MIXTURE OF TWO RELEASES" in refused["msg"]
    assert f"/{CONFIG}: Input/output error" in refused["msg"] or f"/{MODULE}: Input/output error" in refused["msg"]


def test_files_of_a_package_are_left_to_apt(release, host):
    release("begun", release="2.0")
    host.write(MODULE, "of the package")
    host.write("var/lib/dpkg/info/libapache2-mod-socket-handoff.list", f"/{MODULE}\n")
    assert "belongs to the package libapache2-mod-socket-handoff here" in release("restored", to="turn")["msg"]


def test_where_nothing_served_there_is_nothing_to_go_back_to(release, host):
    (host.root / "opt/streaming-daemon/current").unlink()
    release("begun", release="1.0")
    assert "nothing of the chain served here before this rollout" in release("restored", to="turn")["msg"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("turn", "no turn has begun on this host"),
        ("previous", "this host has no record of a previous release"),
        ("9.9", "release 9.9 is not kept on this host; allowed is one that is: none"),
        ("../../etc", "to is '../../etc'; allowed are 1 to 64 letters"),
    ],
)
def test_what_is_not_there_is_named(release, wanted, said):
    assert said in release("restored", to=wanted)["msg"]


def test_check_mode_says_what_would_change_and_changes_nothing(release, host):
    assert release("begun", release="2.0", check=True)["changed"] is True
    assert not (host.root / STORE).exists()
    release("begun", release="2.0")
    host.deploy("2.0")
    before = host.see()
    assert release("restored", to="turn", check=True)["paths"]
    assert release("recorded", release="2.0", check=True)["record"] == {}
    assert host.see() == before
