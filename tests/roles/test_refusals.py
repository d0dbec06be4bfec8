"""Every option that not every value suits has a wrong value in refusals.yml, with the whole message that it earns.

Also what a description promises: a documented range is the enforced one, to its last number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils import inputs
from generate_readme import PLAYBOOKS, ROLES, ROOT, spec_of
from in_process import ASSERT, refusals, sentences

TABLE: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("refusals.yml").read_text())
CASES = [
    pytest.param(entry, number, id=f"{entry}-{number}-{case['option']}")
    for entry, table in TABLE.items()
    for number, case in enumerate(table["cases"])
]
# Options that take every value of their type, and a type that takes everything: with the reason.
FREE: dict[str, str] = {
    "handoff_app_probe_expect": "any text is a text; the probe itself refuses what is no regular expression",
    "rollout_by": "for people to read",
    "handoff_lb_balancers": "names of hosts; a playbook that cannot reach one says so",
    "handoff_lb_drain_server": "any text is a text; the module that drains refuses what is no name",
}
# What the playbooks for a fleet take beside the roles' variables.
OWN = ("rollout_", "rollback_", "status_", "pull_")
OLD_NAMES = {"AnsibleUnicode": "str", "AnsibleMapping": "dict", "AnsibleSequence": "list"}


def play_of(entry: str) -> str:
    """The play that checks inputs: a role's entry point assert, or the first play of a playbook, which checks all."""
    if entry in ROLES:
        return ASSERT.format(role=entry)
    first = yaml.safe_load((ROOT / "playbooks" / f"{entry}.yml").read_text())[0]
    return yaml.safe_dump([{**first, "hosts": "all"}], sort_keys=False)


def message(answer: dict[str, Any]) -> str:
    """What an operator reads. Of Ansible's own messages about types only the part that no release of it words anew."""
    if "argument_errors" not in answer:
        return sentences(answer)
    said = " ".join(re.sub(r"(unable to convert to \w+):.*", r"\1", error) for error in answer["argument_errors"])
    # ansible-core 2.18 names its own classes here.
    return re.sub(r"<class '(?:[\w.]+[.])?(\w+)'>", lambda found: OLD_NAMES.get(found[1], found[1]), said)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any] | None]:
    """What every case of the table was answered."""
    work, found = tmp_path_factory.mktemp("refusals"), {}
    for entry, table in TABLE.items():
        hosts = {f"host{number}": {**table["with"], **case["given"]} for number, case in enumerate(table["cases"])}
        for host, answer in refusals(play_of(entry), hosts, work / entry).items():
            found[f"{entry}-{host.removeprefix('host')}"] = answer
    return found


@pytest.mark.parametrize(("entry", "number"), CASES)
def test_a_wrong_value_earns_exactly_this_message(answers, entry, number):
    case, answer = TABLE[entry]["cases"][number], answers[f"{entry}-{number}"]
    assert answer is not None, "should have been refused"
    assert message(answer) == case["says"]
    *_, leaf = re.split(r"\[\]\.", case["option"])
    assert leaf in message(answer), "the message does not name what is wrong"
    assert "s3cr3t" not in repr(answer)


# How Ansible itself words what a spec refuses.
ANSIBLES = re.compile(
    r"unable to convert to|must be one of: |missing required arguments: |Supported parameters include"
)


@pytest.mark.parametrize(("entry", "number"), CASES)
def test_every_message_of_ours_says_what_is_allowed_and_gives_an_example(entry, number):
    said = TABLE[entry]["cases"][number]["says"]
    assert ANSIBLES.search(said) or ("allowed" in said and "Example: " in said)


def test_the_removal_does_not_ask_for_what_only_a_deployment_needs(tmp_path):
    """Nor does it need what the table's wrong values are wrong of: without them the defaults hold."""
    hosts = {
        "nothing": {},
        "right": {
            "streaming_daemon_drain_timeout": "0",
            "streaming_daemon_write_timeout": 0.1,
        },
        "backends": {"streaming_daemon_backends": []},
        "backend": {"streaming_daemon_backend": "nobody"},
        "credentials": {"streaming_daemon_credentials": {"a/b": "s3cr3t"}},
        "workers": {"streaming_daemon_workers": 65},
        "unknown": {"streaming_daemon_of_an_earlier_release": 1},
    }
    assert refusals(play_of("remove"), hosts, tmp_path / "work") == dict.fromkeys(hosts)


