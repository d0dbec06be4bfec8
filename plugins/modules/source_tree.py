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
    description: >-
      With V(absent), the files of a mirror are removed, and the directories that led to them where this leaves
      them empty. A file that somebody has replaced since stays.
    type: str
    choices: [present, absent]
    default: present
  foreign:
    description: >-
      With O(kind=mirror), a directory in which files of somebody else are kept that the parcel replaces, under their
      whole path, with mode and owner, and readable by root alone. They come back with O(state=absent), or when a parcel
      no longer has them.
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
    description: With O(kind=mirror), the file in which the module remembers what it brought, paths and SHA-256 values.
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
kept:
  description: Relative paths of a mirror that parcels brought and that stay, because somebody has replaced them since.
  type: list
  elements: str
  returned: always
"""

import hashlib
import json
import os
import shutil
import stat
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


def digest_at(path):
    """Return the SHA-256 (hex) of a regular file; None for anything else, a link among it, and for nothing."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.read()).hexdigest()


def read_manifest(module):
    """Return {relative path: SHA-256 values of what parcels brought there}.

    None instead of the values means that they are not known: a list of paths is what release 0.1.0 wrote.
    """
    manifest = module.params["manifest"]
    try:
        with open(manifest, encoding="utf-8") as handle:
            brought = json.load(handle)
        if isinstance(brought, list):
            return dict.fromkeys(brought)
        if not isinstance(brought, dict) or not all(isinstance(digests, list) for digests in brought.values()):
            raise ValueError("it has to be an object of lists")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        module.fail_json(msg=f"source_tree: {manifest} is not the list this module writes: {error}")
    return brought


def write_manifest(manifest, brought):
    """Note what parcels brought, {relative path: SHA-256 values}."""
    write_file(manifest, (json.dumps(brought, indent=1, sort_keys=True) + "\n").encode())


def copy_file(source, target):
    """Copy a file or a link with its mode, owner and times, by rename: nobody ever sees half a copy."""
    was = os.lstat(source)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".source-tree-")
    try:
        with os.fdopen(handle, "wb") as stream:
            if stat.S_ISLNK(was.st_mode):
                os.unlink(temporary)
                os.symlink(os.readlink(source), temporary)
            else:
                with open(source, "rb") as original:
                    shutil.copyfileobj(original, stream)
                stream.flush()
                os.fsync(stream.fileno())
        # The owner first: a change of it would take bits of the mode away.
        os.chown(temporary, was.st_uid, was.st_gid, follow_symlinks=False)
        shutil.copystat(source, temporary, follow_symlinks=False)
        os.rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def same(path, other):
    """Say whether two paths hold the same bytes, or links to the same place."""
    if os.path.islink(path) or os.path.islink(other):
        return os.path.islink(path) and os.path.islink(other) and os.readlink(path) == os.readlink(other)
    return digest_at(path) is not None and digest_at(path) == digest_at(other)


def copy_of(module, path):
    """Return where somebody else's file at a relative path is kept, or None where nothing is kept."""
    foreign = module.params["foreign"]
    return os.path.join(foreign, os.path.join(module.params["dest"], path).lstrip("/")) if foreign else None


def keep(module, path):
    """Copy somebody else's file to where it is kept, for root alone; an earlier copy of something else stays."""
    copy, full = copy_of(module, path), os.path.join(module.params["dest"], path)
    # A directory cannot be replaced by a file; the run fails there, and it stays.
    if (os.path.isdir(full) and not os.path.islink(full)) or same(full, copy):
        return
    if os.path.lexists(copy):
        number = 1
        while os.path.lexists(f"{copy}.{number}"):
            number += 1
        os.rename(copy, f"{copy}.{number}")
    folder = module.params["foreign"]
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for name in ["", *os.path.dirname(copy)[len(folder) :].strip("/").split("/")]:
        folder = os.path.join(folder, name)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
    copy_file(full, copy)


def plan_return(module, brought):
    """Say what becomes of paths that parcels brought; return (restored, removed, kept, copies).

    Only bytes that a parcel brought are replaced or removed. What somebody has put there since stays as it is, and so
    does the copy of what was there before. copies are those that are, or will be, back at their place.
    """
    restored, removed, kept, copies = [], [], [], []
    for path, digests in sorted(brought.items()):
        full, copy = os.path.join(module.params["dest"], path), copy_of(module, path)
        there, has_copy = os.path.lexists(full), bool(copy) and os.path.lexists(copy)
        back = has_copy and there and same(full, copy)
        ours = digest_at(full) in digests if digests is not None else digest_at(full) is not None and not back
        if has_copy and (ours or not there):
            restored.append(path)
        elif ours:
            removed.append(path)
        elif there and not back:
            kept.append(path)
        if has_copy and (back or path in restored):
            copies.append(copy)
    return restored, removed, kept, copies


