#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module apache_config: change Apache's files on Debian as one transaction.

Theory of operation. A set of files and links is compared with the host. When
something differs, Apache's whole configuration directory is copied, the
change is made in the copy, and Apache itself judges the copy. Only then are
the real files replaced, each by rename, after the previous ones were saved.
Apache judges once more where the files really are; if it disagrees, or if a
write fails half way (a full disk), every file goes back to what it was.

So at no moment does a file that Apache refuses lie where the next start, the
next log rotation or the next reboot would find it.

What was at a path before a change set first touched it is kept until the
change set is taken away again, which is a transaction like any other.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: apache_config
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Change Apache's files on Debian as one transaction
description:
  - Writes files and links of Apache's configuration on Debian. All of them, or none.
  - The change is tested by Apache in a copy of the configuration directory before any real file is touched, and once
    more afterwards. A refused change leaves every file as it was.
  - Nothing is reloaded or restarted. RV(changed_paths) tells what changed, so that the caller can choose.
options:
  name:
    description: Name of the change set. The previous files are kept under this name in O(backup_dir).
    type: str
    required: true
  state:
    description:
      - With V(present), the files and links are as given.
      - With V(restored), the last change set of this name is undone.
      - With V(absent), every change set of this name is undone. Each path gets back what was there before the first of
        them, unless a text there is no longer ours, or a link would lead nowhere.
      - A module that was enabled by the change set stays enabled with V(absent) where other enabled configuration has
        come to depend on it without Apache noticing, for example behind C(<IfModule proxy_fcgi_module>), or as the
        handler of PHP, whose source would be served without it. Files named C(.htaccess) are not searched.
    type: str
    choices: [present, restored, absent]
    default: present
  confdir:
    description: Apache's configuration directory.
    type: path
    default: /etc/apache2
  files:
    description: Files to write.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute, or relative to O(confdir).
        type: str
        required: true
      content:
        description: The whole text.
        type: str
      source:
        description:
          - A file on the host to copy the bytes from. While the change is tested, its own texts refer to this file
            instead of O(files[].path), so that a new module binary is loaded by the test.
        type: path
      mode:
        description: Permissions, octal.
        type: str
        default: '0644'
  links:
    description: Symbolic links, as C(a2enmod) and C(a2ensite) make them.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute, or relative to O(confdir).
        type: str
        required: true
      target:
        description: Where the link points. Required unless O(links[].state=absent).
        type: str
      state:
        description: Whether the link exists.
        type: str
        choices: [present, absent]
        default: present
  marker:
    description:
      - A text that every file of ours contains. A file at the same path without it is somebody else's. It is kept
        below C(foreign) in O(backup_dir) for ever before it is replaced.
    type: str
    default: socket_handoff.fleet
  listen:
    description:
      - TCP ports that the new configuration listens on. If a process other than Apache holds one of them, the change is
        refused, because Apache notices that only when it has already stopped serving.
    type: list
    elements: int
    default: []
  needs:
    description:
      - Paths, absolute or relative to O(confdir), that other change sets make before this one. In check mode, where
        they have not, the change is not tested.
    type: list
    elements: str
    default: []
  after:
    description:
      - Names of change sets that are taken away before this one, for O(state=absent). In check mode, where they are
        still there, the removal of all of them is tested as one.
    type: list
    elements: str
    default: []
  control:
    description: Apache's control program.
    type: path
    default: /usr/sbin/apache2ctl
  backup_dir:
    description: Where previous files are kept.
    type: path
    default: /var/lib/socket-handoff/apache
attributes:
  check_mode:
    description:
      - Tests the change in a copy and says what would change. Works on a host without Apache.
    support: full
  diff_mode:
    description: Shows texts, links, and sizes of binary files.
    support: full
"""

EXAMPLES = r"""
- name: Enable a module with its configuration
  socket_handoff.fleet.apache_config:
    name: example
    files:
      - path: mods-available/example.load
        content: |
          # Written by socket_handoff.fleet.
          LoadModule example_module /usr/lib/apache2/modules/mod_example.so
    links:
      - path: mods-enabled/example.load
        target: ../mods-available/example.load
