"""The small parts of a rollout: the lock, the steps, the verdict, the table, who runs it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import lookup_loader
from ansible.template import Templar, trust_as_template
from generate_readme import ROOT


def plugin(kind: str, name: str) -> ModuleType:
    return importlib.import_module(f"ansible_collections.socket_handoff.fleet.plugins.{kind}.{name}")


HOLDER = {"id": "0f3a55c1e2b7", "by": "ada@admin1", "release": "2.0", "since": "2026-11-29T01:00:00Z"}
OTHER = {**HOLDER, "id": "aaaaaaaaaaaa", "by": "bob@admin2"}


@pytest.fixture
def lock(run_module, tmp_path):
    path = tmp_path / "notes/lock"
    return lambda state, **arguments: run_module("rollout_lock", state=state, path=str(path), **arguments)


def test_a_second_rollout_is_refused_with_the_name_of_the_first(lock):
    assert lock("held", holder=HOLDER)["changed"] is True
    refused = lock("held", holder=OTHER)
    assert refused["failed"] is True
    for part in ("2.0", "ada@admin1", "2026-11-29T01:00:00Z", "-e rollout_break_lock=0f3a55c1e2b7"):
        assert part in refused["msg"]
    assert lock("read")["holder"] == HOLDER


def test_who_has_the_lock_may_ask_again_and_only_they_give_it_back(lock):
    lock("held", holder=HOLDER)
    assert lock("held", holder=HOLDER)["changed"] is False
    assert lock("free", holder=OTHER)["changed"] is False
    assert lock("read")["holder"] == HOLDER
    assert lock("free", holder=HOLDER)["changed"] is True
    assert lock("read")["holder"] == {}


def test_a_lock_whose_holder_is_gone_is_taken_over_and_no_other(lock):
    lock("held", holder=HOLDER)
    assert lock("held", holder=OTHER, gone=["bbbbbbbbbbbb"])["failed"] is True
    taken = lock("held", holder=OTHER, gone=[HOLDER["id"]])
    assert (taken["changed"], taken["taken_over"]) == (True, True)
    assert lock("read")["holder"] == OTHER


def test_of_two_who_ask_at_once_one_is_told_no(lock, tmp_path):
    """Both have found that its holder is gone; without more, the second would take away the first one's."""
    lock("held", holder=HOLDER)
    script = (
        "import json, sys\n"
        "from ansible.module_utils.testing import patch_module_args\n"
        "from ansible_collections.socket_handoff.fleet.plugins.modules import rollout_lock as module\n"
        "ours = {'id': sys.argv[1], 'by': sys.argv[1], 'release': '3.0', 'since': 'now'}\n"
        "real = module.put\n"
        "def put(path, holder):\n"
        "    print('decided', file=sys.stderr, flush=True)\n"
        "    sys.stdin.readline()\n"
        "    real(path, holder)\n"
        "module.put = put\n"
        "given = {'state': 'held', 'holder': ours, 'gone': [sys.argv[2]], 'path': sys.argv[3]}\n"
        "with patch_module_args(given):\n"
        "    module.main()\n"
    )
    head = (
        "import sys\n"
        "from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder\n"
        f"_AnsibleCollectionFinder(paths=[{str(ROOT / '.config/collections')!r}])._install()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    path = str(tmp_path / "notes/lock")

    def begin(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", head + script, name, HOLDER["id"], path], text=True, **pipes)

    first = begin("a" * 12)
    assert first.stderr.readline() == "decided\n"
    # It waits for the first, and then sees the first one's lock. A "decided" of its own would be a yes.
    second = begin("b" * 12)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)
    said, _ = first.communicate("\n")
    assert json.loads(said)["taken_over"] is True
    said, _ = second.communicate("\n")
    assert f"by {'a' * 12}" in json.loads(said)["msg"]
    assert lock("read")["holder"]["id"] == "a" * 12


def test_a_controller_that_slept_learns_that_another_has_taken_over(lock):
    lock("held", holder=HOLDER)
    assert "failed" not in lock("kept", holder=HOLDER)
    lock("held", holder=OTHER, gone=[HOLDER["id"]])
    refused = lock("kept", holder=HOLDER)
    assert "the lock of this run (0f3a55c1e2b7) was taken over: 2.0, begun" in refused["msg"]
    assert "by bob@admin2, has it" in refused["msg"]
    lock("free", holder=OTHER)
    assert "nobody has it" in lock("kept", holder=HOLDER)["msg"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"id": 7}', "\udcff"])
def test_a_lock_that_cannot_be_read_has_an_id_by_which_it_can_be_broken(lock, tmp_path, content):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/lock").write_bytes(content.encode(errors="surrogateescape"))
    refused = lock("held", holder=HOLDER)
    (found,) = re.findall(r"-e rollout_break_lock=([0-9a-f]{12})\Z", refused["msg"])
    assert lock("read")["holder"]["id"] == found
    assert lock("held", holder=HOLDER, gone=[found])["taken_over"] is True


def test_a_lock_is_on_the_disk_before_it_is_at_its_place(lock, monkeypatch, tmp_path):
    seen, replaced, synced = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), synced(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("replace"), replaced(*names)))
    lock("held", holder=HOLDER)
    notes = str(tmp_path / "notes")
    assert seen == [f"{notes}/lock.part", "replace", notes]


