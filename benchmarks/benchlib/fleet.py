# SPDX-License-Identifier: Apache-2.0
"""The fleet: a no-change run of site.yml and rollouts of playbooks/rollout.yml, over the number of hosts.

Hosts are systemd containers of script/host, Debian 12 and 13 in turn, reached over SSH like any other. One of each
release is converged and kept as an image; all others are started from these, with keys and a machine-id of their own.

On real machines hosts work by themselves. Here they share the controller's cores, so everything is counted by whose it
is: the controller is a cgroup of its own (ansible-playbook, its forks, its ssh), each host is its container's. Of the
controller's part the main process is told apart: it hands out every task and takes every result, in one thread, so
more cores do not help it.

Each run has fresh SSH connections. A rollout brings a daemon whose sources differ, so that it is installed and
reloaded everywhere; the module and the application stay as they are, nothing is compiled. Whatever only waits
(rollout_soak, rollout_watch, rollout_drain_wait) is 0 here and reckoned with in the report.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib.beyond import available, number
from benchlib.point import pss
from benchlib.tools import CACHE, ROOT, BenchmarkError, checked, kill_all

INSTANCES_PER_HOST = 14
"""inotify instances of a host: systemd has 5, the manager of the user that is logged in 3, journald, logind, dbus."""

MEMORY_PER_HOST = 400e6
"""Bytes that are set aside for a host before it is known what it needs."""

IMAGES = "localhost/socket-handoff-bench"
"""Hosts that were converged once; the tag says of which Debian release, and by which sources."""

DEFAULT_FORKS = 5
"""Ansible's own, of a command without --forks."""

RAMP, AT_ONCE = "1, 10%, 50%, 100%", "25%"
"""The defaults of playbooks/rollout.yml."""

PATIENCE = 3600
"""Seconds for a playbook to end."""

VARIABLES = {
    "ansible_become": True,
    "handoff_app_password": "benchmark-password",
    # The same on all, as hosts behind one name have it.
    "handoff_app_server_name": "chat.example.com",
}

SOURCES = ("roles", "plugins", "playbooks", "daemon-src", "module-src", "templates", "site.yml", "script/host",
           "script/image")  # fmt: skip
"""Of everything that decides what a converged host is; VARIABLES are the rest."""

NO_WAITS = {
    "rollout_soak": 0,
    "rollout_watch": 0,
    "rollout_drain_wait": 0,
    # Drained without a load balancer: a file on the host itself.
    "rollout_drain": "health_file",
}

Say = Callable[[str], None]
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    sizes: tuple[int, ...]  # hosts, growing; with one host nobody waits for anybody
    options: int  # hosts at which forks, pipelining and facts are varied
    forks: tuple[int, ...]  # beside Ansible's own number
    few: tuple[int, ...]  # hosts at which a rollout is made in as few steps as it allows as well, from 3 on


# Hosts and steps are told apart where hosts go in few steps as well: one or two hosts can go in one way only.
QUICK = Settings((1, 2, 3), 2, (1,), (3,))
FULL = Settings((1, 2, 8, 24), 8, (1, 25), (8,))


def rollout_steps() -> Callable[[str, int, str], list[int]]:
    """The collection's own filter: ramp, hosts and how many at once -> the hosts of each step of a rollout."""
    path = ROOT / "plugins/filter/rollout_steps.py"
    spec = importlib.util.spec_from_file_location("rollout_steps", path)
    if spec is None or spec.loader is None:
        raise BenchmarkError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    steps: Callable[[str, int, str], list[int]] = module.rollout_steps
    return steps


# --- whose work it is ---------------------------------------------------------------------------