"""

RETURN = r"""
changed_paths:
  description: Absolute paths that were or would be changed.
  type: list
  elements: str
  returned: always
adopted:
  description: Files of somebody else that were or would be replaced, and are kept.
  type: list
  elements: str
  returned: always
tested:
  description:
    - Whether Apache judged the change. In check mode false when Apache, a source or one of O(needs) is not there yet.
  type: bool
  returned: when state is present or absent
kept:
  description: Paths that state V(absent) left or would leave alone, each with the reason behind a colon.
  type: list
  elements: str
  returned: when state is absent
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile

from ansible.module_utils.basic import AnsibleModule


class Refused(Exception):
    """The change cannot be made; the text says why and what to do."""


class Entry:
    """What shall be at one path, and what is there now.

    A state is None (nothing), ("file", bytes, mode) or ("link", target).
    """

    __slots__ = ("after", "before", "path", "source")

    def __init__(self, path, after, source=None):
        self.path = path
        self.after = after
        self.source = source
        self.before = state_of(path)


def state_of(path):
    """Return the state of one path; refuse what is neither file nor link."""
    if os.path.islink(path):
        return ("link", os.readlink(path))
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        raise Refused(f"{path} is neither a file nor a link. Move it away, then run again.")
    with open(path, "rb") as handle:
        return ("file", handle.read(), os.stat(path).st_mode & 0o7777)


def put(path, state):
    """Make one path have one state; a reader sees the old one or the new one."""
    if state is None:
        if os.path.lexists(path):
            os.unlink(path)
        return
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        if state[0] == "link":
            os.symlink(state[1], temporary)
        else:
            with open(temporary, "xb") as handle:
                handle.write(state[1])
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, state[2])
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def same_link(left, right, folder):
    """Whether two link targets mean the same file (a2enmod writes them relative, people do not always)."""
    return os.path.normpath(os.path.join(folder, left)) == os.path.normpath(os.path.join(folder, right))


def plan(module):
    """Return the entries that have to change, files before links."""
    confdir, entries = module.params["confdir"], []
    for item in module.params["files"]:
        path = os.path.join(confdir, item["path"])
        if item["source"] is None:
            content = item["content"].encode()
        elif os.path.isfile(item["source"]):
            with open(item["source"], "rb") as handle:
                content = handle.read()
        elif module.check_mode:
            content = b""  # built in the real run
        else:
            raise Refused(f"{item['source']} does not exist, so {path} cannot be made from it.")
        entry = Entry(path, ("file", content, int(item["mode"], 8)), item["source"])
        if entry.before != entry.after:
            entries.append(entry)
    for item in module.params["links"]:
        path = os.path.join(confdir, item["path"])
        entry = Entry(path, ("link", item["target"]) if item["state"] == "present" else None)
        if entry.before is not None and entry.before[0] == "file":
            raise Refused(f"{path} is a file where a2enmod and a2ensite make links. Move it away, then run again.")
        if entry.before and entry.after and same_link(entry.before[1], entry.after[1], os.path.dirname(path)):
            continue
        if entry.before != entry.after:
            entries.append(entry)
    return entries


def judge(module, confdir):
    """Ask Apache about a configuration directory; return its complaint or None."""
    # A test opens next to no files; where the limit cannot be raised, apache2ctl's complaint would hide the real one.
    environment = {"APACHE_CONFDIR": confdir, "APACHE_ULIMIT_MAX_FILES": "true", "LC_ALL": "C.UTF-8"}
    code, out, err = module.run_command([module.params["control"], "-t"], environ_update=environment)
    return None if code == 0 else (err or out).replace(confdir, module.params["confdir"]).strip()


def mention_elsewhere(folder, elsewhere):
    """Let the texts below a folder name other paths: elsewhere maps each to the one that takes its place."""
    for below, _subfolders, names in os.walk(folder):
        for name in names:
            path = os.path.join(below, name)
            state = None if os.path.islink(path) or not os.path.isfile(path) else state_of(path)
            if state is None:
                continue
            text = state[1]
            for mentioned, instead in elsewhere.items():
                text = text.replace(mentioned.encode(), instead.encode())
            if text != state[1]:
                put(path, ("file", text, state[2]))


