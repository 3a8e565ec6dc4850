"""Times of the functions through which a request and its tokens pass in an API process, without sockets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from flask.testing import FlaskClient

from fastdeploy.common.messages import AddRequest, Ready, TokenOutput
from fastdeploy.common.request import FinishReason
from fastdeploy.config import EngineConfig
from fastdeploy.demo_model.model import resolve_model_path
from fastdeploy.entrypoints.openai.access_log import AccessRecord
from fastdeploy.entrypoints.openai.app import create_app
from fastdeploy.entrypoints.openai.engine_client import EngineState, EngineStatus
from fastdeploy.entrypoints.openai.events import event_stream
from fastdeploy.entrypoints.openai.options import ServeConfig
from fastdeploy.entrypoints.openai.protocol import ChatRequest
from fastdeploy.entrypoints.openai.served_model import ServedModel
from fastdeploy.entrypoints.openai.validation import decode_object

from .api_inputs import REQUESTS, TEXT, microseconds

_EVENTS = 256


def measure() -> dict[str, float]:
    """Return microseconds for a request, or for a token where the name says so."""
    served = _demo()
    tokenizer = served.tokenizer
    found: dict[str, float] = {}
    for name, body in REQUESTS.items():
        request = ChatRequest.parse(decode_object(body), served.defaults)
        text = tokenizer.apply_chat_template(request.messages)
        found |= {
            f"validation_{name}": microseconds(partial(_validate, served, body)),
            f"template_{name}": microseconds(partial(tokenizer.apply_chat_template, request.messages)),
            f"tokenizing_{name}": microseconds(partial(tokenizer.encode, text)),
        }
    tokens = tokenizer.encode(TEXT)[:2048]

    def detokenize() -> None:
        detokenizer = tokenizer.detokenizer()
        for token in tokens:
            detokenizer.push((token,))

    found["detokenizing_token"] = microseconds(detokenize, per=len(tokens))
    found["sse_token"] = microseconds(_send_events, per=_EVENTS)
    stream = _stream(create_app(served).test_client())
    found["all_of_stream_token"] = (stream(1 + _EVENTS) - stream(1)) / _EVENTS
    found["all_of_stream_request"] = stream(1)
    return found


def _validate(served: ServedModel, body: bytes) -> ChatRequest:
    return ChatRequest.parse(decode_object(body), served.defaults)


def tokens_of_text() -> list[int]:
    return _demo().tokenizer.encode(TEXT)


def _demo() -> ServedModel:
    config = EngineConfig(model=resolve_model_path("demo"))
    engine: Any = _InstantEngine(config)
    served = ServedModel(ServeConfig(config, "demo"), engine)
    engine.tokens = served.tokenizer.encode(TEXT)
    return served


def _send_events() -> None:
    """Encode the events of a stream. A dictionary is made for each, as in chat.py."""
    head: dict[str, Any] = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
    }
    head |= {"created": 1_700_000_000, "model": "demo"}

    def events() -> Iterator[tuple[dict[str, Any], bytes]]:
        for _ in range(_EVENTS):
            choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
            yield head | {"choices": [choice]}, b""

    for _ in event_stream(events(), AccessRecord("x", "POST", "/v1/chat/completions")).response:
        pass


def _stream(client: FlaskClient) -> Callable[[int], float]:
    """Return a function that measures a stream of so many tokens."""
    body = decode_object(REQUESTS["short_chat"])

    def read(tokens: int) -> float:
        fields = {**body, "max_tokens": tokens}

        def once() -> None:
            response = client.post("/v1/chat/completions", json=fields)
            assert response.status_code == 200, response.data
            assert response.data.count(b"\n\n") >= tokens

        return microseconds(once)

    return read


class _InstantEngine:
    """An engine whose tokens are there at once."""

    stats = None

    def __init__(self, config: EngineConfig) -> None:
        self.ready = Ready(num_blocks=1024, block_size=config.block_size, max_model_len=8192)
        self.status = EngineStatus(EngineState.READY)
        self.tokens: Sequence[int] = ()

    def require_ready(self) -> None:
        pass

    def generate(
        self, requests: Sequence[AddRequest], wait_seconds: object = None
    ) -> contextlib.AbstractContextManager[_Outputs]:
        return contextlib.nullcontext(_Outputs(requests[0], self.tokens))


class _Outputs:
    def __init__(self, request: AddRequest, tokens: Sequence[int]) -> None:
        self._request = request
        self._tokens = tokens

    def __iter__(self) -> Iterator[TokenOutput]:
        name, count = self._request.request_id, self._request.params.max_tokens
        for number, token in enumerate(itertools.islice(itertools.cycle(self._tokens), count)):
            yield TokenOutput(name, [token], FinishReason.LENGTH if number == count - 1 else None)

    def stop(self, request_id: str) -> None:
        pass

    def cancel(self) -> None:
        pass
