"""Apache's files change together or not at all; Apache's place is taken by a script that judges a directory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

# Refuses a directory whose enabled files say BROKEN, name a module file that is not there, or use what no module that
# they load knows, as Apache would.
CONTROL = """\
#!/bin/sh
echo "$APACHE_CONFDIR" >> "{log}"
if grep -Rhq BROKEN "$APACHE_CONFDIR"/mods-enabled/; then
    echo "Syntax error on line 1 of $APACHE_CONFDIR/mods-enabled/x.conf" >&2; exit 1
fi
if [ -e "{stubborn}" ] && [ "$APACHE_CONFDIR" = "{confdir}" ]; then echo "only here I say no" >&2; exit 1; fi
for module in $(sed -n 's/^LoadModule [a-z_]* //p' "$APACHE_CONFDIR"/mods-enabled/*.load 2>/dev/null); do
    [ -e "$module" ] || {{ echo "Cannot load $module" >&2; exit 1; }}
    known="$known $(tr -d '\\0' <"$module")"
done
for directive in $(sed -n 's/^Use //p' "$APACHE_CONFDIR"/mods-enabled/*.conf 2>/dev/null); do
    case "$known" in *"$directive"*) ;; *) echo "Invalid command '$directive'" >&2; exit 1 ;; esac
done
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's Apache, as far as the module sees it."""
    for folder in ("mods-available", "mods-enabled", "sites-available", "sites-enabled"):
        (tmp_path / "etc" / folder).mkdir(parents=True)
    (tmp_path / "etc/sites-available/other.conf").write_text("somebody else's\n")
    (tmp_path / "etc/sites-enabled/other.conf").symlink_to("../sites-available/other.conf")
    control = tmp_path / "apache2ctl"
    control.write_text(
        CONTROL.format(log=tmp_path / "judged", stubborn=tmp_path / "stubborn", confdir=tmp_path / "etc")
    )
    control.chmod(0o755)
    return tmp_path


@pytest.fixture
def change(run_module, host):
    """Run the module against that host."""

    def run(name="test", **arguments):
        return run_module(
            "apache_config",
            name=name,
            confdir=str(host / "etc"),
            control=str(host / "apache2ctl"),
            backup_dir=str(host / "backup"),
            **arguments,
        )

    return run


def files(content="good\n", **more):
    return {
        "files": [{"path": "mods-available/x.conf", "content": f"# socket_handoff.fleet\n{content}"}],
        "links": [{"path": "mods-enabled/x.conf", "target": "../mods-available/x.conf"}],
        **more,
    }


def snapshot(root: Path) -> dict[str, str]:
    """Everything below a directory, links as links."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_files_and_links_are_made_and_a_second_run_changes_nothing(change, host):
    report = change(**files())
    assert report["changed"] is True and report["tested"] is True
    assert [Path(path).name for path in report["changed_paths"]] == ["x.conf", "x.conf"]
    assert (host / "etc/mods-enabled/x.conf").read_text() == "# socket_handoff.fleet\ngood\n"
    assert (host / "etc/mods-available/x.conf").stat().st_mode & 0o777 == 0o644
    assert change(**files())["changed"] is False


def test_apache_judges_a_copy_before_any_real_file_is_touched(change, host):
    change(**files())
    first, *others = (host / "judged").read_text().split()
    assert first != str(host / "etc")
    assert others == [str(host / "etc")]
    assert not Path(first).exists()


def test_a_refused_configuration_leaves_every_byte_as_it_was(change, host):
    change(**files())
    before = snapshot(host / "etc")
    report = change(**files("BROKEN\n"))
    assert report["failed"] is True
    assert "Apache refuses the new configuration; nothing was changed" in report["msg"]
    assert f"line 1 of {host}/etc/mods-enabled/x.conf" in report["msg"], "the operator must see the path he knows"
    assert snapshot(host / "etc") == before


def test_a_configuration_refused_only_in_its_place_is_taken_back(change, host):
    change(**files())
    before = snapshot(host / "etc")
    (host / "stubborn").touch()
    report = change(**files("better\n"))
    assert "was taken back" in report["msg"] and "only here I say no" in report["msg"]
    assert snapshot(host / "etc") == before


def test_a_configuration_that_was_broken_before_is_not_blamed_on_the_change(change, host):
    (host / "etc/mods-enabled/old.conf").write_text("BROKEN\n")
    assert "was broken before this change" in change(**files())["msg"]


def test_a_write_that_fails_half_way_is_taken_back(change, host):
    before = snapshot(host / "etc")
    (host / "in-the-way").write_text("a file where a directory is needed")
    arguments = files()
    arguments["files"].append({"path": str(host / "in-the-way/module.so"), "content": "socket_handoff.fleet"})
    report = change(**arguments)
    assert report["failed"] is True
    assert snapshot(host / "etc") == before


@pytest.fixture
def small_disk(host) -> Iterator[Path]:
    """A file system with room for a few small files, where modules would lie."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: mounting a small file system needs root")
    disk = host / "modules"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_half_way_is_no_obstacle_to_going_back(change, small_disk):
    """Old and new of the first file fit; the second does not, and then there is no room for copies of the old."""
    for name in ("first.so", "second.so"):
        (small_disk / name).write_text(f"socket_handoff.fleet {name}".ljust(60_000))
    before = snapshot(small_disk)
    wanted = [
        {"path": str(small_disk / "first.so"), "content": "socket_handoff.fleet".ljust(90_000)},
        {"path": str(small_disk / "second.so"), "content": "socket_handoff.fleet".ljust(200_000)},
    ]
    report = change(files=wanted)
    assert report["failed"] is True
    assert "No space left" in report["msg"]
    assert "taken back" in report["msg"]
    assert snapshot(small_disk) == before


def test_check_mode_says_the_same_and_touches_nothing(change, host):
    before = snapshot(host)
    predicted = change(check=True, **files())
    assert {path: text for path, text in snapshot(host).items() if path != "judged"} == before
    assert predicted["changed_paths"] == change(**files())["changed_paths"]


def test_check_mode_reports_a_configuration_that_apache_would_refuse(change):
    assert "Apache refuses" in change(check=True, **files("BROKEN\n"))["msg"]


def test_check_mode_works_on_a_host_without_apache(run_module, tmp_path):
    report = run_module(
        "apache_config", check=True, name="test", confdir=str(tmp_path / "none"), control="/nonexistent", **files()
    )
    assert report["changed"] is True and report["tested"] is False


def test_a_real_run_on_a_host_without_apache_says_so(run_module, tmp_path):
    report = run_module("apache_config", name="test", confdir=str(tmp_path / "none"), control="/nonexistent", **files())
    assert "Apache is not installed here" in report["msg"]


def binary(host: Path, content: bytes) -> dict[str, list[dict[str, str]]]:
    (host / "built.so").write_bytes(content)
    path = str(host / "modules/mod_x.so")
    return {
        "files": [
            {"path": path, "source": str(host / "built.so")},
            {"path": "mods-available/x.load", "content": f"# socket_handoff.fleet\nLoadModule x_module {path}\n"},
        ],
        "links": [{"path": "mods-enabled/x.load", "target": "../mods-available/x.load"}],
    }


def test_a_module_is_loaded_from_where_it_was_built_while_the_change_is_tested(change, host):
    report = change(**binary(host, b"\x7fELF\xff"))
    assert "failed" not in report, report
    assert (host / "modules/mod_x.so").read_bytes() == b"\x7fELF\xff"
    assert "sha256" in report["diff"][0]["after"]


def release(host: Path, directive: str) -> dict[str, list[dict[str, str]]]:
    """A module that knows one directive, which its configuration uses; what loads it is the same for all."""
    made = binary(host, directive.encode())
    made["files"].append({"path": "mods-available/x.conf", "content": f"# socket_handoff.fleet\nUse {directive}\n"})
    made["links"].append({"path": "mods-enabled/x.conf", "target": "../mods-available/x.conf"})
    return made


def test_a_module_with_another_directive_is_tested_although_what_loads_it_stays_the_same(change, host):
    for directive in ("Yesterday", "Today", "Yesterday"):
        report = change(**release(host, directive))
        assert "failed" not in report, report
        assert (host / "modules/mod_x.so").read_text() == directive
    refused = change(**{**release(host, "Today"), "files": release(host, "Never")["files"][2:]})
    assert "Invalid command 'Never'" in refused["msg"]


def test_records_of_a_release_that_noted_less_are_understood(change, host):
    """Earlier versions kept no originals, and did not say which file is a binary."""
    change(**release(host, "Yesterday"))
    shutil.rmtree(host / "backup/original")
    index = host / "backup/test/index.json"
    records = json.loads(index.read_text())
    index.write_text(json.dumps([{k: v for k, v in record.items() if k != "binary"} for record in records]))
    assert "failed" not in change(**release(host, "Today"))
    removed = change(state="absent")
    assert removed["changed"] is True, removed
    assert not (host / "modules/mod_x.so").exists() and not (host / "etc/mods-available/x.conf").exists()


def test_a_replaced_module_is_a_new_file_and_the_mapped_one_stays_intact(change, host):
    change(**binary(host, b"old"))
    with (host / "modules/mod_x.so").open("rb") as mapped:
        change(**binary(host, b"newer"))
        assert mapped.read() == b"old"


def test_the_last_change_can_be_undone_later(change, host):
    change(**files("first\n"))
    before = snapshot(host / "etc")
    change(**files("second\n"), listen=[])
    assert change(state="restored")["changed"] is True
    assert snapshot(host / "etc") == before
    assert change(state="restored")["changed"] is False, "there is one way back, not two"


def test_undoing_a_first_change_removes_what_it_made(change, host):
    before = snapshot(host / "etc")
    change(**files())
    change(state="restored")
    assert snapshot(host / "etc") == before


def test_somebody_elses_file_is_kept_for_ever(change, host):
    theirs = host / "etc/mods-available/x.conf"
    theirs.write_text("made by hand\n")
    assert change(**files())["adopted"] == [str(theirs)]
    change(**files("again\n"))
    assert (host / "backup/foreign" / str(theirs).lstrip("/")).read_text() == "made by hand\n"


def test_a_file_in_the_place_of_a_link_is_not_removed(change, host):
    (host / "etc/mods-enabled/x.conf").write_text("made by hand\n")
    assert "is a file where a2enmod and a2ensite make links" in change(**files())["msg"]
    assert (host / "etc/mods-enabled/x.conf").read_text() == "made by hand\n"


def test_an_absolute_link_to_the_same_file_is_left_alone(change, host):
    change(**files())
    link = host / "etc/mods-enabled/x.conf"
    link.unlink()
    link.symlink_to(host / "etc/mods-available/x.conf")
    assert change(**files())["changed"] is False


def test_a_link_is_removed_and_a_missing_one_is_no_change(change, host):
    arguments = {"links": [{"path": "sites-enabled/other.conf", "state": "absent"}]}
    assert change(**arguments)["changed"] is True
    assert (host / "etc/sites-available/other.conf").exists()
    assert change(**arguments)["changed"] is False


def test_a_port_that_another_program_holds_is_refused_before_apache_stumbles_over_it(change, host):
    before = snapshot(host / "etc")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        report = change(**files(listen=[taken.getsockname()[1]]))
    name = Path("/proc/self/comm").read_text().strip()
    assert f"is held by {name}, not by Apache" in report["msg"]
    assert snapshot(host / "etc") == before


def test_restrictive_umasks_do_not_hide_files_from_apache(change, host):
    before = os.umask(0o077)
    try:
        change(**binary(host, b"so"))
    finally:
        os.umask(before)
    assert (host / "modules").stat().st_mode & 0o777 == 0o755


def test_the_differences_show_text_before_and_after(change):
    change(**files("old line\n"))
    shown = change(**files("new line\n"))["diff"][0]
    assert textwrap.dedent(shown["before"]).endswith("old line\n") and shown["after"].endswith("new line\n")


def test_absent_brings_back_what_was_there_before_the_first_change(change, host):
    (host / "etc/mods-available/x.conf").write_text("written by hand\n")
    before = snapshot(host / "etc")
    change(**files())
    change(**files("better\n", links=[{"path": "sites-enabled/other.conf", "state": "absent"}]))
    assert snapshot(host / "etc") != before
    predicted = change(state="absent", check=True)
    report = change(state="absent")
    assert report["changed"] is predicted["changed"] is True
    assert report["changed_paths"] == predicted["changed_paths"]
    assert len(report["changed_paths"]) == 3
    assert snapshot(host / "etc") == before
    assert not (host / "backup").exists(), "what is back at its place is no longer kept"
    again = change(state="absent")
    assert again["changed"] is False and again["changed_paths"] == []


def test_absent_leaves_alone_what_somebody_put_there_since(change, host):
    change(**files())
    (host / "etc/mods-available/x.conf").write_text("replaced by hand\n")
    (host / "etc/mods-enabled/x.conf").unlink()
    report = change(state="absent")
    assert report["kept"] == [f"{host}/etc/mods-available/x.conf: somebody else's by now"]
    assert (host / "etc/mods-available/x.conf").read_text() == "replaced by hand\n"


def test_absent_makes_no_link_that_leads_nowhere(change, host):
    change(links=[{"path": "sites-enabled/other.conf", "state": "absent"}])
    (host / "etc/sites-available/other.conf").unlink()
    report = change(state="absent")
    link = host / "etc/sites-enabled/other.conf"
    assert report["kept"] == [f"{link}: ../sites-available/other.conf, where it led, is gone"]
    assert not os.path.lexists(host / "etc/sites-enabled/other.conf")


def test_absent_changes_nothing_when_apache_needs_what_would_go(change, host):
    module = host / "mod_x.so"
    (host / "built").write_text("binary")
    load = {"path": "mods-available/x.load", "content": f"# socket_handoff.fleet\nLoadModule x {module}\n"}
    change(
        files=[{"path": str(module), "source": str(host / "built")}, load],
        links=[{"path": "mods-enabled/x.load", "target": "../mods-available/x.load"}],
    )
    (host / "etc/mods-enabled/by-hand.load").write_text(f"LoadModule x {module}\n")
    before = snapshot(host / "etc")
    for check in (True, False):
        report = change(state="absent", check=check)
        assert "nothing was changed" in report["msg"] and f"Cannot load {module}\n" in report["msg"] + "\n"
        assert snapshot(host / "etc") == before and module.exists()
    (host / "etc/mods-enabled/by-hand.load").unlink()
    assert change(state="absent")["changed"] is True
    assert not module.exists()


def test_a_refused_change_leaves_nothing_for_a_removal(change, host):
    (host / "stubborn").touch()
    change(**files())
    (host / "stubborn").unlink()
    (host / "etc/mods-available/x.conf").write_text("written by hand later\n")
    report = change(state="absent")
    assert report["changed_paths"] == []
    assert (host / "etc/mods-available/x.conf").read_text() == "written by hand later\n"


def test_a_restored_change_leaves_nothing_for_a_removal(change, host):
    change(**files())
    change(state="restored")
    assert not (host / "backup/original").exists() or list((host / "backup/original").iterdir()) == []
    assert change(state="absent")["changed_paths"] == []


def test_check_mode_does_not_judge_what_needs_an_earlier_change(change, host):
    early = change(**files("BROKEN\n"), needs=["mods-enabled/module.load"], check=True)
    assert early["changed"] is True and early["tested"] is False
    (host / "etc/mods-enabled/module.load").touch()
    assert change(**files("BROKEN\n"), needs=["mods-enabled/module.load"], check=True)["failed"] is True
    (host / "etc/mods-enabled/module.load").unlink()
    assert change(**files("BROKEN\n"), needs=["mods-enabled/module.load"])["failed"] is True, "a real run always asks"


@pytest.fixture
def earlier(change, host):
    """A host as a release left it that kept no originals, and that deployed twice."""
    (host / "etc/mods-available/mod.load").touch()
    links = [
        *files()["links"],
        {"path": "mods-enabled/mod.load", "target": "../mods-available/mod.load"},
        {"path": "sites-enabled/other.conf", "state": "absent"},
    ]
    change(**files("first\n", links=links[:2]))
    change(**files("second\n", links=links))
    shutil.rmtree(host / "backup/original")
    return files("second\n", links=links)


def test_what_an_earlier_release_deployed_is_removed_only_after_another_deployment(change, host, earlier):
    before = snapshot(host)
    for check in (True, False):
        assert "kept no record" in change(state="absent", check=check)["msg"]
    assert "Deploy once more with this release, then remove" in change(state="absent")["msg"]
    assert snapshot(host) == before
    assert change(check=True, **earlier)["changed"] is False
    assert snapshot(host) == before
    assert change(**earlier)["changed"] is False
    assert change(state="absent")["changed"] is True
    left = snapshot(host / "etc")
    assert "mods-available/x.conf" not in left and "mods-enabled/x.conf" not in left
    assert left["sites-enabled/other.conf"] == "../sites-available/other.conf", "it was there before the last change"
    assert "mods-enabled/mod.load" in left, "nobody knows who made it"
    assert not (host / "backup").exists()


def test_a_binary_of_an_earlier_release_is_removed_too(change, host):
    change(**binary(host, b"old"))
    change(**binary(host, b"new"))
    shutil.rmtree(host / "backup/original")
    change(**binary(host, b"newer"))
    change(state="absent")
    assert not (host / "modules/mod_x.so").exists()


def test_our_own_file_is_nobody_elses_original(change, host):
    """What was kept for its removal is lost, for example with the disk it was on; the file is still there."""
    change(**files("first\n"))
    shutil.rmtree(host / "backup")
    change(**files("second\n"))
    change(state="absent")
    assert not (host / "etc/mods-available/x.conf").exists()


def test_what_an_earlier_release_replaced_comes_back(change, host):
    (host / "etc/mods-available/x.conf").write_text("by hand\n")
    change(**files("first\n"))
    change(**files("second\n"))
    shutil.rmtree(host / "backup/original")
    change(**files("second\n"))
    change(state="absent")
    assert (host / "etc/mods-available/x.conf").read_text() == "by hand\n"
    assert not (host / "backup").exists()


def test_a_record_that_was_begun_too_late_is_completed(change, host):
    """An earlier release recorded only its last change, and our own text as what was there before."""
    files_of = binary(host, b"so")
    files_of["files"].append({"path": "mods-available/x.conf", "content": "# socket_handoff.fleet\nfirst\n"})
    before = snapshot(host / "etc")
    change(**files_of)
    shutil.rmtree(host / "backup")
    files_of["files"][-1]["content"] += "second\n"
    original = host / "backup/original/test"
    change(**files_of)
    (record,) = [r for r in json.loads((original / "index.json").read_text()) if r["path"].endswith("x.conf")]
    (original / "blob").write_text("# socket_handoff.fleet\nfirst\n")
    (original / "index.json").write_text(json.dumps([{**record, "kind": "file", "mode": 0o644, "blob": "blob"}]))
    assert change(**files_of)["changed"] is False
    change(state="absent")
    assert snapshot(host / "etc") == before
    assert not (host / "modules/mod_x.so").exists()


def test_a_link_by_hand_to_a_file_that_ours_replaced_is_not_taken_for_ours(change, host):
    (host / "etc/mods-available/x.conf").write_text("by hand\n")
    (host / "etc/mods-enabled/x.conf").symlink_to("../mods-available/x.conf")
    before = snapshot(host / "etc")
    for _time in range(2):
        change(**files())
    change(state="absent")
    assert snapshot(host / "etc") == before


def test_no_record_is_lost_where_a_run_is_cut_off(change, host, monkeypatch):
    """Every rename of a second change is once the last that the run came to."""
    before = snapshot(host / "etc")
    (host / "etc/mods-available/x.conf").write_text("by hand\n")
    change(**files("first\n"))
    rename, cut_off_at = os.rename, 0

    class CutOff(BaseException):
        """The machine lost power."""

    for cut_off_at in range(1, 20):
        renamed = []

        def renaming(old, new, *, last=cut_off_at, renamed=renamed):
            if len(renamed) == last:
                raise CutOff
            renamed.append(new)
            rename(old, new)

        monkeypatch.setattr(os, "rename", renaming)
        try:
            change(**files(f"change {cut_off_at}\n"))
        except CutOff:
            monkeypatch.setattr(os, "rename", rename)
            kept = host / "backup/original"
            (index,) = [path for path in kept.glob("test*/index.json") if path.parent.suffix != ".new"]
            blobs = [index.parent / record["blob"] for record in json.loads(index.read_text()) if "blob" in record]
            assert [blob.read_text() for blob in blobs] == ["by hand\n"]
        else:
            break
    assert cut_off_at > 3
    monkeypatch.setattr(os, "rename", rename)
    change(state="absent")
    assert snapshot(host / "etc") == {**before, "mods-available/x.conf": "by hand\n"}
    assert not (host / "backup").exists()


# As Debian delivers them; see a2enmod(8) for the comments.
DEBIANS = {
    "proxy.load": "LoadModule proxy_module {so}\n",
    "proxy.conf": "<IfModule mod_proxy.c>\n</IfModule>\n",
    "proxy_fcgi.load": "# Depends: proxy\nLoadModule proxy_fcgi_module {so}\n",
    "setenvif.load": "LoadModule setenvif_module {so}\n",
    "setenvif.conf": "<IfModule setenvif_module>\n</IfModule>\n",
    "php8.2.load": "# Depends: mpm_prefork\nLoadModule php_module {so}\n",
    "php8.2.conf": '<FilesMatch ".+[.]php$">\n    SetHandler application/x-httpd-php\n</FilesMatch>\n',
    "mpm_prefork.load": "LoadModule mpm_prefork_module {so}\n",
}
FASTCGI = ["proxy.conf", "proxy.load", "proxy_fcgi.load"]
SETENVIF = ["setenvif.conf", "setenvif.load"]


@pytest.fixture
def site(change, host):
    """Enable Debian's modules together with a site of ours, as the roles do."""
    (host / "mod.so").touch()
    for name, text in DEBIANS.items():
        (host / "etc/mods-available" / name).write_text(text.format(so=host / "mod.so"))
    text = '# socket_handoff.fleet\n<IfModule proxy_module>\nSetHandler "proxy:unix:/run/x|fcgi://localhost"\n</IfModule>\n'
    links = [{"path": f"mods-enabled/{name}", "target": f"../mods-available/{name}"} for name in DEBIANS]
    links.append({"path": "sites-enabled/ours.conf", "target": "../sites-available/ours.conf"})
    report = change(files=[{"path": "sites-available/ours.conf", "content": text}], links=links)
    assert "failed" not in report, report


def test_modules_that_only_ours_needed_are_disabled_again(change, host, site):
    assert change(state="absent")["kept"] == []
    assert list((host / "etc/mods-enabled").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ('SetHandler "proxy:unix:/run/php/php-fpm.sock|fcgi://localhost"', FASTCGI),
        ("<IfModule proxy_fcgi_module>\n</IfModule>", FASTCGI),
        ("    <ifmodule mod_proxy_fcgi.c>\n</ifmodule>", FASTCGI),
        ('ProxyPassMatch "^/x" "http://127.0.0.1:1/"', ["proxy.conf", "proxy.load"]),
        ("<IfModule setenvif_module>\n</IfModule>", SETENVIF),
        ("SetEnvIf Host x y", SETENVIF),
        ("SetHandler application/x-httpd-php", ["php8.2.conf", "php8.2.load"]),
        ("<IfModule mod_php8.c>\n</IfModule>", ["php8.2.conf", "php8.2.load"]),
        ("DocumentRoot {host}/pages", ["php8.2.conf", "php8.2.load"]),
        ("DocumentRoot {host}/etc", []),
        ("<IfModule !mod_php8.c>\n</IfModule>", []),
        ("<IfModule mpm_prefork_module>\n</IfModule>", []),
        ("# SetHandler proxy:unix:/run/x|fcgi://localhost", []),
        ("IncludeOptional {host}/included/*.conf", FASTCGI),
    ],
)
def test_a_module_that_another_site_has_come_to_depend_on_stays_enabled(change, host, site, text, stays):
    for folder, name, content in (("pages/sub", "index.php", ""), ("included", "x.conf", "SetHandler proxy:fcgi://x")):
        (host / folder).mkdir(parents=True)
        (host / folder / name).write_text(content)
    (host / "etc/sites-available/other.conf").write_text(f"{text.format(host=host)}\n")
    predicted = change(state="absent", check=True)["kept"]
    kept = change(state="absent")["kept"]
    assert sorted(path.name for path in (host / "etc/mods-enabled").iterdir()) == stays
    assert sorted(Path(line.split(": ")[0]).name for line in kept) == stays
    assert all(line.endswith(" depends on it") for line in kept)
    assert predicted == kept
    assert not (host / "etc/sites-enabled/ours.conf").is_symlink()


