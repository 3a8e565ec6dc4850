"""Tool calls and reasoning as the public conformance suite canitoolcall expects them, over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from canitoolcall.checks import case_status, run_checks
from canitoolcall.fixtures import Fixture, load_family, load_fixtures
from canitoolcall.results import Observation, ParsedToolCall, ParseResult, Status

from ..entrypoints.scripted_replica import serving

WORKER = [sys.executable, str(Path(__file__).with_name("repeating_worker.py"))]
#: The worker repeats the prompt up to the padding token; parsers see the whole prompt.
TEMPLATE = "{{ messages[-1].content }}<pad>{{ begun }}"
#: Family -> values of --tool-call-parser and --reasoning-parser.
PARSERS = {
    "qwen3-hermes": ("hermes", "qwen3"),
    "llama": ("llama3_json", None),
    "llama pythonic": ("pythonic", None),
    "mistral": ("mistral", None),
    "deepseek": ("deepseek", "deepseek_r1"),
}
#: Formats without a parser: DeepSeek's XML, Mistral's reasoning.
WITHOUT_PARSER = {
    *("x-deepseek-v32", "x-deepseek-v4", "x-deepseek-v41"),
    *("x-think-special-token", "x-think-text"),
}
#: As in OpenAI's API, a call is delivered as it comes, also if its arguments turn out to be incomplete.
DELIVERED_EARLY = {
    "qwen3-hermes/vllm-invalid-json-missing-brace",
    "deepseek/vllm-v3-malformed-missing-brace",
}


@pytest.mark.parametrize("name", PARSERS)
def test_calls_and_reasoning_are_as_the_conformance_suite_expects(name: str) -> None:
    tool_parser, reasoning_parser = PARSERS[name]
    options = {"tool_call_parser": tool_parser, "reasoning_parser": reasoning_parser}
    fixtures = [fixture for fixture in load_fixtures(None) if belongs(fixture, name)]
    family = load_family(fixtures[0].family)
    faults = []
    with (
        serving(WORKER, chat_template=TEMPLATE, **options) as (_, port),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        for number, fixture in enumerate(fixtures):
            seen = Observation(whole(client, fixture), {"rand:1:5": streamed(client, fixture, number % 4)})
            rows = run_checks(fixture, family, seen)
            if case_status(rows) is Status.FAIL:
                faults += [f"{fixture.id}: {row.detail}" for row in rows if row.status is Status.FAIL]
    assert not faults, "\n".join(faults)


def belongs(fixture: Fixture, name: str) -> bool:
    family, _, kind = name.partition(" ")
    tags = set(fixture.tags)
    if fixture.family != family or tags & WITHOUT_PARSER or fixture.id in DELIVERED_EARLY:
        return False
    is_cut_off = "truncated" in tags
    return not is_cut_off and (family != "llama" or ("x-llama-pythonic" in tags) == (kind == "pythonic"))


def request_of(fixture: Fixture) -> dict[str, Any]:
    begun = "<think>\n" if "reasoning-prefilled" in fixture.tags else ""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": fixture.raw_output}],
        "tools": list(fixture.tools) or openai.omit,
        "extra_body": {"chat_template_kwargs": {"begun": begun}},
    }


def whole(client: openai.OpenAI, fixture: Fixture) -> ParseResult:
    message = client.chat.completions.create(**request_of(fixture), seed=0).choices[0].message
    calls = [
        ParsedToolCall(call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
        if call.type == "function"
    ]
    return ParseResult(message.content, getattr(message, "reasoning_content", None), tuple(calls))


def streamed(client: openai.OpenAI, fixture: Fixture, seed: int) -> ParseResult:
    content = reasoning = ""
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**request_of(fixture), seed=seed, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            call = calls.setdefault(part.index, ["", ""])
            if part.function is not None:
                call[0] += part.function.name or ""
                call[1] += part.function.arguments or ""
    assert list(calls) == list(range(len(calls)))
    return ParseResult(content, reasoning, tuple(ParsedToolCall(*call) for call in calls.values()))
