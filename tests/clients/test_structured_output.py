"""No wrong JSON gets through: a random model's output is valid for every schema, as jsonschema judges."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI

from .conftest import System

_SHORT = {"type": "string", "maxLength": 5}
_POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def _closed(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    """Return the schema of an object without further properties."""
    required = [name for name in properties if name not in optional]
    closed = {"type": "object", "properties": properties, "required": required}
    return {**closed, "additionalProperties": False, **more}


#: Small, so that a random model reaches the end of most of them.
SCHEMAS: dict[str, Any] = {
    "integers": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 12},
    "multiples": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 7},
    "numbers": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "true and false": {"type": "boolean"},
    "null": {"type": "null"},
    "strings": {"type": "string", "minLength": 3, "maxLength": 6},
    "patterns": {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"},
    "patterns with characters of several bytes": {"type": "string", "pattern": "^[é好]{1,4}😀$"},
    "dates": {"type": "string", "format": "date"},
    "times": {"type": "string", "format": "date-time"},
    "ids": {"type": "string", "format": "uuid"},
    "addresses": {"type": "string", "format": "ipv4"},
    "one of some values": {"enum": ["a", 1, None, True, {"b": []}, 'quo"te', "\\ \n"]},
    "constants": {"const": {"a": [1, "é", {"b": None}]}},
    "types": {"type": ["integer", "null", "boolean"]},
    "arrays": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "empty arrays": {"type": "array", "maxItems": 0},
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 9}, {"const": "x"}],
        "items": False,
        "minItems": 2,
    },
    "arrays of arrays": {
        "type": "array",
        "maxItems": 2,
        "items": {"type": "array", "maxItems": 2, "items": {"enum": [0, 1]}},
    },
    "objects": _POINT,
    "optional properties": _closed({"a": {"const": 1}, "b": _SHORT, "c": {"type": "null"}}, "a", "c"),
    "names to escape": _closed({'a"b\\': {"const": 1}, "é好": {"const": 2}, " ": {"const": 3}}),
    "nested objects": _closed({"from": _POINT, "to": _closed({"name": _SHORT, "at": _POINT}, "at")}),
    "any of": {"anyOf": [_POINT, {"type": "integer"}, _closed({"name": _SHORT})]},
    "one of, told apart by a constant": {
        "oneOf": [
            _closed({"kind": {"const": "circle"}, "radius": {"type": "integer"}}),
            _closed({"kind": {"const": "square"}, "side": {"type": "integer"}}),
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]},
    "references": {
        "$defs": {"point": _POINT},
        **_closed({"a": {"$ref": "#/$defs/point"}, "b": {"$ref": "#/$defs/point"}}),
    },
    "recursion": {
        "$defs": {"tree": _closed({"v": {"enum": [0, 1]}, "next": {"$ref": "#/$defs/tree"}}, "next")},
        "$ref": "#/$defs/tree",
    },
    "maps": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
        "propertyNames": {"pattern": "^[a-b]{1,2}$"},
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[ab]$": {"enum": [1, 2]}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "anything that is required": _closed({"a": {"type": "array", "maxItems": 1, "items": {"enum": [{}]}}}),
}
#: These are answered with 400, because the grammar engine does not know a keyword.
REFUSED = {"maps"}


@pytest.fixture(scope="module")
def client(system: System) -> OpenAI:
    return system.openai()


@pytest.mark.parametrize("number", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_output_of_a_random_model_is_valid_for_its_schema(client: OpenAI, number: int) -> None:
    def texts(schema: Any, seed: int) -> tuple[list[str], int]:
        fields = {"guided_json": schema, "guided_whitespace_pattern": " ?"}
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            n=2,
            seed=seed,
            max_tokens=200,
            extra_body=fields,
        )
        ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
        return [choice.message.content or "" for choice in ended], len(answer.choices)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = {
            name: [pool.submit(texts, schema, seed) for seed in range(number // 2)]
            for name, schema in SCHEMAS.items()
        }
    ended = wanted = 0
    refused = {name for name, results in found.items() if results[0].exception() is not None}
    assert refused == REFUSED, [str(found[name][0].exception()) for name in refused]
    for name in found.keys() - REFUSED:
        validator = Draft202012Validator(SCHEMAS[name], format_checker=Draft202012Validator.FORMAT_CHECKER)
        for result in found[name]:
            said, count = result.result()
            wanted += count
            ended += len(said)
            for text in said:
                assert validator.is_valid(json.loads(text)), f"{name}: {text}"
    assert ended > 0.8 * wanted
