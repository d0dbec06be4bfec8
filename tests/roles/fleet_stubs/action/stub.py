# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""In place of what touches a host: a task that notes that it was run, and answers as the case wants.

``log`` in the directory of the variable FLEET_STUBS gets a line per call, host and what was asked for;
``answers.json`` there says host -> what -> the answer: a dictionary is the result, a text with ``unreachable`` loses
the host, any other text fails with these words, and of a list each call takes the next and the last one stays.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

WELL = {
    "host_release": {"record": {}, "turn": {}, "drift": [], "interrupted": False, "to": {"name": "1.0"}, "paths": []},
    "haproxy_server": {"before": "ready", "status": "UP", "up": []},
    "host_health": {"sample": {"logs": {}}, "ended": 0, "bad": 0, "problems": [], "streams": 0},
}


class ActionModule(ActionBase):
    """Ansible's entry point."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp=None, task_vars=None):
        """Note the call; return the answer."""
        super().run(tmp, task_vars)
        place = Path(os.environ["FLEET_STUBS"])
        name = self._task.action.rpartition(".")[2]
        arguments = self._task.args
        host = self._task.delegate_to or task_vars["inventory_hostname"]
        what = arguments["name"] if name == "stub" else f"{name} {arguments.get('state', '')}".strip()
        with (place / "log").open("a") as log:
            log.write(f"{host} {what}\n")
        answer = json.loads((place / "answers.json").read_text()).get(host, {}).get(what, {})
        if isinstance(answer, list):
            count = (place / "log").read_text().splitlines().count(f"{host} {what}")
            answer = answer[min(count, len(answer)) - 1]
        if isinstance(answer, str):
            if "unreachable" in answer:
                raise AnsibleConnectionFailure(answer)
            return {"failed": True, "msg": answer}
        if name == "rollout_lock":
            return {"changed": False, "holder": arguments.get("holder", {}), **answer}
        return {"changed": False, **WELL.get(name, {}), **answer}
