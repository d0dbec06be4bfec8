"""A misspelt variable is noticed, and nobody else's is: the guard itself, by names alone."""

from __future__ import annotations

import conftest  # noqa: F401  (makes the collection importable)
import pytest
from ansible.errors import AnsibleError
from ansible_collections.socket_handoff.fleet.plugins.lookup import playbook_options, unknown_variables
from ansible_collections.socket_handoff.fleet.plugins.plugin_utils import inputs

MISSPELT = {
    # Within our prefixes: anything that is not known.
    "apache_handoff_mmp": "apache_handoff_mpm",
    "apache_handoff_allowed_prefixes": "apache_handoff_allowed_prefix",
    "apache_handoff_AllowedPrefix": "apache_handoff_allowed_prefix",
    "streaming_daemon_worker": "streaming_daemon_workers",
    "streaming_daemon_workers_": "streaming_daemon_workers",
    "handoff_app_passwort": "handoff_app_password",
    "handoff_ap_password": "handoff_app_password",
    "handoff_target": "handoff_app_target",
    "handoff_foreign_variable": "handoff_foreign_variables",
    "handoff_zzqq": None,
    # The prefix itself has the slip.
    "streaming_deamon_workers": "streaming_daemon_workers",
    "streaming_demon_workers": "streaming_daemon_workers",
    "streamingdaemon_workers": "streaming_daemon_workers",
    "apache_hand_off_mpm": "apache_handoff_mpm",
    "apache_handof_targets": "apache_handoff_targets",
    "hand_off_app_password": "handoff_app_password",
    "handof_app_password": "handoff_app_password",
}
FOREIGN = [
    "ansible_handoff_app_port",
    "ansible_facts",
    "ansible_host",
    "groups",
    "hostvars",
    "inventory_hostname",
    "omit",
    "playbook_dir",
    "role_name",
    "vars",
    # Made from our names on purpose, or private to somebody.
    "vault_handoff_app_password",
    "v_apache_handoff_mpm",
    "my_apache_handoff_mpm",
    "production_streaming_daemon_backends",
    "__apache_handoff_unknown",
    "_handoff_app_prt",
    # Of well-known collections and roles.
    "apache_mods_enabled",
    "apache_listen_port",
    "apache_packages",
    "apache_httpd__mods__host_var",
    "haproxy_backend_servers",
    "node_exporter_web_listen_address",
    "prometheus_targets",
    "php_fpm_pools",
    "systemd_unit_files",
    "podman_containers",
    "streaming_workers",
    "daemon_user",
    "handoffs",
    "app_password",
    "app_port",
]


@pytest.mark.parametrize(("name", "meant"), MISSPELT.items())
def test_a_misspelt_name_is_found_with_the_name_that_was_meant(name, meant):
    assert inputs.unknown([name, "ansible_host", "apache_handoff_mpm"]) == {name: meant}


@pytest.mark.parametrize("name", [*FOREIGN, *sorted(inputs.known())])
def test_known_names_and_those_of_others_are_left_alone(name):
    assert inputs.unknown([name]) == {}


def test_what_the_operator_calls_somebody_elses_is_not_looked_at():
    names = ["handoff_zzqq", "streaming_deamon_workers", "handoff_app_prt"]
    assert list(inputs.unknown(names, foreign=names[:2])) == ["handoff_app_prt"]


def test_every_role_and_playbook_with_a_spec_is_known():
    assert {"apache_handoff", "streaming_daemon", "handoff_app"} <= set(inputs.role_options())
    assert {"deploy", "verify"} <= set(inputs.playbook_options())
    assert {"apache_handoff_mpm", "handoff_app_probe_url", "streaming_daemon_credentials"} <= inputs.known()


def lookup(module, terms=(), variables=None, **options):
    """Run a lookup plugin as Ansible does."""
    plugin = module.LookupModule()
    plugin._load_name = f"socket_handoff.fleet.{module.__name__.rsplit('.', 1)[-1]}"
    return plugin.run(list(terms), variables=variables, **options)


class Secret(dict):
    """Variables whose values nobody may look at."""

    def __getitem__(self, name):
        raise AssertionError(f"the value of {name} was read")

    get = values = items = __getitem__


@pytest.fixture
def options(monkeypatch):
    """Options of a plugin without a configuration around it."""

    def use(module, **given):
        monkeypatch.setattr(module.LookupModule, "set_options", lambda *args, **kwargs: None)
        monkeypatch.setattr(module.LookupModule, "get_option", lambda self, name: given[name])

    return use


def test_the_lookup_says_what_was_meant_and_reads_no_value(options):
    options(unknown_variables, foreign=["handoff_mine"])
    variables = Secret.fromkeys(["handoff_app_passwort", "handoff_zzqq", "handoff_mine", "handoff_app_port"], "s3cr3t")
    assert lookup(unknown_variables, variables=variables) == [
        "handoff_app_passwort is not known; did you mean handoff_app_password?",
        "handoff_zzqq is not known, and nothing is called alike.",
    ]


def test_the_lookup_takes_no_terms(options):
    options(unknown_variables, foreign=[])
    with pytest.raises(AnsibleError, match="takes no terms"):
        lookup(unknown_variables, ["apache_handoff"])


def test_the_spec_of_an_unknown_playbook_is_refused_by_name(options):
    options(playbook_options)
    assert "handoff_app_target" in lookup(playbook_options, ["deploy"])[0]
    with pytest.raises(AnsibleError, match="deplyo is no playbook with a spec; allowed are deploy"):
        lookup(playbook_options, ["deplyo"])
