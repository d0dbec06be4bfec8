"""What the checks of inputs promise whatever runs them: two lines of ansible-core, facts injected or not.

Every setting is one run of ansible-playbook itself, with -vvv, whose hosts are cases of refusals.yml. The second line
of ansible-core has an environment of its own below .cache, which script/bootstrap makes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GATHER
from generate_readme import PLAYBOOKS, ROLES, ROOT
from in_process import DEBIAN
from test_refusals import TABLE, message

CORES = {"pinned": Path(sys.executable).parent, "second": ROOT / ".cache/second-core/bin"}
SETTINGS: dict[str, dict[str, str]] = {
    "facts not injected": {"ANSIBLE_INJECT_FACT_VARS": "false"},
    "facts injected": {"ANSIBLE_INJECT_FACT_VARS": "true"},
}
SECRET = "s3cr3t"
# Beside what refusals.yml has of each role: a secret in every place where a hurried hand may put it.
LEAKS: dict[str, list[dict[str, Any]]] = {
    "streaming_daemon": [
        {"streaming_daemon_credentials": {"key": [SECRET]}},
        {"streaming_daemon_credentials": [{"key": SECRET}]},
        {"streaming_daemon_credentials": {SECRET: "x y"}, "streaming_daemon_credential": SECRET},
        {"streaming_daemon_backends": [{"name": "demo", "type": "openai", "api_key": SECRET}]},
        {"streaming_daemon_backends": [{"name": "demo", "type": "openai", "model": f"{SECRET} x"}]},
    ],
    "handoff_lb": [
        {"handoff_lb_certificate": SECRET},
        {"handoff_lb_certificate": [SECRET]},
        {"handoff_lb_certificates": f"-----BEGIN PRIVATE KEY-----\n{SECRET}"},
    ],
    "handoff_app": [
        {"handoff_app_password": f"{SECRET}\n12345678"},
        {"handoff_app_passwort": SECRET},
        {"vault_handoff_app_password": SECRET, "handoff_app_password": "{{ vault_handoff_app_password }}"},
    ],
}
PLAY = """\
- hosts: {role}
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        {facts}
    - block:
        - ansible.builtin.import_role:
            name: socket_handoff.fleet.{role}
            tasks_from: assert
        - ansible.builtin.set_fact:
            case_answer: null
      rescue:
        # Not the whole result, of which -vvv would show more than the task itself did.
        - ansible.builtin.set_fact:
            case_answer:
              msg: "{{{{ ansible_failed_result.msg | default('') }}}}"
              argument_errors: "{{{{ ansible_failed_result.argument_errors | default([]) }}}}"
              results: >-
                {{{{ ansible_failed_result.results | default([]) | selectattr('failed', 'defined')
                   | selectattr('failed') | map('dict2items') | map('selectattr', 'key', 'in', ['msg', 'failed'])
                   | map('items2dict') | list }}}}
