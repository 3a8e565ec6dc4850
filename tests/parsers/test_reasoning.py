"""Separation of reasoning from content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.parsers.formats import reasoning_format, tool_format
from fastdeploy.parsers.message import MessageParser
from fastdeploy.parsers.parts import Call, Content, Reasoning
from fastdeploy.parsers.reasoning import ReasoningSplitter

from .reading import calls_of, content_of, parts_of

WORDS = (
    *("<think>", "</think>", "<response>", "</response>", "<think", "</", "hello", " ", "\n", "é好"),
    *("<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}'),
)


def parser(name: str, *, is_inside: bool = False, in_one_piece: bool = False) -> MessageParser:
    splitter = ReasoningSplitter(reasoning_format(name), is_inside=is_inside, in_one_piece=in_one_piece)
    return MessageParser(splitter, tool_format("hermes").parser())


@pytest.mark.parametrize("name", ["qwen3", "ernie-x1"])
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=12),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
    is_inside=st.booleans(),
    in_one_piece=st.booleans(),
)
def test_any_text_has_the_same_parts_for_every_cut(
    name: str, words: list[str], cuts: list[int], is_inside: bool, in_one_piece: bool
) -> None:
    text = "".join(words)
    whole = parts_of(parser(name, is_inside=is_inside), text)
    for places in ([cut % (len(text) + 1) for cut in cuts], range(len(text) + 1)):
        again = parser(name, is_inside=is_inside, in_one_piece=in_one_piece)
        assert parts_of(again, text, places) == whole


@pytest.mark.parametrize(
    ("name", "is_inside", "text", "reasoning", "content"),
    [
        ("qwen3", False, "<think>\nHm.\n</think>\n\nHello", "Hm.", "Hello"),
        ("qwen3", True, "Hm.\n</think>\n\nHello", "Hm.", "Hello"),
        ("qwen3", False, "  Hello <think>", None, "  Hello <think>"),
        ("qwen3", False, "<think>\n\n</think>\n\nHello", None, "Hello"),
        # The output was too long for its limit.
        ("deepseek_r1", True, "Hm. </thin", "Hm. </thin", ""),
        ("ernie-x1", True, "Hm.</think>\n\n<response>\nHello\n</response>\n", "Hm.", "Hello"),
        ("ernie-x1", True, "Hm.</think>Hello", "Hm.", "Hello"),
        ("ernie-45-vl-thinking", True, "Hm.</think><response>a", "Hm.", "<response>a"),
    ],
)
def test_what_models_write(
    name: str, is_inside: bool, text: str, reasoning: str | None, content: str
) -> None:
    parts = parts_of(parser(name, is_inside=is_inside), text)
    assert [part.text for part in parts if isinstance(part, Reasoning)] == (
        [] if reasoning is None else [reasoning]
    )
    assert content_of(parts) == content or content_of(parts).strip() == content


def test_calls_follow_the_reasoning_and_are_none_inside_of_it() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"I could {call}.</think>\n<response>\nYes.\n</response>\n{call}"
    parts = parts_of(parser("ernie-x1", is_inside=True), text)
    assert parts[:2] == [Reasoning(f"I could {call}."), Content("Yes.")]
    assert calls_of(parts) == [Call("f", "{}")]


def test_reasoning_in_one_piece_comes_at_its_end() -> None:
    splitter = ReasoningSplitter(reasoning_format("qwen3"), is_inside=True, in_one_piece=True)
    assert splitter.push("Hm. ") == ("", "")
    assert splitter.push("Yes.</think> a") == ("Hm. Yes.", "a")
