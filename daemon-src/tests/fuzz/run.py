"""Fuzzes the two parsers that read what strangers wrote: the wire message, and a backend's event stream.

usage: run.py message|sse --seconds N --work DIRECTORY

Coverage-guided by atheris, from the vectors that all implementations share on; the laws are those of properties.py. A
finding is written to DIRECTORY/TARGET-crash-..., and `run.py TARGET FILE` tries it again. atheris has wheels for few
platforms: elsewhere hypothesis tries for as long, without knowing what it reaches, and says so. Where there are wheels
it has to be installed, because a guess is no fuzzing; `--guess` does without all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    atheris = None

# What is imported here for the first time is what the fuzzer sees the inside of.
with atheris.instrument_imports(include=["streaming_daemon"]) if atheris else contextlib.nullcontext():
    import properties
    from daemon_harness import envelope
    from test_envelope import bytes_of

# As script/requirements-test.txt has it.
HAS_WHEELS = platform.machine() == "x86_64" and sys.version_info < (3, 14)
Law = Callable[[bytes], None]
LARGEST = 4096


# A good envelope, of which one member says something else.
ENVELOPE = json.loads(envelope())
MEMBERS = [*sorted(ENVELOPE), "payload"]


def with_member(name: str, value: bytes) -> bytes:
    """The envelope with ``value`` for ``name``, the version first as Apache has it."""
    members = {each: json.dumps(other).encode() for each, other in ENVELOPE.items()} | {name: value}
    return b"{%b}" % b",".join(b'"%b":%b' % (each.encode(), other) for each, other in members.items())


def message(data: bytes) -> None:
    """The bytes as a message; and all but the first as the value of the member that the first one names."""
    properties.law_of_messages(data)
    if data:
        properties.law_of_messages(with_member(MEMBERS[data[0] % len(MEMBERS)], data[1:]))


def sse(data: bytes) -> None:
    """The first bytes say where to cut, and how much a reader may keep."""
    cuts, most, stream = list(data[:3]), data[3:4], data[4:]
    properties.law_of_streams(stream, cuts, raw=bool(cuts and cuts[0] & 1))
    properties.law_of_bounds(stream, cuts, most[0] if most else 1)


TARGETS: dict[str, Law] = {"message": message, "sse": sse}


def seeds(target: str) -> Iterator[bytes]:
    if target == "sse":
        yield b"\x05\x0b\x11\x40data: {}\n\nevent: x\rdata: 1\r\ndata:2\r\r: c\n\nerror: e\n\n"
        yield b"\x01\x02\x03\xff\xef\xbb\xbfdata: \xf0\x9f\x91\x8b\r\n\r\ndata\n\nid: 1\nretry: 2\ndata: [DONE]\n\n"
        return
    for vectors in json.loads((ROOT / "tests/vectors/envelope.json").read_text("utf-8")).values():
        for vector in vectors:
            if "message" in vector:
                yield bytes_of(vector["message"])
    for number, name in enumerate(MEMBERS):
        yield bytes([number]) + json.dumps(ENVELOPE.get(name)).encode()
    yield bytes([MEMBERS.index("data")]) + json.dumps(json.dumps({"messages": [{"role": "user"}], "demo": {}})).encode()


def fuzz(target: str, seconds: int, work: Path) -> None:
    """With atheris. Does not return: the exit status is the fuzzer's."""
    corpus = work / f"{target}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number:03}").write_bytes(seed[:LARGEST])
    limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", f"-artifact_prefix={work}/{target}-"]
    atheris.Setup([sys.argv[0], *limits, "-timeout=10", "-print_final_stats=1", str(corpus)], TARGETS[target])
    atheris.Fuzz()


def guess(target: str, seconds: int) -> None:
    """Without atheris."""
    from hypothesis import HealthCheck, given, settings, strategies

    known = list(seeds(target))
    deadline = time.monotonic() + seconds
    tried = 0

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.sampled_from(known), strategies.integers(0, LARGEST), strategies.binary(max_size=20))
    def attempt(seed: bytes, at: int, junk: bytes) -> None:
        nonlocal tried
        tried += 1
        at %= len(seed) + 1
        TARGETS[target](seed[:at] + junk + seed[at + len(junk) :])

    while time.monotonic() < deadline:
        attempt()
    print(f"{target}: without atheris; hypothesis tried {tried} cases without coverage's guidance")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("file", nargs="*", type=Path, help="findings to try again, instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/fuzz-daemon", help="corpus and findings")
    parser.add_argument("--guess", action="store_true", help="do without atheris")
    options = parser.parse_args()
    for path in options.file:
        TARGETS[options.target](path.read_bytes())
    if options.file:
        return 0
    if atheris is not None and not options.guess:
        fuzz(options.target, options.seconds, options.work)
    elif HAS_WHEELS and not options.guess:
        print("atheris is not installed: run script/bootstrap test, or say --guess to do without", file=sys.stderr)
        return 1
    else:
        guess(options.target, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