def paths(options: dict[str, Any], above: str = "") -> Iterator[str]:
    """Names of options and, behind their parent's, of their sub-options."""
    for name, option in options.items():
        yield f"{above}{name}"
        yield from paths(option.get("options", {}), f"{above}{name}[].")


def options_of(entry: str) -> dict[str, Any]:
    return spec_of(entry)["main"]["options"] if entry in ROLES else inputs.playbook_options()[entry]


@pytest.mark.parametrize("entry", [*ROLES, *PLAYBOOKS])
def test_every_constrained_option_has_a_wrong_value_and_nothing_else_has(entry):
    tried = {case["option"] for case in TABLE.get(entry, {}).get("cases", [])}
    options = set(paths(options_of(entry)))
    assert tried - options == set()
    assert options - tried - set(FREE) == set()


def test_the_specs_of_playbooks_and_of_roles_agree():
    """The options of a playbook's spec are the roles', said once more for the playbook alone: same type and choices."""
    known = {name: option for role in ROLES for name, option in options_of(role).items()}
    for playbook in PLAYBOOKS:
        for name, option in options_of(playbook).items():
            other = known.setdefault(name, option) if name.startswith(OWN) else known[name]
            for key in ("type", "elements", "choices", "no_log"):
                assert option.get(key) == other.get(key), f"{playbook}.meta.yml: {key} of {name}"
            assert not name.startswith(OWN) or option.get("default") == other.get("default"), name


RANGE = re.compile(r"(?<![\w.])(-?[0-9.]+) to ([0-9.]+)(?![\w])")
CONTEXT: dict[str, dict[str, Any]] = {
    "apache_handoff_targets[].": {"name": "llm", "socket": "/run/llm.sock"},
    "streaming_daemon_backends[].": {"name": "demo", "type": "openai"},
    "handoff_lb_servers[].": {"name": "web1", "address": "192.0.2.11"},
    "streaming_daemon_backends[].tokens_per_second": {"name": "demo", "type": "demo"},
}


def ranges(role: str) -> dict[str, tuple[float, float, str]]:
    """Numeric options whose description names a range: path -> lowest, highest, type."""
    found = {}

    def walk(options: dict[str, Any], above: str = "") -> None:
        for name, option in options.items():
            walk(option.get("options", {}), f"{above}{name}[].")
            if option["type"] in ("int", "float"):
                match = RANGE.search(option["description"])
                assert match, f"{above}{name} is a number, and its description names no range"
                found[f"{above}{name}"] = (float(match[1]), float(match[2].rstrip(".")), option["type"])

    walk(options_of(role))
    return found


def given(path: str, value: float) -> dict[str, Any]:
    """Variables in which the option has this value and all else is right."""
    parent, bracket, leaf = path.partition("[].")
    if not bracket:
        return {path: value}
    return {parent: [{**CONTEXT.get(path, CONTEXT[parent + bracket]), leaf: value}]}


@pytest.mark.parametrize("role", ROLES)
def test_a_documented_range_is_the_enforced_one(role, tmp_path):
    hosts, inside, meant = {}, {}, {}
    for path, (lowest, highest, kind) in ranges(role).items():
        step = 1 if kind == "int" else 0.05
        cast = int if kind == "int" else float
        for value, fits in ((lowest, True), (highest, True), (lowest - step, False), (highest + step, False)):
            host = f"host{len(hosts)}"
            hosts[host] = {**TABLE[role]["with"], **given(path, cast(value))}
            inside[host], meant[host] = fits, f"{path}: {cast(value)}"
    answers = refusals(play_of(role), hosts, tmp_path)
    said = {host: message(answer) if answer else "" for host, answer in answers.items()}
    assert {meant[host]: said[host] for host, fits in inside.items() if fits and said[host]} == {}, "documented"
    assert [meant[host] for host, fits in inside.items() if not fits and not said[host]] == [], "accepted all the same"
