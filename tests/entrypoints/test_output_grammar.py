"""Grammars of whole outputs: what they let a model write, and what the parsers make of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fastdeploy.common.errors import RequestError
from fastdeploy.entrypoints.openai.output_grammar import output_grammar
from fastdeploy.entrypoints.openai.output_parsing import message_parser
from fastdeploy.entrypoints.openai.protocol import ChatRequest, SamplingDefaults
from fastdeploy.entrypoints.openai.served_model import ServedModel
from fastdeploy.grammar.texts import json_schema_grammar
from fastdeploy.parsers.formats import reasoning_format, tool_format
from fastdeploy.parsers.parts import Call, Reasoning
from fastdeploy.parsers.tool_format import ToolFormat

from ..parsers.reading import calls_of, content_of, parts_of

FORMATS = ("hermes", "llama3_json", "mistral", "deepseek", "pythonic")
#: The vocabulary: all bytes, then these tokens.
SPECIAL = ["<eos>", "<think>", "</think>", "[TOOL_CALLS]"]
EOS, BEGIN, END, _ = range(256, 256 + len(SPECIAL))
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = Call("weather", '{"city": "Rome", "days": 2}')
NOW = Call("now", "{}")


class Tokenizer:
    """The attributes of a tokenizer that grammars use, with bytes as tokens."""

    strips_first_space = False
    eos_token_ids = (EOS,)
    tokens: ClassVar = [*(bytes([byte]) for byte in range(256)), *map(str.encode, SPECIAL)]
    special_token_ids: ClassVar = list(range(256, 256 + len(SPECIAL)))
    eos_token_id = EOS
    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    def token_id(self, text: str) -> int | None:
        return 256 + SPECIAL.index(text) if text in SPECIAL else None

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def template_reads(self, name: str, template: str | None) -> bool:
        return True

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(self.tokens[token_id] for token_id in token_ids).decode()


def ids(text: str) -> list[int]:
    """Return the tokens of a text."""
    found: list[int] = []
    while text:
        special = next((each for each in SPECIAL if text.startswith(each)), None)
        found += list(text[0].encode()) if special is None else [256 + SPECIAL.index(special)]
        text = text[len(special or text[0]) :]
    return found


def served(parser: str | None = "hermes", reasoning: str | None = None) -> ServedModel:
    return cast(
        ServedModel,
        SimpleNamespace(
            tokenizer=Tokenizer(),
            tool_format=None if parser is None else tool_format(parser),
            reasoning_format=None if reasoning is None else reasoning_format(reasoning),
        ),
    )


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.parse({"messages": [{"role": "user", "content": "?"}], **fields}, SamplingDefaults())


def grammar_of(model: ServedModel, prompt: str = "", content: str | None = None, **fields: Any) -> str | None:
    return output_grammar(model, chat(**fields), ids(prompt), content)


VOCABULARY = LLTokenizer(TokenizerWrapper(Tokenizer()))


def accepts(grammar: str | None, text: str) -> bool:
    """Return True if the text is a whole output."""
    assert grammar is not None
    matcher = LLMatcher(VOCABULARY, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = ids(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def next_tokens(grammar: str | None, text: str) -> list[int]:
    assert grammar is not None
    matcher = LLMatcher(VOCABULARY, grammar)
    tokens = ids(text)
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    bits = matcher.compute_bitmask()
    return [token for token in range(256 + len(SPECIAL)) if bits[token // 8] >> token % 8 & 1]


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_follow_the_schemas(name: str) -> None:
    model, written = served(name), tool_format(name).render
    grammar = grammar_of(model, tools=TOOLS, tool_choice="required")
    for calls in ([WEATHER], [NOW], [WEATHER, NOW, WEATHER]):
        text = written(calls)
        assert accepts(grammar, text), text
        parser = message_parser(model, chat(tools=TOOLS, tool_choice="required"), [])
        assert parser is not None
        parts = parts_of(parser, text, range(len(text)))
        assert calls_of(parts) == calls
        assert content_of(parts) == ""
    for call in (Call("other", "{}"), Call("weather", "{}"), Call("weather", '{"city": 1}')):
        assert not accepts(grammar, written([call])), call
    assert not accepts(grammar, "")
    assert not accepts(grammar, "No.")


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_called_once(name: str) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    grammar = grammar_of(served(name), tools=TOOLS, tool_choice=choice)
    written = tool_format(name).render
    assert accepts(grammar, written([NOW]))
    assert not accepts(grammar, written([WEATHER]))
    assert not accepts(grammar, written([NOW, NOW]))


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_not_parallel_on_request(name: str) -> None:
    written = tool_format(name).render
    for choice in ("required", "auto"):
        grammar = grammar_of(served(name), tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        assert accepts(grammar, written([NOW]))
        assert not accepts(grammar, written([NOW, NOW]))
        assert accepts(grammar, "No.") == (choice == "auto")


@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_leave_the_choice_to_the_model(name: str) -> None:
    written = tool_format(name).render
    assert grammar_of(served(name), tools=TOOLS) is None
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}]
    grammar = grammar_of(served(name), tools=tools)
    assert accepts(grammar, "No. Or < what?")
    assert accepts(grammar, "")
    assert accepts(grammar, written([WEATHER]))
    assert not accepts(grammar, written([Call("weather", '{"city": 1}')]))
    if tool_format(name).opening:
        assert accepts(grammar, "I see.\n" + written([WEATHER]) + "\nDone.")


@pytest.mark.parametrize("name", FORMATS)
def test_a_constrained_content_leaves_calls_possible(name: str) -> None:
    content = json_schema_grammar({"const": {"done": True}})
    grammar = grammar_of(served(name), content=content, tools=TOOLS)
    assert accepts(grammar, '{"done": true}')
    assert accepts(grammar, tool_format(name).render([WEATHER]))
    assert not accepts(grammar, "No.")
    assert grammar_of(served(name), content=content) == content


def test_reasoning_comes_before_what_is_constrained() -> None:
    model = served("hermes", "qwen3")
    content = json_schema_grammar({"const": 1})
    for grammar, text in (
        (grammar_of(model, "<think>\n", content), "1"),
        (
            grammar_of(model, "<think>\n", tools=TOOLS, tool_choice="required"),
            tool_format("hermes").render([NOW]),
        ),
    ):
        assert accepts(grammar, f"Hm. So {{ it\n</think>\n\n{text}")
        assert not accepts(grammar, text)
        assert not accepts(grammar, "Hm.</think>No.")
    # A model that has not begun may reason or not.
    grammar = grammar_of(model, "", content)
    assert accepts(grammar, "<think>Hm.</think>1")
    assert accepts(grammar, "1")


@pytest.mark.parametrize("field", ["reasoning_max_tokens", "thinking_token_budget"])
def test_reasoning_ends_after_its_limit(field: str) -> None:
    model = served("mistral", "qwen3")
    fields: dict[str, Any] = {field: 5, "tools": TOOLS}
    grammar = grammar_of(model, "<think>\n", **fields)
    assert END in next_tokens(grammar, "abcd")
    assert len(next_tokens(grammar, "abcd")) > 100
    assert next_tokens(grammar, "abcde") == [END]
    for rest in ("", "A long content.", tool_format("mistral").render([NOW])):
        assert accepts(grammar, f"abcde</think>{rest}")
        assert accepts(grammar, f"ab</think>\n\n{rest}")
    started = grammar_of(model, **fields)
    assert next_tokens(started, "<think>abcde") == [END]
    assert accepts(started, "No thoughts.")
    none: dict[str, Any] = {field: 0}
    assert next_tokens(grammar_of(model, "<think>\n", **none), "") == [END]


def test_what_cannot_be_done_is_refused_with_its_field() -> None:
    with pytest.raises(RequestError, match="--reasoning-parser") as caught:
        grammar_of(served(), reasoning_max_tokens=5)
    assert caught.value.param == "reasoning_max_tokens"
    with pytest.raises(RequestError, match="--tool-call-parser") as caught:
        grammar_of(served(None), tools=TOOLS, parallel_tool_calls=False)
    assert caught.value.param == "tools"

    bad = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such"}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "bad", "parameters": bad}}]
    with pytest.raises(RequestError, match="no-such") as caught:
        grammar_of(served(), tools=tools, tool_choice="required")
    assert caught.value.param == "tools[2].function.parameters.properties.a"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"properties": 5},
        {"type": "object", "required": 5},
        {"type": "object", "properties": {"a": 5}},
        {"type": "OBJECT"},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, "b": {}},
        },
        {"$ref": "https://example.org/a"},
        {"properties": {"a": {"$ref": "#/$defs/none"}}},
        {"properties": {'"\\\n': {"type": "integer"}}},
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    ],
    ids=str,
)
def test_any_schema_has_a_grammar_or_is_refused(name: str, schema: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    try:
        grammar = grammar_of(served(name), tools=tools, tool_choice="required")
    except RequestError as error:
        place = error.param or ""
    else:
        place = "tools" if next_tokens(grammar, "") else ""
    assert place.startswith("tools")


def test_a_format_without_grammar_can_only_leave_the_choice_to_the_model() -> None:
    class Plain(ToolFormat):
        def parser(self) -> Any:
            return tool_format("hermes").parser()

        def render(self, calls: Any) -> str:
            return json.dumps(calls)

    model = served()
    model.tool_format = Plain()
    assert grammar_of(model, tools=TOOLS) is None
    with pytest.raises(RequestError, match="not supported by the server's --tool-call-parser"):
        grammar_of(model, tools=TOOLS, tool_choice="required")


def test_the_prompt_decides_whether_reasoning_has_begun() -> None:
    model = served(None, "qwen3")
    for prompt, is_inside in (("a<think>\n", True), ("<think>\n\n</think>\n\n", False), ("a", False)):
        parser = message_parser(model, chat(), ids(prompt))
        assert parser is not None
        assert (parts_of(parser, "Hm.") == [Reasoning("Hm.")]) == is_inside
