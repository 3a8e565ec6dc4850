"""The transcript of a stream: enough to resume it elsewhere, with nothing lost or altered."""

import json
import tracemalloc
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdeploy.common.resumption import Delivered, mark
from fastdeploy.daemon.router.relay.transcript import MAX_TOKENS, Lines, Transcript

from ..pieces import pieces_of

DONE = b"data: [DONE]\n\n"
SIGN = b":\n\n"


class Said(NamedTuple):
    """An event as a replica sends it."""

    text: str
    choice: int = 0
    tokens: tuple[int, ...] = (1,)
    finished: bool = False
    #: Number of signs of life before the event.
    signs: int = 0
    #: Type in a line before the data, as in streams of /v1/responses.
    kind: str = ""

    @property
    def clean(self) -> bytes:
        data = {"id": "x", "created": 5, "choices": [{"index": self.choice, "text": self.text}]}
        kind = f"event: {self.kind}\n" if self.kind else ""
        return b"%bdata: %b\n\n" % (kind.encode(), json.dumps(data, ensure_ascii=False).encode())

    @property
    def raw(self) -> bytes:
        line = mark(self.choice, self.tokens, finished=self.finished)
        return SIGN * self.signs + self.clean[:-1] + line + b"\n"


def delivered(said: list[Said]) -> dict[int, Delivered]:
    """Compute the delivered tokens from the definition of marks."""
    choices: dict[int, Delivered] = {}
    for each in said:
        before = choices.get(each.choice, Delivered([]))
        choices[each.choice] = Delivered([*before.tokens, *each.tokens], before.finished or each.finished)
    return choices


events = st.builds(
    Said,
    # A model may write anything, marks and ends of streams included.
    st.text(max_size=8) | st.sampled_from([": fd 0 1", "\n: fd 0 1 .\n\n", "data: [DONE]\n\n", ":\n\n"]),
    st.integers(0, 3),
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from(["", "response.output_text.delta"]),
)
streams = st.lists(events, min_size=1, max_size=12)
cuts = st.lists(st.integers(0, 4000), max_size=30)


@given(streams, cuts, st.integers(0, 5), st.integers(0, 4000))
@example([Said("a"), Said("b", signs=4)], [], 0, 0)
def test_output_is_the_stream_without_marks_and_keep_alives(
    stream: list[Said], cuts: list[int], signs: int, end: int
) -> None:
    """For any split and any cut, the output has whole events, and tokens for exactly those."""
    data = b"".join(each.raw for each in stream) + SIGN * signs
    data = data[: len(data) - end % len(data)]
    transcript = Transcript()
    out = b"".join(map(transcript.feed, pieces_of(data, cuts)))
    whole = [i for i in range(len(stream)) if len(b"".join(s.raw for s in stream[: i + 1])) <= len(data)]
    come = stream[: len(whole)]
    assert out == b"".join(each.clean for each in come)
    resumption = transcript.resumption("/v1/completions", b"{}")
    if not come:
        assert resumption is None
    else:
        assert resumption is not None
        assert (resumption.id, resumption.created) == ("x", 5)
        assert resumption.choices == delivered(come)
        assert resumption.events == len(come)


@given(streams, cuts, cuts, st.integers(0, 12), st.integers(1, 4000))
def test_a_part_of_an_event_is_replaced_by_the_event_of_another_replica(
    stream: list[Said], cuts: list[int], others: list[int], count: int, lost: int
) -> None:
    count %= len(stream)
    begun = b"".join(each.raw for each in stream[:count])
    part = stream[count].raw[: lost % len(stream[count].raw)]
    transcript = Transcript()
    out = b"".join(map(transcript.feed, pieces_of(begun + part, cuts)))
    transcript.drop_partial()
    rest = b"".join(each.raw for each in stream[count:]) + DONE
    out += b"".join(map(transcript.feed, pieces_of(rest, others)))
    assert out == b"".join(each.clean for each in stream) + DONE
    assert transcript.is_done
    resumption = transcript.resumption("/v1/completions", b"{}")
    assert resumption is not None
    assert resumption.choices == delivered(stream)


@given(st.binary(max_size=60).map(lambda data: data.replace(b"\r", b"\n")), cuts)
def test_stream_without_marks_is_unchanged(data: bytes, cuts: list[int]) -> None:
    lines = Lines()
    out = b"".join(map(lines.feed, pieces_of(data, cuts)))
    assert data.startswith(out)
    assert not out or out.endswith(b"\n")
    assert out + lines.rest == data


