"""A limit of the reasoning, with a real model whose vocabulary has the tags of reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.tokenizer.tokenizer import Tokenizer

from .conftest import TINY, ApiServer


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny checkpoint with tags of reasoning in place of two tokens that it does not use."""
    path = tmp_path_factory.mktemp("thinking")
    for file in TINY.iterdir():
        if file.name == "tokenizer.json":
            text = file.read_text().replace('"<pad>"', '"<think>"').replace('"<unk>"', '"</think>"')
            (path / file.name).write_text(text)
        else:
            (path / file.name).symlink_to(file)
    return path


@pytest.fixture(scope="module")
def server(thinking: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    flags = ("--model", str(thinking), "--reasoning-parser", "qwen3")
    with ApiServer(tmp_path_factory.mktemp("server"), *flags) as running:
        yield running.wait_ready()


@pytest.mark.parametrize("limit", [0, 1, 7])
@pytest.mark.parametrize(
    "content",
    [None, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}],
)
def test_reasoning_ends_at_its_limit(
    thinking: Path, server: ApiServer, limit: int, content: dict[str, Any] | None
) -> None:
    ids = Tokenizer.from_directory(thinking).encode("a<think>")
    body = {"prompt_token_ids": ids, "reasoning_max_tokens": limit, "max_tokens": 40, "seed": 3}
    status, answer = server.post("/v1/chat/completions", {**body, "response_format": content, "n": 2})
    assert status == 200, answer
    for choice in answer["choices"]:
        assert choice["message"]["content"]
        if content is not None:
            assert choice["message"]["content"] in ('"yes"', '"no"')
    used = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 2 <= used <= 2 * (limit + 1)
