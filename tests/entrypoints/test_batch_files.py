"""Lines of a batch: whatever is in them, each has one result, and an interrupted batch continues."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.entrypoints.batch.files import InputFile, OutputFile
from fastdeploy.entrypoints.batch.requests import (
    Request,
    problem_line,
    read_request,
    read_result,
    result_line,
)
from fastdeploy.entrypoints.batch.runner import run_batch

from ..waiting import wait_until

MAX_LINE = 300
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def line(custom_id: str, /, **changes: Any) -> bytes:
    body = {"prompt": custom_id}
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}
    return json.dumps(fields).encode()


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_line_raises(data: bytes) -> None:
    request = read_request(data)
    assert request.problem
    assert read_result(problem_line(request)) == request.custom_id


@given(st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), JSON, max_size=4))
def test_a_request_without_a_problem_can_be_sent(changes: dict[str, Any]) -> None:
    request = read_request(line("a", **changes))
    if not request.problem:
        assert request.path == "/v1/completions"
        assert isinstance(json.loads(request.body), dict)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"custom_id": None}, "custom_id is missing; it must be a string"),
        ({"method": "GET"}, "method is 'GET'; it must be POST"),
        ({"url": "/v1/embeddings"}, "models here generate text"),
        ({"url": "/v1/else"}, "it must be one of /v1/chat/completions, /v1/completions, /v1/responses"),
        ({"body": [1]}, "body is missing; it must be a JSON object"),
        ({"body": {"stream": True}}, "body.stream is set; a batch has no streams, leave it out"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(changes: dict[str, Any], expected: str) -> None:
    request = read_request(line("a", **changes))
    result = json.loads(problem_line(request))
    assert expected in result["error"]["message"]
    assert result["response"] is None
    assert result["custom_id"] == ("a" if "custom_id" not in changes else None)


def test_a_result_is_one_line_whatever_the_server_sends() -> None:
    request = read_request(line("a"))
    assert result_line(request, 200, "r", b'{\n "x":\n 1 }').count(b"\n") == 1
    assert json.loads(result_line(request, 200, "r", b"<html>"))["error"]["code"] == "invalid_response"


def test_blank_lines_do_not_count_and_long_ones_have_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "in"
    long = line("long", body={"prompt": "x" * MAX_LINE})
    file.write_bytes(b"\xef\xbb\xbf" + line("a") + b"\n\n  \r\n" + long + b"\n" + line("b"))
    source = InputFile(file, MAX_LINE)
    assert source.length == 3
    assert [(each.custom_id, each.code) for each in source.requests()] == [
        ("a", ""),
        (None, "line_too_long"),
        ("b", ""),
    ]


class Echo:
    """Answers every request with its own body."""

    def answer(self, number: int, request: Any) -> bytes:
        return result_line(request, 200, str(number), request.body)


@given(count=st.integers(0, 30), cut=st.integers(0, 3000), wrong=st.sets(st.integers(0, 30)))
def test_a_batch_cut_anywhere_continues_to_the_same_results(
    tmp_path_factory: pytest.TempPathFactory, count: int, cut: int, wrong: set[int]
) -> None:
    directory = tmp_path_factory.mktemp("batch")
    source, target = directory / "in", directory / "out"
    source.write_bytes(b"".join((b"{" if i in wrong else line(f"r{i}")) + b"\n" for i in range(count)))
    answer_all(source, target)
    whole = custom_ids(target)
    assert whole == [None if i in wrong else f"r{i}" for i in range(count)]
    target.write_bytes(target.read_bytes()[:cut])
    answer_all(source, target)
    assert custom_ids(target) == whole


def test_requests_are_read_and_sent_as_results_are_written(tmp_path: Path) -> None:
    concurrency, released, taken, busy = 2, threading.Event(), [], []

    class Waiting(Echo):
        def answer(self, number: int, request: Request) -> bytes:
            busy.append(number)
            released.wait()
            return super().answer(number, request)

    def requests() -> Iterator[tuple[int, Request]]:
        for number in range(50):
            taken.append(number)
            yield number, read_request(line(f"r{number}"))

    with OutputFile(tmp_path / "out") as output:
        arguments = (requests(), output, Waiting(), concurrency, lambda number: None)
        thread = threading.Thread(target=run_batch, args=arguments)
        thread.start()
        wait_until(lambda: len(taken) == 4 * concurrency and len(busy) == concurrency, deadline=60)
        released.set()
        thread.join()
    assert custom_ids(tmp_path / "out") == [f"r{number}" for number in range(50)]


def test_results_of_another_input_are_not_continued(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(line("a") + b"\n" + line("b"))
    answer_all(source, target)
    before = target.read_bytes()
    source.write_bytes(line("a") + b"\n" + line("c"))
    with pytest.raises(ConfigError, match="line 2 is for another request"):
        answer_all(source, target)
    source.write_bytes(line("a"))
    with pytest.raises(ConfigError, match="line 2 is beyond the last request"):
        answer_all(source, target)
    assert target.read_bytes() == before


def test_a_file_that_is_no_result_is_left_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(line("a"))
    target.write_text("my notes\n")
    with pytest.raises(ConfigError, match="line 1 is not a result"):
        answer_all(source, target)
    assert target.read_text() == "my notes\n"


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        OutputFile(tmp_path / "out"),
        pytest.raises(ConfigError, match="another run-batch writes this file"),
    ):
        OutputFile(tmp_path / "out")


def answer_all(source: Path, target: Path) -> None:
    requests = InputFile(source, MAX_LINE).requests()
    with OutputFile(target) as output:
        done = output.resume(requests)
        run_batch(enumerate(requests, start=done), output, Echo(), 2, lambda number: None)


def custom_ids(target: Path) -> list[str | None]:
    return [json.loads(line)["custom_id"] for line in target.read_text().splitlines()]