def judge_copy(module, entries):
    """Make the change in a copy of the configuration directory and ask Apache about it."""
    confdir = module.params["confdir"]
    with tempfile.TemporaryDirectory(prefix="apache-config-") as folder:
        copy, gone = os.path.join(folder, "apache2"), os.path.join(folder, "gone")
        shutil.copytree(confdir, copy, symlinks=True)
        for entry in entries:
            if entry.path.startswith(confdir + "/"):
                path = copy + entry.path[len(confdir) :]
                os.makedirs(os.path.dirname(path), exist_ok=True)
                put(path, entry.after)
        # What lies outside, a module above all, is not in the copy. Files that name it may not change themselves: a
        # LoadModule line stays the same while the module behind it learns, or forgets, a directive.
        outside = [entry for entry in entries if not entry.path.startswith(confdir + "/")]
        elsewhere = {e.path: e.source for e in outside if e.source is not None}
        elsewhere |= {e.path: gone + e.path for e in outside if e.after is None}
        if elsewhere:
            mention_elsewhere(copy, elsewhere)
        complaint = judge(module, copy)
    if complaint is not None:
        complaint = complaint.replace(gone, "")
    if complaint is not None:
        # A configuration that was broken before is not this change's fault, and the reader should look elsewhere.
        already = judge(module, confdir)
        raise Refused(
            f"Apache's configuration was broken before this change; mend it first:\n{already}"
            if already is not None
            else f"Apache refuses the new configuration; nothing was changed:\n{complaint}"
        )


def listening_inodes():
    """Return {port: socket inodes} of listening TCP sockets."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as handle:
                rows = handle.read().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            column = row.split()
            if column[3] == "0A":
                found.setdefault(int(column[1].rsplit(":", 1)[1], 16), set()).add(column[9])
    return found


def owners(inodes):
    """Return the names of the processes that hold these socket inodes."""
    wanted, names = {f"socket:[{inode}]" for inode in inodes}, set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in wanted:
                    with open(f"/proc/{pid}/comm", encoding="utf-8") as handle:
                        names.add(handle.read().strip())
                    break
        except OSError:
            continue  # the process ended meanwhile
    return names


def refuse_taken_ports(module):
    """Refuse ports that another process listens on."""
    listening = listening_inodes()
    for port in module.params["listen"]:
        others = owners(listening.get(port, ())) - {os.path.basename(module.params["control"]).replace("ctl", "")}
        if others:
            raise Refused(
                f"port {port} is held by {', '.join(sorted(others))}, not by Apache. "
                "Choose another port or stop that program, then run again."
            )


def write_states(root, states):
    """Keep (path, state, binary) in a directory of its own, which never exists half written."""
    staging = root + ".new"
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging, mode=0o700)
    index = []
    for number, (path, state, binary) in enumerate(states):
        record = {"path": path, "kind": state[0] if state else None, "binary": binary}
        if state and state[0] == "link":
            record["target"] = state[1]
        elif state:
            record["mode"] = state[2]
            record["blob"] = f"{number}-{os.path.basename(path)}"
            put(os.path.join(staging, record["blob"]), ("file", state[1], 0o600))
        index.append(record)
    put(os.path.join(staging, "index.json"), ("file", json.dumps(index, indent=1).encode(), 0o600))
    # Cut off anywhere here, one of the two is there whole.
    if os.path.isdir(root):
        shutil.rmtree(root + ".old", ignore_errors=True)
        os.rename(root, root + ".old")
    os.rename(staging, root)
    shutil.rmtree(root + ".old", ignore_errors=True)


def drop_states(root):
    """Keep these states no longer."""
    for suffix in (".new", ".old", ""):
        shutil.rmtree(root + suffix, ignore_errors=True)


def has_states(root):
    """Whether states are kept in a directory, be it none at all."""
    return os.path.isdir(root) or os.path.isdir(root + ".old")


def read_states(root):
    """Return the (path, state, binary) that are kept in a directory."""
    if not os.path.isdir(root):
        root += ".old"
    try:
        with open(os.path.join(root, "index.json"), encoding="utf-8") as handle:
            index = json.load(handle)
    except FileNotFoundError:
        return []
    states = []
    for record in index:
        state = None
        if record["kind"] == "link":
            state = ("link", record["target"])
        elif record["kind"] == "file":
            with open(os.path.join(root, record["blob"]), "rb") as handle:
                state = ("file", handle.read(), record["mode"])
        # Earlier versions did not note it; their only binary was the module.
        states.append((record["path"], state, record.get("binary", record["path"].endswith(".so"))))
    return states


def kept_in(module, kind, name=None):
    """Return the directory with the previous states, or with those from before the first change set of a name."""
    name = name or module.params["name"]
    return os.path.join(module.params["backup_dir"], name if kind == "previous" else os.path.join("original", name))


def foreign_copy(module, path):
    """Return where somebody else's file is kept that was at a path."""
    return os.path.join(module.params["backup_dir"], "foreign", path.lstrip("/"))


