# SPDX-License-Identifier: Apache-2.0
"""What the report of benchmarks/run says about the run as a whole, and the scenarios' own reports one after another."""

from __future__ import annotations

from benchlib.parts import PARTS, Document

NOT_SOFTWARE = (
    "processor",
    "cores",
    "kernel",
    "system",
    "commit",
    "load_before",
    "python",
    "daemon_python",
    "json",
    "loop",
)
BUSY = 0.5
"""Load average above which, before every single round, a machine was busy with other things."""


def loads(documents: dict[str, Document]) -> list[float]:
    """Load averages before all rounds. From the second round on the run itself is in them."""
    return [load for document in documents.values() for load in document["loads"]]


def about(documents: dict[str, Document]) -> str:
    """The machine, the versions, how busy it was."""
    first = next(iter(documents.values()))["machine"]
    software = ", ".join(f"{name} {value}" for name, value in first.items() if name not in NOT_SOFTWARE)
    found = loads(documents)
    took = sum(document["took"] for document in documents.values())
    runtime = f"Python {first['daemon_python']} with {first['loop']} and {first['json']}"
    return (
        f"{first['processor']}, {first['cores']} cores, Linux {first['kernel']}, {first['system']},\n{software},\n"
        f"daemon on {runtime}, commit {first['commit']}.\n"
        f"The load average was {found[0]:.2f} before the first round and {min(found):.2f} to {max(found):.2f} before "
        f"all of them, the run's own part\nincluded; measuring took {took / 60:.0f} minutes."
    )


def caution(documents: dict[str, Document]) -> str:
    """What a reader has to know before he believes anything; "" where there is nothing."""
    text = ""
    if any(document["quick"] for document in documents.values()):
        text += (
            "**A quick run: it shows that everything is measured, its figures mean little.** It has a tenth of the "
            "streams or less, and one\nround; the targets are for all of them. "
        )
    # The first load is often that of whatever prepared the run, and the later ones have the run itself in them: a
    # machine that was quiet before any round is not busy with other things.
    if min(loads(documents)) > BUSY:
        text += (
            "**The machine was busy with other things.** Believe ratios, memory and CPU time,\n"
            "and not what is a time or a rate."
        )
    return text.strip()


def report(documents: dict[str, Document]) -> str:
    text = "# Benchmarks\n\nMade by `benchmarks/run`; what is measured, and how, is in `benchmarks/README.md`.\n\n"
    text += f"{about(documents)}\n"
    warning = caution(documents)
    text += f"\n{warning}\n" if warning else ""
    for part in PARTS:
        if part.key in documents:
            text += "\n" + part.report(documents[part.key])
            reasons = documents[part.key]["missing"]
            if reasons:
                text += "\n### Could not be measured\n\n"
                text += "".join(f"- {what}: {reason.splitlines()[0]}\n" for what, reason in reasons.items())
    return text
