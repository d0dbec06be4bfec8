"""What deploy.yml refuses because the roles contradict one another, and what the roles write into Apache's files.

As in test_specs, every case is a host of one inventory, only the first play of deploy.yml is run, and nothing changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GATHER
from generate_readme import ROOT
from in_process import DEBIAN, sentences
from test_specs import PASSWORD

LLM = {"name": "llm", "socket": "/run/streaming-daemon.sock"}
PATHS = {"apache_handoff_targets": []}
# name -> (variables, what the message must hold; below, what Apache's files must hold or, with "!", lack)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another socket of the daemon": (
        {"streaming_daemon_socket": "/run/other.sock"},
        ["hands clients to llm (/run/streaming-daemon.sock)", "streaming_daemon_socket is /run/other.sock"],
    ),
    "a target that nobody declared": (
        {"handoff_app_target": "gpt"},
        ["gpt (which is no declared target)", "llm = /run"],
    ),
    "a path that nobody declared": (
        {"handoff_app_socket": "/run/x.sock"},
        ["/run/x.sock (which is no declared target)"],
    ),
    "a name without targets": (PATHS, ["hands clients to llm", "Without targets: the same path"]),
    "another path without targets": (
        {**PATHS, "handoff_app_socket": "/run/x.sock"},
        ["hands clients to /run/x.sock", "permits /run/streaming-daemon.sock"],
    ),
    "a prefix elsewhere": (
        {**PATHS, "handoff_app_socket": LLM["socket"], "apache_handoff_allowed_prefix": "/run/streaming"},
        ["permits /run/streaming;"],
    ),
    "ack on one side": (
        {"apache_handoff_targets": [{**LLM, "ack": True}]},
        ["llm has envelope True and ack True", "streaming_daemon_ack False", "streaming_daemon_ack: true"],
    ),
    "an envelope that the daemon refuses": ({"streaming_daemon_message": "plain"}, ["streaming_daemon_message plain"]),
    "plain data that the daemon refuses": (
        {"apache_handoff_targets": [{**LLM, "envelope": False}], "streaming_daemon_message": "envelope"},
        ["llm has envelope False", "streaming_daemon_message envelope"],
    ),
}
ALLOWS = '<Files "stream.php"> SocketHandoffAllow {} </Files>'
WRITTEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "defaults": (
        {},
        [
            "SocketHandoffTarget llm unix:/run/streaming-daemon.sock transport=auto envelope=on ack=off\n",
            "!SocketHandoffAllowedPrefix",
            '<Location "/socket-handoff-status"> SetHandler socket-handoff-status Require local </Location>',
            "SocketHandoffMaxPayload 8388608",
            ALLOWS.format("llm"),
        ],
    ),
    "every option": (
        {
            "streaming_daemon_ack": True,
            "apache_handoff_status_page": False,
            "apache_handoff_targets": [
                {"name": "old", "socket": "/run/old.sock", "envelope": False, "transport": "stream", "user": "root"},
                {
                    **{"name": "llm", "socket": "/var/run/streaming-daemon.sock", "ack": True, "backup": "old"},
                    **{"headers": ["Cookie", "X-A"], "timeout_ms": 90, "retries": 0, "max_fails": 3, "retry_ms": 500},
                },
            ],
        },
        [
            "SocketHandoffTarget old unix:/run/old.sock transport=stream envelope=off ack=off user=root\n"
            "SocketHandoffTarget llm unix:/var/run/streaming-daemon.sock transport=auto envelope=on ack=on "
            "headers=Cookie,X-A timeout=90ms retries=0 backup=old maxfails=3 retry=500ms\n",
            ALLOWS.format("llm"),
            "!socket-handoff-status",
        ],
    ),
    "behind a load balancer": (
        {"handoff_app_proxy_protocol": True, "handoff_app_load_balancers": ["192.0.2.10", "2001:db8::/64"]},
        [
            "RemoteIPProxyProtocol On\n",
            "RemoteIPProxyProtocolExceptions 127.0.0.0/8 ::1\n",
            'SetEnvIf X-Forwarded-Proto "^https$" HTTPS=on',
            '<Files "health.php"> SocketHandoffAllow llm Require local Require ip 192.0.2.10 '
            "Require ip 2001:db8::/64 </Files>",
        ],
    ),
    "no load balancer": (
        {},
        ["!RemoteIP", "!HTTPS=on", '<Files "health.php"> SocketHandoffAllow llm Require local </Files>'],
    ),
    "a health check that would be a question": (
        {
            "handoff_app_load_balancers": ["192.0.2.10"],
            "apache_handoff_targets": [{**LLM, "envelope": False}],
        },
        ["!Require ip", "!Require local </Files>", "Require all denied"],
    ),
    "a path of a declared target": (
        {"handoff_app_socket": "/var/run/streaming-daemon.sock"},
        ["SocketHandoffTarget llm ", ALLOWS.format("llm")],
    ),
    "paths as with the original module": (
        {**PATHS, "handoff_app_socket": "/run/streaming-daemon.sock", "streaming_daemon_message": "plain"},
        ["SocketHandoffAllowedPrefix /run/streaming-daemon.sock", "!SocketHandoffTarget", "!SocketHandoffAllow "],
    ),
}
RENDER = """
- ansible.builtin.set_fact:
    case_answer: "{{ lookup('ansible.builtin.template', case_root ~ 'mods-available/socket_handoff.conf.j2')
      ~ lookup('ansible.builtin.template', case_root ~ 'sites-available/handoff-app.conf.j2') }}"
  vars:
    __handoff_app_listening: {stdout_lines: []}
