#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module host_release: what a host runs, what it ran before, and the way back.

Theory of operation. A *release* on a host is every file and link that the roles
write for the chain: the daemon's release directory and the link to it, its
units and configuration, the module's binary, Apache's files, the application.
A *snapshot* names all of them with kind, mode, owner and SHA-256; its digest is
taken over that list. The bytes lie beside it once each, named by their SHA-256,
for root alone, so many snapshots of almost the same files cost little.

    DIR/objects/<sha256>          bytes, 0600
    DIR/snapshots/<digest>.json   the list, with a name, a time and a person
    DIR/record.json               what this host runs since when, by whom, and what it ran before
    DIR/turn.json                 a rollout has begun here and has not come to its end

A turn begins with a snapshot of what serves. ``turn.json`` outlives a killed
controller: whoever begins again finds in it what really ran before, and never
takes a half-made change for it. Only a turn keeps credentials, and they go with
it: a release that is kept for months must not keep keys for months.

Going back is checked first, whole: every byte that is needed is there and has
its digest, every credential that the old unit asks for is on the host. Then all
is written beside its place, which needs room and may fail, and only then put in
place by renames, which need none; nor does taking those back.
Services are the caller's: the result says what has to be reloaded or restarted.

A rollback is a turn too, and says so: one that was cut off has the release in its
notes that somebody wanted to leave, and whoever goes on with it must not take
that for what to go back to. Nor does a host that has gone back go on to what its
record has as previous, which is where it came from.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_release
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Remember what a host of the fleet runs, and go back to it
description:
  - Takes snapshots of everything that the roles C(streaming_daemon), C(apache_handoff) and C(handoff_app) write on a
    host,
    compares the host with them, and puts one back.
  - Reloads and restarts nothing. RV(daemon), RV(apache) and their like say what has to follow.
options:
  state:
    description:
      - With V(read), says what the host runs, and what differs from its record.
      - With V(begun), a turn begins, and what serves now is kept. Where an earlier turn did not come to its
        end, what was kept then is what counts.
      - With V(recorded), what is on the host now is O(release), and the turn is over.
      - With V(restored), every file is put back as it was in the snapshot O(to).
      - With V(returned), the turn is over without success, and the record is what it was before.
    type: str
    choices: [read, begun, recorded, restored, returned]
    default: read
  release:
    description:
      - The name that the rollout gave to what it brings. Required for V(begun) and V(recorded).
      - With O(kind=rollback) and O(state=begun), where it goes back to, as for O(to).
    type: str
  kind:
    description:
      - What the turn is for. With V(rollback), O(state=begun) leaves a host alone that has nothing to go back from, and
        says so in RV(stays).
    type: str
    choices: [rollout, rollback]
    default: rollout
  only:
    description:
      - For O(kind=rollback), the name, or the beginning of the digest, of the release to go back from. Hosts that run
        another one stay as they are.
    type: str
    default: ''
  inputs:
    description: The digest of what the release was made from, which tells a finished host from one that has to be
      done again.
    type: str
    default: ''
  to:
    description:
      - V(turn) is what served before the turn, V(previous) what the record says that ran before. Anything else is
        the name
        or the digest, or the beginning of the digest, of a snapshot.
    type: str
    default: turn
  by:
    description: Who does it, for the record.
    type: str
    default: ''
  rollout:
    description: The rollout that does it, for the record.
    type: str
    default: ''
  soaked:
    description: Whether the release has served for as long as it had to, for V(recorded).
    type: bool
    default: true
  keep:
    description: Snapshots to keep, beside those that are in use or that the record names as previous.
    type: int
    default: 3
  dir:
    description: Where all of it is kept.
    type: path
    default: /var/lib/socket-handoff/rollout
  root:
    description: A directory to take for the root of the host.
    type: path
    default: /
attributes:
  check_mode:
    description: Says what would change, and changes nothing.
    support: full
  diff_mode:
    description: The files hold keys and hashes of passwords.
    support: none
"""

EXAMPLES = r"""
- name: See what the host runs
  socket_handoff.fleet.host_release:
  register: census

- name: Go back to what ran before
  socket_handoff.fleet.host_release:
    state: restored
    to: previous
  register: back
