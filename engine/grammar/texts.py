"""Grammars in llguidance's notation, made from the notations that clients use.

These functions are pure and do not check what they are given; `validation.require_valid` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

#: A model can get lost in whitespace, so a run of it has a limit.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
#: The converter of GBNF is a Python program whose time grows with the cube of the number of rules.
_MAX_GBNF, _MAX_RULES = 1 << 16, 256
#: The name that a grammar has inside of another one.
_INNER = "inner"


class Tag(NamedTuple):
    """A part of a text that a grammar constrains, from `begin` to `end`."""

    begin: str
    schema: dict[str, Any] | Literal[True]
    end: str


def json_schema_grammar(
    schema: dict[str, Any] | Literal[True], *, whitespace: str | None = None, compact: bool = False
) -> str:
    """Return the grammar of JSON texts that fit a schema; True allows every value.

    Args:
        whitespace: regular expression of the whitespace between two tokens of JSON.
        compact: no whitespace at all.
    """
    return _wrapped({"json_schema": _with_options(schema, whitespace, compact)})


def json_rule(schema: dict[str, Any] | Literal[True]) -> str:
    """Return the grammar of JSON texts that fit a schema as a part of a Lark rule."""
    return f"%json {json.dumps(_with_options(schema))}"


def json_object_grammar(*, whitespace: str | None = None, compact: bool = False) -> str:
    """Return the grammar of all JSON objects."""
    return json_schema_grammar({"type": "object"}, whitespace=whitespace, compact=compact)


def regex_grammar(pattern: str) -> str:
    """Return the grammar of texts that a regular expression matches from beginning to end."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(words: Iterable[str]) -> str:
    """Return the grammar of which exactly these words are texts."""
    # One terminal compiles far faster than a rule with as many alternatives.
    return lark_grammar("start: WORD\nWORD: " + " | ".join(map(quoted, words)))


def lark_grammar(text: str) -> str:
    """Return the grammar that a text in llguidance's variant of Lark describes."""
    return _wrapped({"lark_grammar": text})


def ebnf_grammar(text: str) -> str:
    """Return the grammar that a text in GBNF, as of llama.cpp, or in Lark describes.

    Raises:
        ValueError: the text is not GBNF, or too long.
    """
    if is_lark_syntax(text):
        return lark_grammar(text)
    if len(text) > _MAX_GBNF or text.count("::=") > _MAX_RULES:
        raise ValueError(
            f"a grammar in GBNF may have {_MAX_GBNF} characters and {_MAX_RULES} rules; in Lark, more"
        )
    try:
        return lark_grammar(gbnf_to_lark(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # The converter reports some faults by an exception of another kind.
    except Exception as error:
        raise ValueError(str(error)) from None


def structural_tag_grammar(tags: Sequence[Tag], triggers: Sequence[str]) -> str:
    """Return the grammar of free text in which a tag follows each trigger.

    Args:
        triggers: beginnings of tags. The text is free up to a trigger.
    """
    lines = ["start: (" + " | ".join(f"tag_{at}" for at, _ in enumerate(triggers)) + ")* rest", "rest: TEXT"]
    lines.append(r"TEXT: /(.|\n)*/")
    for at, trigger in enumerate(triggers):
        bodies = (
            f"{quoted(tag.begin.removeprefix(trigger))} {json_rule(tag.schema)} {quoted(tag.end)}"
            for tag in tags
            if tag.begin.startswith(trigger)
        )
        lines.append(f"tag_{at}: trigger_{at} (" + " | ".join(bodies) + ")")
        lines.append(f"trigger_{at}[lazy]: TEXT {quoted(trigger)}")
    return lark_grammar("\n".join(lines))


def with_content(text: str, content: str) -> str:
    """Return the grammar of a text in Lark, in which `@content` stands for another grammar."""
    first, *others = json.loads(content)["grammars"]
    return _wrapped({"lark_grammar": text}, first | {"name": "content"}, *others)


def with_optional_space(grammar: str) -> str:
    """Return the grammar that also allows a space before a text.

    A SentencePiece model likes to begin with a token that has one; the detokenizer strips it.
    """
    first, *others = json.loads(grammar)["grammars"]
    outer = {"name": "with_space", "lark_grammar": f'start: " "? @{_INNER}'}
    return _wrapped(outer, first | {"name": _INNER}, *others)


def quoted(text: str) -> str:
    """Return a literal of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _with_options(
    schema: dict[str, Any] | Literal[True], whitespace: str | None = None, compact: bool = False
) -> dict[str, Any]:
    schema = {} if schema is True else schema
    options: dict[str, Any] = {"coerce_one_of": True, "lenient": False}
    if compact:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = _WHITESPACE if whitespace is None else whitespace
    given = schema.get("x-guidance")
    return schema | {"x-guidance": (given if isinstance(given, dict) else {}) | options}


def _wrapped(*grammars: dict[str, Any]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)
