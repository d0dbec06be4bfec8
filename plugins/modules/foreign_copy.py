#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module foreign_copy: keep for ever what somebody else wrote and is about to be replaced."""

from __future__ import annotations

DOCUMENTATION = r"""
module: foreign_copy
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Keep a copy of a file that somebody else wrote
description:
  - Copies a file, with its mode, owner, times and extended attributes, to the same path below a directory that is for
    root alone. Where it is a symlink, what it leads to is copied.
  - A copy that is there already and holds something else stays beside the new one as C(.~1~), C(.~2~) and so on. A copy
    is there whole or not at all. Nothing is ever deleted.
options:
  path:
    description: Absolute path of the file.
    type: path
    required: true
  directory:
    description: Absolute path of the directory that holds the copies. It is made with mode C(0700).
    type: path
    required: true
attributes:
  check_mode:
    description: Says whether a copy would be made and makes none.
    support: full
  diff_mode:
    description: What somebody else wrote may hold a secret.
    support: none
"""

EXAMPLES = r"""
- name: Keep what the operator had there
  socket_handoff.fleet.foreign_copy:
    path: /etc/haproxy/haproxy.cfg
    directory: /var/lib/socket-handoff/foreign
"""

RETURN = r"""
copy:
  description: Path of the copy.
  type: str
  returned: always
  sample: /var/lib/socket-handoff/foreign/etc/haproxy/haproxy.cfg
earlier:
  description: Where an earlier copy of something else went.
  type: str
  returned: when there was one
  sample: /var/lib/socket-handoff/foreign/etc/haproxy/haproxy.cfg.~1~
"""

import filecmp
import itertools
import os
import shutil

from ansible.module_utils.basic import AnsibleModule


def numbered(path: str) -> str:
    """The first free name of the form that cp(1) and mv(1) give their numbered backups."""
    return next(name for name in (f"{path}.~{number}~" for number in itertools.count(1)) if not os.path.lexists(name))


def copy_whole(path: str, copy: str, directory: str) -> None:
    """Write beside the copy, under a mask that lets nobody read what is not finished, and rename."""
    before = os.umask(0o077)
    try:
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        os.chmod(directory, 0o700)
        part = f"{copy}.part"
        shutil.copy2(path, part)
        status = os.stat(path)
        os.chown(part, status.st_uid, status.st_gid)
        # A change of owner takes set-user-ID away, see chown(2).
        shutil.copymode(path, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.rename(part, copy)
    finally:
        os.umask(before)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "directory": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    path, directory = module.params["path"], module.params["directory"]
    for name, value in module.params.items():
        if not os.path.isabs(value):
            module.fail_json(msg=f"{name} is {value}; allowed is an absolute path. Example: /etc/haproxy/haproxy.cfg")
    if not os.path.isfile(path):
        module.fail_json(msg=f"path {path} is no file; allowed is a file or a symlink to one.")
    copy = os.path.join(directory, os.path.normpath(path).lstrip("/"))
    try:
        there = os.path.lexists(copy)
        if there and filecmp.cmp(path, copy, shallow=False):
            module.exit_json(changed=False, copy=copy)
        answer = {"changed": True, "copy": copy, **({"earlier": numbered(copy)} if there else {})}
        if not module.check_mode:
            if there:
                # Not renamed away: until the new one is there the earlier one has its name.
                os.link(copy, answer["earlier"], follow_symlinks=False)
            copy_whole(path, copy, directory)
    except OSError as error:
        module.fail_json(msg=f"path {path} cannot be kept in {directory}: {error.strerror}")
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
