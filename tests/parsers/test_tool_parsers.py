"""Parsers of tool calls: what they find does not depend on how the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.parsers.formats import tool_format
from fastdeploy.parsers.parts import Call, CallEnd, Content
from fastdeploy.parsers.tool_format import ToolFormat

from .reading import calls_of, content_of, read

NAMES = ("hermes", "llama3_json", "mistral", "deepseek", "pythonic")
DEEPSEEK_V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
#: Pieces of texts that are calls, or nearly.
WORDS = (
    *("<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"name": "f"}', "[", "]", "{", "}"),
    *(
        '{"a": [1, "}"]}',
        '"x\\"y"',
        "'",
        ",",
        ";",
        " ",
        "\n",
        "hello",
        "<",
        "</",
        "null",
        "f(a=1)",
        "g(",
        ")",
    ),
    *("[TOOL_CALLS]", "f[ARGS]", "<|python_tag|>", '"parameters": {}', "```", "```json\n", "é好"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>f\n", "<｜tool▁sep｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab}]'\"\\", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: Call(name, json.dumps(arguments, ensure_ascii=False)),
        st.sampled_from(("f", "get_weather", "a_1")),
        st.dictionaries(st.sampled_from(("a", "b_c", "unit")), VALUES, max_size=3),
    ),
    min_size=1,
    max_size=3,
)
CUTS = st.lists(st.integers(0, 10_000), max_size=30)


def places(cuts: list[int], text: str) -> list[int]:
    return [cut % (len(text) + 1) for cut in cuts]


def decoded(calls: list[Call]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", NAMES)
@given(words=st.lists(st.sampled_from(WORDS), max_size=12), cuts=CUTS)
def test_any_text_has_the_same_parts_for_every_cut(name: str, words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    parts = read(tool_format(name), text)
    assert read(tool_format(name), text, places(cuts, text)) == parts
    assert read(tool_format(name), text, range(len(text) + 1)) == parts
    if not calls_of(parts):
        assert content_of(parts) == text


@pytest.mark.parametrize("name", NAMES)
@given(calls=CALLS, cuts=CUTS)
def test_rendered_calls_are_found_again(name: str, calls: list[Call], cuts: list[int]) -> None:
    text = tool_format(name).render(calls)
    parts = read(tool_format(name), text, places(cuts, text))
    assert decoded(calls_of(parts)) == decoded(calls)
    assert content_of(parts) == ""


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "hello", "hello", []),
        ("hermes", " \n", " \n", []),
        (
            "hermes",
            'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>\n',
            "Let me see.",
            [("f", '{"a": "</tool_call>"}')],
        ),
        # SmolLM2 has a list in the tag.
        (
            "hermes",
            '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]</tool_call>',
            "",
            [("f", "{}"), ("g", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
        # Half of a surrogate pair is no character.
        (
            "hermes",
            r'<tool_call>{"arguments": {"a": "\ud83d"}, "name": "f"}</tool_call>',
            "",
            [("f", r'{"a": "\ud83d"}')],
        ),
        (
            "hermes",
            r'<tool_call>{"name": "\ud83d"}</tool_call>',
            r'<tool_call>{"name": "\ud83d"}</tool_call>',
            [],
        ),
        ("pythonic", r"[f(a='\ud83d\ude00 \ud83d')]", "", [("f", '{"a": "😀 �"}')]),
        # A bracket is missing.
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call><tool_call>{"name": "g"}</tool_call>',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        # The output was too long for its limit.
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool', "", [("f", "{}")]),
        ("deepseek", DEEPSEEK_V31[:-3], "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ("hermes", "a <tool_call>{no JSON}</tool_call> b", "a <tool_call>{no JSON}</tool_call> b", []),
        ("hermes", "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        # What has begun as a call stays one, as in OpenAI's API, where arguments may be invalid too.
        ("hermes", '<tool_call>{"name": "f", "arguments": {\'a\'}}</tool_call> b', " b", [("f", "{'a'}}")]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (
            "llama3_json",
            '{"name": "f", "parameters": {}}; {"type": "function", "name": "g", "parameters": {"b": 2}}',
            "",
            [("f", "{}"), ("g", '{"b": 2}')],
        ),
        ("llama3_json", 'See: <|python_tag|>{"name": "f", "parameters": {}}', "See:", [("f", "{}")]),
        ("llama3_json", "a <|python_tag|>print(1)", "a <|python_tag|>print(1)", []),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", 'See {"name": "f", "parameters": {}}', 'See {"name": "f", "parameters": {}}', []),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (
            "mistral",
            'a[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}',
            "a",
            [("f", '{"a": 1}'), ("g", '{"b": 2}')],
        ),
        ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        ("deepseek", f"a {DEEPSEEK_V31}", "a", [("f", "{}")]),
        ("deepseek", "<｜tool▁calls▁begin｜>nothing", "<｜tool▁calls▁begin｜>nothing", []),
        (
            "pythonic",
            "[f(a=1, b='x)]', c={'k': [True, null]}), g()]",
            "",
            [("f", '{"a": 1, "b": "x)]", "c": {"k": [true, null]}}'), ("g", "{}")],
        ),
        ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", "", [("f", '{"a": 1}')]),
        ("pythonic", "<|python_start|>f", "<|python_start|>f", []),
        ("pythonic", "[1, 2]", "[1, 2]", []),
        ("pythonic", "[f(1)]", "[f(1)]", []),
        ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
        ("pythonic", "[see f(a) there]", "[see f(a) there]", []),
    ],
)
def test_what_models_write(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    parts = read(tool_format(name), text)
    assert content_of(parts) == content
    assert calls_of(parts) == [Call(*call) for call in calls]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"path": "a", "text": "b"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"path": "a", "text": "b"}'),
    ],
)
def test_arguments_come_as_they_are_written(name: str, text: str) -> None:
    parser = tool_format(name).parser()
    begun = parser.push(text[: text.index('"path"')])
    assert calls_of([*begun, CallEnd(0)]) == [Call("f", "{")]
    parts: list[Any] = parser.push('"path"')
    assert [part.text for part in parts] == ['"path"']


def test_content_comes_as_it_is_written() -> None:
    parser = tool_format("hermes").parser()
    assert parser.push("Hello ") == [Content("Hello")]
    assert parser.push("you <") == [Content(" you")]
    assert parser.push("b") == [Content(" <b")]


def test_long_output_is_parsed_in_linear_time() -> None:
    """Each character is looked at a few times; otherwise this would take minutes."""
    formats: list[tuple[ToolFormat, str]] = [
        (tool_format("hermes"), '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 200_000),
        (tool_format("hermes"), '<tool_call>{"x": "' + "y" * 200_000),
        (tool_format("pythonic"), "[f(a=" + "1" * 100_000),
    ]
    for each, text in formats:
        parser = each.parser()
        for start in range(0, len(text), 4):
            parser.push(text[start : start + 4])
        parser.push("", finished=True)