"""

RETURN = r"""
record:
  description: Release, digest, time and person of the last rollout or rollback; empty where there was none.
  type: dict
  returned: always
runs:
  description: The name of the release that counts as the host's; of a turn that was cut off, what it was bringing.
  type: str
  returned: always
gone_back:
  description: Whether a rollback was the last to change the host.
  type: bool
  returned: always
digest:
  description: The digest of what is on the host now.
  type: str
  returned: always
drift:
  description: Paths that differ from the record.
  type: list
  elements: str
  returned: always
turn:
  description: The turn that has not come to its end; empty where there is none.
  type: dict
  returned: always
snapshots:
  description: What can be gone back to, the newest first, with name, digest, time and person.
  type: list
  elements: dict
  returned: always
parts:
  description: Digests of the daemon's release, the module's binary and the configuration, as they are now.
  type: dict
  returned: always
interrupted:
  description: Whether an earlier turn had not come to its end.
  type: bool
  returned: with O(state=begun)
stays:
  description: Why a rollback leaves the host as it is, and has not begun; empty where it goes back.
  type: str
  returned: with O(state=begun)
back_to:
  description: What O(to) has to be for a rollback that has begun.
  type: str
  returned: with O(state=begun) and O(kind=rollback)
paths:
  description: Paths that were put back, by this or an earlier attempt of the turn.
  type: list
  elements: str
  returned: with O(state=restored)
daemon:
  description: What the daemon needs, V(none), V(reload), V(restart) or V(socket), the last for its socket too.
  type: str
  returned: with O(state=restored)
apache:
  description: What Apache needs, V(none), V(reload) or V(restart).
  type: str
  returned: with O(state=restored)
profile:
  description: Whether the AppArmor profile has to be loaded.
  type: bool
  returned: with O(state=restored)
to:
  description: Name and digest of the snapshot that was put back.
  type: dict
  returned: with O(state=restored)
"""

import errno
import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import time

from ansible.module_utils.basic import AnsibleModule

# What the roles write at places that never change. Whatever of it is not there is remembered as absent.
CURRENT = "/opt/streaming-daemon/current"
FIXED = (
    "/etc/systemd/system/streaming-daemon.socket",
    "/etc/systemd/system/streaming-daemon.service",
    "/etc/streaming-daemon/config.toml",
    "/etc/apparmor.d/streaming-daemon",
    "/etc/handoff-app/config.php",
    "/etc/apache2/mods-available/socket_handoff.load",
    "/etc/apache2/mods-available/socket_handoff.conf",
    "/etc/apache2/mods-enabled/socket_handoff.load",
    "/etc/apache2/mods-enabled/socket_handoff.conf",
    "/etc/apache2/sites-available/handoff-app.conf",
    "/etc/apache2/sites-enabled/handoff-app.conf",
    "/usr/lib/apache2/modules/mod_socket_handoff.so",
    CURRENT,
)
# The application's files, by the list that the role keeps of them. The list is a file of the release too.
APPLICATION = "/var/www/handoff-app"
APPLICATION_LIST = "/var/lib/socket-handoff/handoff-app.json"
# What apache_config keeps: for each change set what its last change replaced, and, below "original", what was there
# before the first: whatever else of Apache's a role has ever changed here, such as links of modules.
APACHE_NOTES = "/var/lib/socket-handoff/apache"
ENABLED = tuple(f"/etc/apache2/{kind}-enabled" for kind in ("conf", "mods", "sites"))
CHANGE_SETS = ("apache_handoff", "handoff_app")
CREDENTIALS = "/etc/streaming-daemon/credentials"
MODULE = "/usr/lib/apache2/modules/mod_socket_handoff.so"
PACKAGE = "libapache2-mod-socket-handoff"
UNITS = "/etc/systemd/system/streaming-daemon."
# That a role has written what is not in use yet. Behind a turn all is, but for what waited before it.
NOTES = tuple(
    f"/var/lib/socket-handoff/{role}.unfinished" for role in ("streaming-daemon", "apache-handoff", "handoff-app")
)
# What a release cannot be called, because it means something here.
MEANS = ("turn", "previous")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}\Z")
# A release that nobody has named: what a plain deployment, or a hand, has left.
UNNAMED = "unnamed"


class Refused(Exception):
    """It cannot be done, and nothing was changed; the text says what is missing and what helps."""


class Tree:
    """The host's files below a root."""

    def __init__(self, root):
        self.root = root.rstrip("/")

    def real(self, path):
        """Return where a path of the host lies for this process."""
        return self.root + path

    def read(self, path):
        """Return the bytes of a file."""
        with open(self.real(path), "rb") as handle:
            return handle.read()

    def entry(self, path):
        """Return what is at a path: kind, and what makes it what it is."""
        real = self.real(path)
        try:
            found = os.lstat(real)
        except FileNotFoundError:
            return {"path": path, "kind": "absent"}
        if os.path.islink(real):
            return {"path": path, "kind": "link", "target": os.readlink(real)}
        if not os.path.isfile(real):
            raise Refused(f"{path} is neither a file nor a link, so it is not what a role wrote; allowed is a file")
        return {
            "path": path,
            "kind": "file",
            "sha256": hashlib.sha256(self.read(path)).hexdigest(),
            "mode": f"{found.st_mode & 0o7777:04o}",
            "owner": name_of(pwd.getpwuid, found.st_uid, "pw_name"),
            "group": name_of(grp.getgrgid, found.st_gid, "gr_name"),
        }

    def files_below(self, folder):
        """Return the paths of the files below a directory, compiled leftovers left out."""
        found = []
        for base, folders, names in os.walk(self.real(folder)):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            found += [os.path.join(base, name)[len(self.root) :] for name in sorted(names)]
        return found