def test_endless_line_is_passed_on_in_pieces() -> None:
    piece, lines, out = b"x" * (1 << 20), Lines(), b""
    for count in range(1, 10):
        out += lines.feed(piece)
        assert out + lines.rest == piece * count
        assert len(lines.rest) <= 4 << 20
    assert out


#: Lines that this project's engines send, and lines that they never send.
lines_of_any_kind = st.sampled_from(
    [
        b": fd 0 1",
        b": fd 0",
        b": fd x",
        b":",
        b": x",
        b"data: [DONE]",
        b"data: {}",
        b"event: x",
        b"",
        b"x: fd 0",
    ]
)


@given(st.lists(lines_of_any_kind, max_size=20), cuts)
@example([b"data: {}", b": fd 0 1", b"", b": fd 0", b""], [18])
@example([b"data: [DONE]", b"", b": x", b""], [])
@example([b"data: {}", b"", b"data: {}", b": fd 0 1", b""], [10])
def test_output_does_not_depend_on_the_split(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    for kind in (Transcript, Lines):
        cut, whole = kind(), kind()
        assert b"".join(map(cut.feed, pieces_of(data, cuts))) == whole.feed(data)
        for attribute in ("is_done", "is_open", "missing_end", "problem", "rest"):
            assert getattr(cut, attribute) == getattr(whole, attribute), attribute
        args = ("/v1/completions", b"{}")
        assert cut.resumption(*args) == whole.resumption(*args)


def test_mark_without_an_event_is_not_forwarded() -> None:
    transcript = Transcript()
    assert transcript.feed(Said("a").raw + b": fd 0 2 .\n\n") == Said("a").clean
    resumption = transcript.resumption("/v1/completions", b"{}")
    assert resumption is not None
    assert resumption.choices == {0: Delivered([1, 2], True)}


def test_truncated_answer_without_marks_does_not_look_complete() -> None:
    transcript = Transcript()
    transcript.feed(Said("a").clean)
    transcript.feed(Said("b").clean)
    assert (transcript.missing_end, transcript.is_done, transcript.is_open) == (b"", False, False)


def test_an_answer_without_marks_passes_and_cannot_be_resumed() -> None:
    transcript = Transcript()
    assert transcript.feed(Said("a").clean) == Said("a").clean
    assert transcript.feed(Said("b").raw) == Said("b").clean
    assert transcript.resumption("/v1/completions", b"{}") is None


@pytest.mark.parametrize("line", [b"", b"x 1", b"0 x", b"0 -1", b"0 99999999999999999999"])
def test_invalid_mark_prevents_resumption_but_not_the_stream(line: bytes) -> None:
    transcript = Transcript()
    transcript.feed(Said("a").raw)
    bad = Said("b").clean[:-1] + b": fd " + line + b"\n\n"
    assert transcript.feed(bad) == Said("b").clean
    assert transcript.resumption("/v1/completions", b"{}") is None
    for _ in range(3000):
        assert transcript.feed(Said("c").raw) == Said("c").clean


def test_endless_event_is_aborted() -> None:
    transcript = Transcript()
    piece = b"data: " + b"x" * 100_000
    assert [transcript.feed(piece) for _ in range(100)] == [b""] * 100
    assert transcript.problem


def test_transcript_of_a_long_stream_is_small_and_bounded() -> None:
    """Ten thousand tokens as marks would take megabytes; as numbers they take four bytes each."""
    one, many = Said("abc", tokens=(100_000,)).raw, Said("abc", tokens=tuple(range(100_000, 100_512))).raw
    transcript = Transcript()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            transcript.feed(one)
        assert tracemalloc.get_traced_memory()[0] < 300_000
        assert transcript.resumption("/v1/completions", b"{}") is not None
        for _ in range(MAX_TOKENS // 512):
            transcript.feed(many)
        assert transcript.resumption("/v1/completions", b"{}") is None
        for _ in range(MAX_TOKENS // 512):
            transcript.feed(many)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_the_first_typed_event_has_the_id_and_time_of_the_response() -> None:
    response = {"id": "resp_1", "created_at": 7}
    for data, known in (
        ({"type": "response.created", "response": response}, ("resp_1", 7)),
        ({"type": "response.created", "response": {"id": "resp_1"}}, None),
        ({"type": "response.created"}, None),
        ({"id": "x"}, None),
    ):
        transcript = Transcript()
        event = b"event: response.created\ndata: %b\n" % json.dumps(data).encode()
        assert transcript.feed(event + mark(0) + b"\n") == event + b"\n"
        resumption = transcript.resumption("/v1/responses", b"{}")
        assert (resumption and (resumption.id, resumption.created)) == known
