"""Fields that change the prompt or the text, against a real replica."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import MAX_MODEL_LEN, ApiServer

#: A template with a mark at the end of each message.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if documents %}{{ documents[0].text }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = {"role": "user", "content": "the quick"}
BEGUN = {"role": "assistant", "content": "brown fox"}


def prompt_of(server: ApiServer, **fields: Any) -> list[int]:
    """Return the token ids of a chat's prompt."""
    body = {
        "messages": [USER],
        "chat_template": TEMPLATE,
        "max_tokens": 1,
        "return_token_ids": True,
        **fields,
    }
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    ids: list[int] = answer["choices"][0]["message"]["prompt_token_ids"]
    return ids


def ids_of(server: ApiServer, text: str, special: bool = False) -> list[int]:
    ids: list[int] = server.post("/tokenize", {"prompt": text, "add_special_tokens": special})[1]["tokens"]
    return ids


@pytest.mark.parametrize(
    ("fields", "text", "special"),
    [
        ({}, "user: the quick</s>assistant:", False),
        ({"add_special_tokens": True}, "user: the quick</s>assistant:", True),
        ({"add_generation_prompt": False}, "user: the quick</s>", False),
        ({"documents": [{"text": "doc"}]}, "user: the quick</s>docassistant:", False),
        (
            {"messages": [USER, BEGUN], "continue_final_message": True},
            "user: the quick</s>assistant: brown fox",
            False,
        ),
        ({"disable_chat_template": True}, "the quick", True),
        ({"disable_chat_template": True, "add_special_tokens": False}, "the quick", False),
    ],
)
def test_fields_of_the_template(server: ApiServer, fields: dict[str, Any], text: str, special: bool) -> None:
    assert prompt_of(server, **fields) == ids_of(server, text, special)
    if "disable_chat_template" not in fields:
        body = {"messages": [USER], "chat_template": TEMPLATE, **fields}
        assert server.post("/tokenize", body)[1]["tokens"] == ids_of(server, text, special)


def test_a_template_that_hides_the_last_message_cannot_continue_it(server: ApiServer) -> None:
    body = {"messages": [BEGUN], "chat_template": "nothing", "continue_final_message": True}
    status, answer = server.post("/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


def test_token_ids_are_the_prompt(server: ApiServer) -> None:
    assert prompt_of(server, messages=[], prompt_token_ids=[5, 6]) == [5, 6]
    assert prompt_of(server, prompt_token_ids=[5], completion_token_ids=[6, 7]) == [5, 6, 7]
    whole = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    one = server.post("/v1/completions", {"prompt": [5, 6], **whole})[1]["choices"][0]["text"]
    other = server.post("/v1/completions", {"prompt_token_ids": [5, 6], **whole})[1]["choices"][0]["text"]
    assert one == other
    status, answer = server.post("/v1/completions", {"prompt_token_ids": [10**6]})
    assert (status, answer["error"]["param"]) == (400, "prompt_token_ids")


def test_a_long_prompt_is_truncated_on_request(server: ApiServer) -> None:
    ids = [5 + i % 40 for i in range(2 * MAX_MODEL_LEN)]
    assert server.post("/v1/completions", {"prompt": ids})[0] == 400
    assert prompt_of(server, prompt_token_ids=ids, truncate_prompt_tokens=7) == ids[-7:]
    kept = prompt_of(server, prompt_token_ids=ids, truncate_prompt_tokens=-1, max_tokens=5)
    assert kept == ids[-(MAX_MODEL_LEN - 5) :]
    body = {"prompt": "the quick brown", "truncate_prompt_tokens": 2, "echo": True, "max_tokens": 0}
    answer = server.post("/v1/completions", body | {"logprobs": 0, "return_token_ids": True})[1]
    choice = answer["choices"][0]
    assert len(choice["prompt_token_ids"]) == len(choice["logprobs"]["tokens"]) == 2
    assert choice["text"] == server.post("/detokenize", {"tokens": choice["prompt_token_ids"]})[1]["prompt"]


def test_special_tokens_are_shown_on_request(server: ApiServer) -> None:
    end = ids_of(server, "</s>")
    assert len(end) == 1
    body = {"prompt": [*end, *end], "echo": True, "max_tokens": 0}
    texts = [
        server.post("/v1/completions", body | {"skip_special_tokens": skip})[1]["choices"][0]["text"]
        for skip in (True, False)
    ]
    assert texts == ["", "</s></s>"]
    drawn = {"prompt": "a", "temperature": 1.9, "seed": 3, "max_tokens": 300, "ignore_eos": True}
    answers = [
        server.post("/v1/completions", drawn | {"skip_special_tokens": skip, "return_token_ids": True})[1]
        for skip in (True, False)
    ]
    hidden, shown = [answer["choices"][0] for answer in answers]
    assert hidden["completion_token_ids"] == shown["completion_token_ids"]
    specials = sum(token == end[0] for token in shown["completion_token_ids"])
    assert specials > 0
    assert shown["text"].count("</s>") == hidden["text"].count("</s>") + specials


@pytest.mark.parametrize(("given", "wanted"), [("a1", "cmpl-a1"), ("cmpl-a1", "cmpl-a1")])
def test_an_id_has_its_prefix_once(server: ApiServer, given: str, wanted: str) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert server.post("/v1/completions", {**body, "request_id": given})[1]["id"] == wanted
    assert server.post("/v1/completions", body, {"X-Request-Id": given})[1]["id"] == wanted