"""
RESCUE = """
- ansible.builtin.set_fact:
    case_answer: "{{ ansible_failed_result }}"
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The text of Apache's files for every case, or the failure."""
    work = tmp_path_factory.mktemp("deploy")
    check = yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text())[0]
    check |= {
        "hosts": "all",
        "max_fail_percentage": 100,
        "tasks": [
            {"ansible.builtin.set_fact": {**DEBIAN, "cacheable": True}},
            {"block": check["tasks"] + yaml.safe_load(RENDER), "rescue": yaml.safe_load(RESCUE)},
        ],
    }
    hosts = {name: variables for cases in (REFUSED, WRITTEN) for name, (variables, _) in cases.items()}
    common = {"handoff_app_password": PASSWORD, "handoff_app_server_name": "localhost"}
    common |= {"case_root": f"{ROOT}/templates/etc/apache2/"}
    (work / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": common}}))
    (work / "play.yml").write_text(yaml.safe_dump([check]) + GATHER)
    (work / "tasks").symlink_to(ROOT / "playbooks/tasks")
    out = work / "answers.json"
    done = subprocess.run(
        ["ansible-playbook", "-i", work / "hosts.yml", "-c", "local", "-e", f"case_out={out}", work / "play.yml"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stdout[-4000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_roles_that_contradict_one_another_are_refused(answers, name):
    assert isinstance(answers[name], dict), "should have been refused"
    for part in REFUSED[name][1]:
        assert part in sentences(answers[name])


@pytest.mark.parametrize("name", WRITTEN)
def test_apache_is_told_what_the_variables_say(answers, name):
    assert isinstance(answers[name], str), sentences(answers[name])
    for part in WRITTEN[name][1]:
        if part.startswith("!"):
            assert part[1:] not in answers[name]
        elif part.startswith("<"):
            assert part in " ".join(answers[name].split())
        else:
            assert part in answers[name]


PREPARED = {"handoff_app_proxy_protocol": True, "handoff_app_load_balancers": ["192.0.2.10"]}
# name -> (variables of web1 and web2, what the message must hold; nothing where they suit)
BALANCED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "both": (PREPARED, PREPARED, []),
    "one does not speak": (
        PREPARED,
        {**PREPARED, "handoff_app_proxy_protocol": False},
        ["and web2 has handoff_app_proxy"],
    ),
    "one knows nobody": ({"handoff_app_proxy_protocol": True}, PREPARED, ["and web1 has", "Example for group_vars"]),
    "neither": ({}, {}, ["web1, web2 have"]),
}


@pytest.mark.parametrize("name", BALANCED)
def test_a_load_balancer_in_front_of_hosts_that_do_not_expect_it_is_refused(name, tmp_path):
    first, second, wanted = BALANCED[name]
    play = next(
        each for each in yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text()) if "of the load" in each["name"]
    )
    play["tasks"] = [task for task in play["tasks"] if "ansible.builtin.import_tasks" in task]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "tasks").symlink_to(ROOT / "playbooks/tasks")
    hosts = {"web_hosts": {"hosts": {"web1": first, "web2": second}}, "load_balancers": {"hosts": {"lb1": {}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(hosts))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path / "hosts.yml", tmp_path / "play.yml"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert (done.returncode == 0) == (not wanted), said
    for part in wanted:
        assert part in said
