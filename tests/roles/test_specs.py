"""Specs, defaults, tasks, templates and READMEs of the roles say the same; wrong input is refused by name.

The negative cases are hosts of one inventory; nothing is installed and no container is needed, because a role's entry
point ``assert`` changes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils import inputs
from generate_readme import ROLES, ROOT, spec_of
from in_process import ASSERT, refusals, sentences

PASSWORD = "correct horse"


def texts(role: str, *folders: str) -> str:
    """Everything a role's own YAML says in these folders."""
    return "\n".join(
        path.read_text() for folder in folders for path in sorted((ROOT / "roles" / role / folder).glob("*.yml"))
    )


def templates() -> list[Path]:
    return sorted((ROOT / "templates").rglob("*.j2"))


# What several roles share has no role's prefix.
SHARED = {"handoff_foreign_variables"}


def names(role: str, text: str) -> set[str]:
    """Public variables of a role that a text mentions."""
    return set(re.findall(rf"(?<![\w./-])(?:{role}_[a-z0-9_]+|{'|'.join(SHARED)})\b", text))


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_exactly_those_of_the_spec(role):
    defaults = yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text())
    documented = {
        name: option["default"] for name, option in spec_of(role)["main"]["options"].items() if "default" in option
    }
    assert defaults == documented


@pytest.mark.parametrize("role", ROLES)
def test_every_documented_variable_is_used(role):
    used = names(role, texts(role, "tasks", "vars", "handlers") + "".join(path.read_text() for path in templates()))
    assert set(spec_of(role)["main"]["options"]) - used == set()


@pytest.mark.parametrize("role", ROLES)
def test_every_used_variable_is_documented(role):
    used = names(
        role, texts(role, "tasks", "vars", "handlers", "defaults") + "".join(path.read_text() for path in templates())
    )
    assert used - set(spec_of(role)["main"]["options"]) == set()


@pytest.mark.parametrize("role", ROLES)
def test_every_private_variable_is_set_and_used(role):
    tasks = texts(role, "tasks", "vars", "handlers")
    mentioned = re.findall(rf"\b(__{role}_[a-z0-9_]+)\b", tasks + "".join(path.read_text() for path in templates()))
    made = set(re.findall(rf"^\s*(__{role}_[a-z0-9_]+):", tasks, re.M)) | set(
        re.findall(rf"register: (__{role}_\w+)", tasks)
    )
    assert set(mentioned) - made == set()
    assert {name for name in made if mentioned.count(name) < 2} == set()


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_that_is_used_has_a_spec_and_takes_the_same_variables(role):
    specs = spec_of(role)
    for playbook in (ROOT / "playbooks").glob("*.yml"):
        text = playbook.read_text()
        for entry in re.findall(rf"name: socket_handoff\.fleet\.{role}\n\s+tasks_from: (\w+)", text):
            assert entry in specs, f"{playbook.name} enters {role} by {entry}"
    for entry, spec in specs.items():
        assert (ROOT / f"roles/{role}/tasks/{entry}.yml").is_file()
        assert spec["options"] == specs["main"]["options"]


