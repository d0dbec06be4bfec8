#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module host_health: what a host of the fleet says about itself, and what has happened since it was asked last.

Theory of operation. Nothing here is judged by its level, only by what was added:
a host may have had errors for years. One call takes a *sample*: counters of the
daemon's board, restarts that systemd has counted, and how long Apache's error
logs are. A later call is given that sample and reads what has come behind it.

The daemon's counters begin at 0 with a new supervisor, and a log that is rotated
begins again; both are told by their own marks (start time, inode), and then all
that is there counts as new.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_health
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.2.0
short_description: Sample a host's counters and error logs, and judge what was added
description:
  - Asks the daemon's metrics socket, systemd and Apache's error logs, and changes nothing.
  - With O(since) it says what has happened since that sample, and whether any of it speaks against the host.
options:
  since:
    description: The RV(sample) of an earlier call.
    type: dict
  fail:
    description: Fail where RV(problems) is not empty.
    type: bool
    default: false
  max_log_errors:
    description: Lines of Apache's error logs that may be added, of those that count.
    type: int
    default: 0
  logs:
    description:
      - Apache's error logs. A line counts where it is an error of the modules socket_handoff, proxy_fcgi or php, or
        critical or
        worse whoever it is from, or tells of a child process that a signal has ended.
      - What anybody can bring about from outside does not count, such as a request for a script that is not there.
    type: list
    elements: path
    default: [/var/log/apache2/error.log, /var/log/apache2/handoff-app-error.log]
  socket:
    description:
      - Where the daemon answers, a Unix socket. Where it is not given, what C(metrics.listen) says in O(config).
      - Where that is V(off), nothing can be counted, which is a problem with O(since), because nobody can be judged
        then.
    type: path
  config:
    description: The daemon's configuration.
    type: path
    default: /etc/streaming-daemon/config.toml
  units:
    description: Units that have to be active.
    type: list
    elements: str
    default: [apache2.service, streaming-daemon.socket, streaming-daemon.service]
attributes:
  check_mode:
    description: Only reads.
    support: full
  diff_mode:
    description: Nothing changes.
    support: none
"""

EXAMPLES = r"""
- name: Take a sample
  socket_handoff.fleet.host_health:
  register: before

- name: Fail where anything has gone wrong since
  socket_handoff.fleet.host_health:
    since: "{{ before.sample }}"
    fail: true
"""

RETURN = r"""
sample:
  description: What to give to a later call as O(since).
  type: dict
  returned: always
streams:
  description: Streams that are running, those that older workers finish included.
  type: int
  returned: always
ended:
  description: Streams that have ended since.
  type: int
  returned: with O(since)
bad:
  description: Of those, the ones that ended because the daemon or its backend failed.
  type: int
  returned: with O(since)
problems:
  description: What speaks against the host, in sentences.
  type: list
  elements: str
  returned: always
