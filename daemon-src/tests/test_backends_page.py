"""docs/backends.md says what is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("httptools")

from streaming_daemon import service
from streaming_daemon.backends import anthropic, openai
from streaming_daemon.config import BACKEND_TYPES, OUTPUTS

PAGE = (Path(__file__).resolve().parents[2] / "docs/backends.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_good_configuration(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(example)
    status = service.check(str(path))
    assert (status, capsys.readouterr().err) == (0, "")


def test_there_is_an_example_of_every_type_but_the_demo_and_of_every_output() -> None:
    text = "\n".join(EXAMPLES)
    for kind in set(BACKEND_TYPES) - {"demo"}:
        assert f'type = "{kind}"' in text
    for output in OUTPUTS:
        assert f'output = "{output}"' in PAGE


@pytest.mark.parametrize(
    ("api", "passed", "rewritten"),
    [
        ("chat completions", openai.CHAT, ()),
        ("responses", openai.RESPONSES, openai.RESPONSES_REWRITTEN),
        ("messages", anthropic.MESSAGES, anthropic.MESSAGES_REWRITTEN),
    ],
)
def test_the_members_that_are_passed_on_are_all_listed(
    api: str, passed: tuple[str, ...], rewritten: tuple[str, ...]
) -> None:
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {api} |")]
    _, _, first, second, _ = row.split("|")
    assert re.findall("`([a-z_]+)`", first) == list(passed)
    assert re.findall("`([a-z_]+)`", second) == list(rewritten)