def test_check_mode_takes_no_lock(lock):
    assert lock("held", holder=HOLDER, check=True)["changed"] is True
    assert lock("read")["holder"] == {}


@pytest.mark.parametrize(
    ("ramp", "hosts", "steps"),
    [
        ("1, 10%, 50%, 100%", 6, [1, 2, 3]),
        ([1, "10%", "50%", "100%"], 100, [1, 9, 40, 50]),
        ("1,10%,50%,100%", 1, [1]),
        ("100%", 7, [7]),
        ("2,4,100%", 3, [2, 1]),
        (["50%", 1, "100%"], 4, [2, 2]),
        ("1,50%", 4, []),
        ("", 4, []),
        ("0,100%", 4, []),
        ("101%", 4, []),
        ("1;100%", 4, []),
        ([None, "100%"], 4, []),
    ],
)
def test_a_ramp_becomes_steps_that_reach_every_host_once(ramp, hosts, steps):
    found = plugin("filter", "rollout_steps").rollout_steps(ramp, hosts)
    assert found == steps
    assert sum(found) in (0, hosts)


@pytest.mark.parametrize(
    ("ramp", "hosts", "at_once", "steps"),
    [
        ("1, 10%, 50%, 100%", 100, "25%", [1, 9, 25, 15, 25, 25]),
        ("1, 10%, 50%, 100%", 6, "25%", [1, 2, 2, 1]),
        ("100%", 2, "25%", [1, 1]),
        ("100%", 1, "25%", [1]),
        ("100%", 5, 2, [2, 2, 1]),
        ("100%", 5, "100%", [5]),
        ("100%", 5, "9", [5]),
        ("100%", 5, 0, []),
        ("100%", 5, "101%", []),
        ("100%", 5, "", []),
    ],
)
def test_no_step_drains_more_than_are_to_be_away_at_once(ramp, hosts, at_once, steps):
    assert plugin("filter", "rollout_steps").rollout_steps(ramp, hosts, at_once) == steps


def sample(host: str, new: bool, ended: int, bad: int, *problems: str) -> dict[str, object]:
    return {"host": host, "new": new, "ended": ended, "bad": bad, "problems": list(problems)}


