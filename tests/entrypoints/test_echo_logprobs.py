"""Log probabilities of prompts over HTTP, as evaluation harnesses request them: echo with logprobs."""

from __future__ import annotations

import http.client
import itertools
import json
from typing import Any

import openai
import pytest

from .conftest import MAX_MODEL_LEN, ApiServer

PROMPT = "the quick brown fox é好"


def complete(server: ApiServer, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    return server.client().completions.create(**fields | options)


def token_ids(server: ApiServer, text: str) -> list[int]:
    extra = {"return_token_ids": True}
    answer = complete(server, prompt=text, max_tokens=1, echo=False, logprobs=None, extra_body=extra)
    return answer.choices[0].prompt_token_ids


def score(choice: Any, context: int) -> tuple[float, bool]:
    """Score a choice as lm-evaluation-harness does (its local-completions model)."""
    logprobs = choice.logprobs.token_logprobs[context:-1]
    tops = choice.logprobs.top_logprobs[context:-1]
    is_greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), is_greedy


def test_the_prompt_alone(server: ApiServer) -> None:
    answer = complete(server, prompt=PROMPT, logprobs=3)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, answer.usage.prompt_tokens)
    shown = choice.logprobs
    count = answer.usage.prompt_tokens
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == count
    assert (shown.token_logprobs[0], shown.top_logprobs[0]) == (None, None)
    assert all(value <= 0 for value in shown.token_logprobs[1:])
    assert all(token in top for token, top in zip(shown.tokens[1:], shown.top_logprobs[1:], strict=True))
    assert all(len(top) <= 4 for top in shown.top_logprobs[1:])
    # Each token stands in the text at its offset.
    assert shown.text_offset == sorted(shown.text_offset)
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        assert "\ufffd" in token or PROMPT.startswith(token, offset)


def test_prompt_and_answer_are_one_list(server: ApiServer) -> None:
    drawn = complete(server, prompt=PROMPT, echo=False, max_tokens=6, extra_body={"ignore_eos": True})
    both = complete(server, prompt=PROMPT, max_tokens=6, extra_body={"ignore_eos": True})
    alone = complete(server, prompt=PROMPT)
    first, then = alone.choices[0].logprobs, drawn.choices[0].logprobs
    shown = both.choices[0].logprobs
    assert both.choices[0].text == PROMPT + drawn.choices[0].text
    assert shown.tokens == first.tokens + then.tokens
    assert shown.token_logprobs == first.token_logprobs + then.token_logprobs
    assert shown.top_logprobs == first.top_logprobs + then.top_logprobs
    assert shown.text_offset == first.text_offset + [len(PROMPT) + offset for offset in then.text_offset]


def test_an_answer_that_is_read_again_has_the_same_values(server: ApiServer) -> None:
    extra = {"ignore_eos": True, "return_token_ids": True}
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "echo": False, "extra_body": extra}
    drawn = complete(server, prompt=PROMPT, **options).choices[0]
    prompt = drawn.prompt_token_ids + drawn.completion_token_ids
    again = complete(server, prompt=prompt).choices[0].logprobs
    assert again.token_logprobs[-40:] == drawn.logprobs.token_logprobs
    assert again.tokens[-40:] == drawn.logprobs.tokens


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_multiple_choice_of_an_evaluation_harness(server: ApiServer, max_tokens: int) -> None:
    """The request is a batch of token lists that end with the choices, and one token to be discarded."""
    context = token_ids(server, "the quick brown")
    greedy = complete(
        server,
        prompt=context,
        max_tokens=3,
        echo=False,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    endings = [greedy.completion_token_ids, [40, 41, 42], [99, 100]]
    answer = complete(server, prompt=[context + ending for ending in endings], max_tokens=max_tokens, seed=1)
    if max_tokens == 0:
        for choice in answer.choices:
            for column in (choice.logprobs.token_logprobs, choice.logprobs.top_logprobs):
                column.append(None)
    scores = [score(choice, len(context)) for choice in answer.choices]
    assert [is_greedy for _, is_greedy in scores] == [True, False, False]
    assert scores[0][0] == pytest.approx(sum(greedy.logprobs.token_logprobs), abs=1e-9)
    assert scores[0][0] > max(scores[1][0], scores[2][0])


def test_a_stop_token_counts_as_the_token_that_is_thrown_away(server: ApiServer) -> None:
    """Otherwise the harness would discard the last token of the choice instead."""
    extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    [likeliest] = complete(server, prompt=[40, 41, 42], max_tokens=1, extra_body=extra).choices
    extra["stop_token_ids"] = likeliest.completion_token_ids
    [choice] = complete(server, prompt=[40, 41, 42], max_tokens=1, extra_body=extra).choices
    assert (choice.finish_reason, choice.text) == (
        "stop",
        likeliest.text[: -len(likeliest.logprobs.tokens[-1])],
    )
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset) == 4
    assert score(choice, 1)[0] == score(complete(server, prompt=[40, 41, 42, 43]).choices[0], 1)[0]


