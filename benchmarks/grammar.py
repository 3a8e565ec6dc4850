"""Structured against free output in the demo model, and the time to compile schemas: `make bench-grammar`.

Decode of 1, 8 and 32 texts (prompt 32, 40 new tokens, temperature 1), free and under a JSON schema with
strings, numbers, enumerations and nested objects. Both take turns in one process; the best of several rounds
counts. A schema is compiled as the API process does it, and again with the vocabulary as the worker does it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher

from fastdeploy.config import ModelConfig
from fastdeploy.demo_model.model import resolve_model_path
from fastdeploy.grammar.matchers import Grammars
from fastdeploy.grammar.texts import json_schema_grammar
from fastdeploy.grammar.validation import LIMITS, require_valid_schema
from fastdeploy.grammar.vocabulary import grammar_vocabulary
from fastdeploy.tokenizer.tokenizer import Tokenizer

from .driver import Driver, engine_config
from .rows import CORES, Row, report

BATCHES = (1, 8, 32)
PROMPT, NEW = 32, 40
NUM_SCHEMAS = 300
#: A long list, so that no text ends early.
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["red", "green", "blue"]},
            "place": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "day": {"type": "string", "format": "date"}},
                "required": ["x", "day"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "size", "kind", "place"],
        "additionalProperties": False,
    },
}
GRAMMAR = json_schema_grammar(SCHEMA, compact=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = resolve_model_path("demo")
    config = engine_config(
        model, "bfloat16", max_num_seqs=max(BATCHES), max_model_len=256, max_num_batched_tokens=2048
    )
    tokenizer = Tokenizer.from_directory(model)
    vocabulary = grammar_vocabulary(tokenizer, ModelConfig.from_directory(model).vocab_size)
    grammars = Grammars(lambda: vocabulary, threads=CORES)
    grammars.matcher(GRAMMAR)
    driver = Driver(config, grammars)
    rows = [*decode_rows(driver, tokenizer, arguments.rounds), *compile_rows(vocabulary)]
    report(rows, "grammar")


def decode_rows(driver: Driver, tokenizer: Tokenizer, rounds: int) -> list[Row]:
    free = {"temperature": 1.0, "seed": 3}
    structured = {
        **free,
        "grammar": GRAMMAR,
        "end_token_ids": tokenizer.eos_token_ids,
    }
    rows = []
    for batch in BATCHES:
        best = {"free": 0.0, "structured": 0.0}
        for _ in range(rounds):
            for name, sampling in (("free", free), ("structured", structured)):
                timing = driver.decode(batch, PROMPT, NEW, **sampling)
                best[name] = max(best[name], timing.tokens_per_second)
        rows.append(Row(f"decode_b{batch}", "tokens/s", best["structured"], best["free"], "free output"))
    return rows


def compile_rows(vocabulary: Any) -> list[Row]:
    chance = random.Random(5)
    schemas = [small_schema(chance, 3) for _ in range(NUM_SCHEMAS)]

    def check(schema: dict[str, Any]) -> None:
        require_valid_schema(schema, "schema", json_schema_grammar)

    def compile_(schema: dict[str, Any]) -> None:
        matcher = LLMatcher(vocabulary, json_schema_grammar(schema), limits=LIMITS)
        matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()

    return [
        *percentiles("validate", check, schemas),
        *percentiles("compile_and_mask", compile_, schemas),
    ]


def percentiles(case: str, run: Callable[[dict[str, Any]], None], schemas: list[dict[str, Any]]) -> list[Row]:
    times = []
    for schema in schemas:
        started = time.perf_counter()
        run(schema)
        times.append(time.perf_counter() - started)
    return [Row(f"{case}_p{p}", "ms", float(np.percentile(times, p)) * 1000) for p in (50, 99)]


def small_schema(chance: random.Random, depth: int) -> dict[str, Any]:
    """Return a random schema of a few dozen keywords."""
    kinds = ["string", "integer", "number", "boolean", "enum", "date", "pattern"]
    match chance.choice(kinds if depth == 0 else ["object", "object", "array", *kinds]):
        case "object":
            names = [f"field_{chance.randrange(1000)}" for _ in range(chance.randint(1, 5))]
            properties = {name: small_schema(chance, depth - 1) for name in names}
            required = [name for name in properties if chance.random() < 0.7]
            return {"type": "object", "properties": properties, "required": required}
        case "array":
            return {
                "type": "array",
                "items": small_schema(chance, depth - 1),
                "maxItems": chance.randint(1, 20),
            }
        case "enum":
            return {"enum": [f"value {chance.randrange(100)}" for _ in range(chance.randint(1, 8))]}
        case "date":
            return {"type": "string", "format": chance.choice(["date", "date-time", "uuid", "email"])}
        case "pattern":
            return {"type": "string", "pattern": f"^[A-Z]{{2,{chance.randint(2, 9)}}}-[0-9]+$"}
        case "integer":
            return {"type": "integer", "minimum": chance.randint(-9, 9), "maximum": chance.randint(10, 10**6)}
        case kind:
            return {"type": kind}


if __name__ == "__main__":
    main()
