"""Times of the libraries of other Python servers for the same work, in an environment of their own.

`python -m benchmarks.api_peers functions MODEL_DIRECTORY` reads the description of our API as input and
writes times of these as JSON, under the names of api_functions.py:

* validation: `json` and pydantic, as in FastAPI, with a model of the fields and limits of our description;
* template and tokens: transformers;
* detokenizing: the incremental decoder of `tokenizers`, which vLLM uses;
* events: pydantic, with the classes of OpenAI's client.

`python -m benchmarks.api_peers server PORT TOKENS_PER_SECOND` serves streams by FastAPI and uvicorn.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
from openai.types.chat import ChatCompletionChunk

from .api_inputs import REQUESTS, TEXT, microseconds

_HEAD: dict[str, Any] = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "demo",
}


def functions(directory: str, description: dict[str, Any]) -> dict[str, float]:
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    body_class = _Models(description["components"]["schemas"]).of("ChatBody")
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    found: dict[str, float] = {}
    for name, body in REQUESTS.items():
        messages = json.loads(body)["messages"]
        encode = partial(tokenizer.encode, render(messages), add_special_tokens=False)
        found |= {
            f"validation_{name}": microseconds(partial(_validate, body_class, body)),
            f"template_{name}": microseconds(partial(render, messages)),
            f"tokenizing_{name}": microseconds(encode),
        }
    decoder = Tokenizer.from_file(f"{directory}/tokenizer.json")
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)[:2048]

    def detokenize() -> None:
        stream = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            stream.step(decoder, token)

    found["detokenizing_token"] = microseconds(detokenize, per=len(tokens))
    found["sse_token"] = microseconds(lambda: _event(" word"))
    return found


def _validate(kind: type[pydantic.BaseModel], body: bytes) -> pydantic.BaseModel:
    return kind.model_validate(json.loads(body))


def _event(text: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish_reason}
    choices: Any = [choice]
    chunk = ChatCompletionChunk(**_HEAD, choices=choices)
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class _Models:
    """pydantic models of the objects of a description."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas
        self._models: dict[str, Any] = {}

    def of(self, name: str) -> Any:
        if name not in self._models:
            schema = self._schemas[name]
            if "properties" not in schema:
                self._models[name] = self._kind(schema)
            else:
                needed = schema.get("required", ())
                fields: dict[str, Any] = {
                    key: (self._kind(each), ...) if key in needed else (self._kind(each) | None, None)
                    for key, each in schema["properties"].items()
                }
                config = pydantic.ConfigDict(extra="allow", protected_namespaces=())
                self._models[name] = pydantic.create_model(name, __config__=config, **fields)
        return self._models[name]

    def _kind(self, schema: dict[str, Any]) -> Any:
        if "$ref" in schema:
            return self.of(schema["$ref"].rpartition("/")[2])
        if "anyOf" in schema:
            kind = self._kind(schema["anyOf"][0])
            for each in schema["anyOf"][1:]:
                kind = kind | self._kind(each)
            return kind
        if "enum" in schema:
            strings = [each for each in schema["enum"] if isinstance(each, str)]
            return Literal[tuple(strings)] if len(strings) == len(schema["enum"]) else Any
        limits = {
            "ge": schema.get("minimum"),
            "le": schema.get("maximum"),
            "min_length": schema.get("minLength", schema.get("minItems")),
            "max_length": schema.get("maxLength", schema.get("maxItems")),
        }
        given = {name: value for name, value in limits.items() if value is not None}
        plain: dict[str, Any] = {
            "integer": int,
            "number": float,
            "string": str,
            "boolean": bool,
            "null": None,
        }
        match schema.get("type"):
            case "array":
                # mypy knows only types that are written out.
                plain_kind: Any = list[self._kind(schema.get("items", {}))]  # type: ignore[misc]
            case "object":
                plain_kind = dict[str, Any]
            case None:
                return Any
            case name:
                plain_kind = plain[name]
        return Annotated[plain_kind, pydantic.Field(**given)] if given else plain_kind


def server(port: int, rate: float) -> None:
    import fastapi
    import uvicorn
    from fastapi.responses import StreamingResponse

    app = fastapi.FastAPI()
    words = TEXT.split()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            due, count = time.monotonic(), body["max_tokens"]
            for number in range(count):
                due += 1 / rate if rate else 0
                await asyncio.sleep(max(0.0, due - time.monotonic()) if rate else 0)
                yield _event(" " + words[number % len(words)], "length" if number == count - 1 else None)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def main() -> None:
    match sys.argv[1:]:
        case ["functions", directory]:
            found = functions(directory, json.load(sys.stdin))
            names = ("pydantic", "transformers", "tokenizers", "fastapi", "uvicorn")
            versions = {name: importlib.metadata.version(name) for name in names}
            print(json.dumps({"microseconds": found, "versions": versions}))
        case ["server", port, rate]:
            server(int(port), float(rate))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