def name_of(lookup, number, attribute):
    """Return the name of a user or group, or its number where it has none."""
    try:
        return getattr(lookup(number), attribute)
    except KeyError:
        return str(number)


def number_of(lookup, name, attribute):
    """Return the number of a user or group."""
    try:
        return getattr(lookup(name), attribute)
    except KeyError:
        return int(name) if name.isdigit() else 0


def fill(real, content, mode, owner):
    """Write a file to the disk; no link is followed. Raises OSError with its name."""
    descriptor = os.open(real, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        try:
            handle.write(content)
            handle.flush()
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fsync(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, real) from error


def write(real, content):
    """Write a file of ours whole or not at all."""
    staging = f"{real}.part"
    try:
        fill(staging, content, 0o600, None)
        os.replace(staging, real)
    except OSError:
        forget(staging)
        raise


def read_json(path, default):
    """Return what a JSON file of ours holds."""
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise Refused(f"{path} is not what this module writes ({error}); move it away, and run again") from error


def digest_of(entries):
    """Return the digest of a list of entries, secrets left out."""
    plain = [entry for entry in entries if not entry.get("secret")]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def now():
    """Return the time as it is written down, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Store:
    """Snapshots, record and turn of one host."""

    def __init__(self, params, check):
        self.tree = Tree(params["root"])
        self.dir = self.tree.real(params["dir"])
        self.params = params
        self.check = check

    def at(self, *parts):
        """Return a path of the store."""
        return os.path.join(self.dir, *parts)

    def originals(self):
        """Return path -> (entry before us, its bytes), for everything of Apache's that a role has ever changed here."""
        found = {}
        for name in CHANGE_SETS:
            folder = self.tree.real(os.path.join(APACHE_NOTES, "original", name))
            for suffix in ("", ".old"):
                for record in read_json(os.path.join(folder + suffix, "index.json"), []):
                    found.setdefault(record["path"], self.original(record, folder + suffix))
        return found

    @staticmethod
    def original(record, folder):
        """Return the entry, and its bytes, that a record of apache_config stands for."""
        path, kind = record["path"], record["kind"] or "absent"
        if kind == "link":
            return {"path": path, "kind": kind, "target": record["target"]}, b""
        if kind == "absent":
            return {"path": path, "kind": kind}, b""
        with open(os.path.join(folder, record["blob"]), "rb") as handle:
            content = handle.read()
        digest = hashlib.sha256(content).hexdigest()
        # apache_config writes as root.
        about = {"sha256": digest, "mode": f"{record['mode']:04o}", "owner": "root", "group": "root"}
        return {"path": path, "kind": kind, **about}, content

    def unnoted(self):
        """Return what of Apache's a version that kept no originals may have changed, as far as it is there."""
        found = set()
        for name in CHANGE_SETS:
            last = self.tree.real(os.path.join(APACHE_NOTES, name, "index.json"))
            noted = self.tree.real(os.path.join(APACHE_NOTES, "original", name))
            if not os.path.isdir(noted) and os.path.exists(last):
                # Only its last change is on record, so what is enabled now is all remembered.
                found.update(record["path"] for record in read_json(last, []))
                for folder in ENABLED:
                    found.update(self.tree.files_below(folder))
        return found

    def application(self):
        """Return the paths of the application's files."""
        listed = read_json(self.tree.real(APPLICATION_LIST), {})
        return [f"{APPLICATION}/{name}" for name in listed]

    def paths(self):
        """Return every path that belongs to what the host runs now."""
        found = {*FIXED, APPLICATION_LIST, *self.originals(), *self.unnoted(), *self.application()}
        current = self.tree.entry(CURRENT)
        if current["kind"] == "link":
            found.update(self.tree.files_below(current["target"]))
        return sorted(found)

    def entries(self):
        """Return what is there now."""
        return [self.tree.entry(path) for path in self.paths()]

    def secrets(self):
        """Return the credentials that are there now."""
        return [{**self.tree.entry(path), "secret": True} for path in self.tree.files_below(CREDENTIALS)]

    def record(self):
        """Return the record, empty where there is none."""
        return read_json(self.at("record.json"), {})

    def turn(self):
        """Return the turn that has not come to its end, empty where there is none."""
        return read_json(self.at("turn.json"), {})

    def snapshots(self):
        """Return the snapshots, the newest first."""
        found = []
        for name in os.listdir(self.at("snapshots")) if os.path.isdir(self.at("snapshots")) else []:
            if name.endswith(".json"):
                found.append(read_json(self.at("snapshots", name), {}))
        return sorted(found, key=lambda each: each["saved"], reverse=True)

    def keep(self, entries):
        """Keep the bytes of entries."""
        os.makedirs(self.at("objects"), mode=0o700, exist_ok=True)
        os.makedirs(self.at("snapshots"), mode=0o700, exist_ok=True)
        os.chmod(self.dir, 0o700)
        for entry in entries:
            if entry["kind"] != "file":
                continue
            place = self.at("objects", entry["sha256"])
            if not os.path.exists(place):
                content = self.tree.read(entry["path"])
                if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                    raise Refused(f"{entry['path']} changes while it is read: is somebody else at work on this host?")
                write(place, content)

    def save(self, entries, name, by, when=None):
        """Keep a snapshot; one that is there already gets the newer name. Return its digest."""
        digest = digest_of(entries)
        self.keep(entries)
        snapshot = {"name": name, "digest": digest, "time": when or now(), "by": by, "entries": entries}
        snapshot["saved"] = time.time()
        write(self.at("snapshots", f"{digest[:16]}.json"), json.dumps(snapshot, indent=1).encode())
        return digest

    def find(self, wanted):
        """Return the snapshot that is meant. Raises Refused."""
        known = self.snapshots()
        if wanted == "turn":
            turn = self.turn()
            if not turn:
                raise Refused("no turn has begun on this host, so there is nothing to undo")
            wanted = turn["before"]
        elif wanted == "previous":
            previous = self.record().get("previous") or {}
            if not previous:
                raise Refused(
                    "this host has no record of a previous release: it has had one rollout at most. Allowed is one "
                    "that is "
                    f"kept: {self.kept(known)}"
                )
            wanted = previous["digest"]
        found = [each for each in known if each["name"] == wanted]
        if not found and re.match(r"^[0-9a-f]{8,64}\Z", wanted):
            found = [each for each in known if each["digest"].startswith(wanted)]
        if not found:
            raise Refused(f"release {wanted} is not kept on this host; allowed is one that is: {self.kept(known)}")
        return found[0]

    @staticmethod
    def kept(known):
        """Return the snapshots in words."""
        return ", ".join(f"{each['name']} ({each['digest'][:12]})" for each in known) or "none"

    def collect(self):
        """Forget snapshots and bytes that nobody needs."""
        record, turn = self.record(), self.turn()
        needed = {record.get("digest"), (record.get("previous") or {}).get("digest"), turn.get("before")}
        known = self.snapshots()
        kept = known[: self.params["keep"]] + [each for each in known if each["digest"] in needed]
        digests = {each["digest"] for each in kept}
        for each in known:
            if each["digest"] not in digests:
                os.unlink(self.at("snapshots", f"{each['digest'][:16]}.json"))
        used = {entry.get("sha256") for each in kept for entry in each["entries"] + turn.get("secrets", [])}
        for name in os.listdir(self.at("objects")):
            if name not in used:
                os.unlink(self.at("objects", name))

    def parts(self, entries):
        """Return digests of what a release is made of."""
        by_path = {entry["path"]: entry for entry in entries}
        current = by_path.get(CURRENT, {}).get("target", "")
        configuration = [
            entry
            for entry in entries
            if entry["path"].startswith("/etc/") and not entry["path"].startswith("/etc/handoff-app/")
        ]
        return {
            "daemon": os.path.basename(current),
            "module": by_path.get(MODULE, {}).get("sha256", "")[:12],
            "configuration": digest_of(configuration)[:12],
        }


def drift_of(store, record, entries):
    """Return the paths that differ from what the record names."""
    if "digest" not in record or digest_of(entries) == record["digest"]:
        return []
    recorded = [each for each in store.snapshots() if each["digest"] == record["digest"]]
    if not recorded:
        return ["(what was recorded is not kept any more)"]
    then = {entry["path"]: entry for entry in recorded[0]["entries"]}
    today = {entry["path"]: entry for entry in entries}
    absent = {"kind": "absent"}
    return sorted(
        path
        for path in then.keys() | today.keys()
        if {**then.get(path, absent), "path": path} != {**today.get(path, absent), "path": path}
    )


def what_runs(record, turn):
    """Return name and digest: of what a rollout that was cut off has half brought, or else of what is on record."""
    # Whatever rollback was cut off behind it.
    brought = turn.get("brings", turn["release"]) if turn else ""
    return (brought, "") if brought else (record.get("release", UNNAMED), record.get("digest", ""))


def has_gone_back(record, turn):
    """Return whether a rollback was the last to change the host, so that previous is where it came from."""
    return not turn and record.get("kind") == "rollback"


def stays(params, record, turn):
    """Return why a rollback leaves a host as it is; empty where it goes back."""
    runs, digest = what_runs(record, turn)
    wanted = params["only"]
    if wanted and runs != wanted and not (len(wanted) >= 8 and digest.startswith(wanted)):
        return f"it runs {runs}, and only hosts that run {wanted} go back"
    if params["release"] == "previous" and has_gone_back(record, turn):
        gone = f"it has gone back to {runs} already, at {record['time']} by {record['by'] or 'nobody knows whom'}"
        return f"{gone}; anything else goes by its name only"
    return ""


def begin(store, params):
    """Begin a turn; return (changed, more of the result)."""
    turn, record = store.turn(), store.record()
    more = {"interrupted": bool(turn), "stays": ""}
    if params["kind"] == "rollback":
        more["stays"] = stays(params, record, turn)
        if more["stays"]:
            return False, more
        # Where a rollout was cut off, nobody means by previous what is half there, nor what the record has as previous.
        halfway = bool(turn) and turn.get("kind", "rollout") == "rollout" and params["release"] == "previous"
        more["back_to"] = "turn" if halfway else params["release"]
        # What is not there is better known before the host is drained for it.
        store.find(more["back_to"])
    if turn:
        # What served before it stays what it was; who goes on with it, and with what, may be new. What it was for stays
        # too: a rollout behind a rollback that was cut off does not make good what that one wanted to leave.
        brings = params["release"] if params["kind"] == "rollout" else turn.get("brings", turn["release"])
        turn.update({key: params[key] for key in ("release", "inputs", "rollout", "by")}, brings=brings)
        if not store.check:
            write(store.at("turn.json"), json.dumps(turn, indent=1).encode())
        return True, more
    entries = store.entries()
    served = any(entry["path"] == CURRENT and entry["kind"] == "link" for entry in entries)
    if store.check:
        return True, more
    digest = digest_of(entries)
    same = record.get("digest") == digest
    name = record["release"] if same else f"{UNNAMED}-{digest[:8]}"
    secrets = store.secrets()
    store.save(entries, name, record.get("by", "") if same else "", record.get("time") if same else None)
    store.keep(secrets)
    turn = {
        **{"release": params["release"], "inputs": params["inputs"], "rollout": params["rollout"], "by": params["by"]},
        **{"time": now(), "before": digest, "name": name, "served": served, "secrets": secrets},
        **{"kind": params["kind"], "brings": params["release"] if params["kind"] == "rollout" else ""},
        **{"unfinished": [path for path in NOTES if os.path.exists(store.tree.real(path))]},
        "record": record,
    }
    write(store.at("turn.json"), json.dumps(turn, indent=1).encode())
    return True, more


def finish(store, turn):
    """Forget a turn, and the notes of what its roles had written: by now all of it is in use, or gone."""
    for path in NOTES:
        if path not in turn.get("unfinished", []) and os.path.exists(store.tree.real(path)):
            os.unlink(store.tree.real(path))
    os.unlink(store.at("turn.json"))


def give_up(store, params):
    """End a turn without success; return whether there was one."""
    turn = store.turn()
    if turn and not store.check:
        record = turn["record"]
        record["failed"] = {"release": turn["release"], "time": now(), "by": params["by"], "rollout": params["rollout"]}
        write(store.at("record.json"), json.dumps(record, indent=1).encode())
        finish(store, turn)
        store.collect()
    return bool(turn)


def conclude(store, params):
    """Record what is on the host as a release; return whether that changed anything."""
    entries, record, turn = store.entries(), store.record(), store.turn()
    digest = digest_of(entries)
    previous = record.get("previous")
    if turn and turn["before"] != digest and turn["served"]:
        previous = {"release": turn["name"], "digest": turn["before"]}
    elif not turn and record.get("digest") not in (None, digest):
        previous = {"release": record["release"], "digest": record["digest"]}
    wanted = {
        **{"release": params["release"], "inputs": params["inputs"], "digest": digest, "previous": previous},
        **{"soaked": params["soaked"], "parts": store.parts(entries)},
    }
    if not turn and all(record.get(key) == value for key, value in wanted.items()):
        return False
    if store.check:
        return True
    store.save(entries, params["release"], params["by"])
    wanted.update(time=now(), by=params["by"], rollout=params["rollout"], kind=params["kind"])
    write(store.at("record.json"), json.dumps(wanted, indent=1).encode())
    if params["soaked"] and turn:
        finish(store, turn)
    store.collect()
    return True


def credentials_asked_for(snapshot, content):
    """Return the paths of the credentials that a snapshot's unit asks for."""
    unit = next((each for each in snapshot["entries"] if each["path"] == f"{UNITS}service"), {"kind": "absent"})
    if unit["kind"] != "file":
        return []
    return re.findall(r"(?m)^LoadCredential(?:Encrypted)?=[^:\n]+:(\S+)", content(unit).decode(errors="replace"))


def plan(store, snapshot, secrets):
    """Return (entry, bytes) for whatever differs from a snapshot. Raises Refused before anything is changed."""

    def content(entry):
        if entry["sha256"] in given:
            return given[entry["sha256"]]
        try:
            with open(store.at("objects", entry["sha256"]), "rb") as handle:
                found = handle.read()
        except FileNotFoundError:
            found = b""
        if hashlib.sha256(found).hexdigest() != entry["sha256"]:
            raise Refused(
                f"release {snapshot['name']} cannot be put back: what is kept of {entry['path']} is damaged or gone. "
                "Nothing was changed. Allowed is another release, or a rollout of this one"
            )
        return found

    wanted = {entry["path"]: entry for entry in [*snapshot["entries"], *secrets]}
    # What was no part of that release becomes what it was before a later one changed it first.
    before = {path: original for path, original in store.originals().items() if path not in wanted}
    given = {entry["sha256"]: found for entry, found in before.values() if entry["kind"] == "file"}
    wanted.update({path: entry for path, (entry, _) in before.items()})
    for path in set(store.application()) - set(wanted):
        wanted[path] = {"path": path, "kind": "absent"}
    for path in credentials_asked_for(snapshot, content):
        if path not in wanted and not os.path.exists(store.tree.real(path)):
            raise Refused(
                f"release {snapshot['name']} asks for the credential {path}, which is not on this host any more, and "
                "old "
                "credentials are not kept. Nothing was changed. Declare it in streaming_daemon_credentials and roll "
                "that out"
            )
    steps = []
    for path, entry in sorted(wanted.items()):
        plain = {key: value for key, value in entry.items() if key != "secret"}
        if store.tree.entry(path) != plain:
            steps.append((plain, content(entry) if entry["kind"] == "file" else b""))
    packaged = f"/var/lib/dpkg/info/{PACKAGE}.list"
    if any(entry["path"] == MODULE for entry, _ in steps) and os.path.exists(store.tree.real(packaged)):
        raise Refused(
            f"release {snapshot['name']} has another {MODULE}, which belongs to the package {PACKAGE} here; going "
            "back to "
            f"another version of a package is for apt. Nothing was changed. Example: apt install {PACKAGE}=VERSION"
        )
    # The directory first, then the link to it, then what makes use of it.
    return sorted(steps, key=lambda step: (step[0]["path"] != CURRENT, step[0]["path"].startswith("/etc/")))


def forget(*places):
    """Remove files and links that may be there."""
    for place in places:
        if os.path.lexists(place):
            os.unlink(place)


def stage(store, entry, content):
    """Bring what an entry says beside its place, and the way back: all that needs room, and may fail."""
    real = store.tree.real(entry["path"])
    # An attempt that was cut off may have left its own.
    forget(f"{real}.part", f"{real}.was")
    if os.path.lexists(real):
        os.link(real, f"{real}.was", follow_symlinks=False)
    if entry["kind"] == "absent":
        return
    os.makedirs(os.path.dirname(real), exist_ok=True)
    if entry["kind"] == "link":
        os.symlink(entry["target"], f"{real}.part")
        return
    owner = None
    if os.geteuid() == 0:
        owner = (number_of(pwd.getpwnam, entry["owner"], "pw_uid"), number_of(grp.getgrnam, entry["group"], "gr_gid"))
    fill(f"{real}.part", content, int(entry["mode"], 8), owner)


def exchange(store, steps):
    """Make every path what its entry says. Raises OSError with all of them as they were, or Refused for a mixture."""
    done = []
    try:
        for entry, content in steps:
            stage(store, entry, content)
        for entry, _ in steps:
            real = store.tree.real(entry["path"])
            done.append(entry["path"])
            if entry["kind"] == "absent":
                forget(real)
            else:
                os.replace(f"{real}.part", real)
    except OSError as error:
        left = []
        for path in reversed(done):
            real = store.tree.real(path)
            try:
                if os.path.lexists(f"{real}.was"):
                    os.replace(f"{real}.was", real)
                else:
                    forget(real)
            except OSError as again:
                left.append(f"{path}: {again.strerror}")
        if left:
            raise Refused(
                f"{error.strerror}, and then, putting that back: {'; '.join(left)}. THIS HOST HAS A MIXTURE OF TWO "
                "RELEASES: keep it out of service, mend its disk, and run the rollback again"
            ) from error
        raise
    finally:
        for entry, _ in steps:
            real = store.tree.real(entry["path"])
            forget(f"{real}.part", f"{real}.was")


def needs(paths):
    """Return what services need after these paths have changed."""
    daemon, apache = "none", "none"
    if any(path.startswith(("/etc/streaming-daemon/config", "/opt/streaming-daemon/")) for path in paths):
        daemon = "reload"
    if any(path == f"{UNITS}service" or path.startswith(CREDENTIALS) for path in paths):
        daemon = "restart"
    if f"{UNITS}socket" in paths:
        daemon = "socket"
    if any(path.startswith("/etc/apache2/") for path in paths):
        apache = "reload"
    # What Apache cannot take over on the run; see the role apache_handoff.
    if any(path == MODULE or re.search(r"/mods-enabled/.*[.]load\Z", path) for path in paths):
        apache = "restart"
    return {"daemon": daemon, "apache": apache, "profile": "/etc/apparmor.d/streaming-daemon" in paths}


def restore(store, params):
    """Put a snapshot back; return (changed, more of the result)."""
    snapshot = store.find(params["to"])
    turn = store.turn()
    if params["to"] == "turn" and not turn["served"]:
        raise Refused("nothing of the chain served here before this rollout, so there is nothing to go back to")
    secrets = turn["secrets"] if params["to"] == "turn" else []
    steps = plan(store, snapshot, secrets)
    # Services may not have been told of what an earlier attempt of this turn put back before it was cut off.
    paths = sorted({*(entry["path"] for entry, _ in steps), *turn.get("pending", [])})
    if not store.check:
        try:
            if turn and paths != turn.get("pending", []):
                write(store.at("turn.json"), json.dumps({**turn, "pending": paths}, indent=1).encode())
            exchange(store, steps)
        except OSError as error:
            full = " The disk is full." if error.errno == errno.ENOSPC else ""
            raise Refused(
                f"release {snapshot['name']} cannot be put back: {error.filename or 'a file'}: {error.strerror}.{full} "
                "Every file is as it was before this attempt. Make room, and run the rollback again"
            ) from error
        # Whatever was compiled belongs to other sources.
        for folder in {os.path.dirname(entry["path"]) for entry, _ in steps if "/releases/" in entry["path"]}:
            shutil.rmtree(store.tree.real(os.path.join(folder, "__pycache__")), ignore_errors=True)
    meant = {"name": snapshot["name"], "digest": snapshot["digest"]}
    return bool(steps), {"paths": paths, "to": meant, **needs(paths)}


def run(module):
    """Do it; return the result."""
    params = module.params
    for name in ("release", "to"):
        if params[name] is not None and not NAME.match(params[name]):
            raise Refused(
                f"{name} is {params[name]!r}; allowed are 1 to 64 letters, digits and . _ + ~ -. Example: 2026-11-29.1"
            )
    if params["release"] in MEANS and (params["kind"] == "rollout" or params["release"] == "turn"):
        raise Refused(
            f"release is {params['release']}, which means something else here; allowed is a name of its own. Nothing "
            "was changed. Example: 2026-11-29.1"
        )
    store = Store(params, module.check_mode)
    changed, more = False, {}
    if params["state"] == "begun":
        changed, more = begin(store, params)
    elif params["state"] == "recorded":
        changed = conclude(store, params)
    elif params["state"] == "restored":
        changed, more = restore(store, params)
    elif params["state"] == "returned":
        changed = give_up(store, params)
    entries, record = store.entries(), store.record()
    turn = {key: value for key, value in store.turn().items() if key not in ("secrets", "record")}
    brief = [{key: each[key] for key in ("name", "digest", "time", "by")} for each in store.snapshots()]
    return {
        **{"changed": changed, "record": record, "digest": digest_of(entries), "turn": turn, "snapshots": brief},
        **{"runs": what_runs(record, turn)[0], "gone_back": has_gone_back(record, turn)},
        **{"drift": drift_of(store, record, entries), "parts": store.parts(entries), **more},
    }


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["read", "begun", "recorded", "restored", "returned"],
                "default": "read",
            },
            "release": {"type": "str"},
            "inputs": {"type": "str", "default": ""},
            "kind": {"type": "str", "choices": ["rollout", "rollback"], "default": "rollout"},
            "only": {"type": "str", "default": ""},
            "to": {"type": "str", "default": "turn"},
            "by": {"type": "str", "default": ""},
            "rollout": {"type": "str", "default": ""},
            "soaked": {"type": "bool", "default": True},
            "keep": {"type": "int", "default": 3},
            "dir": {"type": "path", "default": "/var/lib/socket-handoff/rollout"},
            "root": {"type": "path", "default": "/"},
        },
        required_if=[("state", "begun", ("release",)), ("state", "recorded", ("release",))],
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except Refused as error:
        module.fail_json(msg=f"host_release: {error}")
    except OSError as error:
        full = " The disk is full: make room, and run again." if error.errno == errno.ENOSPC else ""
        module.fail_json(msg=f"host_release: {error.filename or params_dir(module)}: {error.strerror}.{full}")
    module.exit_json(**result)


def params_dir(module):
    """Return where everything is kept, for a message without a file name."""
    return module.params["dir"]


if __name__ == "__main__":
    main()
