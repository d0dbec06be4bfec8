#!/usr/bin/env python3
"""Write roles/*/README.md and playbooks/README.md from what roles and playbooks themselves say.

Sources: meta/argument_specs.yml (purpose, variables), tasks/main.yml (tags), playbooks/*.meta.yml. Run without
arguments to write; with --check to learn whether a README is out of date (exit status 1, the difference on standard
output).
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "meta/argument_specs.yml").is_file())
PLAYBOOKS = sorted(path.name.removesuffix(".meta.yml") for path in (ROOT / "playbooks").glob("*.meta.yml"))

Spec = dict[str, Any]


# Where a role belongs, if not on the web hosts.
GROUPS = {"handoff_lb": "load_balancers", "handoff_monitoring": "monitoring", "release_puller": "pull_hosts"}


def spec_of(role: str) -> dict[str, Spec]:
    """Return the entry points of a role."""
    text = (ROOT / "roles" / role / "meta/argument_specs.yml").read_text()
    specs: dict[str, Spec] = yaml.safe_load(text)["argument_specs"]
    return specs


def markdown(text: str) -> str:
    """Turn Ansible's markup into Markdown."""
    text = re.sub(r"\bL\(([^,()]+), *([^()]+)\)", r"[\1](\2)", text.strip())
    return re.sub(r"\b[CVOMP]\(([^()]*(?:\([^()]*\)[^()]*)*)\)", r"`\1`", text)


def cell(text: str) -> str:
    """Make a text fit into a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def paragraphs(description: str | list[str]) -> list[str]:
    """Return a description as Markdown paragraphs."""
    return [markdown(text) for text in ([description] if isinstance(description, str) else description)]


def shown_default(option: Spec) -> str:
    """Return a default as YAML on one line."""
    if "default" not in option:
        return ""
    text = yaml.safe_dump(option["default"], default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def shown_type(option: Spec) -> str:
    """Return a type with its choices."""
    kind = f"list of {option['elements']}" if option["type"] == "list" else str(option["type"])
    return kind + (": " + ", ".join(f"`{choice}`" for choice in option["choices"]) if "choices" in option else "")


def rows(options: dict[str, Spec], prefix: str = "") -> list[str]:
    """Return the table rows of options and, indented by their parent's name, of their sub-options."""
    lines = []
    for name, option in options.items():
        text = " ".join(paragraphs(option["description"]))
        needed = " (required)" if option.get("required") or text.startswith("Required.") else ""
        lines.append(
            f"| `{prefix}{name}`{needed} | {cell(shown_type(option))} | {cell(shown_default(option))} | {cell(text)} |"
        )
        lines += rows(option.get("options", {}), f"{prefix}{name}[].")
    return lines


def tag_rows(role: str) -> list[str]:
    """Return the steps of tasks/main.yml with the tags that select them."""

    def walk(tasks: list[dict[str, Any]]) -> list[str]:
        lines = []
        for task in tasks:
            for key in ("block", "rescue"):
                lines += walk(task.get(key, []))
            if "tags" in task:
                lines.append(f"| {task['name']} | {', '.join(f'`{tag}`' for tag in task['tags'])} |")
        return lines

    return walk(yaml.safe_load((ROOT / "roles" / role / "tasks/main.yml").read_text()))


def readme(role: str) -> str:
    """Return the whole text of a role's README."""
    specs = spec_of(role)
    main = specs["main"]
    required = [name for name, option in main["options"].items() if "Required." in option["description"]]
    lines = [
        "<!-- Written by tests/roles/generate_readme.py from meta/argument_specs.yml; change that, run it again. -->",
        f"# Role `socket_handoff.fleet.{role}`",
        "",
        f"{markdown(main['short_description'])}. For Debian 12 and 13.",
        "",
    ]
    for text in paragraphs(main["description"]):
        lines += [text, ""]
    lines += [
        "## Use",
        "",
        "```yaml",
        f"- name: {main['short_description']}",
        f"  hosts: {GROUPS.get(role, 'web_hosts')}",
        "  become: true",
        "  roles:",
    ]
    lines.append(f"    - role: socket_handoff.fleet.{role}")
    if required:
        lines += ["  vars:"] + [f'    {name}: "{{{{ vault_{name} }}}}"' for name in required]
    if role == "handoff_lb":
        lines += ["  vars:", '    handoff_lb_certificate_file: "{{ inventory_dir }}/.secrets/chat.example.com.pem"']
    lines += ["```", "", "## Variables", "", "| name | type | default | what it does |", "|---|---|---|---|"]
    lines += rows(main["options"])
    lines += [
        "",
        "A misspelt name is refused: what begins with `handoff_` or a role's name has to be in a role's table.",
    ]
    lines += ["", "## Steps and tags", "", "| step | tags |", "|---|---|", *tag_rows(role), ""]
    lines += [
        f"In `site.yml` the tag `{role}` selects the whole role. Steps tagged `always` run with every choice of tags.",
        "",
    ]
    others = {name: spec for name, spec in specs.items() if name != "main"}
    if others:
        lines += [
            "## Further entry points",
            "",
            "They take the same variables.",
            "",
            "| `tasks_from` | what it does |",
            "|---|---|",
        ]
        lines += [f"| `{name}` | {cell(' '.join(paragraphs(spec['description'])))} |" for name, spec in others.items()]
        lines.append("")
    return "\n".join(lines)


def playbooks() -> str:
    """Return the whole text of the playbooks' README."""
    lines = [
        "<!-- Written by tests/roles/generate_readme.py from playbooks/*.meta.yml; change those, run it again. -->",
        "# Playbooks",
        "",
        "Each checks what it was told before it does anything. By their full names they run from any project that has",
        "the collection installed, for example `ansible-playbook -i my-inventory socket_handoff.fleet.deploy`.",
        "",
    ]
    for name in PLAYBOOKS:
        meta = yaml.safe_load((ROOT / "playbooks" / f"{name}.meta.yml").read_text())
        spec = meta["argument_specs"][name]
        lines += [f"## `socket_handoff.fleet.{name}`", "", f"{markdown(meta['short_description'])}.", ""]
        lines += [*paragraphs(meta["description"]), ""]
        lines += ["| name | type | what it does |", "|---|---|---|"]
        for option, described in spec["options"].items():
            text = cell(" ".join(paragraphs(described["description"])))
            lines.append(f"| `{option}` | {cell(shown_type(described))} | {text} |")
        lines += ["", "```yaml", spec["examples"].rstrip(), "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Write the READMEs, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a README is out of date")
    check = parser.parse_args().check
    stale = False
    written = {ROOT / "roles" / role / "README.md": readme(role) for role in ROLES}
    for path, wanted in {**written, ROOT / "playbooks/README.md": playbooks()}.items():
        found = path.read_text() if path.exists() else ""
        if check and found != wanted:
            stale = True
            shown = path.relative_to(ROOT)
            print(f"{shown} is out of date; run {Path(__file__).relative_to(ROOT)}")
            sys.stdout.writelines(
                difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), f"a/{shown}", f"b/{shown}")
            )
        elif not check:
            path.write_text(wanted)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