def unified() -> Path:
    """Where cgroup v2 is mounted, by itself or beside v1. It counts CPU time without any controller."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise BenchmarkError("no cgroup2 is mounted, by which CPU time could be told apart")


def container_group(identity: str, groups: str) -> str:
    """The cgroup of a whole container, from /proc/PID/cgroup of its first process, which is somewhere inside.

    Raises BenchmarkError where no part of the path names the container.
    """
    path = next((line[3:] for line in groups.splitlines() if line.startswith("0::")), "")
    found = []
    for step in path.strip("/").split("/"):
        found.append(step)
        if identity in step:
            return "/".join(found)
    raise BenchmarkError(f"the container {identity[:12]} has no cgroup of its own in {path!r}")


def cpu_seconds(group: Path) -> float:
    """CPU time of a cgroup and all below it so far."""
    return int((group / "cpu.stat").read_text().split("usage_usec ")[1].split()[0]) / 1e6


def own_cpu_seconds(stat: str) -> float:
    """utime and stime of /proc/PID/stat: of the process itself, without children."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def members(group: Path) -> list[int]:
    return [int(line) for line in (group / "cgroup.procs").read_text().split()]


@contextmanager
def controller_group() -> Iterator[Path]:
    """A cgroup for one run; what stays in it (ssh keeps connections for a minute) ends with it."""
    group = unified() / f"bench-fleet-{os.getpid()}"
    group.mkdir(exist_ok=True)
    try:
        yield group
    finally:
        while left := members(group):
            kill_all(left)
        group.rmdir()


# --- the hosts ----------------------------------------------------------------------------------


