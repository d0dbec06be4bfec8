"""What Prometheus and Grafana are given: judged by Prometheus' own promtool, and held against what is really exported.

The same is done once more with a live scrape, on hosts (tests/chain/test_monitoring.py).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from generate_readme import ROOT

TEMPLATES = ROOT / "templates/etc"
ROLE = ROOT / "roles/handoff_monitoring"
ALERTS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((ROLE / "files/socket-handoff.json").read_text())
RUNBOOK = ROOT / "docs/monitoring.md"


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, f"{name} is missing: run script/bootstrap fast"
    return found


def rendered(path: str, **given: Any) -> str:
    """One of the role's templates, with its defaults and what is given."""
    variables: dict[str, Any] = {"ansible_managed": "x", "groups": {}, "hostvars": {}, "role_path": str(ROLE)}
    for name in ("vars", "defaults"):
        variables |= yaml.safe_load((ROLE / name / "main.yml").read_text())
    trusted = {
        name: trust_as_template(value) if isinstance(value, str) and "{{" in value else value
        for name, value in (variables | given).items()
    }
    templar = Templar(loader=DataLoader(), variables=trusted)
    return str(templar.template(trust_as_template((TEMPLATES / path).read_text()))) + "\n"


HOSTS = {"groups": {"web_hosts": ["web1", "web2", "web3"]}}
HOSTS["hostvars"] = {"web1": {"ansible_host": "192.0.2.7"}, "web2": {}, "web3": {"ansible_host": "2001:db8::7"}}  # type: ignore[assignment]


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the role writes, with three web hosts and an Alertmanager."""
    folder = tmp_path_factory.mktemp("prometheus")
    for path in (TEMPLATES / "prometheus").glob("*.j2"):
        text = rendered(f"prometheus/{path.name}", **HOSTS, handoff_monitoring_alertmanagers=["alerts:9093"])
        (folder / path.stem).write_text(text)
    return folder


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)


def rules(folder: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((folder / "socket-handoff-rules.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_prometheus_takes_the_configuration_with_its_rules(etc: Path) -> None:
    done = promtool("check", "config", etc / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_prometheus_yml_and_the_file_for_one_of_your_own_have_the_same_jobs(etc: Path) -> None:
    whole, part = (
        yaml.safe_load((etc / f"{name}.yml").read_text()) for name in ("prometheus", "socket-handoff-scrape")
    )
    assert whole["scrape_configs"] == part["scrape_configs"]
    assert [job["job_name"] for job in part["scrape_configs"]] == ["streaming-daemon", "socket-handoff"]
    assert whole["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["alerts:9093"]}]}]


TARGETS: list[tuple[dict[str, Any], dict[str, str]]] = [
    (HOSTS, {"web1": "192.0.2.7:9464", "web2": "web2:9464", "web3": "[2001:db8::7]:9464"}),
    (
        {**HOSTS, "hostvars": {"web1": {"handoff_monitoring_port": 9999}, "web2": {}, "web3": {}}},
        {"web1": "web1:9999", "web2": "web2:9464", "web3": "web3:9464"},
    ),
    (
        {"handoff_monitoring_targets": ["a:1", "b", "[::1]", "[::1]:2"], "handoff_monitoring_port": 7},
        {"a:1": "a:1", "b": "b:7", "[::1]": "[::1]:7", "[::1]:2": "[::1]:2"},
    ),
    ({}, {}),
]


@pytest.mark.parametrize(("given", "expected"), TARGETS)
def test_every_web_host_is_a_target_under_the_name_that_alerts_show(given, expected):
    written = yaml.safe_load(rendered("prometheus/socket-handoff-targets.yml.j2", **given))
    assert {entry["labels"]["host"]: entry["targets"][0] for entry in written} == expected


def alert_test(name: str, rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What promtool expects of one alert: the whole of it, text and all, and then nothing."""
    case = ALERTS[name]
    labels = {**case["labels"], **rule["labels"]}

    def text(template: str) -> str:
        template = re.sub(r"\{\{ \$labels[.](\w+) \}\}", lambda found: labels[found[1]], template)
        return re.sub(r"\{\{ \$value \| \w+ \}\}", lambda _: str(case["shown"]), template)

    alert = {"exp_labels": labels, "exp_annotations": {key: text(value) for key, value in rule["annotations"].items()}}
    for series, expected in ((case["fires"], [alert]), (case["quiet"], [])):
        yield {
            "interval": "1m",
            "input_series": [dict(zip(("series", "values"), line.split(" ", 1), strict=True)) for line in series],
            "alert_rule_test": [{"eval_time": f"{case['at']}m", "alertname": name, "exp_alerts": expected}],
        }


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_fires_when_it_should_and_not_when_it_should_not(name: str, etc: Path, tmp_path: Path) -> None:
    rule = next(rule for rule in rules(etc) if rule["alert"] == name)
    both = {"rule_files": [str(etc / "socket-handoff-rules.yml")], "tests": list(alert_test(name, rule))}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(both))
    done = promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_and_has_what_an_operator_needs(etc: Path) -> None:
    assert [rule["alert"] for rule in rules(etc)] == list(ALERTS)
    page = f"{yaml.safe_load((ROLE / 'defaults/main.yml').read_text())['handoff_monitoring_runbook_url']}#"
    for rule in rules(etc):
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == page + rule["alert"].lower()
        assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning")
    assert re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.M) == list(ALERTS), "the runbook, in the rules' order"
    assert page.endswith(f"/{RUNBOOK.relative_to(ROOT)}#")


