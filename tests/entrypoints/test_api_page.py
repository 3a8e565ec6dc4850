"""docs/api.md: its examples work, and it names fields and endpoints that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy.entrypoints.openai.bodies import ChatBody, CompletionBody

from .conftest import ApiServer

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
EXAMPLES = [text for text in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if text.startswith("curl ")]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The tiny checkpoint has a token for nearly each character."""
    with ApiServer(tmp_path_factory.mktemp("roomy"), "--max-model-len", "2048") as server:
        yield server.wait_ready()


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_work(roomy: ApiServer, example: str) -> None:
    here = example.replace("localhost:30000", f"127.0.0.1:{roomy.port}")
    command = ["curl", "--silent", "--fail-with-body", *shlex.split(here.replace("\\\n", ""))[1:]]
    result = subprocess.run(command, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stdout
    if b'"stream": true' in example.encode():
        assert result.stdout.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(result.stdout)


def test_fields_in_the_table_are_declared() -> None:
    [table] = re.findall(r"^\| group \| fields \|\n(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(\w+)`", table))
    assert named >= {"messages", "prompt_logprobs", "cache_salt"}
    assert named <= {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
