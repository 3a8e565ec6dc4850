"""Validation of grammars, with limits for those that would take too much time or memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..common.errors import RequestError

MAX_CHARACTERS = 1 << 18
MAX_WORDS = 1 << 13
MAX_TAGS = 256
#: Compiling within these takes less than a second, and a mask less than 50 ms. A state has 1 or 2 KB.
LIMITS = LLParserLimits(
    max_grammar_size=50_000, max_lexer_states=30_000, step_lexer_fuel=100_000, step_max_items=30_000
)
#: Characters of schemas that are tried to find the place of a fault.
_MAX_TRIED = MAX_CHARACTERS
_MAX_MESSAGE = 300
_MAX_PATH = 200
_INVALID = "invalid_value"


def require_valid(
    grammar: str, field: str, vocabulary: LLTokenizer | None = None, *, has_place: bool = True
) -> None:
    """Raise RequestError unless the grammar can be compiled.

    Args:
        field: name of its field in the request.
        has_place: the error's line and column belong to the text of the client.
    """
    require_length(len(grammar), field)
    fault = _fault(grammar, vocabulary)
    if fault is not None:
        raise RequestError(f"{field}: {_sentence(fault, has_place)}", field, code=_INVALID)


def require_valid_schema(schema: Any, field: str, grammar_of: Callable[[Any], str]) -> None:
    """Raise RequestError unless the grammar of a JSON schema can be compiled; it names the wrong part."""
    grammar = grammar_of(schema)
    require_length(len(grammar), field)
    fault = _fault(grammar, None)
    if fault is not None:
        place = field if "recursion" in fault else field + _place(schema, fault, grammar_of)
        raise RequestError(f"{place}: {_sentence(fault, False)}", place, code=_INVALID)


def require_length(length: int, field: str) -> None:
    """Raise RequestError for the text of a grammar that is too long."""
    if length > MAX_CHARACTERS:
        raise RequestError(
            f"{field} has {length} characters; a grammar may have at most {MAX_CHARACTERS}",
            field,
            code=_INVALID,
        )


def names_special_tokens(grammar: str) -> bool:
    """Return True if only the vocabulary shows whether a valid grammar is one for this model."""
    _, warnings = _messages(grammar, None)
    return any("no tokenizer" in warning for warning in warnings)


def _fault(grammar: str, vocabulary: LLTokenizer | None) -> str | None:
    is_error, messages = _messages(grammar, vocabulary)
    return messages[0] if is_error else None


@lru_cache(maxsize=32)
def _messages(grammar: str, vocabulary: LLTokenizer | None) -> tuple[bool, list[str]]:
    """Return True and an error, or False and warnings."""
    return LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=LIMITS)


def _place(schema: Any, fault: str, grammar_of: Callable[[Any], str]) -> str:
    """Return the path of the smallest part of a schema that has the same fault on its own."""
    path, tried = "", 0
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    while True:
        for step, part in _parts(schema):
            # References to definitions must work in a part too, but a fault in them is not one of the part.
            whole = part if step.startswith(tuple(f".{key}." for key in shared)) else shared | part
            grammar = grammar_of(whole)
            tried += len(grammar)
            if tried > _MAX_TRIED or len(path) > _MAX_PATH:
                return path
            if _fault(grammar, None) == fault:
                path, schema = path + step, part
                break
        else:
            return path


def _parts(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the schemas directly inside of a schema, each with the path to it."""
    parts = []
    for key, value in schema.items():
        if isinstance(value, dict) and key in ("properties", "patternProperties", "$defs", "definitions"):
            parts += [(f".{key}.{_name(name)}", part) for name, part in value.items()]
        elif isinstance(value, list):
            parts += [(f".{key}[{at}]", part) for at, part in enumerate(value)]
        elif isinstance(value, dict):
            parts.append((f".{key}", value))
    return [(path, part) for path, part in parts if isinstance(part, dict)]


def _name(key: str) -> str:
    return key if len(key) <= 100 and key.isprintable() else "..."


def _sentence(fault: str, has_place: bool) -> str:
    """Return an error of llguidance as one line, with its place first."""
    at = re.match(r"(?:at )?(\d+)\((\d+)\): ", fault)
    text = fault[at.end() :] if at else fault
    # What follows is the source, with a mark at the place.
    text = re.split(r"\n *\d+ \| ", text)[0]
    expression = re.search(r"regex parse error:\n(?P<source>(?: .*\n)*?) {4}(?P<mark> *)\^+\nerror: ", text)
    place = f"line {at[1]}, column {at[2]}: " if at and has_place else ""
    if expression:
        head = text[: expression.start()] if has_place else ""
        column = f"character {len(expression['mark']) + 1}: "
        text = f"{head}{column}{text[expression.end() :]}"
    line = place + " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "..."