def instances_in_use() -> int:
    """inotify instances of root's processes."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile, and then it has none
            if process.stat().st_uid == 0:
                found += sum(
                    os.readlink(descriptor) == "anon_inode:inotify" for descriptor in (process / "fd").iterdir()
                )
    return found


def most_hosts() -> tuple[int, str]:
    """How many hosts can be here beside what runs already, and what is short first, in words."""
    limit = number("/proc/sys/fs/inotify/max_user_instances") or 0
    used = instances_in_use()
    wanted = used + FULL.sizes[-1] * INSTANCES_PER_HOST
    bounds = {
        f"fs.inotify.max_user_instances is {limit}, and {used} are in use; allow at least {wanted}, for example by "
        f"sysctl -w fs.inotify.max_user_instances=1024": max(0, limit - used) // INSTANCES_PER_HOST,
        f"{available() / 1e9:.1f} GB of memory are free, and a host needs {MEMORY_PER_HOST / 1e9:.1f}": int(
            available() // MEMORY_PER_HOST
        ),
    }
    short = min(bounds, key=lambda text: bounds[text])
    return bounds[short], short


def listed(*rooms: str) -> list[str]:
    """Files of the checkout that are tracked, or new and not ignored."""
    names = checked(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *rooms]).split("\0")
    return sorted(name for name in names if name and os.path.lexists(ROOT / name))


@dataclass(slots=True)
class Fleet:
    """The containers, a copy of the checkout to change and to deploy from, and what was run."""

    work: Path
    say: Say
    sources: str = ""  # digest of everything that decides what a converged host is
    hosts: list[str] = field(default_factory=list)
    groups: dict[str, Path] = field(default_factory=dict)
    turn: int = 0

    @property
    def checkout(self) -> Path:
        return self.work / "checkout"

    @staticmethod
    def release(place: int) -> int:
        """Debian's, of the host at this place."""
        return 12 + place % 2

    def image(self, release: int) -> str:
        return f"{IMAGES}:{release}-{self.sources}"

    def copy_checkout(self) -> None:
        """What is deployed stays the same, whoever edits the checkout meanwhile."""
        for name in listed():
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.checkout / name, follow_symlinks=False)
        seen = hashlib.sha256(json.dumps(VARIABLES, sort_keys=True).encode())
        for path in (self.checkout / name for name in listed(*SOURCES)):
            if path.is_file():
                seen.update(f"{path.relative_to(self.checkout)}\0".encode() + path.read_bytes())
        self.sources = seen.hexdigest()[:12]

    def next_release(self) -> None:
        """A daemon whose sources differ in a word from those that any host has, and a name for it."""
        self.turn += 1
        path = self.checkout / "daemon-src/streaming_daemon/__init__.py"
        text = re.sub(r'"""(Release \d+[.] )?', f'"""Release {self.turn}. ', path.read_text(), count=1)
        path.write_text(text)

    def up(self, name: str, release: int, image: str = "") -> None:
        # Before it is there: what is interrupted on the way has to be taken down as well.
        self.hosts.append(name)
        checked(["script/host", "up", name, str(release)], TEST_HOST_IMAGE=image)
        told = checked(["podman", "inspect", "--format", "{{.Id}} {{.State.Pid}}", f"socket-handoff-{name}"]).split()
        group = container_group(told[0], Path(f"/proc/{told[1]}/cgroup").read_text())
        self.groups[name] = unified() / group

    def down(self, name: str) -> None:
        checked(["script/host", "down", name])
        self.hosts.remove(name)
        self.groups.pop(name, None)

    def close(self) -> None:
        for name in list(self.hosts):
            self.down(name)

    def make_images(self) -> None:
        """One converged host of each Debian release, kept; nothing where they are there already."""
        missing = [release for release in (12, 13) if not self._there(self.image(release))]
        if not missing:
            return
        self.forget_images()
        self.say(f"converging a Debian {' and a '.join(map(str, missing))} host, of which the others are copies")
        names = [f"bench-template{release}" for release in missing]
        for name, release in zip(names, missing, strict=True):
            self.up(name, release)
        self.playbook("template", "site.yml", names, changes=True)
        self.roll_out(names, RAMP, AT_ONCE)
        tidy = "rm -rf /etc/ssh/ssh_host_* /var/log/journal/* && : >/etc/machine-id"
        for name, release in zip(names, missing, strict=True):
            checked(["podman", "exec", f"socket-handoff-{name}", "sh", "-c", tidy])
            checked(["podman", "commit", "--quiet", f"socket-handoff-{name}", self.image(release)])
            self.down(name)

    def forget_images(self) -> None:
        """Those of other sources: gigabytes that nobody starts from any more."""
        kept = checked(["podman", "images", "--format", "{{.Repository}}:{{.Tag}}", IMAGES]).split()
        for image in set(kept) - {self.image(release) for release in (12, 13)}:
            checked(["podman", "rmi", image])

    @staticmethod
    def _there(image: str) -> bool:
        return subprocess.run(["podman", "image", "exists", image], check=False).returncode == 0

    def grow(self, size: int) -> list[str]:
        names = [f"bench-{place + 1}" for place in range(size)]
        for place, name in enumerate(names):
            if name not in self.hosts:
                self.up(name, self.release(place), self.image(self.release(place)))
        return names

    def inventory(self, names: list[str]) -> Path:
        path = self.work / "inventory.json"
        variables = {**VARIABLES, "ansible_ssh_common_args": f"-F {ROOT}/.cache/ssh/config"}
        group = {"hosts": {name: {} for name in names}, "vars": variables}
        path.write_text(json.dumps({"all": {"children": {"web_hosts": group}}}))
        return path

    # --- runs

    def playbook(
        self,
        kind: str,
        play: str,
        names: list[str],
        *arguments: str,
        forks: int = DEFAULT_FORKS,
        pipelining: bool = True,
        changes: bool = False,
    ) -> Run:
        """Runs a playbook and says what it took; raises BenchmarkError where it failed, or changed what it must not."""
        argv = [str(ROOT / "script/enter"), "ansible-playbook", "-i", str(self.inventory(names)), play, *arguments]
        # It moves itself, so that nothing of it runs anywhere else, and stays the process that was started.
        moved = ["sh", "-c", 'echo $$ >"$0" && exec "$@"']
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        control = Path(tempfile.mkdtemp(prefix="ssh-", dir=self.work))
        environment |= {
            "ANSIBLE_CONFIG": str(self.checkout / "ansible.cfg"),
            "ANSIBLE_FORKS": str(forks),
            "ANSIBLE_PIPELINING": str(pipelining),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(control),
            "ANSIBLE_TIMEOUT": "60",
        }
        logs = CACHE / "fleet"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{kind}-{len(names)}.log"
        self.say(f"{kind}: {len(names)} hosts, {forks} forks{'' if pipelining else ', without pipelining'}")
        groups = [self.groups[name] for name in names]
        with controller_group() as group, log.open("wb") as out:
            before = sum(map(cpu_seconds, groups))
            began = time.monotonic()
            process = subprocess.Popen(
                [*moved, str(group / "cgroup.procs"), *argv],
                cwd=self.checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                memory = watch(process.pid, group)
                wall = time.monotonic() - began
                # It has ended and is not waited for yet: its own share is still there to read.
                main = own_cpu_seconds(Path(f"/proc/{process.pid}/stat").read_text())
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            controller, hosts = cpu_seconds(group), sum(map(cpu_seconds, groups)) - before
        text = log.read_text(errors="replace")
        found = recap(text)
        if process.returncode != 0 or set(names) - set(found):
            raise BenchmarkError(f"{play} ended with {process.returncode}, see {log}: {text[-1500:]}")
        changed = {name: counts["changed"] for name, counts in found.items() if counts["changed"]}
        if changed and not changes:
            raise BenchmarkError(f"{play} should have changed nothing and changed {changed}, see {log}")
        return {
            "kind": kind,
            "hosts": len(names),
            "steps": steps(text),
            "turns": turns(text),
            "forks": forks,
            "pipelining": pipelining,
            "tasks": max(found[name]["ok"] + found[name]["skipped"] for name in names),
            "wall_s": wall,
            "controller_cpu_s": controller,
            "main_cpu_s": main,
            "controller_pss": memory,
            "hosts_cpu_s": hosts,
        }

    def roll_out(self, names: list[str], ramp: str, at_once: str, again: bool = False) -> Run:
        """To the present release, or once more.

        Raises BenchmarkError also where too few had a turn, or too many, or in other steps than these.
        """
        kind = "again" if again else "rollout"
        given = {**NO_WAITS, "rollout_release": f"{os.getpid()}-{self.turn}", "rollout_ramp": ramp}
        given["rollout_at_once"] = at_once
        # Once more changes nothing that serves, but takes and gives back the lock.
        run = self.playbook(kind, "playbooks/rollout.yml", names, "-e", json.dumps(given), changes=True)
        if run["turns"] != (0 if again else len(names)):
            raise BenchmarkError(f"{kind}: {run['turns']} of {len(names)} hosts had a turn")
        planned = len(rollout_steps()(ramp, len(names), at_once))
        if run["steps"] != planned:
            raise BenchmarkError(f"{kind}: {len(names)} hosts went in {run['steps']} steps, where {planned} were meant")
        return run


def watch(pid: int, group: Path) -> int:
    """Waits for the end of a process, leaves it to be waited for; the most memory that its cgroup had meanwhile, PSS.

    Raises BenchmarkError where it does not end.
    """
    deadline = time.monotonic() + PATIENCE
    most = 0
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(1000):
            most = max(most, pss(members(group)))
            if time.monotonic() > deadline:
                raise BenchmarkError(f"no end after {PATIENCE} s")
    finally:
        os.close(descriptor)
    return most


def recap(text: str) -> dict[str, dict[str, int]]:
    """host -> what ansible-playbook's last lines count of it."""
    _, _, last = text.rpartition("PLAY RECAP")
    return {
        line[0]: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line[1])}
        for line in re.findall(r"^(\S.*?) +: (ok=.*)$", last, re.MULTILINE)
    }