def task_of(tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The one task of this name, in blocks too."""
    inside = [task for block in tasks for task in block.get("block", [block])]
    (found,) = [task for task in inside if task["name"] == name]
    return found


@pytest.mark.parametrize("role", ROLES)
def test_the_note_of_a_run_that_was_cut_off_stays_until_somebody_has_acted_on_it(role):
    """Whoever drops it must have looked for it, and a way back does not restart what an earlier run has written."""
    done = "Note that what is written is in use"
    tasks = ROOT / "roles" / role / "tasks"
    assert task_of(yaml.safe_load((tasks / "main.yml").read_text()), done)["tags"] == ["configure"]
    given = task_of(yaml.safe_load((tasks / "restore.yml").read_text()), done).get("when", True)
    conditions = given if isinstance(given, list) else [given]
    facts = {"streaming_daemon_active": {"rc": 0}, "streaming_daemon_current": {"stat": {"exists": True}}}

    def drops(**cut_off: Any) -> bool:
        variables = {f"__{name}": value for name, value in (facts | cut_off).items()}
        templar = Templar(loader=DataLoader(), variables=variables)
        return all(templar.template(trust_as_template(f"{{{{ {condition} }}}}")) is True for condition in conditions)

    assert drops(**{f"{role}_cut_off": {"stat": {"exists": False}}})
    assert not drops(**{f"{role}_cut_off": {"stat": {"exists": True}}})
    if role != "streaming_daemon":  # looks in any case
        assert not drops()


def playbooks() -> list[Path]:
    return sorted(path for path in (ROOT / "playbooks").glob("*.yml") if not path.name.endswith(".meta.yml"))


@pytest.mark.parametrize("playbook", playbooks(), ids=lambda path: path.stem)
def test_every_playbook_checks_its_inputs_first_by_a_spec_that_names_what_it_reads(playbook):
    meta = yaml.safe_load(playbook.with_suffix(".meta.yml").read_text())
    assert list(meta["argument_specs"]) == [playbook.stem]
    options = set(meta["argument_specs"][playbook.stem]["options"])
    plays = yaml.safe_load(playbook.read_text())
    (check,) = plays[0]["tasks"][0]["ansible.builtin.validate_argument_spec"].values()
    assert f"lookup('socket_handoff.fleet.playbook_options', '{playbook.stem}')" in check
    # Read by the playbook itself, or by an entry point that it enters and that is no role's whole.
    whole = with_its_tasks(playbook)
    text = re.sub(r"name: socket_handoff[.]fleet[.]\w+|role: .*|tags: .*", "", whole)
    read = {name for role in ROLES for name in names(role, text)}
    entered = re.findall(r"name: socket_handoff[.]fleet[.](\w+)\n\s+tasks_from: (\w+)", whole)
    for role, entry in entered:
        if entry != "assert":
            read |= names(role, (ROOT / f"roles/{role}/tasks/{entry}.yml").read_text())
    derived = {"handoff_app_port"} if "handoff_app_probe_url" in read else set()
    # Of a role that it applies whole it takes every variable, and says so; deploy.yml names those that have to agree.
    applied = re.findall(r"include_role:\n\s+name: socket_handoff[.]fleet[.](\w+)\n(?!\s+tasks_from)", whole)
    read -= {name for role in applied for name in read if name.startswith(f"{role}_")}
    derived -= {name for role in applied for name in derived if name.startswith(f"{role}_")}
    read -= set(re.findall(r"(?m)^\s+(\w+): \"", whole))  # what it sets itself
    # Beside them its own, and none that it does not read.
    own = {name for name in options if name.startswith(("rollout_", "rollback_", "status_", "pull_"))}
    assert {name for name in own if not re.search(rf"\b{name}\b", whole)} == set()
    assert options - own == read | derived


def with_its_tasks(path):
    """The text of a playbook, and of the tasks that it includes."""
    text = path.read_text()
    for name in dict.fromkeys(re.findall(r"(?:include|import)_tasks: (\S+)", text)):
        text += with_its_tasks(path.parent / name)
    return text


def test_what_is_removed_is_not_brought_back_meanwhile_by_a_host_that_pulls():
    names = [play["name"] for play in yaml.safe_load((ROOT / "playbooks/remove.yml").read_text())]
    assert names[2:4] == ["Let no host pull any more", "Remove the load balancers"]


def test_the_removal_asks_apache_about_all_of_it_before_anything_goes():
    plays = yaml.safe_load((ROOT / "playbooks/remove.yml").read_text())
    [remove] = [play for play in plays if play["name"] == "Remove the chain"]
    roles = [task.get("ansible.builtin.import_role", {}).get("name", "").split(".")[-1] for task in remove["tasks"]]
    asks = remove["tasks"][0]
    assert roles == ["", "handoff_monitoring", "handoff_app", "apache_handoff", "streaming_daemon"]
    assert asks["check_mode"] is True
    assert asks["socket_handoff.fleet.apache_config"] == {
        "name": "apache_handoff",
        "state": "absent",
        "after": ["handoff_monitoring", "handoff_app"],
    }


def test_site_yml_only_puts_playbooks_with_specs_in_order():
    plays = yaml.safe_load((ROOT / "site.yml").read_text())
    assert [set(play) for play in plays] == [{"name", "ansible.builtin.import_playbook"}] * len(plays)
    assert {ROOT / play["ansible.builtin.import_playbook"] for play in plays} <= set(playbooks())


def test_a_deployment_asks_for_rollouts_around_all_that_it_changes_and_before_anybody_pulls():
    plays = {play["name"]: play for play in yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text())}
    order = list(plays)
    first, last = "Leave hosts alone that a rollout is at work on", "End what a rollout has left open"
    changing = [name for name, play in plays.items() if "roles" in play or play.get("tags") == ["handoff_monitoring"]]
    assert order[order.index(first) + 1 : order.index(last)] + order[order.index(last) + 1 :] == changing
    assert changing[-1] == order[-1] == "Let hosts pull"
    # Part of a deployment asks too, and does not end what a rollout has left.
    assert (plays[first]["tags"], plays[last].get("tags")) == (["always"], None)


def documents() -> list[Path]:
    """Where an operator meets variables: documents, examples, what the scripts and scenarios set."""
    rooms = ("README.md", "COMPATIBILITY.md", "docs", "examples", "molecule", "script", "changelogs", "CHANGELOG.md")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *rooms], cwd=ROOT, capture_output=True, text=True, check=True
    )
    suffixes = {".md", ".yml", ".yaml", ".php", ".sh", ""}
    return [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in suffixes]


def test_every_variable_that_documents_and_examples_name_exists():
    unknown = {}
    for path in documents():
        mentioned = {name for role in ROLES for name in names(role, path.read_text())}
        if strange := mentioned - inputs.known():
            unknown[str(path.relative_to(ROOT))] = strange
    assert unknown == {}


def as_text(value: Any) -> Any:
    """What ``-e name=value``, an INI inventory or an older Ansible make of a number or a truth value."""
    if isinstance(value, dict):
        return {key: as_text(below) for key, below in value.items()}
    if isinstance(value, list):
        return [as_text(below) for below in value]
    return str(value) if isinstance(value, bool | int | float) else value


NUMBERS: dict[str, dict[str, Any]] = {
    "etc/apache2/mods-available/socket_handoff.conf.j2": {
        "apache_handoff_enabled": False,
        "apache_handoff_status_page": False,
        "apache_handoff_targets": [
            {"name": "old", "socket": "/run/old.sock", "envelope": False, "ack": False},
            {
                **{"name": "llm", "socket": "/run/llm.sock", "envelope": True, "ack": True, "timeout_ms": 250},
                **{"retries": 0, "max_fails": 3, "retry_ms": 500},
            },
        ],
    },
    "etc/streaming-daemon/config.toml.j2": {
        "streaming_daemon_ack": False,
        "streaming_daemon_backends": [
            {"name": "demo", "type": "demo", "tokens_per_second": 12.5},
            {"name": "slow", "type": "demo", "tokens_per_second": 2},
            {
                **{"name": "llm", "type": "openai", "base_url": "http://[::1]:8000/v1", "model": "1.5"},
                **{"connect_timeout": 3, "first_event_timeout": 30.5, "idle_timeout": 60},
            },
        ],
    },
}


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_that_came_as_text_is_written_as_the_number(path):
    text = trust_as_template((ROOT / "templates" / path).read_text())
    variables: dict[str, Any] = {"ansible_managed": "x"}
    for role in ROLES:
        variables |= yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text())
    variables = {name: value for name, value in variables.items() if "{{" not in str(value)} | NUMBERS[path]
    written, from_text = (
        Templar(loader=DataLoader(), variables=given).template(text) for given in (variables, as_text(variables))
    )
    assert from_text == written
    if path.endswith(".toml.j2"):
        assert tomllib.loads(written)["backends"]["llm"]["first_event_timeout"] == 30.5


def sub_options(role: str, variable: str) -> set[str]:
    return set(spec_of(role)["main"]["options"][variable]["options"])


def test_options_of_targets_are_those_that_apaches_configuration_has():
    template = (ROOT / "templates/etc/apache2/mods-available/socket_handoff.conf.j2").read_text()
    assert set(re.findall(r"\btarget[.](\w+)", template)) == sub_options("apache_handoff", "apache_handoff_targets")


def test_options_and_defaults_of_the_daemon_are_the_daemons_own(monkeypatch):
    """The role speaks for a part of the daemon's configuration, with the defaults that the daemon has itself."""
    monkeypatch.syspath_prepend(str(ROOT / "daemon-src"))
    config = importlib.import_module("streaming_daemon.config")
    backends = {field.name for kind in (config.DemoConfig, config.OpenAIConfig) for field in dataclasses.fields(kind)}
    assert sub_options("streaming_daemon", "streaming_daemon_backends") - {"name", "type"} <= backends
    choices = spec_of("streaming_daemon")["main"]["options"]["streaming_daemon_backends"]["options"]["type"]["choices"]
    assert set(choices) <= set(config.BACKEND_TYPES)
    defaults = yaml.safe_load((ROOT / "roles/streaming_daemon/defaults/main.yml").read_text())
    template = (ROOT / "templates/etc/streaming-daemon/config.toml.j2").read_text()
    for table, kind in (("server", config.ServerConfig), ("listen", config.ListenConfig)):
        for key in keys_in(template, table):
            assert defaults[f"streaming_daemon_{key}"] == getattr(kind(), key), key


def keys_in(template: str, table: str) -> list[str]:
    """The keys that config.toml.j2 writes into a table."""
    keys = re.findall(r"^(\w+) = ", template.split(f"[{table}]\n")[1].split("\n[")[0].split("\n{%")[0], re.M)
    assert keys
    return keys


def test_what_the_daemons_configuration_has_from_variables_is_refused_as_further_configuration():
    template = (ROOT / "templates/etc/streaming-daemon/config.toml.j2").read_text()
    written = yaml.safe_load((ROOT / "roles/streaming_daemon/vars/main.yml").read_text())[
        "__streaming_daemon_written_keys"
    ]
    tables = re.findall(r"^\[(\w+)\]$", template, re.M)
    assert {table: list(keys) for table, keys in written.items()} == {t: keys_in(template, t) for t in tables}
    assert f"set written = {[*tables, 'backends']}" in template
    options = spec_of("streaming_daemon")["main"]["options"]
    assert {variable for keys in written.values() for variable in keys.values()} <= options.keys()


@pytest.mark.parametrize("role", ROLES)
def test_tags_stand_in_the_table_of_contents_only(role):
    for path in (ROOT / f"roles/{role}/tasks").glob("*.yml"):
        if path.name != "main.yml":
            assert not re.search(r"^\s*tags:", path.read_text(), re.M), path
    allowed = {"always", "install", "configure", "service", "verify"}
    main = (ROOT / f"roles/{role}/tasks/main.yml").read_text()
    assert set(re.findall(r"\w+", " ".join(re.findall(r"tags: \[(.*)\]", main)))) <= allowed
    assert re.search(r"import_tasks: assert.yml\n\s+tags: \[always\]", main)


@pytest.mark.parametrize("path", templates(), ids=lambda path: str(path.relative_to(ROOT / "templates")))
def test_every_template_says_who_manages_the_file_and_whose_it_is(path):
    head = path.read_text().splitlines()[:3]
    assert any("ansible_managed | comment" in line for line in head)
    assert any("Written by socket_handoff.fleet" in line for line in head)


def test_readmes_are_what_the_specs_say():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate_readme.py")), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "path", [*ROOT.glob("roles/*/README.md"), ROOT / "playbooks/README.md"], ids=lambda path: path.parent.name
)
def test_a_readme_has_no_markup_of_ansible_left(path):
    assert re.findall(r"\b[A-Z]\([^)]*\)?", path.read_text()) == []


def backend(**more: Any) -> dict[str, Any]:
    return {"streaming_daemon_backends": [{"name": "demo", "type": "demo"}, {"name": "llm", "type": "openai", **more}]}


def targets(*declared: dict[str, Any]) -> dict[str, Any]:
    return {"apache_handoff_targets": list(declared)}


CERTIFICATE = "-----BEGIN CERTIFICATE-----\nczNjcjN0\n-----END CERTIFICATE-----\n"
KEY = "-----BEGIN PRIVATE KEY-----\nczNjcjN0\n-----END PRIVATE KEY-----\n"


def balanced(**more: Any) -> dict[str, Any]:
    servers = [{"name": "web1", "address": "192.0.2.11"}]
    return {"handoff_lb_certificate_self_signed": True, "handoff_lb_servers": servers, **more}


# role -> [(variables, what the message must hold)]; None stands for an input that has to pass.
CASES: dict[str, list[tuple[dict[str, Any], list[str] | None]]] = {
    "apache_handoff": [
        ({}, None),
        ({"apache_handoff_allowed_prefix": "/var/run/llm/", "apache_handoff_targets": []}, None),
        (
            {
                "apache_handoff_allowed_prefix": "/run/a..b/c.sock",
                "apache_handoff_max_retries": 0,
                "apache_handoff_targets": [],
            },
            None,
        ),
        (
            {"apache_handoff_allowed_prefix": "/run/llm.sock"},
            [
                'apache_handoff_allowed_prefix is "/run/llm.sock"',
                "apache_handoff_targets declares llm",
                "Example: apache_handoff_targets: [{name: llm, socket: /run/llm.sock}] Or: apache_handoff_targets: []",
            ],
        ),
        (
            {
                "apache_handoff_targets": [
                    {
                        **{"name": "llm", "socket": "/var/run/llm/a.sock", "envelope": True, "ack": True},
                        **{"transport": "seqpacket", "user": "root", "headers": ["Cookie", "X-Trace"]},
                        **{"timeout_ms": 10000, "retries": 0, "backup": "LLM", "max_fails": 0, "retry_ms": 100},
                    },
                    {"name": "LLM", "socket": "/run/old.sock", "envelope": False},
                ]
            },
            None,
        ),
        *[
            (
                targets({"name": name, "socket": "/run/x"}),
                ["apache_handoff_targets names", json.dumps(name), "Example: "],
            )
            for name in ("", "a b", "-x", "x" * 65, "All", "none", "x\n", "/run/x")
        ],
        (targets({"name": "llm", "socket": "/run/x"}, {"name": "llm", "socket": "/run/y"}), ["a name of its own"]),
        (targets(*({"name": f"t{number}", "socket": "/run/x"} for number in range(64))), ["at most 63"]),
        (targets({"socket": "/run/x"}), ["apache_handoff_targets", "name"]),
        (targets({"name": "llm"}), ["apache_handoff_targets", "socket"]),
        *[
            (
                targets({"name": "llm", "socket": "/run/x", **wrong}, {"name": "plain", "socket": "/run/p"}),
                ["apache_handoff_targets: llm has a wrong " + "".join(wrong), "Example: "],
            )
            for wrong in (
                *({"socket": path} for path in ("/tmp/x", "/run", "/run/", "/run/x/", "/run/../x", "/run/a b")),
                *({"user": user} for user in ("", "Me", "a b", "root;")),
                *({"headers": names} for names in ([], ["Coo kie"], ["A,B"], ["é"], ["X"] * 33)),
                *({"timeout_ms": value} for value in (0, 10001)),
                *({"retries": value} for value in (-1, 11)),
                *({"backup": name} for name in ("llm", "nobody", "")),
                *({"max_fails": value} for value in (-1, 1001)),
                *({"retry_ms": value} for value in (99, 60001)),
            )
        ],
        (
            targets({"name": "llm", "socket": "/run/x", "envelope": False, "headers": ["Cookie"]}),
            ["llm has a wrong headers", "only with envelope true"],
        ),
        (targets({"name": "llm", "socket": "/run/x", "transport": "udp"}), ["auto, seqpacket, stream", "udp"]),
        (targets({"name": "llm", "socket": "/run/x", "color": "red"}), ["color", "apache_handoff_targets"]),
        ({"apache_handoff_status_page": "perhaps"}, ["apache_handoff_status_page", "perhaps"]),
        ({"apache_handoff_max_payload": 1073741825}, ["apache_handoff_max_payload is 1073741825", "0 to 1073741824"]),
        *[
            (
                {"apache_handoff_allowed_prefix": path},
                ["apache_handoff_allowed_prefix is", json.dumps(path), "below /run", "Example: "],
            )
            for path in (
                "/tmp/x.sock",
                "/run",
                "/run/",
                "run/x",
                "/run/../etc/x",
                "/run/./x",
                "/run//x",
                "/runx/y",
                "/run/a b",
                "/run/x\ny",
                "/run/x\n",
            )
        ],
        (
            {"apache_handoff_connect_timeout_ms": 0},
            ["apache_handoff_connect_timeout_ms is 0", "1 to 10000", "Example: 150"],
        ),
        ({"apache_handoff_send_timeout_ms": 10001}, ["apache_handoff_send_timeout_ms is 10001", "1 to 10000"]),
        ({"apache_handoff_max_retries": 11}, ["apache_handoff_max_retries is 11", "0 to 10"]),
        ({"apache_handoff_max_retries": "many"}, ["apache_handoff_max_retries", "many"]),
        ({"apache_handoff_mpm": "itk"}, ["apache_handoff_mpm", "keep, event, worker, prefork", "itk"]),
        ({"apache_handoff_enabled": "perhaps"}, ["apache_handoff_enabled", "perhaps"]),
        ({"apache_handoff_install_packages": "perhaps"}, ["apache_handoff_install_packages", "perhaps"]),
        ({"apache_handoff_apxs": "apxs"}, ['apache_handoff_apxs is "apxs"', "absolute path", "Example: /usr/bin/apxs"]),
        (
            {"apache_handoff_allowed_prefixes": "/run/x"},
            ["apache_handoff_allowed_prefixes is not known; did you mean apache_handoff_allowed_prefix?"],
        ),
        (
            {"case_release": "11"},
            ["is Debian 11", "Debian 12 (bookworm) and Debian 13 (trixie)", "Nothing was changed"],
        ),
        ({"case_distribution": "Ubuntu", "case_release": "24"}, ["is Ubuntu 24", "--limit"]),
        ({"case_service_mgr": "sysvinit"}, ["under sysvinit", "systemd"]),
    ],
    "streaming_daemon": [
        ({}, None),
        (
            {"streaming_daemon_workers": 0, "streaming_daemon_heartbeat": 0, "streaming_daemon_drain_timeout": 86400},
            None,
        ),
        (
            {
                **backend(base_url="http://[::1]:8000/v1", model="a/b:c", api_key_credential="key", idle_timeout=0.1),
                "streaming_daemon_credentials": {"key": "s3cr3t"},
                "streaming_daemon_backend": "llm",
            },
            None,
        ),
        (
            {"streaming_daemon_socket": "/tmp/x.sock"},
            ['streaming_daemon_socket is "/tmp/x.sock"', "below /run", "Example: "],
        ),
        ({"streaming_daemon_socket": "/run/" + "x" * 103}, ["streaming_daemon_socket is", "107 bytes"]),
        (
            {"streaming_daemon_socket_group": "www data"},
            ["streaming_daemon_socket_group is", "www data", "Example: www-data"],
        ),
        ({"streaming_daemon_message": "json"}, ["streaming_daemon_message", "auto, envelope, plain", "json"]),
        ({"streaming_daemon_ack": "perhaps"}, ["streaming_daemon_ack", "perhaps"]),
        ({"streaming_daemon_max_payload": -1}, ["streaming_daemon_max_payload is -1", "0 to 1073741824"]),
        ({"streaming_daemon_workers": 65}, ["streaming_daemon_workers is 65", "whole number", "0 to 64"]),
        ({"streaming_daemon_workers": -1}, ["streaming_daemon_workers is -1"]),
        ({"streaming_daemon_max_streams": 0}, ["streaming_daemon_max_streams is 0", "1 to 1000000"]),
        ({"streaming_daemon_handoff_timeout": 0}, ["streaming_daemon_handoff_timeout is 0", "0.1 to 60"]),
        ({"streaming_daemon_write_timeout": 3601}, ["streaming_daemon_write_timeout is 3601", "0.1 to 3600"]),
        ({"streaming_daemon_linger_timeout": 61}, ["streaming_daemon_linger_timeout is 61", "0 to 60"]),
        ({"streaming_daemon_drain_timeout": 86401}, ["streaming_daemon_drain_timeout is 86401"]),
        ({"streaming_daemon_heartbeat": "often"}, ["streaming_daemon_heartbeat", "unable to convert to float"]),
        ({"streaming_daemon_keep_releases": 1}, ["streaming_daemon_keep_releases is 1", "2 to 100"]),
        ({"streaming_daemon_access_log": "json", "streaming_daemon_metrics_listen": "127.0.0.1:9464"}, None),
        ({"streaming_daemon_access_log": "common"}, ["streaming_daemon_access_log", "none, combined, json, pairs"]),
        (
            {"streaming_daemon_metrics_listen": "0.0.0.0:9464"},
            ['streaming_daemon_metrics_listen is "0.0.0.0:9464"', "Example: 127.0.0.1:9464"],
        ),
        ({"streaming_daemon_log_level": "loud"}, ["streaming_daemon_log_level", "debug, info, warning, error", "loud"]),
        ({"streaming_daemon_install_packages": "perhaps"}, ["streaming_daemon_install_packages", "perhaps"]),
        ({"streaming_daemon_backend": "claude"}, ['streaming_daemon_backend is "claude"', "demo", "Example: demo"]),
        ({"streaming_daemon_backends": []}, ["at least one backend"]),
        ({"streaming_daemon_backends": [{"name": "demo", "type": "demo"}] * 2}, ["a name of its own"]),
        (
            {"streaming_daemon_backends": [{"name": "de mo", "type": "demo"}], "streaming_daemon_backend": "de mo"},
            ["de mo", "Example: "],
        ),
        ({"streaming_daemon_backends": [{"name": "demo", "type": "telepathy"}]}, ["telepathy", "demo, openai"]),
        ({"streaming_daemon_backends": [{"name": "demo"}]}, ["type", "streaming_daemon_backends"]),
        (
            {"streaming_daemon_backends": [{"name": "demo", "type": "demo", "pace": 3}]},
            ["pace", "streaming_daemon_backends"],
        ),
        (
            {"streaming_daemon_backends": [{"name": "demo", "type": "demo", "model": "x"}]},
            ["wrong model (text is not shown), allowed for type demo are name, type, tokens_per_second."],
        ),
        (
            {"streaming_daemon_backends": [{"name": "demo", "type": "demo", "tokens_per_second": 0}]},
            ["wrong tokens_per_second = 0, allowed is a number from 0.1 to 10000."],
        ),
        (backend(base_url="ftp://example.com"), ["wrong base_url", "!ftp://", "https://api.example.com/v1"]),
        (backend(base_url="https://user:pw@example.com/v1"), ["without user or query"]),
        (backend(model="two words"), ["wrong model", "!two words", "allowed is a name of"]),
        (backend(connect_timeout=301), ["wrong connect_timeout = 301, allowed is seconds from 0.1 to 300."]),
        (backend(first_event_timeout=0), ["wrong first_event_timeout = 0, "]),
        (backend(idle_timeout=3601), ["wrong idle_timeout = 3601, "]),
        (
            backend(api_key_credential="missing_key"),
            ["wrong api_key_credential", "!missing_key", "a key of streaming_daemon_credentials", "none given"],
        ),
        ({"streaming_daemon_credentials": {"a/b": "s3cr3t"}}, ["a/b", "Values are not shown", "!s3cr3t"]),
        ({"streaming_daemon_credentials": {"key": "s3cr3t\nsecond line"}}, ["which key is not", "!s3cr3t"]),
        ({"streaming_daemon_credentials": {"key": ""}}, ["which key is not"]),
        ({"streaming_daemon_credentials": {"key": ["s3cr3t"]}}, ["which key is not", "!s3cr3t"]),
        ({"streaming_daemon_credentials": {"key": {"value": "s3cr3t"}}}, ["which key is not", "!s3cr3t"]),
        ({"streaming_daemon_credentials": {"key": 12345678}}, ["which key is not", "!12345678"]),
        (
            {"streaming_daemon_credentials": ["s3cr3t"]},
            ["streaming_daemon_credentials", "unable to convert to dict", "!s3cr3t"],
        ),
        (
            {"streaming_daemon_credentials": "s3cr3t"},
            ["streaming_daemon_credentials", "unable to convert to dict", "!s3cr3t"],
        ),
        (
            backend(api_key="s3cr3t"),
            ["streaming_daemon_backends.api_key. Supported parameters include: api_key_credential", "!s3cr3t"],
        ),
        (backend(connect_timeout="s3cr3t"), ["connect_timeout", "!s3cr3t"]),
        (backend(base_url={"x": "s3cr3t"}), ["wrong base_url", "!s3cr3t"]),
        (
            {"streaming_daemon_worker": 2},
            ["streaming_daemon_worker is not known; did you mean streaming_daemon_workers?"],
        ),
        ({"case_release": "14"}, ["is Debian 14", "Nothing was changed"]),
    ],
    "handoff_lb": [
        (balanced(), None),
        (
            balanced(
                handoff_lb_servers=[
                    {"name": "web1.example.com", "address": "web1.internal", "port": 8080},
                    {"name": "web2", "address": "2001:db8::2"},
                ],
                handoff_lb_addresses=["*", "::", "192.0.2.1"],
                handoff_lb_sticky=False,
            ),
            None,
        ),
        (
            balanced(handoff_lb_certificate_self_signed=False, handoff_lb_certificate=f"{CERTIFICATE}{KEY}"),
            None,
        ),
        (balanced(handoff_lb_certificate_self_signed=False, handoff_lb_certificate_path="/etc/haproxy/certs/"), None),
        (
            balanced(handoff_lb_certificate_self_signed=False, handoff_lb_certificate=CERTIFICATE),
            ["handoff_lb_certificate is set, but not usable (it is not shown)", "!czNjcjN0"],
        ),
        (
            balanced(
                handoff_lb_certificate_self_signed=False,
                handoff_lb_certificate=CERTIFICATE + KEY.replace("PRIVATE", "ENCRYPTED PRIVATE"),
            ),
            ["which is not encrypted", "!czNjcjN0"],
        ),
        (
            balanced(handoff_lb_certificate_path="/etc/x.pem"),
            ["handoff_lb_certificate_path and handoff_lb_certificate_self_signed are set"],
        ),
        *[
            (
                balanced(handoff_lb_servers=[{"name": "web1", "address": "x", **wrong}]),
                ["handoff_lb_servers has", *said],
            )
            for wrong, said in (
                ({"name": "a b"}, ['"a b"']),
                ({"name": ""}, ['name ""']),
                ({"name": "web1\n"}, ["Example: "]),
                ({"address": "a b"}, ['"a b"']),
                ({"address": "x\nserver y 192.0.2.1"}, ["address "]),
                ({"port": 65536}, ["port 65536"]),
            )
        ],
        (balanced(handoff_lb_health_path="/a b"), ['handoff_lb_health_path is "/a b"']),
        (balanced(handoff_lb_server="web1"), ["handoff_lb_server is not known; did you mean handoff_lb_servers?"]),
        (balanced(case_release="11"), ["is Debian 11", "load_balancers:!"]),
    ],
    "handoff_app": [
        ({"handoff_app_password": PASSWORD}, None),
        ({"handoff_app_password": PASSWORD, "handoff_app_php": "mod_php", "apache_handoff_mpm": "prefork"}, None),
        ({}, ["handoff_app_password is not set", "8 to 72", "Example: handoff_app_password:"]),
        ({"handoff_app_password": ""}, ["handoff_app_password is not set"]),
        (
            {"handoff_app_password": "s3cr3t"},
            ["handoff_app_password is set, but not usable (it is not shown)", "!s3cr3t"],
        ),
        ({"handoff_app_password": "s3cr3t\n12345678"}, ["on one line", "!s3cr3t"]),
        ({"handoff_app_password": ["s3cr3t\n12345678"] * 9}, ["set, but not usable", "!s3cr3t"]),
        *[
            ({"handoff_app_password": PASSWORD, **variables}, message)
            for variables, message in (
                ({"handoff_app_php": "cgi"}, ["handoff_app_php", "fpm, mod_php", "cgi"]),
                ({"handoff_app_php": "mod_php"}, ["apache_handoff_mpm is keep", "apache_handoff_mpm: prefork"]),
                ({"handoff_app_php": "mod_php", "apache_handoff_mpm": "event"}, ["apache_handoff_mpm is event"]),
                ({"handoff_app_port": 0}, ["handoff_app_port is 0", "1 to 65535"]),
                ({"handoff_app_port": 65536}, ["handoff_app_port is 65536"]),
                (
                    {"handoff_app_server_name": "chat.example.com; evil"},
                    ["chat.example.com; evil", "Example: chat.example.com"],
                ),
                ({"handoff_app_server_aliases": ["good.example.com", "-bad"]}, ["-bad"]),
                (
                    {"handoff_app_disable_default_site": "maybe"},
                    ["handoff_app_disable_default_site", "auto, always, never", "maybe"],
                ),
                ({"handoff_app_socket": "/var/run/x.sock"}, None),
                *[
                    ({"handoff_app_target": name}, ["handoff_app_target is", json.dumps(name), "Example: llm"])
                    for name in ("", "/run/x.sock", "a b", "None", "x" * 65)
                ],
                ({"handoff_app_socket": "/tmp/x.sock"}, ['handoff_app_socket is "/tmp/x.sock"', "Example: "]),
                ({"handoff_app_user": "o'brien"}, ["handoff_app_user is", "Example: demo"]),
                ({"handoff_app_install_packages": "perhaps"}, ["handoff_app_install_packages", "perhaps"]),
                ({"handoff_app_probe_timeout": "soon"}, ["handoff_app_probe_timeout", "unable to convert to float"]),
                (
                    {"handoff_app_passwort": "s3cr3t"},
                    ["handoff_app_passwort is not known; did you mean handoff_app_password?", "!s3cr3t"],
                ),
                ({"case_release": "11"}, ["is Debian 11"]),
            )
        ],
    ],
}
# Instead of asking this machine, which may be anything: Debian 12 under systemd unless the case says otherwise.
FACTS = {
    "case_distribution": "distribution",
    "case_release": "distribution_major_version",
    "case_service_mgr": "service_mgr",
}
NUMBERED = [(role, number, *case) for role in CASES for number, case in enumerate(CASES[role])]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any] | None]:
    """Try every case; return what each role had to say, None where it was content."""
    work = tmp_path_factory.mktemp("negative")
    found: dict[str, dict[str, Any] | None] = {}
    for role, cases in CASES.items():
        hosts, facts = {}, {}
        for number, (variables, _) in enumerate(cases):
            name = f"{role}_{number}"
            hosts[name] = {key: value for key, value in variables.items() if key not in FACTS}
            facts[name] = {FACTS[key]: value for key, value in variables.items() if key in FACTS}
        found |= refusals(ASSERT.format(role=role), hosts, work / role, facts)
    return found


@pytest.mark.parametrize(("role", "number", "variables", "wanted"), NUMBERED, ids=lambda value: str(value)[:60])
def test_wrong_input_is_refused_by_name_and_right_input_passes(answers, role, number, variables, wanted):
    answer = answers[f"{role}_{number}"]
    if wanted is None:
        assert answer is None
        return
    assert answer is not None, "should have been refused"
    said = sentences(answer)
    for part in wanted:
        if part.startswith("!"):
            assert part[1:] not in json.dumps(answer, default=repr)
        else:
            assert part in said
