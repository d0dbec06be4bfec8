#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module haproxy_server: take one server out of a running HAProxy's rotation, and bring it back.

Theory of operation. HAProxy's runtime API takes one command per connection on a
Unix socket and closes the connection behind the answer (management guide, 9.3).
What an operator has asked for is kept by HAProxy apart from what its checks have
found: bits of srv_admin_state in ``show servers state``. Those bits are compared
with the wish, so that a second run changes nothing. Sessions and health come from
``show stat``. Neither touches the configuration; a reload keeps the bits only
where the configuration loads a state file, which the role handoff_lb sees to.

Streams may last for hours, so no wait is without end, and its end is no failure
unless the caller says so.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_server
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Drain, stop or enable one server of a running HAProxy
description:
  - Sets the administrative state of a server by HAProxy's runtime API, and waits for what follows from it.
  - Needs nothing on the host but Python; the user has to be permitted to HAProxy's socket.
options:
  backend:
    description: Name of the backend.
    type: str
    required: true
  server:
    description: Name of the server in O(backend).
    type: str
    required: true
  state:
    description:
      - With V(maint), the server gets no new requests, goes on with those that it has, and is not checked.
      - With V(drain), it is checked, and clients that are bound to it by a cookie stay with it.
      - With V(ready), it takes part again.
    type: str
    choices: [ready, drain, maint]
    required: true
  wait:
    description:
      - Seconds to wait. For V(drain) and V(maint) until the server has no session left, for V(ready) until its checks
        have succeeded, which is required then. 0 does not wait.
      - Sessions of a HAProxy process from before a reload are not seen.
    type: float
    default: 0
  at_deadline:
    description:
      - What happens when sessions are left after O(wait). V(continue) leaves them alone and reports RV(sessions),
        V(fail) also fails, and V(shutdown) closes their connections.
    type: str
    choices: [continue, fail, shutdown]
    default: continue
  socket:
    description: HAProxy's Unix socket, of level C(admin).
    type: path
    default: /run/haproxy/admin.sock
attributes:
  check_mode:
    description: Asks HAProxy and says what would change. Does not wait.
    support: full
  diff_mode:
    description: Shows the administrative state before and after.
    support: full
"""

EXAMPLES = r"""
- name: Send no new requests to web1, and give what runs five minutes
  socket_handoff.fleet.haproxy_server:
    backend: web
    server: web1.example.com
    state: drain
    wait: 300
  delegate_to: lb1.example.com

- name: Let web1 take part again, and see that it is healthy
  socket_handoff.fleet.haproxy_server:
    backend: web
    server: web1.example.com
    state: ready
    wait: 30
  delegate_to: lb1.example.com
"""

RETURN = r"""
state:
  description: Administrative state after the task, or as it would be.
  type: str
  returned: success
before:
  description: Administrative state before the task.
  type: str
  returned: success
status:
  description: What HAProxy says of the server, for example C(UP), C(DRAIN), C(MAINT) or C(DOWN).
  type: str
  returned: success
up:
  description: The servers of O(backend) that get new requests, this one included where it is one of them.
  type: list
  elements: str
  returned: success
  version_added: 0.2.0
sessions:
  description: Sessions that the server has.
  type: int
  returned: success
waited:
  description: Seconds that were spent waiting.
  type: float
  returned: success
timed_out:
  description: Whether sessions were left after O(wait).
  type: bool
  returned: success