def original_of(module, path, state):
    """Return the state of a path before us, of which our own file tells nothing but that we were here."""
    ours = state is not None and state[0] == "file" and module.params["marker"].encode() in state[1]
    return state_of(foreign_copy(module, path)) if ours else state


def without_originals(module, name):
    """Whether a release that kept no originals has changed something by this name that is still changed."""
    previous = [] if has_states(kept_in(module, "original", name)) else read_states(kept_in(module, "previous", name))
    return any(state_of(path) != state for path, state, _binary in previous)


def complete_originals(module):
    """Keep the originals that a release without them, or with few of them, has left no trace of, as far as can be told.

    A declared file with our marker is ours, and so are the binary beside it and the links to it, unless somebody else's
    file was there. A link that changed last was before as the previous states say. Who made the others is not known;
    they stay as they are when the change set is taken away.
    """
    confdir, marker = module.params["confdir"], module.params["marker"].encode()
    originals = read_states(kept_in(module, "original"))
    known, added = {path for path, _state, _binary in originals}, {}
    previous = {}
    if without_originals(module, module.params["name"]):
        previous = {path: state for path, state, _binary in read_states(kept_in(module, "previous"))}
    binaries = []
    for item in module.params["files"]:
        path = os.path.join(confdir, item["path"])
        if path in known:
            continue
        state = state_of(path)
        if item["source"] is not None:
            binaries += [path] if state else []
        elif state and state[0] == "file" and marker in state[1]:
            added[path] = original_of(module, path, previous.get(path, state))
    if added:
        added.update(dict.fromkeys(binaries))
    for item in module.params["links"]:
        path = os.path.join(confdir, item["path"])
        target = os.path.normpath(os.path.join(os.path.dirname(path), item["target"] or ""))
        if path not in known and (path in previous or (target in added and added[target] is None)):
            added[path] = previous.get(path)
    if added:
        originals += [(path, state, path in binaries) for path, state in added.items()]
        write_states(kept_in(module, "original"), originals)


def save(module, entries, adopted):
    """Keep the previous states, so that they can be restored by this run or a later one."""
    # First what a removal needs: without it, what follows would look like the work of a release that kept none.
    originals = read_states(kept_in(module, "original"))
    known = {path for path, _state, _binary in originals}
    originals += [
        (entry.path, original_of(module, entry.path, entry.before), entry.source is not None)
        for entry in entries
        if entry.path not in known
    ]
    write_states(kept_in(module, "original"), originals)
    write_states(
        kept_in(module, "previous"), [(entry.path, entry.before, entry.source is not None) for entry in entries]
    )
    for entry in entries:
        keep = foreign_copy(module, entry.path)
        if entry.path in adopted and not os.path.lexists(keep):
            os.makedirs(os.path.dirname(keep), mode=0o700, exist_ok=True)
            put(keep, entry.before)


def forget(module):
    """Drop the originals of paths that are as they were before the first change set: nothing of ours is there."""
    originals = read_states(kept_in(module, "original"))
    changed = [record for record in originals if state_of(record[0]) != record[1]]
    if changed:
        write_states(kept_in(module, "original"), changed)
    else:
        drop_states(kept_in(module, "original"))


def restore(module):
    """Undo the last change set of this name; return the paths that changed."""
    changed = []
    for path, state, _binary in reversed(read_states(kept_in(module, "previous"))):
        if state_of(path) != state:
            changed.append(path)
            if not module.check_mode:
                put(path, state)
    if not module.check_mode:
        forget(module)
        drop_states(kept_in(module, "previous"))
    return changed


