"""The reference of all keys is what the code says, and a key that nobody explains does not get in."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from daemon_harness import SOURCE

TOOL = SOURCE / "tools" / "reference.py"
pytestmark = pytest.mark.skipif(not (SOURCE.parent / "docs").is_dir(), reason="the documents are not here")


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_and_the_example_say() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_key_without_an_explanation_is_an_error(tool: ModuleType) -> None:
    text = tool.EXAMPLE.read_text()
    begin = text.index("max_payload")
    end = text.index("\n", begin)
    for changed in (text[:begin] + text[end + 1 :], text[:begin] + text[begin:end].partition("#")[0] + text[end:]):
        comments = tool._Comments(changed)
        with pytest.raises(tool.MissingError, match=r"listen\.max_payload is missing, or has no comment"):
            comments.of(("listen", "max_payload"))


def test_every_key_of_every_table_is_in_the_reference(tool: ModuleType) -> None:
    page = tool.page()
    for key in ("`max_streams`", "`streams_per_user`", "`base_url`", "`command`", "`allow_choice`", "`listen`"):
        assert f"| {key} |" in page
    assert "| `command` | required |" in page


def test_a_hash_in_a_string_is_no_comment(tool: ModuleType) -> None:
    assert tool._Comments('a = "x # y"   # z # w\n').of(("a",)) == "z # w"
