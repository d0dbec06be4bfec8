"""What every directive of a unit's sandbox is worth to the host's own systemd, held against a baseline.

One file per unit and Debian release in `exposure_baseline`, because every systemd knows other directives and judges by
other rules. A value is true where the directive protects, null where it does not apply to the unit, and otherwise what
systemd-analyze(1) says its lack costs; each lack has its reason in `waivers.json`. `properties` are those that
systemd-analyze does not look at.

The output of `python3 tests/chain/exposure.py` on a host is a new baseline: as root, with the name of a unit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testinfra.host import Host

FOLDER = Path(__file__).with_name("exposure_baseline")
PROPERTIES = [
    "AmbientCapabilities",
    "DevicePolicy",
    "LimitCORE",
    "LogsDirectoryMode",
    "NonBlocking",
    "PrivateMounts",
    "ReadWritePaths",
    "RuntimeDirectoryMode",
    "SupplementaryGroups",
    "SystemCallErrorNumber",
    "User",
]


def measure(run: Callable[[str], str], unit: str) -> dict[str, Any]:
    """Return what systemd says of a unit now; `run` runs a command and returns its output."""
    rows = json.loads(run(f"systemd-analyze security --no-pager --json=short {unit}"))
    shown = run(f"systemctl show --property={','.join(PROPERTIES)} {unit}")
    return {
        "directives": {
            row["json_field"]: row["exposure"] if row["set"] is False else row["set"]
            for row in sorted(rows, key=lambda row: str(row["json_field"]))
        },
        "properties": dict(sorted(line.split("=", 1) for line in shown.splitlines() if "=" in line)),
    }


def assert_baseline(host: Host, unit: str, variant: str = "") -> None:
    """Assert that a unit is exactly as protected as its baseline says, directive by directive."""
    release = host.check_output(". /etc/os-release; echo $VERSION_ID")
    path = FOLDER / f"{unit}{variant}.debian{release}.json"
    baseline, now = json.loads(path.read_text()), measure(host.check_output, unit)
    differences = [
        f"{kind}: {name} was {baseline[kind].get(name, 'unknown')!r} and is {now[kind].get(name, 'gone')!r}"
        for kind in baseline
        for name in sorted(baseline[kind].keys() | now[kind].keys())
        if baseline[kind].get(name, "unknown") != now[kind].get(name, "gone")
    ]
    assert not differences, f"{path.name} and {host.backend.hostname} differ:\n" + "\n".join(differences)
    waivers = json.loads((FOLDER / "waivers.json").read_text())[unit + variant]
    lacking = {name for name, value in now["directives"].items() if isinstance(value, str)}
    assert lacking == waivers.keys(), "a directive is missing without a reason, or a reason without a missing directive"


if __name__ == "__main__":
    print(
        json.dumps(
            measure(lambda command: subprocess.check_output(command, shell=True, text=True), sys.argv[1]), indent=1
        )
    )
