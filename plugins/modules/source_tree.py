#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module source_tree: write a parcel of sources on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: source_tree
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Write a parcel of sources on a host, whole or not at all
description:
  - Writes what the lookup P(socket_handoff.fleet.source_tree#lookup) packed on the controller.
  - A release directory (O(kind=release)) is written beside its final name and renamed, so it exists completely or not
    at all. It is never altered afterwards. A directory that no longer matches its digest is replaced.
  - A mirror (O(kind=mirror)) replaces changed files one by one, each by rename, and removes files that an earlier
    parcel brought and this one does not. Files that no parcel brought are left alone.
options:
  dest:
    description: Absolute path of the directory.
    type: path
    required: true
  parcel:
    description:
      - RV(socket_handoff.fleet.source_tree#lookup:_raw[].parcel) of the lookup.
      - Required unless O(state=absent).
    type: str
  state:
    description: With V(absent), the files of a mirror are removed, and directories that this leaves empty.
    type: str
    choices: [present, absent]
    default: present
  foreign:
    description: >-
      With O(kind=mirror), a directory in which files of somebody else are kept that the parcel replaces, under their
      whole path. They come back with O(state=absent).
    type: path
  kind:
    description: Whether the directory is an immutable release or a mirror that changes file by file.
    type: str
    choices: [release, mirror]
    default: release
  prefix:
    description: Directory inside O(dest) into which the files go, for example the name of a Python package.
    type: str
    default: ''
  manifest:
    description: With O(kind=mirror), the file in which the module remembers what it brought.
    type: path
attributes:
  check_mode:
    description: Says what would change and changes nothing.
    support: full
  diff_mode:
    description: Lists the files that would be written or removed.
    support: full
"""

EXAMPLES = r"""
- name: Put a release of the daemon into its own directory
  vars:
    tree: "{{ lookup('socket_handoff.fleet.source_tree', 'daemon-src/streaming_daemon', patterns=['*.py']) }}"
  socket_handoff.fleet.source_tree:
    dest: /opt/streaming-daemon/releases/0.1.0-{{ tree.digest[:12] }}
    parcel: "{{ tree.parcel }}"
    prefix: streaming_daemon
"""

RETURN = r"""
digest:
  description: SHA-256 that names the tree.
  type: str
  returned: always
written:
  description: Relative paths that were or would be written.
  type: list
  elements: str
  returned: always
removed:
  description: Relative paths that were or would be removed.
  type: list
  elements: str
  returned: always
"""

import json
import os
import shutil
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.socket_handoff.fleet.plugins.module_utils.source_tree import digest_of, unpack


def read_tree(root):
    """Return {relative path: bytes} of the regular files below root, without compiled leftovers."""
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as handle:
                    files[os.path.relpath(path, root)] = handle.read()
    return files


def write_file(path, content):
    """Replace one file by rename, so that a reader sees the old bytes or the new ones."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".source-tree-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_release(dest, files):
    """Write the whole tree beside its final name, then rename it into place."""
    parent = os.path.dirname(dest)
    os.makedirs(parent, mode=0o755, exist_ok=True)
    staging = tempfile.mkdtemp(dir=parent, prefix=".source-tree-")
    try:
        os.chmod(staging, 0o755)
        for path, content in files.items():
            write_file(os.path.join(staging, path), content)
        if os.path.isdir(dest):
            # Only a damaged release gets here; a rename cannot replace a directory that is not empty.
            retired = tempfile.mkdtemp(dir=parent, prefix=".source-tree-")
            os.rename(dest, os.path.join(retired, "damaged"))
            os.rename(staging, dest)
            shutil.rmtree(retired)
        else:
            os.rename(staging, dest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def read_manifest(module):
    """Return the relative paths that an earlier parcel brought."""
    manifest = module.params["manifest"]
    try:
        with open(manifest, encoding="utf-8") as handle:
            return set(json.load(handle))
    except FileNotFoundError:
        return set()
    except ValueError as error:
        module.fail_json(msg=f"source_tree: {manifest} is not the list this module writes: {error}")


def keep(path, foreign):
    """Copy somebody else's file to where it is kept; the first copy stays."""
    copy = os.path.join(foreign, path.lstrip("/"))
    if not os.path.lexists(copy):
        os.makedirs(os.path.dirname(copy), mode=0o700, exist_ok=True)
        shutil.copy2(path, copy)


def remove_mirror(module):
    """Remove what the parcels of a mirror brought, bring back what they replaced; ends the module."""
    dest, manifest, foreign = module.params["dest"], module.params["manifest"], module.params["foreign"]
    if module.params["kind"] != "mirror":
        module.fail_json(msg="source_tree: state absent is for kind mirror; remove the directory of a release instead.")
    brought, present, restored = sorted(read_manifest(module)), read_tree(dest), []
    changed = os.path.lexists(manifest)
    try:
        for path in brought:
            full = os.path.join(dest, path)
            copy = os.path.join(foreign, full.lstrip("/")) if foreign else None
            if copy and os.path.isfile(copy):
                restored.append(path)
                if not module.check_mode:
                    shutil.move(copy, full)
            elif path in present and not module.check_mode:
                os.unlink(full)
        if changed and not module.check_mode:
            os.unlink(manifest)
            for folder, _subfolders, _names in os.walk(dest, topdown=False):
                if not os.listdir(folder):
                    os.rmdir(folder)
    except OSError as error:
        module.fail_json(msg=f"source_tree: cannot remove from {dest}: {error}. Mend permissions, then run again.")
    removed = [path for path in brought if path in present and path not in restored]
    listing = "".join(f"{path}\n" for path in removed)
    diff = {"before_header": dest, "after_header": dest, "before": listing, "after": ""}
    module.exit_json(changed=changed, digest="", written=restored, removed=removed, diff=diff)


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            # Not a secret, but a quarter of a megabyte that has no place in a journal.
            "parcel": {"type": "str", "no_log": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "foreign": {"type": "path"},
            "kind": {"type": "str", "choices": ["release", "mirror"], "default": "release"},
            "prefix": {"type": "str", "default": ""},
            "manifest": {"type": "path"},
        },
        required_if=[("kind", "mirror", ("manifest",)), ("state", "present", ("parcel",))],
        supports_check_mode=True,
    )
    # Whatever the login shell or sudo says: what is written here is read by other users.
    os.umask(0o022)
    dest, manifest, foreign = module.params["dest"], module.params["manifest"], module.params["foreign"]
    if module.params["state"] == "absent":
        remove_mirror(module)
    try:
        files = unpack(module.params["parcel"])
    except ValueError as error:
        module.fail_json(msg=f"source_tree: {error}")
    if module.params["prefix"]:
        files = {f"{module.params['prefix']}/{path}": content for path, content in files.items()}

    present = read_tree(dest)
    written = sorted(path for path, content in files.items() if present.get(path) != content)
    brought_before = set(present) if module.params["kind"] == "release" else read_manifest(module)
    removed = sorted(path for path in brought_before - set(files) if path in present)
    stale_manifest = module.params["kind"] == "mirror" and brought_before != set(files)
    changed = bool(written or removed or stale_manifest)

    if changed and not module.check_mode:
        try:
            if module.params["kind"] == "release":
                write_release(dest, files)
            else:
                for path in set(written) & set(present) - brought_before if foreign else ():
                    keep(os.path.join(dest, path), foreign)
                for path in written:
                    write_file(os.path.join(dest, path), files[path])
                for path in removed:
                    os.unlink(os.path.join(dest, path))
                write_file(manifest, (json.dumps(sorted(files), indent=1) + "\n").encode())
        except OSError as error:
            module.fail_json(
                msg=f"source_tree: cannot write {dest}: {error}. Free space or mend permissions, then run again."
            )

    module.exit_json(
        changed=changed,
        digest=digest_of(files),
        written=written,
        removed=removed,
        diff={
            "before_header": dest,
            "after_header": dest,
            "before": "".join(f"{path}\n" for path in sorted(set(written) & set(present)) + removed),
            "after": "".join(f"{path} (new bytes)\n" for path in written),
        },
    )


if __name__ == "__main__":
    main()