def expressions() -> list[str]:
    """Every expression of the dashboard, as Grafana sends it."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    found += [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    assert len(found) > 50
    return [text.replace("$__rate_interval", "1m").replace("$host", ".*") for text in found]


def test_prometheus_understands_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = promtool("check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_in(text: str) -> set[str]:
    """The metrics of ours that an expression names."""
    return set(re.findall(r"\b(?:daemon|socket_handoff)_[a-z_]+", re.sub(r'"[^"]*"', "", text)))


def families() -> dict[str, str]:
    """Every metric that daemon and module export, as sources of both say: name -> type."""
    board = importlib.import_module("streaming_daemon.board")
    found = {each.name: "plain" for each in (*board.METRICS, *board.BACKEND_METRICS) if each.name}
    found |= {each.name: "histogram" for each in (*board.HISTOGRAMS, *board.BACKEND_HISTOGRAMS)}
    # Written by metrics.py itself; the two kinds of tokens are one metric there.
    written = (ROOT / "daemon-src/streaming_daemon/metrics.py").read_text()
    found |= dict.fromkeys(re.findall(r'(?:gauge|core[.]\w+)\(\s*"(daemon_\w+)"', written), "plain")
    assert 'InfoMetricFamily("daemon",' in written
    found |= {"daemon_info": "plain"}
    del found["daemon_prompt_tokens_total"], found["daemon_completion_tokens_total"]
    page = (ROOT / "module-src/handoff_status_page.c").read_text()
    for name in re.findall(r'"socket_handoff_(\w+?)[ {]', page):
        if name.endswith("_bucket"):
            found[f"socket_handoff_{name.removesuffix('_bucket')}"] = "histogram"
        elif not name.endswith(("_sum", "_count")):
            found[f"socket_handoff_{name}"] = "plain"
    assert len(found) > 50
    return found


# What no panel and no alert is about, with the reason.
NOT_SHOWN = {
    "daemon_metrics_requests_total": "counts Prometheus itself",
    "socket_handoff_start_time_seconds": "when Apache was started; its numbers begin anew then, which rate() knows",
}


def test_rules_and_dashboard_name_only_what_is_exported_and_leave_nothing_out(monkeypatch, etc):
    monkeypatch.syspath_prepend(str(ROOT / "daemon-src"))
    exported = families()
    series = {name for name, kind in exported.items() if kind == "plain"}
    series |= {
        f"{name}_{end}" for name, kind in exported.items() if kind == "histogram" for end in ("bucket", "sum", "count")
    }
    named = metrics_in(" ".join([*expressions(), *(rule["expr"] for rule in rules(etc))]))
    assert named - series == set(), "no such metric"
    used = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in exported else name for name in named}
    assert set(exported) - used == set(NOT_SHOWN), "exported, and neither shown nor left out with a reason"


def test_rules_and_dashboard_name_only_values_of_labels_that_there_are(monkeypatch, etc):
    monkeypatch.syspath_prepend(str(ROOT / "daemon-src"))
    board = importlib.import_module("streaming_daemon.board")
    known: dict[str, set[str]] = {}
    for each in board.METRICS:
        known.setdefault(each.label, set()).update(each.values)
    known["state"] = {"accepting", "draining", "starting", "hung"}
    table = (ROOT / "docs/directives.md").read_text().partition("\n| result | meaning |")[2].partition("\n\n")[0]
    known["result"] = set(re.findall(r"`([\w-]+)`", table))
    assert "no-daemon" in known["result"]
    text = " ".join([*expressions(), *(rule["expr"] for rule in rules(etc))])
    for label, values in re.findall(r'\b(state|result|reason|limit|outcome)[=!~]+"([^"]*)"', text):
        assert set(values.split("|")) <= known[label], label


def leaves(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with the way to it; an empty list or object is one too."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, f"{above}.{key}")
    elif isinstance(value, list) and value:
        for number, below in enumerate(value):
            yield from leaves(below, f"{above}[{number}]")
    else:
        yield above, value


def test_grafanas_own_model_of_a_dashboard_knows_every_field():
    """Not Grafana itself, which is not in Debian: the classes that Grafana generates from the schema of dashboards.

    They read what they know and drop what they do not, so whatever is missing afterwards would be dropped or refused.
    """
    models = importlib.import_module("grafana_foundation_sdk.models.dashboard")
    encoder = importlib.import_module("grafana_foundation_sdk.cog.encoder")
    runtime = importlib.import_module("grafana_foundation_sdk.cog.plugins")
    runtime.register_default_plugins()
    understood = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(DASHBOARD)))
    given, back = dict(leaves(DASHBOARD)), dict(leaves(understood))
    assert {way: value for way, value in given.items() if back.get(way, "dropped") != value} == {}


def test_the_dashboard_is_laid_out_without_gaps_and_overlaps():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for place in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert place not in taken, f"{panel['title']} lies over {taken[place]}"
            taken[place] = panel["title"]
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("kind", ["datasources", "dashboards"])
def test_grafana_is_told_of_the_data_source_that_the_dashboard_asks(kind):
    written = yaml.safe_load(rendered(f"grafana/provisioning/{kind}/socket-handoff.yaml.j2"))
    if kind == "dashboards":
        assert written["providers"][0]["options"]["path"] == "/etc/grafana/socket-handoff"
        return
    (source,) = written["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    asked = {value for way, value in leaves(DASHBOARD) if way.endswith("datasource.uid")}
    assert asked == {source["uid"]}


def test_only_addresses_that_may_read_are_let_in(tmp_path):
    text = rendered(
        "apache2/sites-available/handoff-metrics.conf.j2",
        handoff_monitoring_allowed_addresses=["192.0.2.10", "2001:db8::/32"],
    )
    for path in ("/daemon/metrics", "/module/metrics"):
        (location,) = re.findall(rf'<Location "{path}">(.*?)</Location>', text, re.S)
        assert re.findall(r"Require .*", location) == ["Require ip 192.0.2.10", "Require ip 2001:db8::/32"]
    assert re.search(r'<Location "/">\s*Require all denied\s*</Location>\s*<Location', text)


def test_monitoring_hosts_are_let_in_by_the_addresses_that_their_facts_have():
    facts = {"all_ipv4_addresses": ["192.0.2.10"], "all_ipv6_addresses": ["fe80::1", "2001:db8::10"]}
    text = rendered(
        "apache2/sites-available/handoff-metrics.conf.j2",
        groups={"monitoring": ["watch"], "web_hosts": ["web1"]},
        hostvars={"watch": {"ansible_facts": facts}, "web1": {"ansible_facts": {"all_ipv4_addresses": ["192.0.2.1"]}}},
    )
    assert re.findall(r"Require ip (.*)", text) == ["192.0.2.10", "2001:db8::10"] * 2


def test_rotating_loses_no_line_of_the_access_log_and_needs_no_signal(monkeypatch, tmp_path):
    """The role's own file, given to logrotate as the user of this test, while a worker's log is being written."""
    monkeypatch.syspath_prepend(str(ROOT / "daemon-src"))
    access_log = importlib.import_module("streaming_daemon.access_log")
    folder = tmp_path / "log"
    folder.mkdir(mode=0o750)
    config = rendered("logrotate.d/streaming-daemon.j2", handoff_monitoring_access_log_days=2)
    assert "su streaming-daemon streaming-daemon" in config
    config = config.replace("/var/log/streaming-daemon", str(folder))
    (tmp_path / "rotate.conf").write_text(re.sub(r"^ *su .*\n", "", config, flags=re.M))
    (tmp_path / "rotate.conf").chmod(0o644)
    log, written, files = access_log.LogFile(str(folder / "access.log")), 0, set()

    def write_until(condition: Any) -> None:
        nonlocal written
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, sorted(os.listdir(folder))
            log.write(f"line {written}")
            written += 1
            time.sleep(0.01)  # the pace of the writer

    for turn in range(3):
        write_until(lambda before=written: written > before + 20)
        state = ["--state", str(tmp_path / "state"), "--force", str(tmp_path / "rotate.conf")]
        done = subprocess.run([tool("logrotate"), *state], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        write_until((folder / "access.log").exists)
        if turn == 0:
            assert (folder / "access.log.1").exists(), "compressed while workers still write to it"
            files = {line for name in os.listdir(folder) for line in (folder / name).read_text().splitlines()}
            assert files == {f"line {number}" for number in range(written)}
    log.close()
    assert sorted(os.listdir(folder)) == ["access.log", "access.log.1", "access.log.2.gz"]
