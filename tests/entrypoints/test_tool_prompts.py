"""Tools and earlier calls in prompts: in the chat template's own words, or as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fastdeploy.entrypoints.openai.protocol import ChatRequest, SamplingDefaults
from fastdeploy.entrypoints.openai.tool_prompt import with_written_tools
from fastdeploy.parsers.formats import tool_format
from fastdeploy.tokenizer.chat_template import compile_template
from fastdeploy.tokenizer.tokenizer import Tokenizer

from .conftest import TINY
from .scripted_replica import served_by
from .test_tool_calls import NOW, WEATHER, Replica

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
READS_TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + PLAIN
READS_CALLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}:{{ c.function.arguments USE }}){% endfor %}"
    "{% endfor %}"
)
USER = {"role": "user", "content": "Rome?"}


def called(*calls: tuple[str, Any], content: str | None = None) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ],
    }


def result(content: Any, name: str = "weather") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{name}", "content": content}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with served_by("writes 40", chat_template=PLAIN, tool_call_parser="hermes") as (served, port):
        yield Replica(served, port)


def prompt(replica: Replica, **fields: Any) -> str:
    """Return the prompt of a chat, which is also that of /tokenize."""
    body = {"messages": [USER], "tools": [WEATHER], **fields}
    ids = replica.chat(return_token_ids=True, **body)["choices"][0]["message"]["prompt_token_ids"]
    body.pop("tool_choice", None)
    answer = json.loads(replica.post("/tokenize", json.dumps(body).encode(), {})[1])
    if "tool_choice" not in fields:
        assert answer["tokens"] == ids
    return Tokenizer.from_directory(TINY).decode(ids, skip_special_tokens=False)


def test_a_template_without_tools_gets_them_in_the_system_message(replica: Replica) -> None:
    text = prompt(replica, tools=[WEATHER, NOW])
    lines = f"<tools>\n{json.dumps(WEATHER)}\n{json.dumps(NOW)}\n</tools>"
    assert text.startswith("[system]# Tools\n")
    assert lines in text
    assert "<tool_call>\n" in text
    assert text.endswith("[user]Rome?")
    text = prompt(replica, messages=[{"role": "developer", "content": "Be brief."}, USER])
    assert text.startswith("[system]Be brief.\n\n# Tools\n")
    for fields in ({"tool_choice": "none"}, {"tools": None}):
        assert prompt(replica, **fields) == "[user]Rome?"


def test_a_template_that_reads_tools_gets_them(replica: Replica) -> None:
    assert prompt(replica, chat_template=READS_TOOLS, tools=[WEATHER, NOW]) == "<weather><now>[user]Rome?"


@pytest.mark.parametrize("arguments", [{"city": "Rom é"}, '{"city": "Rom é"}'])
def test_calls_and_results_are_text_for_a_template_without_calls(replica: Replica, arguments: Any) -> None:
    messages = [
        USER,
        called(("weather", arguments), ("now", ""), content="Wait."),
        result([{"type": "text", "text": "sunny"}]),
        result("12:00", "now"),
        called(("now", {})),
        result("12:01", "now"),
    ]
    assert prompt(replica, messages=messages, tools=None) == (
        "[user]Rome?"
        "[assistant]Wait.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        "[user]<tool_response>\nsunny\n</tool_response>\n<tool_response>\n12:00\n</tool_response>"
        '[assistant]<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        "[user]<tool_response>\n12:01\n</tool_response>"
    )


@pytest.mark.parametrize(
    ("use", "shown"),
    [
        ("| tojson", '{"city": "Rom é"}'),
        # Of DeepSeek: the arguments as text.
        ("+ '!'", '{"city": "Rom é"}!'),
        ("~ '!'", '{"city": "Rom é"}!'),
        ("| string", '{"city": "Rom é"}'),
        (".city", "Rom é"),
        ("is mapping", "True"),
    ],
)
def test_templates_read_arguments_as_object_or_as_text(use: str, shown: str) -> None:
    render = compile_template(READS_CALLS.replace("USE", use))
    for arguments in ({"city": "Rom é"}, '{"city":"Rom é"}'):
        messages = templated([USER, called(("weather", arguments)), result("sunny")])
        text = render({"messages": messages})
        assert text == f"[user]Rome?[assistant](weather:{shown})[tool]sunny"


def test_arguments_that_are_no_object_stay_as_they_are() -> None:
    render = compile_template(READS_CALLS.replace("USE", ""))
    assert render({"messages": templated([called(("weather", "{broken"))])}) == "[assistant](weather:{broken)"


def test_a_template_of_the_client_reads_calls_too(replica: Replica) -> None:
    messages = [USER, called(("weather", {"city": "Rom"})), result("sunny")]
    text = prompt(replica, messages=messages, chat_template=READS_CALLS.replace("USE", "+ ''"), tools=None)
    assert text == '[user]Rome?[assistant](weather:{"city": "Rom"})[tool]sunny'


def templated(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return ChatRequest.parse({"messages": messages}, SamplingDefaults()).messages


@pytest.mark.parametrize("name", ["llama3_json", "pythonic", "mistral", "deepseek"])
def test_the_system_message_tells_the_format_of_the_parser(name: str) -> None:
    [system, user] = with_written_tools([USER], [WEATHER], tool_format(name))
    assert system["content"].partition("</tools>\n\n")[2] == tool_format(name).instruction
    assert user == USER