def test_the_prefix_cache_hides_nothing(server: ApiServer) -> None:
    prompt = list(range(10, 300))
    first, second = (complete(server, prompt=prompt).choices[0].logprobs for _ in range(2))
    assert len(first.token_logprobs) == len(prompt)
    assert second == first


def test_choices_and_prompts_have_their_own(server: ApiServer) -> None:
    prompts = [[40], [50, 51, 52], list(range(60, 90))]
    answer = complete(server, prompt=prompts, n=2, max_tokens=3, seed=1, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        prompt = prompts[choice.index // 2]
        expected = complete(server, prompt=prompt).choices[0].logprobs
        values = choice.logprobs.token_logprobs
        assert values[: len(prompt)] == expected.token_logprobs
        assert len(values) == len(prompt) + 3


def test_a_stream_says_the_same_in_pieces(server: ApiServer) -> None:
    options = {"prompt": [PROMPT, "one"], "n": 2, "max_tokens": 5, "seed": 2, "temperature": 1}
    whole = complete(server, **options)
    parts: dict[int, list[Any]] = {}
    for chunk in complete(server, **options, stream=True):
        parts.setdefault(chunk.choices[0].index, []).append(chunk.choices[0])
    for choice in whole.choices:
        pieces = parts[choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [getattr(piece.logprobs, column) for piece in pieces if piece.logprobs is not None]
            assert list(itertools.chain(*joined)) == getattr(choice.logprobs, column)


def test_a_stream_without_an_answer_ends_with_its_reason(server: ApiServer) -> None:
    first, last = complete(server, prompt=PROMPT, stream=True)
    assert (first.choices[0].text, last.choices[0].text) == (PROMPT, "")
    assert last.choices[0].finish_reason == "length"
    assert first.choices[0].logprobs == complete(server, prompt=PROMPT).choices[0].logprobs


def test_a_stream_scores_a_prompt_that_has_no_text(server: ApiServer) -> None:
    """Special tokens are not shown, but have log probabilities."""
    prompt = [2, 2, 2]
    first, last = complete(server, prompt=prompt, stream=True)
    assert first.choices[0].text == ""
    assert first.choices[0].logprobs == complete(server, prompt=prompt).choices[0].logprobs
    assert len(first.choices[0].logprobs.tokens) == len(prompt)
    assert last.choices[0].finish_reason == "length"


def test_max_tokens_0_requires_echo(server: ApiServer) -> None:
    answer = complete(server, prompt=PROMPT, echo=False, logprobs=None)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("", 0)
    assert complete(server, prompt=PROMPT, logprobs=None).choices[0].text == PROMPT


def test_a_prompt_may_fill_the_context_if_nothing_follows(server: ApiServer) -> None:
    prompt = [5] * MAX_MODEL_LEN
    assert len(complete(server, prompt=prompt).choices[0].logprobs.tokens) == MAX_MODEL_LEN
    with pytest.raises(openai.BadRequestError, match=f"context length is {MAX_MODEL_LEN}$"):
        complete(server, prompt=[*prompt, 5])
    with pytest.raises(openai.BadRequestError, match="one of them for the output"):
        complete(server, prompt=prompt, max_tokens=1)


def test_size_of_one_answer_is_limited(server: ApiServer) -> None:
    with pytest.raises(openai.BadRequestError, match=r"echo with logprobs .* the limit is 1048576") as caught:
        complete(server, prompt=[[5] * 400] * 128, logprobs=20)
    assert caught.value.param == "echo"
    assert complete(server, prompt=[5] * 400, logprobs=20, stream=True)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": [5] * 2000, "logprobs": 20, "echo": True, "max_tokens": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert (answer.status, "or no stream" in answer.read().decode()) == (400, True)
    connection.close()