def steps(text: str) -> int:
    """Of a rollout, by what it says before the first; 1 of any other playbook."""
    said = re.search(r"hosts in steps of ([\d, ]+);", " ".join(text.split()))
    return len(said[1].split(",")) if said else 1


def turns(text: str) -> int:
    """How many hosts of a rollout were given a turn."""
    begun = re.findall(r"^TASK \[Note that the turn begins\] \*+\n(?:ok: .*\n)+", text, re.MULTILINE)
    return sum(part.count("\nok: ") for part in begun)


FACTS = {
    "facts_all": {"gather_facts": True, "tasks": []},
    "facts_needed": {
        "gather_facts": False,
        "tasks": [{"ansible.builtin.setup": {"gather_subset": ["!all", "!min", "distribution", "service_mgr"]}}],
    },
    "facts_none": {"gather_facts": False, "tasks": [{"ansible.builtin.ping": {}}]},
}
"""Plays of one task: all facts, those that each role asks for, and a task that does nothing, to compare them with."""


def gather(fleet: Fleet, kind: str, names: list[str]) -> Run:
    path = fleet.checkout / f"{kind}.json"
    path.write_text(json.dumps([{"hosts": "web_hosts", **FACTS[kind]}]))
    return fleet.playbook(kind, path.name, names)