# What shows, beside <IfModule>, that a text uses a module. Apache notices none of it, or only when it is asked.
USES = {
    "proxy": r"proxy:|fcgi:|\bProxyPass",
    "proxy_fcgi": r"fcgi:",
    "setenvif": r"\b(?:SetEnvIf|BrowserMatch)",
    "php": r"application/x-httpd-php|\bphp_(?:admin_)?(?:value|flag)\b",
}
SCRIPT = (".php", ".phtml", ".phar")


def text_after(path, after):
    """Return the text that Apache reads at a path once it is as in after ({path: state}); None where there is none."""
    for _link in range(8):
        state = after[path] if path in after else ("link", os.readlink(path)) if os.path.islink(path) else ()
        if state is None:
            return None
        if state and state[0] == "file":
            return state[1].decode(errors="replace")
        if not state:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), state[1]))
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as handle:
        return handle.read()


def enabled_after(confdir, after):
    """Return {path: text} of the configuration that is enabled once the paths are as in after ({path: state})."""
    folders = [name for name in os.listdir(confdir) if name.endswith("-enabled") or name in ("conf", "conf.d")]
    pending = [os.path.join(confdir, "apache2.conf")]
    for folder in folders:
        inside = {os.path.join(confdir, folder, name) for name in os.listdir(os.path.join(confdir, folder))}
        inside |= {path for path in after if os.path.dirname(path) == os.path.join(confdir, folder)}
        pending += sorted(path for path in inside if path.endswith((".conf", ".load")))
    found = {}
    while pending:
        path = pending.pop(0)
        if path in found:
            continue
        if os.path.isdir(path):
            pending += sorted(os.path.join(path, name) for name in os.listdir(path))
            continue
        text = text_after(path, after)
        if text is None:
            continue
        found[path] = text
        for pattern in re.findall(r'^\s*Include(?:Optional)?\s+"?([^"\s]+)', text, re.I | re.M):
            pending += sorted(glob.glob(os.path.join(confdir, pattern)))
    return found


def scripts_in(text):
    """Return a PHP file below a DocumentRoot that this text names, which mod_php serves without being mentioned."""
    for root in re.findall(r'^\s*DocumentRoot\s+"?([^"\n]+?)"?\s*$', text, re.I | re.M):
        for folder, _subfolders, names in os.walk(root):
            for name in names:
                if name.endswith(SCRIPT):
                    return os.path.join(folder, name)
    return None


def dependent(name, enabled):
    """Return the path of an enabled text that depends on a module, by the name that a2enmod knows it by, or None."""
    family = "php" if name.startswith("php") else name
    known_as = r"php\d*" if family == "php" else re.escape(name)
    # Not "!": who says what holds without the module is served by its absence.
    guards = rf'^\s*<IfModule\s+"?(?:{known_as}_module|mod_{known_as}[.]c)"?\s*>'
    uses = rf"^(?!\s*#).*(?:{USES[family]})" if family in USES else None
    # As a2dismod does: what other modules depend on is in a comment of Debian's.
    depends = rf"^#\s*Depends:(?:.*\s)?{re.escape(name)}(?:\s|$)"
    for path, text in enabled.items():
        # In a module's own configuration it is what that does beside the other: mod_status shows how proxies are.
        of_a_module = os.path.basename(os.path.dirname(path)) == "mods-enabled"
        if not of_a_module and re.search(guards, text, re.I | re.M):
            return path
        if uses and re.search(uses, text, re.I | re.M):
            return path
        if path.endswith(".load") and re.search(depends, text, re.M):
            return path
        if family == "php" and scripts_in(text):
            return path
    return None


