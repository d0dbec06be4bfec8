# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What this collection may be told: the variables of its roles and playbooks, read from their own specs.

Runs on the controller only. It sees names of variables and never a value, so nothing it says can hold a secret.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parents[2]
# Beside the roles' own: what several of them share.
SHARED_PREFIX = "handoff_"
# Within our prefixes any resemblance is worth a question. Outside of them a name is refused only where it can hardly be
# anything but ours with a slip in it: "streaming_deamon_workers" scores 0.96, "streaming_demon_workers" 0.98.
WITHIN, OUTSIDE = 0.6, 0.9
# A slip of the fingers changes this many letters at most; a longer or shorter name is somebody else's.
SLIP = 2


def _options(path: Path) -> dict[str, dict[str, Any]]:
    """Return the options of every entry point of one spec file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    specs = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["argument_specs"]
    return {name: spec.get("options", {}) for name, spec in specs.items()}


@lru_cache(maxsize=1)
def role_options() -> dict[str, dict[str, dict[str, Any]]]:
    """Return role -> entry point -> options."""
    return {path.parts[-3]: _options(path) for path in sorted((ROOT / "roles").glob("*/meta/argument_specs.yml"))}


@lru_cache(maxsize=1)
def playbook_options() -> dict[str, dict[str, Any]]:
    """Return playbook -> options, by the spec of the playbook's own name in ``playbooks/<name>.meta.yml``."""
    paths = sorted((ROOT / "playbooks").glob("*.meta.yml"))
    return {path.name.removesuffix(".meta.yml"): _options(path)[path.name.removesuffix(".meta.yml")] for path in paths}


@lru_cache(maxsize=1)
def known() -> frozenset[str]:
    """Return every variable that some role or playbook takes."""
    of_roles = {name for entries in role_options().values() for options in entries.values() for name in options}
    return frozenset(of_roles.union(*playbook_options().values()))


def prefixes() -> tuple[str, ...]:
    """Return what a variable of this collection begins with."""
    return (SHARED_PREFIX, *(f"{role}_" for role in role_options()))


def _looks_like(name: str, names: frozenset[str]) -> str | None:
    """Return the variable that a name outside our prefixes can hardly fail to mean."""
    if any(ours in name for ours in names):
        return None  # vault_handoff_app_password and its like are made from our names on purpose
    near = [ours for ours in names if abs(len(ours) - len(name)) <= SLIP]
    return next(iter(difflib.get_close_matches(name, near, n=1, cutoff=OUTSIDE)), None)


def unknown(names: Iterable[str], foreign: Iterable[str] = ()) -> dict[str, str | None]:
    """Find the variables that were meant for this collection and that it does not have.

    ``names`` are those of all variables that are set, ``foreign`` those that the operator calls somebody else's.
    Returns name -> nearest known variable, None where nothing resembles it, sorted by name. Names that begin with ``_``
    are private to somebody, names that begin with ``ansible_`` are Ansible's; neither is looked at.
    """
    ours, begin = known(), prefixes()
    found: dict[str, str | None] = {}
    for name in sorted(set(names) - set(foreign) - ours):
        if name.startswith(("_", "ansible_")):
            continue
        if name.startswith(begin):
            found[name] = next(iter(difflib.get_close_matches(name, sorted(ours), n=1, cutoff=WITHIN)), None)
        elif nearest := _looks_like(name, ours):
            found[name] = nearest
    return found