@contextmanager
def fleet_of_nobody(say: Say) -> Iterator[Fleet]:
    """The work directory and no hosts yet; whatever was started is gone afterwards."""
    if not (ROOT / ".cache/venv/bin/ansible-playbook").exists():
        raise BenchmarkError("ansible-playbook is not installed: run script/bootstrap test (or demo) first")
    work = Path(tempfile.mkdtemp(prefix="fleet-"))
    fleet = Fleet(work, say)
    try:
        fleet.copy_checkout()
        yield fleet
    finally:
        fleet.close()
        shutil.rmtree(work)


def measure(settings: Settings, say: Say) -> dict[str, Any]:
    """All runs of one round, and what could not be measured.

    First what changes nothing, with ever more hosts, then the rollouts: each brings something that no host has, so that
    it does not matter what went to whom before.
    """
    runs: list[Run] = []
    missing: dict[str, str] = {}
    idle: dict[str, float] = {}
    sizes: list[int] = []
    with fleet_of_nobody(say) as fleet:
        fleet.make_images()
        for size in settings.sizes:
            most, short = most_hosts()
            if size > most + len(fleet.hosts):
                missing[f"{size} hosts"] = short
            else:
                sizes.append(size)
                names = fleet.grow(size)
                idle[str(size)] = idle_cores([fleet.groups[name] for name in names])
                collect(runs, missing, fleet, f"no change, {size} hosts", unchanged(fleet, names, settings))
        for size in sizes:
            names = fleet.grow(size)
            collect(runs, missing, fleet, f"rollouts, {size} hosts", rolled_out(fleet, names, settings))
    return {"runs": runs, "idle": idle, "missing": missing}


def collect(runs: list[Run], missing: dict[str, str], fleet: Fleet, what: str, measured: Iterator[Run]) -> None:
    """One run after the other; where one fails, those before it are good and those behind it are missing."""
    try:
        for run in measured:
            runs.append(run)
            fleet.say(f"{run['wall_s']:.0f} s, controller's CPU {run['controller_cpu_s']:.0f} s")
    except BenchmarkError as error:
        fleet.say(f"{what} CANNOT be measured: {error}")
        missing[what] = str(error)


def unchanged(fleet: Fleet, names: list[str], settings: Settings) -> Iterator[Run]:
    """site.yml on hosts that are as it would make them; at one size also with other settings, one at a time."""
    # Unmeasured: the first command on a host finds nothing in its page cache.
    gather(fleet, "facts_all", names)
    yield fleet.playbook("no_change", "site.yml", names)
    if len(names) == settings.options:
        for forks in settings.forks:
            yield fleet.playbook("no_change", "site.yml", names, forks=forks)
        yield fleet.playbook("no_change", "site.yml", names, pipelining=False)
        for kind in FACTS:
            yield gather(fleet, kind, names)


def rolled_out(fleet: Fleet, names: list[str], settings: Settings) -> Iterator[Run]:
    """A new release in the default steps, and once more; where settings say so, another one in as few as can be."""
    ways = [(RAMP, AT_ONCE)]
    if len(names) in settings.few:
        # All of them together are refused: somebody has to serve.
        ways.append(("100%", str(len(names) - 1)))
    for ramp, at_once in ways:
        fleet.next_release()
        yield fleet.roll_out(names, ramp, at_once)
        yield fleet.roll_out(names, ramp, at_once, again=True)


def idle_cores(groups: list[Path]) -> float:
    """What the hosts use while nobody asks anything of them, in cores."""
    began, before = time.monotonic(), sum(map(cpu_seconds, groups))
    time.sleep(5)  # the window that is measured
    return (sum(map(cpu_seconds, groups)) - before) / (time.monotonic() - began)
