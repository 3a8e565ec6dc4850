"""Constraints of a body: one grammar for the form of the output, and rules for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ...common.errors import RequestError
from ...grammar import texts
from ...grammar.validation import require_valid, require_valid_schema
from .constraint_bodies import ConstraintBody, StructuredOutputs, TagFormat
from .validation import MISSING, WRONG_TYPE, WRONG_VALUE, invalid, validated

_MAX_ID_DIGITS = 10


def read_constraints(body: ConstraintBody) -> dict[str, Any]:
    """Return the fields of a `GenerationRequest` for the constraints of a body.

    Raises:
        RequestError: a constraint is invalid, or two exclude each other.
    """
    source = _source(body)
    return {
        "grammar": None if source is None else _grammar(source, _options(body)),
        "grammar_field": None if source is None else source.field,
        "logit_bias": _biases(body.logit_bias or {}),
        "bad_words": tuple(body.bad_words or ()),
        "bad_words_token_ids": tuple(
            (word,) if isinstance(word, int) else tuple(word) for word in body.bad_words_token_ids or ()
        ),
        "allowed_token_ids": tuple(body.allowed_token_ids or ()),
    }


@dataclass(frozen=True, slots=True)
class _JsonOptions:
    whitespace: str | None = None
    compact: bool = False
    #: Objects have only the properties that a schema names.
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Source:
    """A field that asks for structured output."""

    field: str
    value: Any
    #: Returns the grammar.
    read: Callable[[Any, str, _JsonOptions], str]


def _grammar(source: _Source, options: _JsonOptions) -> str:
    try:
        return source.read(source.value, source.field, options)
    except RecursionError:
        raise RequestError(f"{source.field} is nested too deeply", source.field, code=WRONG_VALUE) from None


def _source(body: ConstraintBody) -> _Source | None:
    sources = list(_sources(body))
    if not sources:
        if body.guided_whitespace_pattern is not None:
            raise RequestError(
                "guided_whitespace_pattern needs a JSON schema beside it, such as guided_json",
                "guided_whitespace_pattern",
            )
        return None
    if len(sources) > 1:
        first, second = sources[:2]
        raise RequestError(
            f"{first.field} and {second.field} exclude each other; send only one of them", second.field
        )
    return sources[0]


def _sources(body: ConstraintBody) -> Iterator[_Source]:
    given = body.response_format
    if given is not None and given.type not in (None, "text"):
        if given.type == "json_object":
            yield _Source("response_format", True, _json_object)
        elif given.type == "json_schema":
            if given.json_schema is None:
                raise RequestError(
                    "response_format.json_schema is missing; it must be an object with a schema",
                    "response_format.json_schema",
                    code=MISSING,
                )
            yield _Source("response_format.json_schema.schema", given.json_schema.schema, _json)
        else:
            for name in ("structures", "triggers"):
                if getattr(given, name) is None:
                    field = f"response_format.{name}"
                    raise RequestError(f"{field} is missing; it must be a list", field, code=MISSING)
            assert given.structures is not None
            assert given.triggers is not None
            tags = TagFormat(structures=given.structures, triggers=given.triggers)
            yield _Source("response_format", tags, _structural_tag)
    yield from _given(
        "",
        ("guided_json", body.guided_json, _json),
        ("guided_json_object", body.guided_json_object or None, _json_object),
        ("guided_regex", body.guided_regex, _regex),
        ("guided_choice", body.guided_choice, _choice),
        ("guided_grammar", body.guided_grammar, _lark_or_gbnf),
        ("structural_tag", body.structural_tag, _structural_tag),
        ("json_schema", body.json_schema, _json),
        ("regex", body.regex, _regex),
        ("ebnf", body.ebnf, _lark_or_gbnf),
    )
    outputs = body.structured_outputs
    if outputs is not None:
        yield from _given(
            "structured_outputs.",
            ("json", outputs.json, _json),
            ("json_object", outputs.json_object or None, _json_object),
            ("regex", outputs.regex, _regex),
            ("choice", outputs.choice, _choice),
            ("grammar", outputs.grammar, _lark_or_gbnf),
            ("structural_tag", outputs.structural_tag, _structural_tag),
        )


def _given(
    prefix: str, *fields: tuple[str, Any, Callable[[Any, str, _JsonOptions], str]]
) -> Iterator[_Source]:
    for name, value, read in fields:
        if value is not None:
            yield _Source(prefix + name, value, read)


def _options(body: ConstraintBody) -> _JsonOptions:
    outputs = body.structured_outputs or StructuredOutputs()
    whitespace = outputs.whitespace_pattern
    if body.guided_whitespace_pattern is not None:
        whitespace = body.guided_whitespace_pattern
    if whitespace is not None:
        field = "structured_outputs.whitespace_pattern" if outputs.whitespace_pattern else None
        require_valid(texts.regex_grammar(whitespace), field or "guided_whitespace_pattern", has_place=False)
    return _JsonOptions(
        whitespace, outputs.disable_any_whitespace or False, outputs.disable_additional_properties or False
    )


def _json(value: Any, field: str, options: _JsonOptions) -> str:
    schema = _schema(value, field)
    if options.closed:
        schema = _closed(schema)
    grammar_of = partial(texts.json_schema_grammar, whitespace=options.whitespace, compact=options.compact)
    require_valid_schema(schema, field, grammar_of)
    return grammar_of(schema)


def _json_object(value: Any, field: str, options: _JsonOptions) -> str:
    return texts.json_object_grammar(whitespace=options.whitespace, compact=options.compact)


def _regex(value: str, field: str, options: _JsonOptions) -> str:
    grammar = texts.regex_grammar(value)
    require_valid(grammar, field, has_place=False)
    return grammar


def _choice(value: list[str], field: str, options: _JsonOptions) -> str:
    grammar = texts.choice_grammar(value)
    require_valid(grammar, field, has_place=False)
    return grammar


def _lark_or_gbnf(value: str, field: str, options: _JsonOptions) -> str:
    try:
        grammar = texts.ebnf_grammar(value)
    except ValueError as error:
        raise RequestError(f"{field}: {error}", field, code=WRONG_VALUE) from None
    # A converted grammar has other lines than the client's.
    require_valid(grammar, field, has_place=grammar == texts.lark_grammar(value))
    return grammar


def _structural_tag(value: Any, field: str, options: _JsonOptions) -> str:
    if isinstance(value, TagFormat):
        declared = value
    else:
        value = _decoded(value, field) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise invalid(field, value, "an object with structures and triggers", code=WRONG_TYPE)
        declared = validated(value, TagFormat, field)
    tags = []
    for at, structure in enumerate(declared.structures):
        place = f"{field}.structures[{at}]"
        if not structure.begin.startswith(tuple(declared.triggers)):
            raise RequestError(f"{place}.begin must start with one of the triggers", f"{place}.begin")
        schema = _schema(structure.schema, f"{place}.schema")
        require_valid_schema(schema, f"{place}.schema", texts.json_schema_grammar)
        tags.append(texts.Tag(structure.begin, schema, structure.end))
    for at, trigger in enumerate(declared.triggers):
        if not any(tag.begin.startswith(trigger) for tag in tags):
            place = f"{field}.triggers[{at}]"
            raise RequestError(f"{place} is not the beginning of a structure", place)
    grammar = texts.structural_tag_grammar(tags, declared.triggers)
    require_valid(grammar, field, has_place=False)
    return grammar


def _schema(value: Any, field: str) -> Any:
    """Return a schema, which may be given as its text."""
    schema = _decoded(value, field) if isinstance(value, str) else value
    if isinstance(schema, dict) or schema is True:
        return schema
    if schema is None:
        raise RequestError(f"{field} is missing; it must be a JSON schema", field, code=MISSING)
    raise invalid(field, schema, "a JSON schema: an object, or true for any value", code=WRONG_TYPE)


def _decoded(text: str, field: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise RequestError(f"{field} is nested too deeply", field) from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError(f"{field} is not valid JSON: {error}", field, code=WRONG_VALUE) from None


def _closed(schema: Any) -> Any:
    """Return the schema without properties that it does not name, as vLLM does."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in schema or "patternProperties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _biases(given: dict[str, float | None]) -> tuple[tuple[int, float], ...]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise RequestError(
                "logit_bias has a key that is not a token id; each must be a number as a string",
                "logit_bias",
            )
        if bias is not None:
            biases[int(key)] = bias
    return tuple(biases.items())
