"""The pieces of a stream are the whole response, whatever the model says and however its tokens arrive."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..entrypoints.scripted_replica import serving

WORKER = [sys.executable, str(Path(__file__).with_name("repeating_worker.py"))]
#: The characters have one to four bytes in UTF-8, and the last two are joined by others.
ALPHABET = "aab é好😀\N{ZERO WIDTH JOINER}\N{COMBINING ACUTE ACCENT}\n"


@pytest.fixture(scope="module")
def launched() -> Iterator[openai.OpenAI]:
    """A client of a replica that repeats the last message."""
    template = "{{ messages[-1].content }}"
    with (
        serving(WORKER, chat_template=template) as (_, port),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


texts = st.text(ALPHABET, min_size=1, max_size=25)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=3)


@settings(max_examples=40)
@given(text=texts, stop=stops, include=st.booleans(), seed=st.integers(1, 9), limit=st.integers(1, 99))
def test_pieces_of_a_chat_are_its_whole_text(
    launched: openai.OpenAI, text: str, stop: list[str], include: bool, seed: int, limit: int
) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "stop": stop,
        "max_tokens": limit,
        "logprobs": True,
        "extra_body": {"include_stop_str_in_output": include, "return_token_ids": True},
    }
    whole = launched.chat.completions.create(**options, seed=0).choices[0]
    chunks = [
        chunk.choices[0] for chunk in launched.chat.completions.create(**options, seed=seed, stream=True)
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason
    assert whole.logprobs is not None
    entries = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or []]
    assert entries == whole.logprobs.content
    if whole.finish_reason == "stop":
        assert whole.message.content == expected(text, stop, include)


@settings(max_examples=20)
@given(text=texts, stop=stops, seed=st.integers(1, 9), echo=st.booleans())
def test_pieces_of_completions_are_their_whole_texts(
    launched: openai.OpenAI, text: str, stop: list[str], seed: int, echo: bool
) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": [text, "a😀"], "n": 2, "stop": stop, "echo": echo}
    # The worker has no log probabilities of prompts.
    options |= {"max_tokens": 200, "logprobs": None if echo else 0}
    whole = launched.completions.create(**options, seed=0).choices
    said = [""] * 4
    tokens: list[list[str]] = [[] for _ in whole]
    for chunk in launched.completions.create(**options, seed=seed, stream=True):
        [choice] = chunk.choices
        said[choice.index] += choice.text
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens or []
    assert said == [choice.text for choice in whole]
    assert tokens == [choice.logprobs.tokens if choice.logprobs else [] for choice in whole]
    assert said[0].removeprefix(text if echo else "") == expected(text, stop, include=False)


def expected(text: str, stop: list[str], include: bool) -> str:
    """Return the text up to the stop string that is complete first; of several, the one that begins first."""
    ends = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    if not ends:
        return text
    end, begin = min(ends)
    return text[: end if include else begin]
