"""Marks and resumptions: decoding returns what was encoded, and refuses anything else."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import RequestError
from fastdeploy.common.resumption import (
    Delivered,
    Resumption,
    decode_resumption,
    encode_resumption,
    mark,
    marks_of,
)

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
events = st.lists(st.tuples(st.integers(0, 3), ids), max_size=20)
deliveries = st.builds(Delivered, ids, st.booleans())
resumptions = st.builds(
    Resumption,
    st.text(),
    st.binary(),
    st.text(),
    st.integers(0, 2**35),
    st.dictionaries(st.integers(0, 300), deliveries),
)


def test_a_mark_is_a_comment_line_of_server_sent_events() -> None:
    assert mark(0) == b": fd 0\n"
    assert mark(12, [345, 346]) == b": fd 12 345 346\n"
    assert mark(0, [2], finished=True) == b": fd 0 2 .\n"
    assert mark(1, finished=True) == b": fd 1 .\n"


@given(events=events, finished=st.sets(st.integers(0, 3)))
def test_marks_add_up_to_the_tokens_of_each_choice(
    events: list[tuple[int, list[int]]], finished: set[int]
) -> None:
    expected: dict[int, list[int]] = {}
    for choice, tokens in events:
        expected.setdefault(choice, []).extend(tokens)
    last = {choice: index for index, (choice, _) in enumerate(events)}
    lines = [
        mark(choice, tokens, finished=choice in finished and index == last[choice])
        for index, (choice, tokens) in enumerate(events)
    ]
    assert marks_of(line.removeprefix(b": fd ").removesuffix(b"\n") for line in lines) == {
        choice: Delivered(tokens, choice in finished) for choice, tokens in expected.items()
    }


@pytest.mark.parametrize("line", [b"", b"x", b"0 x", b"0 . 1", b"0 1.5"])
def test_invalid_mark_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whatever its words)
        marks_of([b"0 1", line])


@given(resumptions)
def test_a_resumption_arrives_as_it_was_sent(resumption: Resumption) -> None:
    assert decode_resumption(encode_resumption(resumption)) == resumption


@given(st.binary() | st.integers(-(2**63), 2**64 - 1).map(msgspec.msgpack.encode))
def test_anything_else_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode_resumption(data)
    assert "\n" not in str(caught.value)


def test_the_router_gets_it_without_paddle() -> None:
    code = "import sys, fastdeploy.common.resumption; sys.exit(bool({'paddle', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