"""

import json
import os
import re
import socket
import subprocess
import tomllib

from ansible.module_utils.basic import AnsibleModule

TIMEOUT = 10.0
# Streams that ended, by the daemon's own words, for a reason that is not the client's. A drain that ran out of time is
# what an operator has asked for.
BAD = ("other", "backend_error", "timeout", "overloaded")
# Handoffs that say that Apache and the daemon do not understand one another. Clients that go away are no such sign.
MISUNDERSTOOD = ("other", "invalid", "descriptors", "too_large")
# Counters that do not move on a host that is well.
STILL = {
    "daemon_workers_died_total": "workers died",
    "daemon_workers_hung_total": "workers hung",
    "daemon_streams_lost_total": "streams were lost with their workers",
    "daemon_generations_refused_total": "generations did not start",
}
# Anchored to what Apache itself writes at a line's beginning: behind it stands what strangers have asked for.
COUNTS = re.compile(
    rb"^\[[^]]*\] \[(?:(?:socket_handoff|proxy_fcgi|php\d*):(?:error|crit|alert|emerg)|[\w-]+:(?:crit|alert|emerg))\]"
    rb"|^\[[^]]*\] \[[\w-]+:\w+\] \[pid [^]]*\] AH0005[0-2]: child pid \d+ exit signal "
)
# A script that is not there, a client that goes away while it sends a request or is sent an answer, and the health
# checks of a load balancer that drains the host, which an earlier release of the application logs.
FROM_OUTSIDE = re.compile(
    rb"^\[[^]]*\] \[proxy_fcgi:error\] \[pid [^]]*\] (?:\(\d+\)[^\[]*: )?\[client [^]]*\] "
    rb"(?:AH01071: Got error 'Primary script unknown(?:\\n)?'"
    rb"|AH01071: Got error 'PHP message: handoff-app: This host is out of service for now[.] "
    rb"\([^()]*/health[.]php:\d+\)'"
    rb"|AH01075: Error dispatching request to [^(]*\((?:reading input brigade|passing brigade to output filters)\))"
)
DIRECTORY = "/run/streaming-daemon/"
LISTEN = f"unix:{DIRECTORY}metrics.sock"
# Enough to see what it is; the log itself has the rest.
SHOWN = 3
MOST = 1 << 20


def listens(params):
    """Return where the daemon answers, as metrics.listen has it."""
    if params["socket"] is not None:
        return f"unix:{params['socket']}"
    try:
        with open(params["config"], "rb") as handle:
            return str(tomllib.load(handle).get("metrics", {}).get("listen", LISTEN))
    except (OSError, ValueError, AttributeError):
        # The daemon's own default. Whether it runs with what cannot be read is said by whether it answers.
        return LISTEN


def board(listen):
    """Return the daemon's own numbers; None where it does not answer."""
    pieces = []
    path = listen.removeprefix("unix:")
    host, _, port = listen.rpartition(":")
    family, where = socket.AF_UNIX, os.path.join(DIRECTORY, path)
    if path == listen:
        host = host.removeprefix("[").removesuffix("]")
        family, where = (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port) if port.isdigit() else 0)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as peer:
            peer.settimeout(TIMEOUT)
            peer.connect(where)
            peer.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while piece := peer.recv(65536):
                pieces.append(piece)
        found = json.loads(b"".join(pieces).partition(b"\r\n\r\n")[2])
    except (OSError, ValueError, OverflowError):
        return None
    # Somebody else may have the port.
    return found if isinstance(found, dict) and isinstance(found.get("values"), dict) and "started" in found else None