def test_a_site_that_comes_back_with_the_removal_keeps_its_modules_too(change, host, site):
    """Not disabled by hand, but by an earlier change set of ours."""
    (host / "etc/sites-available/other.conf").write_text("SetHandler proxy:fcgi://localhost\n")
    change(links=[{"path": "sites-enabled/other.conf", "state": "absent"}])
    change(state="absent")
    assert sorted(path.name for path in (host / "etc/mods-enabled").iterdir()) == FASTCGI


def test_what_another_module_does_beside_it_keeps_no_module(change, host, site):
    """Debian's status.conf is enabled everywhere."""
    text = "<IfModule mod_status.c>\n    <IfModule mod_proxy.c>\n        ProxyStatus On\n    </IfModule>\n</IfModule>\n"
    (host / "etc/mods-enabled/status.conf").write_text(text)
    assert change(state="absent")["kept"] == []
    assert [path.name for path in (host / "etc/mods-enabled").iterdir()] == ["status.conf"]


def test_a_module_enabled_by_hand_keeps_what_it_depends_on(change, host, site):
    (host / "etc/mods-enabled/proxy_http.load").write_text("# Depends: proxy\n")
    kept = change(state="absent")["kept"]
    assert f"{host}/etc/mods-enabled/proxy.load: {host}/etc/mods-enabled/proxy_http.load depends on it" in kept


