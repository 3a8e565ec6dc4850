"""Keys that clients of FastDeploy, vLLM and OpenAI read, which have to be there even if they are null."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import ApiServer
from .wire import CHAT, chat, chunks, complete, refusal

IDS = ("prompt_token_ids", "completion_token_ids", "prompt_tokens", "completion_tokens")
SAMPLED = {"temperature": 1.2, "seed": 4, "max_tokens": 8, "ignore_eos": True}


def test_absent_values_of_a_chat_are_null(server: ApiServer) -> None:
    answer = chat(server, **SAMPLED)
    message, choice = answer["choices"][0]["message"], answer["choices"][0]
    for name in ("refusal", "reasoning_content", "tool_calls", *IDS):
        assert message[name] is None
    for name in ("logprobs", "stop_reason", "token_ids"):
        assert choice[name] is None
    for name in ("system_fingerprint", "service_tier", "prompt_token_ids"):
        assert answer[name] is None
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_absent_values_of_a_completion_are_null(server: ApiServer) -> None:
    [choice] = complete(server, **SAMPLED)["choices"]
    for name in ("logprobs", "stop_reason", "token_ids", "prompt_logprobs", *IDS):
        assert choice[name] is None


def test_every_delta_has_content(server: ApiServer) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(server, chat=True, **SAMPLED)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert (
        "".join(delta["content"] for delta in deltas)
        == chat(server, **SAMPLED)["choices"][0]["message"]["content"]
    )


def test_ids_of_a_chat_are_where_both_servers_have_them(server: ApiServer) -> None:
    fields = SAMPLED | {"return_token_ids": True}
    answer = chat(server, **fields)
    choice = answer["choices"][0]
    assert len(choice["token_ids"]) == 8
    assert choice["token_ids"] == choice["message"]["completion_token_ids"]
    assert answer["prompt_token_ids"] == choice["message"]["prompt_token_ids"]
    assert choice["message"]["prompt_tokens"].endswith("user: the quick brown\nassistant:")
    assert choice["message"]["completion_tokens"] == choice["message"]["content"]
    first, *rest = chunks(server, chat=True, **fields)
    assert (
        first["prompt_token_ids"]
        == first["choices"][0]["delta"]["prompt_token_ids"]
        == answer["prompt_token_ids"]
    )
    assert first["choices"][0]["delta"]["completion_token_ids"] is None
    parts = [chunk["choices"][0] for chunk in rest]
    assert [part["delta"]["prompt_token_ids"] for part in parts] == [None] * len(parts)
    assert [part["delta"]["completion_token_ids"] for part in parts] == [part["token_ids"] for part in parts]
    assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]


def test_ids_of_a_completion_are_where_both_servers_have_them(server: ApiServer) -> None:
    fields = SAMPLED | {"return_token_ids": True}
    [choice] = complete(server, **fields)["choices"]
    assert len(choice["token_ids"]) == 8
    assert choice["token_ids"] == choice["completion_token_ids"]
    first, *rest = [chunk["choices"][0] for chunk in chunks(server, chat=False, **fields)]
    assert (first["prompt_token_ids"], first["completion_token_ids"]) == (choice["prompt_token_ids"], None)
    assert [i for part in rest for i in part["token_ids"]] == choice["token_ids"]


def stop_token(server: ApiServer, **fields: Any) -> int:
    """Return the third token of the greedy completion."""
    [choice] = complete(server, temperature=0, max_tokens=3, ignore_eos=True, return_token_ids=True)[
        "choices"
    ]
    return int(choice["token_ids"][-1])


def test_stop_reason_names_the_stop_token(server: ApiServer) -> None:
    fields = {"temperature": 0, "ignore_eos": True, "max_tokens": 9, "stop_token_ids": [stop_token(server)]}
    [choice] = complete(server, **fields)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop_token(server))
    *others, last = chunks(server, chat=False, **fields)
    assert last["choices"][0]["stop_reason"] == stop_token(server)
    assert all("stop_reason" not in chunk["choices"][0] for chunk in others)


def test_stop_reason_names_the_stop_string(server: ApiServer) -> None:
    [whole] = complete(server, **SAMPLED)["choices"]
    stop = whole["text"][3:5]
    [choice] = complete(server, **SAMPLED, stop=["never", stop])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("is_chat", [True, False])
def test_ids_and_logprobs_correspond_up_to_the_stop_token(server: ApiServer, is_chat: bool) -> None:
    """Trainers zip the two."""
    fields: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 9}
    fields["logprobs"] = True if is_chat else 0
    ask = chat if is_chat else complete
    fields["stop_token_ids"] = [ask(server, **fields)["choices"][0]["token_ids"][4]]
    [choice] = ask(server, **fields)["choices"]
    assert choice["finish_reason"] == "stop"
    logprobs = choice["logprobs"]
    assert len(choice["token_ids"]) == len(logprobs["content"] if is_chat else logprobs["tokens"])
    parts = [chunk["choices"][0] for chunk in chunks(server, chat=is_chat, **fields)]
    for part in parts:
        if part["logprobs"] is not None:
            shown = part["logprobs"]["content"] if is_chat else part["logprobs"]["tokens"]
            assert len(shown) == len(part["token_ids"])


def test_top_logprobs_of_a_completion_include_the_drawn_token(server: ApiServer) -> None:
    [choice] = complete(server, **SAMPLED | {"temperature": 2.0, "logprobs": 0})["choices"]
    shown = choice["logprobs"]
    assert shown["top_logprobs"] == [
        {token: value} for token, value in zip(shown["tokens"], shown["token_logprobs"], strict=True)
    ]


def test_a_salt_separates_cached_prompts(server: ApiServer) -> None:
    def cached(salt: str | None) -> int:
        answer = complete(server, prompt=[11] * 200, max_tokens=1, cache_salt=salt)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(salt) for salt in ("ours", "ours", "theirs", None)] == [0, 192, 0, 0]


@pytest.mark.parametrize("is_chat", [True, False])
def test_events_have_as_many_tokens_as_requested(server: ApiServer, is_chat: bool) -> None:
    fields = SAMPLED | {"return_token_ids": True}
    several = chunks(server, chat=is_chat, **fields, max_streaming_response_tokens=3)[1:]
    single = chunks(server, chat=is_chat, **fields)[1:]
    ids = [chunk["choices"][0]["token_ids"] for chunk in several]
    assert [i for part in ids for i in part] == [
        i for chunk in single for i in chunk["choices"][0]["token_ids"]
    ]
    assert len(several) == 4


def test_the_template_decides_about_roles(server: ApiServer) -> None:
    wizard = [{"role": "wizard", "content": "hi"}]
    assert chat(server, messages=wizard, max_tokens=1)
    template = "{{ raise_exception('no ' + messages[0].role) }}"
    error = refusal(server, CHAT, messages=wizard, chat_template=template)
    assert "no wizard" in error["message"]