def still_needed(module, entries, earlier):
    """Return {path: who needs it} of links in mods-enabled that a removal would take away from other configuration.

    Without proxy_fcgi or mod_php Apache takes a PHP file for a text and serves its source, and finds nothing wrong.
    """
    confdir, after = module.params["confdir"], {entry.path: entry.after for entry in [*earlier, *entries]}
    links, needed = {}, {}
    for entry in entries:
        name, suffix = os.path.splitext(os.path.basename(entry.path))
        if os.path.dirname(entry.path) != os.path.join(confdir, "mods-enabled") or suffix not in (".load", ".conf"):
            continue
        # One MPM is exchanged for another, and a link to a file that goes too would lead nowhere.
        if name.startswith("mpm_") or entry.after is not None or not entry.before or entry.before[0] != "link":
            continue
        if text_after(entry.path, {path: state for path, state in after.items() if path != entry.path}) is not None:
            links.setdefault(name, []).append(entry.path)
    while links:
        enabled = enabled_after(confdir, after)
        found = {name: user for name in links if (user := dependent(name, enabled))}
        if not found:
            break
        for name, user in found.items():
            for path in links.pop(name):
                needed[path] = user
                del after[path]
    return needed


def plan_removal(module, name, earlier):
    """Return the entries that take away every change set of a name, and {path: why} of what stays as it is.

    Entries that take effect earlier are given.
    """
    if without_originals(module, name):
        raise Refused(
            f"an earlier release has put the change set {name} in place, and kept no record of what "
            "was there before; nothing was changed. Deploy once more with this release, then remove."
        )
    marker, entries, kept = module.params["marker"].encode(), [], {}
    for path, state, binary in reversed(read_states(kept_in(module, "original", name))):
        if not binary:  # an earlier release may have kept our own
            state = original_of(module, path, state)
        entry = Entry(path, state)
        if entry.before == entry.after:
            continue
        foreign = entry.before and entry.before[0] == "file" and not binary and marker not in entry.before[1]
        nowhere = state and state[0] == "link" and not os.path.exists(os.path.join(os.path.dirname(path), state[1]))
        if foreign:
            kept[path] = "somebody else's by now"
        elif nowhere:
            kept[path] = f"{state[1]}, where it led, is gone"
        else:
            entries.append(entry)
    if os.path.isdir(module.params["confdir"]):
        for path, user in still_needed(module, entries, earlier).items():
            kept[path] = f"{user} depends on it"
    return [entry for entry in entries if entry.path not in kept], kept


def clean_up(module, entries):
    """Remove what was kept for change sets that are gone, and directories that this leaves empty."""
    for kind in ("previous", "original"):
        drop_states(kept_in(module, kind))
    for entry in entries:
        keep = foreign_copy(module, entry.path)
        # Back at its place, so no longer kept; a copy of something else stays.
        if os.path.lexists(keep) and state_of(keep) == entry.after:
            os.unlink(keep)
    for folder, subfolders, names in os.walk(module.params["backup_dir"], topdown=False):
        if not names and not any(os.path.lexists(os.path.join(folder, name)) for name in subfolders):
            os.rmdir(folder)


def set_aside(entry):
    """Give a file that is about to be replaced a second name; return that name, or None where there is no file.

    A hard link takes no space, so that going back by rename works on a full disk too.
    """
    if entry.before is None or entry.before[0] != "file":
        return None
    aside = entry.path + ".before"
    if os.path.lexists(aside):
        os.unlink(aside)
    os.link(entry.path, aside)
    return aside


def apply(module, entries, adopted):
    """Save, replace, judge; on any trouble put everything back."""
    save(module, entries, adopted)
    begun = []
    try:
        for entry in entries:
            os.makedirs(os.path.dirname(entry.path), mode=0o755, exist_ok=True)
            begun.append((entry, set_aside(entry)))
            put(entry.path, entry.after)
        complaint = judge(module, module.params["confdir"]) if os.access(module.params["control"], os.X_OK) else None
    except OSError as error:
        complaint = str(error)
    if complaint is None:
        for _entry, aside in begun:
            if aside is not None:
                os.unlink(aside)
        return
    stuck = []
    for entry, aside in reversed(begun):
        try:
            if aside is not None:
                os.rename(aside, entry.path)
                # rename(2) does nothing, and says so to nobody, where both names are still the same file.
                if os.path.lexists(aside):
                    os.unlink(aside)
            elif state_of(entry.path) != entry.before:
                put(entry.path, entry.before)
        except OSError as error:
            stuck.append(f"{entry.path} ({error})")
    with contextlib.suppress(OSError):  # a full disk; what is kept too much is kept for nothing
        forget(module)
        if not stuck:
            drop_states(kept_in(module, "previous"))
    if stuck:
        raise Refused(
            f"the change could not be completed:\n{complaint}\nand these could not be taken back: {', '.join(stuck)}. "
            f"Their previous contents are below {module.params['backup_dir']}/{module.params['name']}."
        )
    raise Refused(f"the change could not be completed and was taken back:\n{complaint}")


