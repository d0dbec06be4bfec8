"""What the filter to_toml writes, Python's own parser reads back as it was; and the daemon's role writes with it."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.socket_handoff.fleet.plugins.filter.toml import to_toml
from ansible_collections.socket_handoff.fleet.plugins.lookup import daemon_config
from generate_readme import ROOT
from in_process import ASSERT, refusals

TABLES: list[dict[str, Any]] = [
    {},
    {"limits": {}},
    {"first": 1, "table": {"key": "value"}, "last": True},
    {"routes": [{"path": ["/a", "/b"], "backend": "demo"}, {"backend": "demo"}], "limits": {"user_rate": 0.1}},
    {"empty": [], "mixed": {"list": [{"a": 1}, {"b": [[], {}]}]}},
    {"numbers": {"int": -3, "large": 10**18, "float": 1e22, "tiny": 1e-7, "whole": 2.0, "inf": math.inf}},
    {"text": {"quotes": '"""\\"', "controls": "\x00\x1f\x7f\x80\n\t\r", "emoji": "💡é", "empty": "", "true": "true"}},
    {"key with spaces": {"": 1, "a.b": 2, "é": 3, '"': 4, "-": 5, "5": 6, "new\nline": 7}, "[x]": {"y": 1}},
    {"exec": {"environment": {"A": "1", "B C": "=\n"}}},
]


@pytest.mark.parametrize("tables", TABLES, ids=repr)
def test_what_is_written_is_read_back_as_it_was(tables: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(tables)) == tables
    below = {name: value for name, value in tables.items() if isinstance(value, dict)}
    assert tomllib.loads(to_toml(below, "up")) == ({"up": below} if below else {})


@pytest.mark.parametrize("value", [None, b"bytes", {1, 2}, object()])
def test_what_toml_has_no_word_for_is_refused_by_its_path(value: Any) -> None:
    for tables, path in (
        ({"a": value}, "value.a"),
        ({"a": {"b": [{"c": value}]}}, "a.b.c"),
        ({"r": [{"c": value}]}, "r.c"),
    ):
        with pytest.raises(AnsibleFilterError, match=rf"^{path} is of type \w+; allowed are .* Example: "):
            to_toml(tables)


def test_the_daemon_s_own_check_is_what_the_lookup_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = daemon_config.LookupModule().run
    monkeypatch.setattr(daemon_config.LookupModule, "set_options", lambda *_, **__: None)
    assert ask(["[limits]\nstreams_per_user = 4"]) == []
    first, second = ask(["[limits]\nstreams_per_user = -1", "[[[", ""])
    assert first.startswith("limits.streams_per_user = -1: allowed is ")
    assert "/dev/stdin" not in first + second
    assert second


def test_a_check_that_cannot_run_is_no_approval(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(daemon_config.LookupModule, "set_options", lambda *_, **__: None)
    monkeypatch.setattr(daemon_config, "SOURCE", tmp_path)
    with pytest.raises(Exception, match=r"streaming_daemon --check ended with 1: .*No module named"):
        daemon_config.LookupModule().run([""])


def test_the_example_of_the_page_is_taken_and_one_slip_in_it_is_not(tmp_path: Path) -> None:
    page = (ROOT / "docs/backends.md").read_text().split("### By the role\n")[1]
    example = re.findall(r"```yaml\n(.*?)```", page, re.S)[0]
    right = yaml.safe_load(example) | {"vault_openai_api_key": "k", "vault_anthropic_api_key": "k"}
    wrong = right | yaml.safe_load(example.replace("max_duration: 7200", "max_duration: 700000"))
    answers = refusals(ASSERT.format(role="streaming_daemon"), {"right": right, "wrong": wrong}, tmp_path)
    assert answers["right"] is None
    assert "server.max_duration = 700000: allowed is a number from 0 to 604800" in repr(answers["wrong"])


@pytest.mark.parametrize("runs_programs", [False, True])
def test_the_unit_permits_what_ties_a_program_to_its_worker_only_where_there_is_one(runs_programs: bool) -> None:
    program = {"backends": {"program": {"type": "exec", "command": ["/usr/bin/cat"]}}}
    role = ROOT / "roles/streaming_daemon"
    names = ("extra_named", "extra_backends", "runs_programs")
    every = yaml.safe_load((role / "vars/main.yml").read_text())
    computed = {f"__streaming_daemon_{name}": trust_as_template(every[f"__streaming_daemon_{name}"]) for name in names}
    variables = yaml.safe_load((role / "defaults/main.yml").read_text()) | computed
    variables |= {f"__streaming_daemon_{name}": False for name in ("confines", "encrypts", "network")}
    variables |= {"ansible_managed": "x", "__streaming_daemon_nofile": 1}
    variables |= {"streaming_daemon_extra_config": program if runs_programs else {}}
    text = (ROOT / "templates/etc/systemd/system/streaming-daemon.service.j2").read_text()
    unit = Templar(loader=DataLoader(), variables=variables).template(trust_as_template(text))
    assert ("\nSystemCallFilter=capset\n" in unit) == runs_programs
