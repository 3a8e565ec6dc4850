"""`prompt_logprobs`, `--max-logprobs` and log probabilities of the whole vocabulary over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import ApiServer
from .wire import CHAT, COMPLETIONS, chat, chunks, complete, refusal

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("unlimited"), "--max-logprobs", "-1") as server:
        yield server.wait_ready()


def scored(server: ApiServer, count: int, **fields: Any) -> list[dict[str, dict[str, Any]]]:
    """Return the log probabilities of PROMPT from its second token on."""
    [choice] = complete(server, prompt=PROMPT, prompt_logprobs=count, **GREEDY | fields)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    return list(others)


def test_zero_asks_for_the_tokens_of_the_prompt(server: ApiServer) -> None:
    entries = scored(server, 0)
    assert [[*entry] for entry in entries] == [[str(token_id)] for token_id in PROMPT[1:]]
    for entry in entries:
        for value in entry.values():
            assert value["logprob"] < 0
            assert value["rank"] >= 1
            assert isinstance(value["decoded_token"], str)


def test_the_most_likely_tokens_come_in_their_order(server: ApiServer) -> None:
    own = scored(server, 0)
    for entry, alone in zip(scored(server, 3), own, strict=True):
        by_rank = sorted(entry.values(), key=lambda value: value["rank"])
        assert [value["rank"] for value in by_rank[:3]] == [1, 2, 3]
        assert [value["logprob"] for value in by_rank] == sorted(
            (value["logprob"] for value in by_rank), reverse=True
        )
        assert entry.items() >= alone.items()
        assert len(entry) == (3 if min(value["rank"] for value in alone.values()) <= 3 else 4)


def test_ranks_count_all_more_likely_tokens(unlimited: ApiServer) -> None:
    for whole, alone in zip(scored(unlimited, -1), scored(unlimited, 0), strict=True):
        assert len(whole) == 512
        [(token_id, value)] = alone.items()
        assert whole[token_id] == value
        assert value["rank"] == 1 + sum(each["rank"] < value["rank"] for each in whole.values())
        assert sorted(each["rank"] for each in whole.values()) == list(range(1, 513))


def test_the_prefix_cache_does_not_hide_them(server: ApiServer) -> None:
    prompt = [*range(100, 400)]
    first, second = (
        complete(server, prompt=prompt, prompt_logprobs=1, **GREEDY)["choices"][0] for _ in range(2)
    )
    assert len(first["prompt_logprobs"]) == 300
    assert second == first


def test_a_chat_has_them_where_fastdeploy_and_vllm_have_them(server: ApiServer) -> None:
    answer = chat(server, prompt_logprobs=1, n=2, seed=1, return_token_ids=True, max_tokens=2)
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"] == answer["prompt_logprobs"]
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_has_them_in_its_first_event(server: ApiServer, is_chat: bool) -> None:
    whole = (chat if is_chat else complete)(server, prompt_logprobs=2, **GREEDY)
    first, *others = chunks(server, chat=is_chat, prompt_logprobs=2, **GREEDY)
    assert first["choices"][0]["prompt_logprobs"] == whole["choices"][0]["prompt_logprobs"]
    assert not any("prompt_logprobs" in chunk["choices"][0] for chunk in others)


def test_echo_keeps_its_own_number(server: ApiServer) -> None:
    fields = {"prompt": PROMPT, "echo": True, "logprobs": 1}
    [both] = complete(server, prompt_logprobs=4, **fields, **GREEDY)["choices"]
    [echo] = complete(server, **fields, **GREEDY)["choices"]
    assert both["logprobs"] == echo["logprobs"]
    assert both["prompt_logprobs"][1:] == scored(server, 4)


def test_a_prompt_of_one_token_has_none(server: ApiServer) -> None:
    [choice] = complete(server, prompt=[5], prompt_logprobs=2, **GREEDY)["choices"]
    assert choice["prompt_logprobs"] == [None]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_more_than_the_limit_is_refused(
    server: ApiServer, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refusal(server, path, **fields)
    assert error["param"] == param
    assert "it must be at most 20 (--max-logprobs)" in error["message"]


def test_minus_one_returns_the_whole_vocabulary(unlimited: ApiServer) -> None:
    [choice] = complete(unlimited, logprobs=-1, return_tokens_as_token_ids=True, **GREEDY)["choices"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [512] * 3
    [choice] = chat(unlimited, logprobs=True, top_logprobs=-1, **GREEDY)["choices"]
    for entry in choice["logprobs"]["content"]:
        values = [each["logprob"] for each in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert (len(values), values[0]) == (512, entry["logprob"])


def test_the_size_of_a_whole_response_is_limited(unlimited: ApiServer) -> None:
    fields = {"logprobs": -1, "n": 128, "max_tokens": 100}
    error = refusal(unlimited, COMPLETIONS, **fields)
    assert error["param"] == "logprobs"
    assert "the limit is 1048576" in error["message"]
    fields = {"logprobs": -1, "stream": True, "max_streaming_response_tokens": 64}
    assert refusal(unlimited, COMPLETIONS, **fields)["param"] == "logprobs"
    error = refusal(unlimited, CHAT, prompt_logprobs=-1, stream=True, prompt_token_ids=PROMPT * 5)
    assert "or no stream" in error["message"]


@pytest.mark.parametrize("is_chat", [True, False])
def test_tokens_may_be_named_by_id(server: ApiServer, is_chat: bool) -> None:
    ask = chat if is_chat else complete
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if is_chat else {"logprobs": 1}
    fields |= GREEDY | {"return_token_ids": True}
    [choice] = ask(server, **fields, return_tokens_as_token_ids=True)["choices"]
    logprobs = choice["logprobs"]
    names = [entry["token"] for entry in logprobs["content"]] if is_chat else logprobs["tokens"]
    assert names == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    if not is_chat:
        [by_text] = complete(server, **fields)["choices"]
        assert logprobs["text_offset"] == by_text["logprobs"]["text_offset"]
        parts = chunks(server, chat=False, return_tokens_as_token_ids=True, **fields)[1:]
        offsets = [part["choices"][0]["logprobs"]["text_offset"] for part in parts]
        assert [offset for part in offsets for offset in part] == logprobs["text_offset"]
