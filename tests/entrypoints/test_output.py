"""ChoiceOutput: text does not depend on how its tokens arrive, and stop strings are not shown."""

import codecs
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.messages import Logprobs, TokenOutput
from fastdeploy.common.request import FinishReason
from fastdeploy.entrypoints.openai.output import ChoiceOutput, Delta, ReplayMismatch


class ByteDetokenizer:
    """Token ids are the bytes of UTF-8 text; a character appears with its last byte."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(bytes(token_ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def run(groups: list[list[int]], finish: FinishReason, **options: Any) -> tuple[ChoiceOutput, list[Delta]]:
    choice = ChoiceOutput(ByteDetokenizer(), **options)
    deltas = []
    for index, group in enumerate(groups):
        logprobs = [Logprobs(token_id=t, logprob=-0.5, top=[]) for t in group]
        reason = finish if index == len(groups) - 1 else None
        deltas.append(choice.push(TokenOutput("r", group, reason, logprobs)))
        if choice.finish_reason:
            break
    return choice, deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


alphabet = st.text(alphabet="abcé好", max_size=30)
stops = st.lists(st.text(alphabet="abcé好", min_size=1, max_size=4), max_size=3).map(tuple)


@given(data=st.data(), text=alphabet, stop=stops, include=st.booleans(), min_tokens=st.integers(0, 10))
def test_grouping_never_changes_text_tokens_or_finish_reason(
    data: st.DataObject, text: str, stop: tuple[str, ...], include: bool, min_tokens: int
) -> None:
    ids = list(text.encode())
    options: dict[str, Any] = {"stop": stop, "include_stop": include, "min_tokens": min_tokens}
    whole, whole_deltas = run([ids], FinishReason.LENGTH, **options)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))))
    groups = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    parts, part_deltas = run(groups, FinishReason.LENGTH, **options)

    assert text_of(part_deltas) == text_of(whole_deltas)
    assert parts.finish_reason == whole.finish_reason
    assert parts.num_tokens == whole.num_tokens
    for name in ("token_ids", "logprobs"):
        assert [x for d in part_deltas for x in getattr(d, name)] == [
            x for d in whole_deltas for x in getattr(d, name)
        ]


@given(data=st.data(), text=alphabet, stop=stops, include=st.booleans(), min_tokens=st.integers(0, 10))
def test_resumed_choice_continues_like_the_original(
    data: st.DataObject, text: str, stop: tuple[str, ...], include: bool, min_tokens: int
) -> None:
    """Wherever the cut is, no byte and no log probability is repeated or lost."""
    ids = list(text.encode())
    options: dict[str, Any] = {"stop": stop, "include_stop": include, "min_tokens": min_tokens}
    whole, deltas = run([[i] for i in ids] or [[]], FinishReason.LENGTH, **options)
    cut = data.draw(st.integers(0, max(0, len(deltas) - 1)))
    with_logprobs = data.draw(st.booleans())

    choice = ChoiceOutput(ByteDetokenizer(), **options)
    said = choice.replay(ids[:cut], with_logprobs=with_logprobs)
    assert [(each.text, each.token_ids) for each in said] == [
        (each.text, each.token_ids) for each in deltas[:cut] if each
    ]
    assert choice.num_tokens == cut
    rest = ids[cut - choice.num_repeated :]
    more = []
    for index, i in enumerate(rest):
        reason = FinishReason.LENGTH if index == len(rest) - 1 else None
        more.append(choice.push(TokenOutput("r", [i], reason, [Logprobs(i, -0.5, [])])))
        if choice.finish_reason:
            break
    if rest:
        assert choice.finish_reason == whole.finish_reason
        assert choice.token_ids == whole.token_ids
        ahead = deltas[cut:]
        assert text_of(more) == text_of(ahead)
        assert [i for d in more for i in d.token_ids] == [i for d in ahead for i in d.token_ids]
        if with_logprobs:
            assert [e for d in more for e in d.logprobs] == [e for d in ahead for e in d.logprobs]


def test_tokens_with_a_stop_string_cannot_be_resumed() -> None:
    choice = ChoiceOutput(ByteDetokenizer(), stop=("END",))
    with pytest.raises(ReplayMismatch):
        choice.replay(list(b"the END"), with_logprobs=False)


def test_a_token_that_is_drawn_again_must_be_the_same() -> None:
    choice = ChoiceOutput(ByteDetokenizer(), stop=("END",))
    choice.replay(list(b"the EN"), with_logprobs=True)
    assert choice.num_repeated == 2
    assert not choice.push(TokenOutput("r", list(b"E")))
    with pytest.raises(ReplayMismatch, match=r"token 78 .* token 77"):
        choice.push(TokenOutput("r", list(b"M")))


@given(text=alphabet, stop=stops)
def test_a_stop_string_never_leaks_nor_does_a_piece_of_it(text: str, stop: tuple[str, ...]) -> None:
    choice, deltas = run([[b] for b in text.encode()] or [[]], FinishReason.LENGTH, stop=stop)
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    if ends:
        first = min(ends)
        starts = [text.find(s) for s in stop if s in text and text.find(s) + len(s) == first]
        assert text_of(deltas) == text[: min(starts)]
        assert choice.finish_reason is FinishReason.STOP
    else:
        assert text_of(deltas) == text
        assert choice.finish_reason is FinishReason.LENGTH
    assert not any(s in text_of(deltas) for s in stop)


@given(text=alphabet, stop=stops)
def test_logprobs_stand_for_the_bytes_that_were_delivered(text: str, stop: tuple[str, ...]) -> None:
    _, deltas = run([[b] for b in text.encode()] or [[]], FinishReason.LENGTH, stop=stop)
    assert bytes(entry.token_id for d in deltas for entry in d.logprobs).decode() == text_of(deltas)


def test_text_that_cannot_become_a_stop_string_is_delivered_at_once() -> None:
    choice = ChoiceOutput(ByteDetokenizer(), stop=("END",))
    assert choice.push(TokenOutput("r", list(b"hello E"))).text == "hello "
    assert choice.push(TokenOutput("r", list(b"N"))).text == ""
    assert choice.push(TokenOutput("r", list(b"G"))).text == "ENG"


def test_the_stop_string_is_kept_when_asked_for() -> None:
    _, deltas = run([list(b"one. two.")], FinishReason.LENGTH, stop=(".",), include_stop=True)
    assert text_of(deltas) == "one."


def test_a_stop_token_is_counted_but_not_shown() -> None:
    choice, deltas = run([list(b"hi"), list(b"!")], FinishReason.STOP)
    assert (text_of(deltas), choice.num_tokens) == ("hi", 3)
    assert [i for d in deltas for i in d.token_ids] == list(b"hi!")
    assert [e.token_id for d in deltas for e in d.logprobs] == list(b"hi")


def test_character_cut_by_the_length_limit_becomes_a_replacement() -> None:
    _, deltas = run([[*b"a", *"好".encode()[:2]]], FinishReason.LENGTH)
    assert text_of(deltas) == "a\N{REPLACEMENT CHARACTER}"


def test_stop_strings_before_min_tokens_are_plain_text() -> None:
    _, deltas = run([[b] for b in b"a.b.c"], FinishReason.LENGTH, stop=(".",), min_tokens=3)
    assert text_of(deltas) == "a.b"


def test_error_releases_withheld_text() -> None:
    choice = ChoiceOutput(ByteDetokenizer(), stop=("END",))
    choice.push(TokenOutput("r", list(b"EN")))
    delta = choice.push(TokenOutput("r", [], FinishReason.ERROR, message="out of memory"))
    assert (delta.text, delta.finish_reason) == ("EN", FinishReason.ERROR)
