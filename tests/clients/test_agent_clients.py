"""Clients of agents, which are large packages: `make test-clients` installs them and runs this file."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from .conftest import System

pytestmark = pytest.mark.clients

MESSAGES = [{"role": "user", "content": "the quick brown"}]


@pytest.fixture(scope="module")
def options(system: System) -> dict[str, Any]:
    return {
        "model": "openai/tiny",
        "messages": MESSAGES,
        "api_base": system.base_url,
        "api_key": "none",
        "max_tokens": 12,
        "seed": 4,
        "num_retries": 0,
    }


@pytest.fixture(scope="module")
def litellm() -> Any:
    # Otherwise it downloads a list of prices.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    return pytest.importorskip("litellm")


def test_litellm_reads_a_chat_whole_and_streamed(litellm: Any, options: dict[str, Any]) -> None:
    whole = litellm.completion(**options, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.content) == 12
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert built.usage.completion_tokens == 12


def test_litellm_reads_a_completion(litellm: Any, options: dict[str, Any]) -> None:
    rest = {key: value for key, value in options.items() if key != "messages"}
    rest["model"] = "text-completion-openai/tiny"
    answer = litellm.text_completion(**rest, prompt="the quick", echo=True)
    assert answer.choices[0].text.startswith("the quick")


def test_litellm_raises_its_exceptions_for_errors(litellm: Any, options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="top_p is 2; it must be between 0 and 1"):
        litellm.completion(**options, top_p=2)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**options, "messages": [{"role": "user", "content": "a" * 5000}]})


def test_litellm_reads_a_forced_call_whole_and_streamed(litellm: Any, options: dict[str, Any]) -> None:
    parameters = {
        "type": "object",
        "properties": {"zone": {"enum": ["UTC", "CET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    options = {**options, "tools": [tool], "tool_choice": "required", "max_tokens": 400}
    options["parallel_tool_calls"] = False
    [whole] = litellm.completion(**options).choices[0].message.tool_calls
    assert whole.function.name == "now"
    assert json.loads(whole.function.arguments)["zone"] in ("UTC", "CET")
    chunks = list(litellm.completion(**options, stream=True))
    [streamed] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert streamed.function == whole.function


def agent_of(system: System, **options: Any) -> Any:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=system.base_url, api_key="none"))
    return pydantic_ai.Agent(model, **options)


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    number: int = Field(ge=0, le=99)


def test_pydantic_ai_returns_the_callers_type_by_a_forced_call(system: System) -> None:
    agent = agent_of(system, output_type=Verdict, model_settings={"max_tokens": 400, "seed": 4})
    assert isinstance(agent.run_sync("the quick brown").output, Verdict)


def test_pydantic_ai_talks_and_remembers(system: System) -> None:
    agent = agent_of(system, model_settings={"max_tokens": 12, "seed": 4})
    first = agent.run_sync("the quick brown")
    assert first.usage.output_tokens == 12
    second = agent.run_sync("fox", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens
