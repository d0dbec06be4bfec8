"""The example inventories are taken by the checks of every role as they are, with the secrets that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from generate_readme import ROOT
from in_process import ASSERT, refusals

INVENTORIES = sorted(path.parent for path in ROOT.glob("examples/inventory/*/hosts.yml"))
ROLES_OF = {
    "web_hosts": ("apache_handoff", "streaming_daemon", "handoff_app"),
    "load_balancers": ("handoff_lb",),
    "monitoring_hosts": ("handoff_monitoring",),
}
PEM = (
    "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"
    "-----BEGIN PRIVATE KEY-----\nMA==\n-----END PRIVATE KEY-----\n"
)


def variables(inventory: Path, group: str, own: dict[str, Any] | None) -> dict[str, Any]:
    """What a host of this group has, least specific first."""
    path = inventory / "group_vars" / f"{group}.yml"
    in_file: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
    in_group: dict[str, Any] = yaml.safe_load((inventory / "hosts.yml").read_text())[group].get("vars", {})
    return {**in_group, **in_file, **(own or {})}


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.name)
def test_no_role_refuses_what_an_example_inventory_says(inventory: Path, tmp_path: Path) -> None:
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    assert set(hosts) <= set(ROLES_OF), "a group that no playbook knows"
    assert {path.stem for path in (inventory / "group_vars").glob("*.yml")} <= set(hosts)
    servers = {"handoff_lb_servers": [{"name": name, "address": "192.0.2.11"} for name in hosts["web_hosts"]["hosts"]]}
    for group, entries in hosts.items():
        for role in ROLES_OF[group]:
            work = tmp_path / role
            (work / ".secrets").mkdir(parents=True)
            (work / ".secrets/openai_api_key").write_text("key")
            (work / ".secrets/chat.example.com.pem").write_text(PEM)
            given = {name: variables(inventory, group, own) for name, own in entries["hosts"].items()}
            if role == "handoff_lb":  # by default from the group of the inventory, which is not there
                given = {name: servers | values for name, values in given.items()}
            answers = refusals(ASSERT.format(role=role), given, work)
            assert answers == dict.fromkeys(given)
            # They do reach the check.
            misspelt = refusals(
                ASSERT.format(role=role), {name: {f"{role}_x": 1} | given[name] for name in given}, work
            )
            assert None not in misspelt.values()