def units(names):
    """Return name -> (state, restarts) of units, as systemd has them."""
    command = ["systemctl", "show", "--property=Id,ActiveState,NRestarts", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        # That none of them is known is what the judgement says then.
        return {}
    found = {}
    for block in done.stdout.strip().split("\n\n"):
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in fields:
            found[fields["Id"]] = (fields.get("ActiveState", "unknown"), int(fields.get("NRestarts") or 0))
    return found


def lengths(paths):
    """Return path -> (inode, length) of logs that are there."""
    found = {}
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        found[path] = [status.st_ino, status.st_size]
    return found


def added(path, before):
    """Return the lines that count which were added to a log since, at most the last mebibyte of them."""
    try:
        with open(path, "rb") as handle:
            status = os.fstat(handle.fileno())
            inode, length = before or (None, 0)
            begin = length if inode == status.st_ino and length <= status.st_size else 0
            handle.seek(max(begin, status.st_size - MOST))
            lines = handle.read(MOST).splitlines()
            return [
                line.decode(errors="replace") for line in lines if COUNTS.search(line) and not FROM_OUTSIDE.search(line)
            ]
    except FileNotFoundError:
        return []


def moved(then, today, name):
    """Return by how much a counter has grown, its labels apart."""
    new = today["values"].get(name, 0)
    old = then["values"].get(name, 0) if then and then["started"] == today["started"] else 0
    if isinstance(new, dict):
        return {key: value - (old.get(key, 0) if isinstance(old, dict) else 0) for key, value in new.items()}
    return new - old


def of_daemon(then, today):
    """Return (ended, bad, problems) by the daemon's board."""
    by_outcome = moved(then, today, "daemon_streams_total")
    ended, bad = sum(by_outcome.values()), sum(by_outcome.get(name, 0) for name in BAD)
    problems = []
    for name, words in STILL.items():
        if (count := moved(then, today, name)) > 0:
            problems.append(f"{int(count)} {words} ({name}; see journalctl --unit streaming-daemon)")
    by_reason = moved(then, today, "daemon_handoff_errors_total")
    refused = {reason: by_reason[reason] for reason in MISUNDERSTOOD if by_reason.get(reason, 0) > 0}
    if refused:
        words = ", ".join(f"{int(count)} {reason}" for reason, count in sorted(refused.items()))
        problems.append(f"handoffs came to nothing: {words} (daemon_handoff_errors_total)")
    return ended, bad, problems


def judge(sample, since, numbers, listen, params):
    """Return (ended, bad, problems)."""
    problems = [
        f"{name} is {state} (see systemctl status {name})"
        for name, (state, _) in sample["units"].items()
        if state != "active"
    ]
    problems += [f"{name} is not known to systemd" for name in params["units"] if name not in sample["units"]]
    if listen == "off" and since is not None:
        problems.append(
            "streaming_daemon_metrics_listen is off, so nobody can count what becomes of streams; allowed is "
            "unix:metrics.sock, or a loopback address and a port"
        )
    elif listen != "off" and numbers is None:
        problems.append(f"the daemon does not answer on {listen.removeprefix('unix:')}")
    if since is None:
        return 0, 0, problems
    for name, (_, restarts) in sample["units"].items():
        before = (since.get("units") or {}).get(name, (None, 0))[1]
        # systemd begins to count again when somebody restarts the unit.
        if restarts > before:
            problems.append(f"systemd has restarted {name} {restarts - before} times, because it crashed")
    lines = [line for path in params["logs"] for line in added(path, (since.get("logs") or {}).get(path))]
    if len(lines) > params["max_log_errors"]:
        shown = " | ".join(line[:300] for line in lines[:SHOWN])
        problems.append(
            f"Apache's error logs have {len(lines)} new errors, and {params['max_log_errors']} are allowed: {shown}"
        )
    if numbers is None:
        return 0, 0, problems
    ended, bad, more = of_daemon(since.get("board"), numbers)
    return int(ended), int(bad), problems + more


def run(module):
    """Do it; return the result."""
    params = module.params
    found = units(params["units"])
    listen = listens(params)
    numbers = None if listen == "off" else board(listen)
    names = ["daemon_streams_total", "daemon_handoff_errors_total", *STILL]
    kept = numbers and {
        "started": numbers["started"],
        "values": {name: numbers["values"].get(name, 0) for name in names},
    }
    sample = {
        "units": {name: list(value) for name, value in found.items()},
        "logs": lengths(params["logs"]),
        "board": kept,
    }
    ended, bad, problems = judge(sample, params["since"], numbers, listen, params)
    values = numbers["values"] if numbers else {}
    streams = values.get("daemon_active_streams", 0)
    result = {"changed": False, "sample": sample, "problems": problems, "streams": int(streams)}
    if params["since"] is not None:
        result.update(ended=ended, bad=bad)
    if problems and params["fail"]:
        module.fail_json(msg="host_health: " + "; ".join(problems), **result)
    return result


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "since": {"type": "dict"},
            "fail": {"type": "bool", "default": False},
            "max_log_errors": {"type": "int", "default": 0},
            "logs": {
                "type": "list",
                "elements": "path",
                "default": ["/var/log/apache2/error.log", "/var/log/apache2/handoff-app-error.log"],
            },
            "socket": {"type": "path"},
            "config": {"type": "path", "default": "/etc/streaming-daemon/config.toml"},
            "units": {
                "type": "list",
                "elements": "str",
                "default": ["apache2.service", "streaming-daemon.socket", "streaming-daemon.service"],
            },
        },
        supports_check_mode=True,
    )
    module.exit_json(**run(module))


if __name__ == "__main__":
    main()