@pytest.mark.parametrize(
    ("samples", "refused"),
    [
        ([sample("a", True, 100, 0), sample("b", False, 100, 0)], []),
        ([sample("a", True, 100, 3), sample("b", False, 100, 1)], []),
        ([sample("a", True, 100, 4), sample("b", False, 100, 1)], ["a"]),
        # The backend fails everybody: that is not the release.
        ([sample("a", True, 100, 60), sample("b", False, 100, 60)], []),
        ([sample("a", True, 19, 19)], []),
        ([sample("a", True, 20, 20)], ["a"]),
        ([sample("a", True, 0, 0, "apache2.service is failed"), sample("c", True, 50, 0)], ["a"]),
        ([sample("b", False, 100, 90, "worse")], []),
    ],
)
def test_a_canary_is_judged_by_those_that_have_the_old_release(samples, refused):
    verdicts = plugin("filter", "soak_verdicts").soak_verdicts(samples, margin=2, minimum=20)
    assert sorted(verdicts) == refused
    assert all("worse than before" in text for text in verdicts.values())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"msg": "The disk is full"}, "The disk is full"),
        ({"msg": "non-zero return code", "stderr": "AH00526:\n  no"}, "non-zero return code: AH00526: no"),
        (
            {"msg": "MODULE FAILURE", "module_stderr": "x" * 2000 + "KeyError"},
            f"MODULE FAILURE: ... {'x' * 992}KeyError",
        ),
        ({"msg": "died: no", "stderr": "no"}, "died: no"),
        ({}, "see above"),
        ("?", "see above"),
        ({"censored": "the output has been hidden"}, "what it said is kept secret"),
        (
            {
                "msg": "One or more items failed",
                "results": [
                    {"item": "a", "failed": False},
                    {"item": "b", "failed": True, "msg": "no b"},
                    {"item": {"k": 1}, "_ansible_item_label": "c", "unreachable": True, "msg": "away"},
                    {"item": {"k": 1}, "failed": True, "msg": "no d"},
                    {"item": "e", "failed": True, "msg": "no e"},
                ],
            },
            "b: no b; c: away; no d; and 1 more",
        ),
    ],
)
def test_why_is_what_the_program_or_the_item_has_said(result, words):
    assert plugin("filter", "failure_words").failure_words(result) == words


def test_a_table_has_its_columns_below_one_another():
    rows = [{"host": "web1", "why": "a\nb"}, {"host": "web-with-a-long-name", "why": ""}]
    lines = plugin("filter", "fleet_table").fleet_table(rows, ["host", "why"])
    assert lines == ["host                  why", "web1                  a b", "web-with-a-long-name"]


def test_this_process_is_here_one_that_has_ended_is_gone_and_one_elsewhere_is_not_guessed_at():
    module = plugin("lookup", "rollout_controller")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = module.name_of(child.pid)
    assert module.state_of(name) == "here"
    # The number alone does not make it the same process, nor does it after a reboot.
    assert module.state_of(f"{name[:-1]}{(int(name[-1]) + 1) % 10}") == "gone"
    machine, boot, number, started = name.split(" ")
    assert module.state_of(f"{machine} {boot[::-1]} {number} {started}") == "gone"
    assert module.state_of(f"other/{machine} {boot} {number} {started}") == "elsewhere"
    assert module.state_of("nonsense") == "elsewhere"
    child.communicate(b"\n")
    assert module.state_of(name) == "gone"


def test_nothing_is_claimed_of_a_process_where_those_of_others_cannot_be_seen(monkeypatch):
    """/proc may be mounted with hidepid, and a unit may have ProtectProc=: what runs would count as gone."""
    module = plugin("lookup", "rollout_controller")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = module.name_of(child.pid)
    machine, boot, number, started = name.split(" ")
    read, own = module._read, f"/proc/{os.getpid()}/"

    def half_blind(path: str) -> str:
        return "unknown" if path.startswith("/proc/") and not path.startswith((own, "/proc/sys/")) else read(path)

    monkeypatch.setattr(module, "_read", half_blind)
    assert module.state_of(name) == "elsewhere"
    assert module.state_of(module.name_of(os.getpid())) == "here"
    assert module.state_of(f"{machine} {boot[::-1]} {number} {started}") == "gone"
    child.communicate(b"\n")