@pytest.fixture
def repair(host):
    """Arguments that replace the text behind a link, without which Apache would refuse everything."""
    (host / "etc/mods-available/x.conf").write_text("BROKEN\n")
    (host / "etc/mods-enabled/x.conf").symlink_to("../mods-available/x.conf")
    return {"files": [{"path": "mods-available/x.conf", "content": "# socket_handoff.fleet\n"}]}


def test_check_mode_tests_a_removal(change, repair):
    assert change(**repair)["changed"] is True
    report = change(state="absent", check=True)
    assert "Apache refuses the new configuration; nothing was changed" in report["msg"]


def test_check_mode_tests_a_removal_together_with_those_that_go_before_it(change, host):
    """Two change sets, of which the second needs the first: as the module and a virtual host that uses it."""
    module = host / "modules/mod_x.so"
    change(**binary(host, b"so"))
    user = {"path": "mods-available/user.load", "content": f"# socket_handoff.fleet\nLoadModule user {module}\n"}
    link = {"path": "mods-enabled/user.load", "target": "../mods-available/user.load"}
    change(name="later", files=[user], links=[link])
    before = snapshot(host)
    assert "Apache refuses" in change(state="absent", check=True)["msg"]
    report = change(state="absent", after=["later"], check=True)
    assert report["tested"] is True
    assert len(report["changed_paths"]) == 3, "only its own"
    (host / "judged").write_text(before["judged"])
    assert snapshot(host) == before
    change(name="later", state="absent")
    assert change(state="absent", after=["later"])["changed_paths"] == report["changed_paths"]


def test_what_goes_before_a_removal_is_tested_even_if_nothing_else_goes(change, repair):
    change(name="later", **repair)
    assert change(state="absent", check=True)["changed"] is False
    assert "Apache refuses" in change(state="absent", after=["later"], check=True)["msg"]
