"""Clients that are not OpenAI's, through the router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError

from .conftest import System

MESSAGES = [{"role": "user", "content": "the quick brown"}]
SAMPLED: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "seed": 4}


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[InferenceClient]:
    """Hugging Face's client, which has its own HTTP code and types."""
    with InferenceClient(base_url=system.base_url, api_key="none", timeout=60) as client:
        yield client


def test_hugging_faces_client_reads_a_chat_with_logprobs(client: InferenceClient) -> None:
    answer = client.chat_completion(**SAMPLED, model="tiny", logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.completion_tokens == 12
    assert choice.logprobs is not None
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [3] * 12


def test_hugging_faces_client_reads_a_stream(client: InferenceClient) -> None:
    whole = client.chat_completion(**SAMPLED, model="tiny").choices[0].message.content
    options: Any = {"include_usage": True}
    *chunks, usage = client.chat_completion(**SAMPLED, model="tiny", stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage and usage.usage.completion_tokens) == ([], 12)


def test_hugging_faces_client_shows_the_reason_of_a_refusal(client: InferenceClient) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat_completion(messages=MESSAGES, model="tiny", top_p=2.0)
    assert "top_p is 2.0; it must be between 0 and 1" in str(caught.value)
