# SPDX-License-Identifier: Apache-2.0
"""benchmarks/daemon measures what it says it measures. Nothing here looks at speed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchlib.daemon import AIMS, QUICK, SHOWN, envelope

BENCHMARKS = Path(__file__).resolve().parents[1]


def test_an_unknown_scenario_or_contender_is_named_with_what_there_is() -> None:
    for argument, allowed in ((["--only", "speed"], "relay-tls"), (["--contenders", "rust"], "naive")):
        done = subprocess.run([str(BENCHMARKS / "daemon"), *argument], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert argument[1] in done.stderr and allowed in done.stderr


def test_every_client_has_an_id_a_user_and_a_cookie_of_its_own() -> None:
    assert envelope(1, 1.0, "").count(b"@@@@@@@@") == 3


def test_the_command_leaves_every_figure_of_every_contender_in_every_scenario(tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "daemon"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    document = json.loads((tmp_path / "daemon.json").read_text())
    assert document["missing"] == {}
    scenarios = QUICK.scenarios()
    assert set(document["samples"]) == {scenario.key for scenario in scenarios}
    for scenario in scenarios:
        cells = document["samples"][scenario.key]
        assert set(cells) == set(scenario.contenders)
        for who, cell in cells.items():
            for what in SHOWN[scenario.key if scenario.key in SHOWN else "idle"]:
                assert len(cell[what]) == QUICK.rounds, (scenario.key, who, what)
            assert cell["handoffs_per_second"][0] > 0, (scenario.key, who)
            if scenario.count or scenario.how[0] == "loop":
                assert cell["events_per_second"][0] > 0, (scenario.key, who)
    report = (tmp_path / "daemon.md").read_text()
    assert report.count("| met |") + report.count("| **missed** |") == len(AIMS)
    for scenario in scenarios:
        assert f"## {scenario.title}" in report
