"""What the tests of removal share with those of the whole chain, and a picture of a host to compare."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chain"))

# Everything that is a file on the host, by what it is and not by when it was written: kind, mode, owner, contents.
PICTURE = r"""
import hashlib, json, os, re, subprocess

# Other people's: mounts of the kernel, caches, what time passes over, Ansible's own.
LEFT_OUT = re.compile(
    r"/(proc|sys|dev|run|tmp|var/tmp|var/cache/(apt|debconf|ldconfig)|var/lib/(apt|systemd|php/sessions|private|prometheus)"
    r"|var/log/(journal|wtmp|btmp|lastlog|private)|(root|home/deploy)/\.(ansible|ssh|cache))(/|$)"
    # The backups that useradd(8) makes, its lock, what Apache itself logs, and Python's bytecode of Debian's packages.
    r"|/etc/(passwd|shadow|group|gshadow|subuid|subgid)-$|/etc/\.pwd\.lock$|/var/log/apache2/(access|error|other_vhosts_access)\.log$"
    r"|/__pycache__(/|$)"
)
seen = {}
for folder, subfolders, names in os.walk("/"):
    subfolders[:] = [name for name in subfolders if not LEFT_OUT.match(os.path.join(folder, name))]
    for name in names + subfolders:
        path = os.path.join(folder, name)
        if LEFT_OUT.search(path):
            continue
        status = os.lstat(path)
        entry = [oct(status.st_mode), status.st_uid, status.st_gid]
        if os.path.islink(path):
            entry.append(os.readlink(path))
        elif os.path.isfile(path):
            with open(path, "rb") as file:
                entry.append(hashlib.sha256(file.read()).hexdigest())
        seen[path] = entry
for path in os.listdir("/run"):
    seen["/run/" + path] = "there"

def lines(command):
    return sorted(" ".join(line.split()) for line in subprocess.run(
        command, shell=True, text=True, capture_output=True).stdout.splitlines())

# These come and go by themselves.
PASSING = r"(user|session|apt-|systemd-|e2scrub|dpkg-|fstrim|phpsession|logrotate)"
units = lines("systemctl list-units --all --plain --no-legend --type=service,socket,timer,path,target")
seen |= {"unit " + unit.split()[0]: "there" for unit in units if not re.match(PASSING, unit)}
# Sessions of SSH have a transient one each.
files = lines("systemctl list-unit-files --no-legend")
seen |= {"unit file " + line: "there" for line in files if " transient" not in line}
seen |= {"user or group " + line: "there" for line in lines("getent passwd; getent group")}
seen |= {"module of Apache " + line: "there" for line in lines("apache2ctl -M 2>/dev/null")}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def picture(host: Host) -> Callable[[], dict[str, object]]:
    """A function that looks at the host now."""

    def look() -> dict[str, object]:
        seen: dict[str, object] = json.loads(host.check_output(f"python3 -c {shlex.quote(PICTURE)}"))
        return seen

    return look


@pytest.fixture(scope="module")
def name(host: Host) -> str:
    """The host's name in the scenario's inventory."""
    return str(host.check_output("hostname"))