def shown(state):
    """Return a state as text for a diff."""
    if state is None:
        return ""
    if state[0] == "link":
        return f"link to {state[1]}\n"
    try:
        return state[1].decode()
    except UnicodeDecodeError:
        return f"{len(state[1])} bytes, sha256 {hashlib.sha256(state[1]).hexdigest()}\n"


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "restored", "absent"], "default": "present"},
            "confdir": {"type": "path", "default": "/etc/apache2"},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "str", "required": True},
                    "content": {"type": "str"},
                    "source": {"type": "path"},
                    "mode": {"type": "str", "default": "0644"},
                },
                "mutually_exclusive": [("content", "source")],
                "required_one_of": [("content", "source")],
            },
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "str", "required": True},
                    "target": {"type": "str"},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                },
                "required_if": [("state", "present", ("target",))],
            },
            "marker": {"type": "str", "default": "socket_handoff.fleet"},
            "listen": {"type": "list", "elements": "int", "default": []},
            "needs": {"type": "list", "elements": "str", "default": []},
            "after": {"type": "list", "elements": "str", "default": []},
            "control": {"type": "path", "default": "/usr/sbin/apache2ctl"},
            "backup_dir": {"type": "path", "default": "/var/lib/socket-handoff/apache"},
        },
        supports_check_mode=True,
    )
    # Whatever the login shell or sudo says: what is written here is read by other users.
    os.umask(0o022)
    confdir = module.params["confdir"] = module.params["confdir"].rstrip("/")
    try:
        if module.params["state"] == "restored":
            paths = restore(module)
            module.exit_json(changed=bool(paths), changed_paths=paths, adopted=[])

        installed = os.path.isdir(confdir) and os.access(module.params["control"], os.X_OK)
        removal, adopted, kept, earlier = module.params["state"] == "absent", [], {}, []
        if removal:
            for name in module.params["after"] if module.check_mode else ():
                earlier += plan_removal(module, name, earlier)[0]
            entries, kept = plan_removal(module, module.params["name"], earlier)
            changed = bool(entries) or any(has_states(kept_in(module, kind)) for kind in ("previous", "original"))
        else:
            if not installed and not module.check_mode:
                raise Refused(f"Apache is not installed here: {confdir} or {module.params['control']} is missing.")
            entries = plan(module)
            changed = bool(entries)
            marker = module.params["marker"].encode()
            adopted = [
                entry.path
                for entry in entries
                if entry.before and entry.before[0] == "file" and entry.source is None and marker not in entry.before[1]
            ]
            refuse_taken_ports(module)
        tested = installed and all(entry.source is None or os.path.isfile(entry.source) for entry in entries)
        if module.check_mode:
            # What goes before this one in a real run is still to come, or still there.
            needed = [os.path.join(confdir, path) for path in module.params["needs"]]
            tested = tested and all(os.path.exists(path) for path in needed)
        if tested and (entries or earlier):
            judge_copy(module, [*earlier, *entries])
        if not removal and not module.check_mode:
            complete_originals(module)
        if entries and not module.check_mode:
            apply(module, entries, adopted)
        if removal and changed and not module.check_mode:
            clean_up(module, entries)
    except Refused as refusal:
        module.fail_json(msg=f"apache_config: {refusal}")
    except OSError as error:
        module.fail_json(msg=f"apache_config: {error}. Nothing was changed.")
    module.exit_json(
        changed=changed,
        changed_paths=[entry.path for entry in entries],
        adopted=adopted,
        tested=tested,
        kept=[f"{path}: {why}" for path, why in kept.items()],
        diff=[
            {
                "before_header": entry.path,
                "after_header": entry.path,
                "before": shown(entry.before),
                "after": shown(entry.after),
            }
            for entry in entries
        ],
    )


if __name__ == "__main__":
    main()
