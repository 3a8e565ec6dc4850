"""OpenAI's client through the router: its accumulators, exceptions, pages and headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from ..router.conftest import RouterProcess
from .conftest import System

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown"}]
SAMPLED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 4}


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[openai.OpenAI]:
    with system.openai() as client:
        yield client


def choices_of(completion: ChatCompletion) -> list[tuple[str | None, str | None, str]]:
    return [(each.message.role, each.message.content, each.finish_reason) for each in completion.choices]


@pytest.mark.parametrize("n", [1, 3])
def test_the_clients_accumulated_stream_is_the_whole_answer(client: openai.OpenAI, n: int) -> None:
    # The client's accumulator accepts no choice that ended by its length.
    ends = {"stop_token_ids": list(range(3, 259)), "min_tokens": 6}
    options: dict[str, Any] = {**SAMPLED, "max_tokens": 64, "n": n, "logprobs": True, "top_logprobs": 2}
    options["extra_body"] = ends
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert choices_of(final) == choices_of(whole)
    assert [each.logprobs for each in final.choices] == [each.logprobs for each in whole.choices]
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens >= n * 6
    snapshots = {event.snapshot for event in events if event.type == "content.delta"}
    done = [event.content for event in events if event.type == "content.done"]
    assert set(done) == {each.message.content for each in whole.choices} <= snapshots


def test_parallel_streams_of_the_asynchronous_client_do_not_mix(system: System) -> None:
    async def text(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(**{**SAMPLED, "seed": seed, "stream": True})
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def texts(seeds: list[int]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=system.base_url, api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(text(client, seed) for seed in seeds)))

    together = asyncio.run(texts([*range(8), *range(8)]))
    assert together[:8] == together[8:]
    assert len(set(together)) == 8


def test_completions_with_logprobs_of_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["the", "quick brown"], max_tokens=3, echo=True, logprobs=1, n=2, seed=1
    )
    for choice, prompt in zip(answer.choices, ["the", "the", "quick brown", "quick brown"], strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens).endswith(choice.text)
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by


def test_an_answer_has_the_id_of_its_request(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**SAMPLED, extra_headers={"X-Request-Id": "mine"})
    answer = raw.parse()
    assert raw.headers["x-request-id"] == answer._request_id == "mine"
    assert answer.id == "chatcmpl-mine"
    assert raw.headers["x-fd-replica"]


def ask(client: openai.OpenAI, **fields: Any) -> Callable[[], object]:
    return lambda: client.chat.completions.create(**{**SAMPLED, **fields})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"temperature": "x"}, openai.BadRequestError, "temperature", "invalid_type"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, openai.BadRequestError, "messages",
         "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError,
         "messages[0].content[0]", "invalid_type"),
        ({"extra_body": {"lora_path": "x"}}, openai.BadRequestError, "lora_path", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_a_wrong_request_raises_the_clients_exception(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    code: str,
    stream: bool,
) -> None:
    with pytest.raises(error) as caught:
        ask(client, stream=stream, **fields)()
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_an_unknown_endpoint_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="tiny", input="a")
    assert caught.value.code == "unknown_url"
    assert "generate text" in caught.value.message


def test_a_wrong_key_and_a_missing_replica_raise_the_clients_exceptions(
    start_router: Callable[..., RouterProcess],
) -> None:
    router = start_router(env={"FD_API_KEY": "right"})
    for key, error in (("wrong", openai.AuthenticationError), ("right", openai.InternalServerError)):
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(error) as caught:
                ask(client)()
            assert caught.value.body