def test_a_process_of_another_container_is_elsewhere_though_its_name_and_its_machine_id_are_the_same(monkeypatch):
    module = plugin("lookup", "rollout_controller")
    readlink = os.readlink
    other = "/proc/self/ns/pid"
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]" if path == other else readlink(path))
    name = module.name_of(os.getpid())
    assert module.state_of(name) == "here"
    monkeypatch.undo()
    assert module.state_of(name) == "elsewhere"


def test_a_controller_whose_user_has_no_name_is_named_by_its_number(monkeypatch):
    module = plugin("lookup", "rollout_controller")

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(module.getpass, "getuser", nobody)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (found,) = lookup_loader.get("socket_handoff.fleet.rollout_controller").run([])
    assert found["by"].startswith("uid4711@")


def test_the_controller_names_the_run_and_not_one_of_its_workers():
    module = plugin("lookup", "rollout_controller")
    (found,) = lookup_loader.get("socket_handoff.fleet.rollout_controller").run([])
    assert found["process"] == module.name_of(os.getpid())
    assert "@" in found["by"]


def inputs(of: str = "all", **variables: object) -> str:
    loader = DataLoader()
    lookup = lookup_loader.get("socket_handoff.fleet.release_inputs", loader=loader, templar=Templar(loader, variables))
    (digest,) = lookup.run([], variables=variables, of=of)
    return str(digest)


def test_what_a_release_is_made_from_has_one_digest():
    plain = inputs(streaming_daemon_workers=2)
    assert inputs(streaming_daemon_workers=2) == plain
    assert inputs(streaming_daemon_workers=3) != plain
    assert inputs(streaming_daemon_workers=trust_as_template("{{ 1 + 1 }}")) == plain
    assert inputs(streaming_daemon_workers=2, somebody_elses=1) == plain


def test_the_files_of_a_release_are_the_same_whatever_the_variables_are():
    assert inputs(of="files", streaming_daemon_workers=2) == inputs(of="files", streaming_daemon_workers=3)
    assert inputs(of="files") != inputs()


def test_secrets_and_what_the_probe_asks_are_no_part_of_a_release():
    plain = inputs(streaming_daemon_credentials={"key": "one"})
    assert inputs(streaming_daemon_credentials={"key": "two"}) == plain
    assert inputs(streaming_daemon_credentials={"other": "one"}) != plain
    assert inputs(streaming_daemon_credentials={"key": "one"}, handoff_app_password="x") == plain
    assert inputs(streaming_daemon_credentials={"key": "one"}, handoff_app_probe_tokens=9) == plain


def test_every_tree_that_a_release_is_made_from_is_there():
    module = plugin("lookup", "release_inputs")
    for tree, endings in module.TREES:
        assert any(path.name.endswith(endings) for path in (ROOT / tree).rglob("*")), tree


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("plugins/modules/apache_config.py", True),
        ("plugins/module_utils/source_tree.py", True),
        ("examples/php-app/public/icon.png", True),
        ("roles/handoff_app/tasks/install.yml", True),
        # What rolls out, and what only looks, brings nothing to a host.
        ("plugins/modules/host_health.py", False),
        ("plugins/modules/handoff_probe.py", False),
        ("plugins/lookup/rollout_controller.py", False),
    ],
)
def test_what_reaches_a_host_makes_another_release_of_it_and_nothing_else_does(path, counts, monkeypatch, tmp_path):
    module = plugin("lookup", "release_inputs")
    for tree in (*(tree for tree, _ in module.TREES), "plugins"):
        shutil.copytree(ROOT / tree, tmp_path / tree, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    before = module.digest_of_trees()
    assert module.digest_of_trees() == before
    with (tmp_path / path).open("a") as handle:
        handle.write("# changed\n")
    assert (module.digest_of_trees() != before) == counts
