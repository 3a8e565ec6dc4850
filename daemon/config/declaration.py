"""Declaration of an option of dp.toml: conversion of its value by msgspec, and messages for a wrong one.

msgspec's own messages call types by Python's names and leave out the value; here they are in TOML's words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, Meta, Struct, ValidationError
from msgspec.inspect import (
    BoolType,
    CustomType,
    DictType,
    FloatType,
    IntType,
    LiteralType,
    StrType,
    VarTupleType,
    type_info,
)
from msgspec.structs import fields

from ...common import masking

#: Takes a value of the right type, returns an error message or None.
Check = Callable[[Any], str | None]

_NAMES: dict[type, str] = {
    StrType: "string",
    IntType: "integer",
    FloatType: "number",
    BoolType: "boolean",
    CustomType: "path",
    DictType: "table of strings",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "table",
}
#: TOML's types of the numbers that an option accepts.
_NUMBERS: dict[type, tuple[type, ...]] = {IntType: (int,), FloatType: (int, float)}


def about(
    help: str,
    *,
    unit: str = "",
    old_name: str = "",
    base: int | None = None,
    check: Check | None = None,
    **constraints: Any,
) -> Meta:
    """Describe an option.

    Args:
        help: one sentence.
        old_name: former name, which is still accepted.
        base: default of a list of ports.
        constraints: as in `msgspec.Meta`.
    """
    given = {"unit": unit, "old_name": old_name, "base": base, "check": check}
    extra = {name: value for name, value in given.items() if value}
    return Meta(description=help, extra=extra, **constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Declaration of one option: a field of a section."""

    name: str
    #: Type annotation, for `msgspec.convert`.
    type: Any
    #: msgspec's description of the type.
    kind: Any
    #: NODEFAULT if the option is required.
    default: Any
    help: str
    unit: str
    old_name: str
    check: Check | None

    @property
    def kind_name(self) -> str:
        """Return the type as messages and documentation call it."""
        return _name(self.kind)

    @property
    def range(self) -> str:
        """Return the range of a number, such as "at least 1", or ""."""
        return _range(self.kind) if isinstance(self.kind, IntType | FloatType) else ""

    def convert(self, value: Any) -> Any:
        """Return the value of a TOML file in the option's type.

        Raises:
            ValueError: the value is wrong. The message has no values that may be secrets.
        """
        if any("\0" in text for text in _texts_of(value)):
            raise ValueError("must not contain the character NUL")
        if isinstance(self.kind, FloatType) and not _is_finite(value):
            raise ValueError(f"is {value!r}; it must be a finite number")
        try:
            result = msgspec.convert(value, self.type, dec_hook=_path)
        except ValidationError:
            raise ValueError(_complaint(self.kind, value)) from None
        if self.check is not None and (complaint := self.check(result)):
            # A list or a table may contain secrets.
            is_text = isinstance(value, str)
            raise ValueError(f"is {masking.value(value)!r}; {complaint}" if is_text else complaint)
        return result


@cache
def options_of(section: type[Struct]) -> dict[str, Option]:
    """Return the options of a section by name."""
    options = {}
    described: Any = type_info(section)
    for field, info in zip(fields(section), described.fields, strict=True):
        meta: Any = info.type
        extra = meta.extra or {}
        default = field.default if field.default_factory is NODEFAULT else field.default_factory()
        options[field.name] = Option(
            name=field.name,
            type=field.type,
            kind=meta.type,
            default=extra.get("base", default),
            help=meta.extra_json_schema["description"],
            unit=extra.get("unit", ""),
            old_name=extra.get("old_name", ""),
            check=extra.get("check"),
        )
    return options


def _complaint(kind: Any, value: Any) -> str:
    """Say why msgspec rejects the value, and what would be right."""
    match kind:
        case DictType() if isinstance(value, dict):
            name, word = next(item for item in value.items() if not isinstance(item[1], str))
            return f'{name} is {_sort(word)}; it must be a string, {name} = "..."'
        case VarTupleType(item_type=IntType() as port):
            wrong = next(each for each in value if not port.ge <= each <= port.le)
            return f"contains {wrong}; a port is {_range(port)}"
        case DictType() | VarTupleType():
            # A wrong value of arguments or environment may be a secret.
            return f"is {_sort(value)}; it must be a {_name(kind)}"
        case LiteralType(values=values):
            right = ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
        case StrType() if isinstance(value, str):
            return f"is {value!r}; it must not be empty"
        case IntType() | FloatType() if type(value) in _NUMBERS[type(kind)]:
            right = _range(kind)
        case CustomType() if isinstance(value, str):
            right = "a directory of its own"
        case _:
            right = _with_article(_name(kind))
    return f"is {value!r}; it must be {right}"


def _is_finite(value: Any) -> bool:
    # An integer of TOML may be larger than any float.
    return type(value) not in (int, float) or abs(value) <= sys.float_info.max


def _range(number: IntType | FloatType) -> str:
    if number.ge is None:
        return ""
    return f"at least {number.ge}" if number.le is None else f"between {number.ge} and {number.le}"


def _name(kind: Any) -> str:
    match kind:
        case LiteralType(values=values):
            return _NAMES[type(values[0])]
        case VarTupleType(item_type=IntType()):
            return "port or list of ports"
        case VarTupleType():
            return "list of strings"
    return _NAMES[type(kind)]


def _sort(value: Any) -> str:
    """Return the type of a TOML value, with an article."""
    if isinstance(value, list):
        return "a list that does not only contain strings"
    return _with_article(_NAMES.get(type(value), type(value).__name__))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _texts_of(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return (item for item in items if isinstance(item, str))


def _path(kind: Any, value: Any) -> Path:
    path = Path(value)
    # Otherwise "." would mean the default, which is the empty path.
    if value and path == Path():
        raise ValueError
    return path
