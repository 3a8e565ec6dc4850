"""OpenAPI description of a replica's API, and the same as a page, from the declared bodies."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from ... import __version__
from ...common.api_paths import ABORT_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from . import answers
from .bodies import AbortBody, ChatBody, CompletionBody, DetokenizeBody, Message, TokenizeBody
from .response_answers import ResponseEvent, ResponseObject
from .response_bodies import InputItem, ReasoningOptions, ResponsesBody, TextOptions
from .unsupported import WITHOUT_EFFECT
from .validation import Body

_REFERENCE = "#/components/schemas/"


@dataclass(frozen=True, slots=True)
class _Operation:
    method: str
    path: str
    summary: str
    answer: type[Struct]
    body: type[Body] | None = None
    #: Events of a stream.
    event: type[Struct] | None = None
    needs_key: bool = True


_OPERATIONS = (
    _Operation(
        *("post", "/v1/chat/completions", "Continue a conversation", answers.ChatCompletion, ChatBody),
        answers.ChatCompletionChunk,
    ),
    _Operation(
        *("post", "/v1/completions", "Continue prompts", answers.Completion, CompletionBody),
        answers.Completion,
    ),
    _Operation(
        *("post", "/v1/responses", "Continue a conversation of items", ResponseObject, ResponsesBody),
        ResponseEvent,
    ),
    _Operation("get", "/v1/models", "List the model", answers.ModelList),
    _Operation("get", "/v1/models/{model}", "Describe the model", answers.ModelCard),
    _Operation("post", TOKENIZE_PATH, "Return the token ids of a text", answers.Tokens, TokenizeBody),
    _Operation("post", DETOKENIZE_PATH, "Return the text of token ids", answers.Text, DetokenizeBody),
    _Operation("post", ABORT_PATH, "End open requests", answers.Abortion, AbortBody),
    _Operation("get", "/version", "Return the version", answers.Version, needs_key=False),
    _Operation("get", "/load", "Return the number of open requests", answers.Load, needs_key=False),
)
_BODIES: tuple[type[Body], ...] = (
    *(ChatBody, CompletionBody, Message, TokenizeBody, DetokenizeBody),
    *(ResponsesBody, InputItem, TextOptions, ReasoningOptions),
)


@cache
def openapi() -> bytes:
    """Return the description in OpenAPI 3.1, as JSON."""
    return msgspec.json.encode(_description())


@cache
def docs_page() -> bytes:
    """Return the description as an HTML page that loads nothing else."""
    description = _description()
    schemas = description["components"]["schemas"]
    rows = "".join(
        f"<tr><td><code>{each.method.upper()} {_text(each.path)}</code><td>{_text(each.summary)}"
        f"<td>{_link(each.body)}<td>{_link(each.answer)}"
        for each in _OPERATIONS
    )
    objects = "".join(_object(name, schemas[name]) for name in sorted(schemas))
    return _PAGE.format(version=__version__, rows=rows, objects=objects).encode()


def _description() -> dict[str, Any]:
    declared = [each for it in _OPERATIONS for each in (it.body, it.answer, it.event) if each is not None]
    _, schemas = msgspec.json.schema_components(
        [*dict.fromkeys(declared), answers.Error], ref_template=_REFERENCE + "{name}"
    )
    for body in _BODIES:
        schemas[body.__name__]["properties"] |= _fields_without_effect(body)
    paths: dict[str, Any] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "fd-dp", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _fields_without_effect(body: type[Body]) -> dict[str, Any]:
    refused: dict[str, Any] = {
        name: {"enum": [None, *field.harmless], "description": f"Not supported: {field.why}."}
        for name, field in body.refused.items()
    }
    if body not in (ChatBody, CompletionBody, ResponsesBody):
        return refused
    names = sorted(WITHOUT_EFFECT - {*body.__struct_fields__, *refused})
    return refused | {name: {"description": "Accepted without effect."} for name in names}


def _operation(operation: _Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        # Without the key, the server may be open.
        "security": [{}, {"key": []}] if operation.needs_key else [],
        "responses": {
            "200": {"description": "The response.", "content": content},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": _reference(answers.Error)}},
            },
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.body)}},
        }
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def _event(kind: type[Struct]) -> dict[str, Any]:
    """Return the schema of one event of a stream, as the fields that it consists of."""
    data = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(kind), _reference(answers.Error)]},
    }
    return {
        "type": "object",
        "description": f"An event with a {kind.__name__} or an error; the last one is [DONE].",
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _reference(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE + kind.__name__}


def _object(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{_text(field)}</code>{' *' * (field in required)}<td>{_type(each)}"
        f"<td>{_text(_note(each))}"
        for field, each in schema.get("properties", {}).items()
    )
    about = f"<p>{_text(schema.get('description', ''))}</p>"
    return f'<h2 id="{name}">{name}</h2>{about}<table><tr><th>Field<th>Type<th>Meaning{rows}</table>'


def _note(schema: dict[str, Any]) -> str:
    """Return the description, which msgspec puts beside or inside of the types."""
    return next((each["description"] for each in _nested(schema) if "description" in each), "")


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REFERENCE)
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(
            f"<code>{_text(msgspec.json.encode(each).decode())}</code>" for each in schema["enum"]
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [
        f"{word} {schema[key]:.6g}"
        for key, word in (("minimum", "&ge;"), ("maximum", "&le;"), ("maxLength", "length &le;"))
        if key in schema and abs(schema[key]) < 1e300
    ]
    return " ".join([_text(schema.get("type", "any")), *bounds])


def _nested(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for each in schema.get("anyOf", ()):
        yield from _nested(each)


def _link(kind: type[Struct] | None) -> str:
    return "" if kind is None else f'<a href="#{kind.__name__}">{kind.__name__}</a>'


def _text(text: str) -> str:
    return html.escape(text)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>fd-dp API</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; text-align: left; vertical-align: top }}
</style>
<h1>fd-dp API {version}</h1>
<p>OpenAI's API with fields of vLLM and FastDeploy. The same in OpenAPI:
<a href="/openapi.json">/openapi.json</a>. Errors have the body <a href="#Error">Error</a>.
A star marks a required field.</p>
<table><tr><th>Endpoint<th>Purpose<th>Body<th>Response{rows}</table>
{objects}
</html>
"""
