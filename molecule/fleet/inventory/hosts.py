#!/usr/bin/env python3
"""The hosts of the scenario: a load balancer, and web hosts of Debian 12 and 13 in turn.

FLEET_HOSTS says how many web hosts, 6 where it says nothing. Two cores take an hour and a half for all cases with six
of them; three show nearly everything in an hour.
"""

import json
import os

HOSTS = [f"fleet{number}" for number in range(1, int(os.environ.get("FLEET_HOSTS", "6")) + 1)]
VARIABLES = {name: {"test_host_debian_release": 12 + number % 2} for number, name in enumerate(HOSTS)}
VARIABLES["fleetlb"] = {"test_host_debian_release": 12}

print(
    json.dumps(
        {
            "web_hosts": {"hosts": HOSTS},
            "load_balancers": {"hosts": ["fleetlb"]},
            "_meta": {"hostvars": VARIABLES},
        }
    )
)