"""

import csv
import socket
import time

from ansible.module_utils.basic import AnsibleModule

# Bits of srv_admin_state (management guide, "show servers state"): forced by an operator, or maintenance by
# configuration. Inherited ones (0x02, 0x10) belong to a tracked server.
FORCED_MAINT = 0x01
CONFIGURED_MAINT = 0x04
FORCED_DRAIN = 0x08
ANSWER_TIMEOUT = 10.0
# Between two looks while waiting: one command for a whole fleet's drain costs HAProxy nothing.
PAUSE = 0.5


class Failed(Exception):
    """HAProxy could not be asked, or refused; the text says what to do."""


class Runtime:
    """HAProxy's runtime API on one socket."""

    def __init__(self, path):
        self.path = path

    def ask(self, command):
        """Send one command; return its answer without surrounding white space."""
        pieces = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(ANSWER_TIMEOUT)
                peer.connect(self.path)
                peer.sendall(command.encode() + b"\n")
                while piece := peer.recv(65536):
                    pieces.append(piece)
        except OSError as error:
            raise Failed(
                f"socket {self.path} does not answer {command!r} ({error}); allowed is the path of a 'stats socket' of "
                "a HAProxy that runs. Look at: systemctl status haproxy"
            ) from error
        answer = b"".join(pieces).decode(errors="replace").strip()
        if answer.startswith("Permission denied"):
            raise Failed(
                f"socket {self.path} refuses {command!r}; allowed is a socket with 'level admin' in haproxy.cfg"
            )
        return answer

    def tell(self, command):
        """Send a command that has no answer unless it is refused."""
        answer = self.ask(command)
        if answer:
            raise Failed(f"HAProxy refused {command!r}: {answer}")

    def admin_state(self, backend, server):
        """Return what an operator has asked for: ready, drain or maint."""
        lines = self.ask(f"show servers state {backend}").splitlines()
        heads = [line.lstrip("# ").split() for line in lines if line.startswith("#")]
        if not heads:
            raise Failed(f"backend {backend} is unknown to HAProxy ({' '.join(lines)}); allowed is one of haproxy.cfg")
        # The first line is the version of the format, alone.
        found = [line.split() for line in lines if not line.startswith("#")]
        rows = [dict(zip(heads[0], fields, strict=False)) for fields in found if len(fields) > 1]
        for row in rows:
            if row["srv_name"] == server:
                bits = int(row["srv_admin_state"])
                if bits & (FORCED_MAINT | CONFIGURED_MAINT):
                    return "maint"
                return "drain" if bits & FORCED_DRAIN else "ready"
        names = ", ".join(row["srv_name"] for row in rows)
        raise Failed(f"server {server} is not in backend {backend}; allowed is one of: {names}")

    def statistics(self, backend, server):
        """Return (status, sessions, names of the backend's servers that get new requests)."""
        # Objects of type server (4) of every proxy.
        lines = self.ask("show stat -1 4 -1").lstrip("# ").splitlines()
        rows = {row["svname"]: row for row in csv.DictReader(lines) if row["pxname"] == backend}
        if server not in rows:
            raise Failed(f"server {server} of backend {backend} has no statistics; is it still in haproxy.cfg?")
        # One that is on its way down, as 'UP 1/3', gets them still.
        up = [name for name, row in rows.items() if row["status"].startswith("UP") or row["status"] == "no check"]
        return rows[server]["status"], int(rows[server]["scur"]) + int(rows[server]["qcur"]), up


def is_up(status):
    """Whether the checks have succeeded. Behind a maintenance a server is 'UP 1/2' before it was asked, as it is
    behind a failed check; 'no check' will never say more."""
    return status in ("UP", "no check")


def await_end(runtime, params):
    """Wait for what the state brings; return what was found last, with the seconds and whether they were not enough."""
    began = time.monotonic()
    while True:
        status, sessions, up = runtime.statistics(params["backend"], params["server"])
        reached = is_up(status) if params["state"] == "ready" else sessions == 0
        waited = time.monotonic() - began
        if reached or waited >= params["wait"]:
            short = not reached and params["wait"] > 0
            return {"status": status, "sessions": sessions, "up": up, "waited": round(waited, 1), "timed_out": short}
        # The runtime API tells nobody of changes: it has to be asked again, until the time is over.
        time.sleep(min(PAUSE, max(0.0, params["wait"] - waited)))


def run(module):
    """Do it; return the result."""
    params = module.params
    for name in ("backend", "server"):
        # One command per line, its words separated by spaces, commands by semicolons.
        if not params[name] or any(character in " \t\r\n;/\\#" for character in params[name]):
            raise Failed(f"{name} is {params[name]!r}; allowed is a name from haproxy.cfg. Example: web1")
    if not 0 <= params["wait"] <= 86400:
        raise Failed(f"wait is {params['wait']}; allowed is a number from 0 to 86400. Example: 300")
    runtime = Runtime(params["socket"])
    before = runtime.admin_state(params["backend"], params["server"])
    changed = before != params["state"]
    if changed and not module.check_mode:
        runtime.tell(f"set server {params['backend']}/{params['server']} state {params['state']}")
    result = {"changed": changed, "before": before, "state": params["state"]}
    if changed:
        name = f"{params['backend']}/{params['server']}"
        result["diff"] = {"before": f"{name} {before}\n", "after": f"{name} {params['state']}\n"}
    if module.check_mode:
        params["wait"] = 0
    found = await_end(runtime, params)
    result.update(found)
    after = f"after {found['waited']} s"
    if found["timed_out"] and params["state"] == "ready":
        module.fail_json(
            msg=f"{params['server']} is {found['status']} {after}: its checks do not succeed. See its error logs.",
            **result,
        )
    if found["timed_out"] and params["at_deadline"] == "fail":
        module.fail_json(msg=f"{params['server']} has {found['sessions']} sessions left {after}", **result)
    if found["timed_out"] and params["at_deadline"] == "shutdown":
        runtime.tell(f"shutdown sessions server {params['backend']}/{params['server']}")
        result["changed"] = True
    return result


def main():
    """Ansible's entry point."""
    module = AnsibleModule(
        argument_spec={
            "backend": {"type": "str", "required": True},
            "server": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["ready", "drain", "maint"], "required": True},
            "wait": {"type": "float", "default": 0},
            "at_deadline": {"type": "str", "choices": ["continue", "fail", "shutdown"], "default": "continue"},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except Failed as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
