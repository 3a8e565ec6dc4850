"""Malformed requests, drawn from the published description of the API.

The description is the judge: a body that its JSON Schema rejects has to be refused with the name of the field
that was changed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from fastdeploy.entrypoints.openai.api_description import openapi
from fastdeploy.entrypoints.openai.validation import MAX_NESTING

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, ABORT = "/v1/responses", "/v1/abort_requests"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
_TOKENS = {"max_tokens": 1}
#: Valid bodies. A malformed one differs in one place.
_BASES: dict[str, tuple[dict[str, Any], ...]] = {
    CHAT: (
        {"messages": [{"role": "user", "content": "a"}], **_TOKENS},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "refusal": "no"},
                {"role": "user", "content": "b", "name": "c"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
            "logit_bias": {"7": 1.5},
            "stop": ["x", "y"],
            "stream": True,
            "stream_options": {"include_usage": True},
            **_TOKENS,
        },
    ),
    COMPLETIONS: ({"prompt": "a", **_TOKENS}, {"prompt": [[5, 6], [7]], "stop_token_ids": [3], **_TOKENS}),
    RESPONSES: (
        {"input": "a", "max_output_tokens": 1},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "b"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "text": {"format": {"type": "json_object"}},
            "max_output_tokens": 1,
        },
    ),
    ABORT: ({"req_ids": ["a", "b"]},),
    TOKENIZE: ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}),
    DETOKENIZE: ({"tokens": [5, 6]},),
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, -3, 7, 129, 2**31, 2**63, -(2**63) - 1, 10**30, -(10**400)),
    *(0.5, -0.5, 1e308, -1e308, 5e-324),
    *("", "x", "7", "\0", "é好😀", "\N{ZERO WIDTH JOINER}" * 9, "x" * 1100, "x" * 70_000),
    *([], [[]], [[[]]], [None], [True], [-1], [0.5], ["x", 7], [10**30], [""], ["x"] * 300, [0] * 1000),
    *({}, {"x": 1}, {"type": "x"}, {"type": 5}, {"type": ["text"]}, {"role": "user"}, {"x": {"y": [{}]}}),
)
_TOOL = {"type": "function", "function": {"name": "f"}}


@dataclass(frozen=True, slots=True)
class Malformed:
    path: str
    body: bytes
    #: The changed field of the body; None if the body has no fields.
    field: str | None


def malformed(number: int, seed: int) -> list[Malformed]:
    """Return so many different requests.

    They have wrong values, conflicts between fields, bodies nested too deeply, and broken JSON.
    """
    chance = random.Random(seed)
    kinds: Sequence[Callable[[random.Random], Malformed]] = [*[_wrong_value] * 8, _bomb, _broken_text]
    found = dict.fromkeys(_conflicts())
    while len(found) < number:
        found[chance.choice(kinds)(chance)] = None
    return list(found)


@cache
def _validator(path: str) -> Draft202012Validator:
    description = json.loads(openapi())
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return Draft202012Validator({**schema, "components": description["components"]})


def _wrong_value(chance: random.Random) -> Malformed:
    while True:
        path = _path(chance)
        body = copy.deepcopy(chance.choice(_BASES[path]))
        if chance.random() < 0.5:
            field = chance.choice(_field_names(path))
            body[field] = chance.choice(_VALUES)
        else:
            field = chance.choice(list(body))
            _spoil(body, field, chance)
        if not _validator(path).is_valid(body):
            return Malformed(path, json.dumps(body).encode(), field)


def _path(chance: random.Random) -> str:
    return chance.choices(list(_BASES), (6, 4, 4, 1, 1, 1))[0]


def _field_names(path: str) -> list[str]:
    name = _validator(path).schema["$ref"].rpartition("/")[2]
    return sorted(_validator(path).schema["components"]["schemas"][name]["properties"])


def _spoil(value: Any, key: Any, chance: random.Random) -> None:
    """Replace or remove one of the values below `value[key]`, or itself."""
    inner = value[key]
    keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
    if keys and chance.random() < 0.8:
        _spoil(inner, chance.choice(keys), chance)
    elif isinstance(value, dict) and chance.random() < 0.2:
        del value[key]
    else:
        value[key] = chance.choice(_VALUES)


def _conflicts() -> Iterator[Malformed]:
    """Yield bodies with faults that a schema does not show, such as fields that exclude each other."""
    for path, fields, field in (
        (CHAT, {"stream_options": {}}, "stream_options"),
        (CHAT, {"min_tokens": 5}, "min_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (CHAT, {"chat_template": "{{ "}, "chat_template"),
        (CHAT, {"chat_template": "{% for x in range(10**9) %}{{ x }}{% endfor %}"}, "chat_template"),
        (CHAT, {"request_id": "a b"}, "request_id"),
        (CHAT, {"prompt_token_ids": [2**31 - 1]}, "prompt_token_ids"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [_TOOL], "tool_choice": _named("g")}, "tool_choice"),
        (CHAT, {"tools": [_TOOL, _TOOL]}, "tools"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        (CHAT, {"guided_json": {"type": "text"}}, "guided_json"),
        (CHAT, {"guided_json": "{"}, "guided_json"),
        (CHAT, {"guided_json": {"$ref": "http://localhost/x"}}, "guided_json"),
        (CHAT, {"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
        (CHAT, {"guided_regex": "("}, "guided_regex"),
        (CHAT, {"guided_regex": "(?=a)b"}, "guided_regex"),
        (CHAT, {"guided_grammar": "start: nothing"}, "guided_grammar"),
        (CHAT, {"guided_choice": []}, "guided_choice"),
        (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (CHAT, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"99999999": 1}}, "logit_bias"),
        (CHAT, {"allowed_token_ids": []}, "allowed_token_ids"),
        (CHAT, {"prompt_logprobs": 2, "stream": True, "n": 500}, "n"),
        (RESPONSES, {"store": True}, "store"),
        (RESPONSES, {"previous_response_id": "x"}, "previous_response_id"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a"}}}, "text"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        (COMPLETIONS, {"stream_options": {}}, "stream_options"),
        (COMPLETIONS, {"min_tokens": 5}, "min_tokens"),
        (COMPLETIONS, {"best_of": 3}, "best_of"),
        (COMPLETIONS, {"best_of": 3, "n": 2}, "best_of"),
        (COMPLETIONS, {"prompt": ["a"] * 3, "n": 100}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 5000}, "prompt"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "a"}]}, "prompt"),
        (TOKENIZE, {"prompt": None}, "prompt"),
        (DETOKENIZE, {"tokens": [10**6]}, "tokens"),
    ):
        yield Malformed(path, json.dumps({**_BASES[path][0], **fields}).encode(), field)


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _bomb(chance: random.Random) -> Malformed:
    path = _path(chance)
    depth = chance.choice((MAX_NESTING, 300, 450, 500, 900, 990, 5_000, 100_000))
    begin, end = chance.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"role":', b"}]")))
    field = chance.choice(_field_names(path))
    body = b'{"%s":%s0%s}' % (field.encode(), begin * depth, end * depth)
    return Malformed(path, body, None)


def _broken_text(chance: random.Random) -> Malformed:
    path = _path(chance)
    text = json.dumps(chance.choice(_BASES[path])).encode()
    at = chance.randrange(1, len(text))
    body = chance.choice(
        (
            *(b"", b" \n", b"null", b"5", b'"x"', b"[]", b"[%s]" % text, b"nul", b"\0", b"\xff\xfe"),
            *(text[:at], text[:at] + b"\xff" + text[at:], text[:at] + b"\0" + text[at:], text + b"}"),
            *(text + text, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text[::-1]),
            *(text.replace(b'"', b"'"), text[:-1] + b",}", b"// x\n" + text),
            *(text[:-1] + b',"seed":%s}' % each for each in (b"NaN", b"Infinity", b"-Infinity", b"1e999")),
            *(text[:-1] + b',"seed":%s}' % each for each in (b"01", b"+1", b".5", b"1.", b"0x1", b"True")),
            *(text[:-1] + b',"user":"%s"}' % each for each in (b"\\ud800", b"\\x41", b"\\u12", b"\n", b"\\")),
        )
    )
    return Malformed(path, body, None)
