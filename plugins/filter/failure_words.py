# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filter failure_words: what a failed task has said, in one line."""

from __future__ import annotations

DOCUMENTATION = r"""
name: failure_words
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Say in one line why a task has failed
description:
  - A command's message is C(non-zero return code), and a loop's C(One or more items failed). This takes the words of
    the program, and those of the items that failed.
options:
  _input:
    description: The result of a task, for example C(ansible_failed_result).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Try
  block:
    - name: Ask
      ansible.builtin.command: apache2ctl configtest
      changed_when: false
  rescue:
    - name: Say why
      ansible.builtin.debug:
        msg: "{{ ansible_failed_result | socket_handoff.fleet.failure_words }}"
"""

RETURN = r"""
_value:
  description: The words, at most about a thousand characters of each of up to three items.
  type: str
"""

# Enough to see what it is; the run's output has the rest.
MOST, ITEMS = 1000, 3
SILENT = "see above"


def of_one(result):
    """Return the words of a result that is no loop's."""
    said = []
    for key in ("msg", "stderr", "module_stderr"):
        text = " ".join(str(result.get(key) or "").split())
        if text and not any(text in each for each in said):
            # The end of a traceback is what says something.
            said.append(text if len(text) <= MOST else f"... {text[-MOST:]}")
    if not said and result.get("censored"):
        said.append("what it said is kept secret")
    return ": ".join(said) or SILENT


def failure_words(result):
    """Return what a failed task has said."""
    if not isinstance(result, dict):
        return SILENT
    items = [each for each in result.get("results") or [] if isinstance(each, dict)]
    failed = [each for each in items if each.get("failed") or each.get("unreachable")]
    if not failed:
        return of_one(result)
    said = []
    for each in failed[:ITEMS]:
        label = each.get("_ansible_item_label", each.get("item", ""))
        said.append(f"{label}: {of_one(each)}" if isinstance(label, (str, int)) and label != "" else of_one(each))
    more = [f"and {len(failed) - ITEMS} more"] if len(failed) > ITEMS else []
    return "; ".join(said + more)


class FilterModule:
    """Ansible's entry point."""

    def filters(self):
        """Return the filter by name."""
        return {"failure_words": failure_words}