"""


def playbook(core: str, work: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ansible-playbook of one of the two lines in this checkout."""
    program = CORES[core] / "ansible-playbook"
    assert program.exists(), f"{program} is missing: run script/bootstrap fast"
    return subprocess.run(
        [program, "-c", "local", *arguments],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "ANSIBLE_LOCAL_TEMP": str(work / "tmp"),
            "ANSIBLE_NOCOLOR": "true",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def sample(role: str) -> list[dict[str, Any]]:
    """Every fourth case: this tries the tools, test_refusals tries the cases."""
    cases: list[dict[str, Any]] = TABLE[role]["cases"][::4]
    return cases


# The other two pairs are what everything else here and test_deploy runs with: ansible.cfg says so.
RUNS = [("pinned", "facts injected"), ("second", "facts not injected")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda pair: ", ".join(pair))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of one run, and what it printed."""
    core, setting = request.param
    work = tmp_path_factory.mktemp("contract")
    inventory: dict[str, Any] = {}
    for role in ROLES:
        right = TABLE[role]["with"]
        hosts = {f"{role}_right": dict(right)}
        hosts |= {f"{role}_{number}": {**right, **case["given"]} for number, case in enumerate(sample(role))}
        hosts |= {f"{role}_leak{number}": {**right, **case} for number, case in enumerate(LEAKS.get(role, []))}
        inventory[role] = {"hosts": hosts}
    (work / "hosts.yml").write_text(yaml.safe_dump(inventory))
    facts = json.dumps({**DEBIAN, "cacheable": True})
    (work / "play.yml").write_text("".join(PLAY.format(role=role, facts=facts) for role in ROLES) + GATHER)
    arguments = ["-vvv", "-i", str(work / "hosts.yml"), "-e", f"case_out={work / 'out.json'}", str(work / "play.yml")]
    done = playbook(core, work, *arguments, **SETTINGS[setting])
    assert (work / "out.json").exists(), done.stdout[-4000:] + done.stderr[-2000:]
    return {"answers": json.loads((work / "out.json").read_text()), "said": done.stdout + done.stderr}


def test_right_inputs_pass_and_wrong_ones_earn_the_same_words_everywhere(run):
    for role in ROLES:
        assert run["answers"][f"{role}_right"] is None
        for number, case in enumerate(sample(role)):
            answer = run["answers"][f"{role}_{number}"]
            assert answer is not None, case["option"]
            if not answer["argument_errors"]:
                del answer["argument_errors"]
            assert message(answer) == case["says"]


def test_no_secret_is_shown_even_with_vvv(run):
    assert [line for line in run["said"].splitlines() if SECRET in line] == []


def test_nothing_is_used_that_a_later_ansible_takes_away(run):
    assert not re.search(r"DEPRECATION WARNING(?!.*ANSIBLE_INJECT_FACT_VARS)", run["said"])


@pytest.mark.parametrize("core", CORES)
def test_every_playbook_is_understood(core, tmp_path):
    hosts = ["-i", "examples/inventory/one-host"]
    for name in ("site.yml", *(f"playbooks/{name}.yml" for name in PLAYBOOKS)):
        done = playbook(core, tmp_path, *hosts, "--syntax-check", name)
        assert done.returncode == 0, done.stdout + done.stderr


CACHED = """\
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.import_role:
        name: socket_handoff.fleet.streaming_daemon
        tasks_from: assert
"""


@pytest.mark.parametrize("core", CORES)
def test_facts_are_gathered_where_they_are_missing_and_taken_from_a_cache_where_they_are_not(core, tmp_path):
    """This machine, whatever it is: either it passes, or it is refused by what was found out about it."""
    (tmp_path / "play.yml").write_text(CACHED)
    arguments = ["-i", "machine,", str(tmp_path / "play.yml")]
    cache = {
        "ANSIBLE_CACHE_PLUGIN": "ansible.builtin.jsonfile",
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path / "facts"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
    }
    first, second = (playbook(core, tmp_path, *arguments, **cache) for _ in range(2))
    (known,) = (tmp_path / "facts").glob("*machine")
    found = json.loads(known.read_text())
    assert "service_mgr" in json.dumps(found) and "distribution_major_version" in json.dumps(found)
    gathering = r"TASK \[.*Gather the facts that are missing\].*\n{}: \[machine\]"
    assert re.search(gathering.format("ok"), first.stdout), first.stdout
    assert re.search(gathering.format("skipping"), second.stdout), second.stdout
    for done in (first, second):
        assert done.returncode == 0 or "machine is " in done.stdout


def test_no_role_reads_a_fact_that_only_injection_provides():
    """What begins with ansible_ and is no fact: Ansible's own variables, by their list in the documentation."""
    own = {
        *("ansible_check_mode", "ansible_diff_mode", "ansible_facts", "ansible_managed"),
        *("ansible_failed_result", "ansible_failed_task", "ansible_host", "ansible_play_batch"),
        *("ansible_become", "ansible_connection", "ansible_limit", "ansible_play_hosts", "ansible_play_hosts_all"),
        *("ansible_run_tags", "ansible_skip_tags"),
        *("ansible_playbook_python", "ansible_python_interpreter", "ansible_version"),
        "ansible_core",  # of the file name of a wheel
    }
    places = [ROOT / "roles", ROOT / "playbooks", ROOT / "templates"]
    texts = [path.read_text() for place in places for path in place.rglob("*") if path.suffix in (".yml", ".j2")]
    assert set(re.findall(r"(?<![\w.])ansible_\w+", "\n".join(texts))) <= own