def give_back(module, restored, removed):
    """Put back what was kept, and remove the rest of what parcels brought."""
    dest = module.params["dest"]
    for path in restored:
        os.makedirs(os.path.dirname(os.path.join(dest, path)), mode=0o755, exist_ok=True)
        copy_file(copy_of(module, path), os.path.join(dest, path))
    for path in removed:
        os.unlink(os.path.join(dest, path))


def remove_empty_parents(root, paths):
    """Remove the directories that led to these relative paths, root among them, where they are empty now."""
    parents = {os.path.join(root, *path.split("/")[:depth]) for path in paths for depth in range(path.count("/") + 1)}
    for folder in sorted(parents, key=len, reverse=True):
        if os.path.isdir(folder) and not os.path.islink(folder) and not os.listdir(folder):
            os.rmdir(folder)


def drop_copies(module, copies):
    """Remove copies of what is back at its place."""
    foreign = module.params["foreign"]
    for copy in copies:
        os.unlink(copy)
    if foreign:
        remove_empty_parents(foreign, [os.path.relpath(copy, foreign) for copy in copies])


def remove_mirror(module):
    """Remove what the parcels of a mirror brought, bring back what they replaced; ends the module.

    Cut off at any point it can be run again: the copies go last, and by then the manifest says that nothing at their
    paths is ours.
    """
    dest, manifest = module.params["dest"], module.params["manifest"]
    if module.params["kind"] != "mirror":
        module.fail_json(msg="source_tree: state absent is for kind mirror; remove the directory of a release instead.")
    brought, changed = read_manifest(module), os.path.lexists(manifest)
    try:
        restored, removed, kept, copies = plan_return(module, brought)
        if changed and not module.check_mode:
            give_back(module, restored, removed)
            if copies:
                write_manifest(manifest, {path: [] for path in brought})
                drop_copies(module, copies)
            remove_empty_parents(dest, brought)
            os.unlink(manifest)
    except OSError as error:
        module.fail_json(msg=f"source_tree: cannot remove from {dest}: {error}. Mend permissions, then run again.")
    listing = "".join(f"{path}\n" for path in removed)
    diff = {"before_header": dest, "after_header": dest, "before": listing, "after": ""}
    module.exit_json(changed=changed, digest="", written=restored, removed=removed, kept=kept, diff=diff)


def write_mirror(module, files, written, before):
    """Replace changed files one by one; before is the manifest as it was.

    The manifest is written twice: cut off between, a run leaves no file of ours that would pass for somebody else's.
    """
    dest, manifest = module.params["dest"], module.params["manifest"]
    after = {path: [hashlib.sha256(content).hexdigest()] for path, content in files.items()}
    restored, removed, _kept, copies = plan_return(module, gone(before, files))
    if module.params["foreign"]:
        for path in sorted(set(files) - set(before)):
            if os.path.lexists(os.path.join(dest, path)):
                keep(module, path)
    write_manifest(manifest, {path: (before.get(path) or []) + after.get(path, []) for path in before.keys() | after})
    for path in written:
        write_file(os.path.join(dest, path), files[path])
    give_back(module, restored, removed)
    write_manifest(manifest, after)
    drop_copies(module, copies)


def gone(before, files):
    """Return the part of a manifest that a parcel no longer has."""
    return {path: digests for path, digests in before.items() if path not in files}


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
    dest = module.params["dest"]
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
    if module.params["kind"] == "release":
        restored, removed, kept, stale_manifest = [], sorted(set(present) - set(files)), [], False
    else:
        before = read_manifest(module)
        restored, removed, kept, _copies = plan_return(module, gone(before, files))
        stale_manifest = before != {path: [hashlib.sha256(content).hexdigest()] for path, content in files.items()}
    changed = bool(written or removed or stale_manifest)

    if changed and not module.check_mode:
        try:
            if module.params["kind"] == "release":
                write_release(dest, files)
            else:
                write_mirror(module, files, written, before)
        except OSError as error:
            module.fail_json(
                msg=f"source_tree: cannot write {dest}: {error}. Free space or mend permissions, then run again."
            )

    module.exit_json(
        changed=changed,
        digest=digest_of(files),
        written=sorted(written + restored),
        removed=removed,
        kept=kept,
        diff={
            "before_header": dest,
            "after_header": dest,
            "before": "".join(f"{path}\n" for path in sorted(set(written) & set(present)) + removed),
            "after": "".join(f"{path} (new bytes)\n" for path in sorted(written + restored)),
        },
    )


if __name__ == "__main__":
    main()
