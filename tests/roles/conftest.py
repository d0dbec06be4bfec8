"""What the tests of roles and plugins share: the collection importable under its own name, modules run in memory."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]

# The way Ansible itself finds the collection in a clone; see ansible.cfg.
if not any(type(finder).__name__ == "_AnsibleCollectionFinder" for finder in sys.meta_path):
    _AnsibleCollectionFinder(paths=[str(ROOT / ".config/collections")])._install()

# The last play of a run: what every host has answered, in one file.
GATHER = """\
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.copy:
        content: "{{ dict(groups['all'] | zip(groups['all'] | map('extract', hostvars, 'case_answer'))) | to_json }}"
        dest: "{{ case_out }}"
        mode: '0600'
"""

RunModule = Callable[..., dict[str, Any]]


@pytest.fixture
def run_module(capsys: pytest.CaptureFixture[str]) -> RunModule:
    """Run one of our modules in this process; return what it reports."""

    def run(name: str, /, check: bool = False, **arguments: Any) -> dict[str, Any]:
        module = importlib.import_module(f"ansible_collections.socket_handoff.fleet.plugins.modules.{name}")
        capsys.readouterr()
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            module.main()
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run
