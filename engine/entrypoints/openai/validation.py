"""Validation of a client's JSON against a declared msgspec.Struct; an error message names the wrong field.

msgspec's own messages call types by Python's names and leave out the value; here they are in JSON's words.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import Struct, ValidationError, inspect

from ...common.errors import RequestError

#: The error codes of OpenAI's API for an invalid field.
MISSING, WRONG_TYPE, WRONG_VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
UNSUPPORTED = "unsupported_parameter"
#: Levels of objects and lists in a body. Recursive functions need a stack for each.
MAX_NESTING = 128


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is not implemented."""

    #: Why the server refuses it, as a main clause.
    why: str
    #: Values that would not change the response, and are accepted.
    harmless: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        value = without_nulls(value)
        # In Python True == 1, but `logprobs: 1` and `logprobs: true` differ.
        return value is None or any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.harmless
        )

    def error(self, name: str) -> RequestError:
        other = f" or send {msgspec.json.encode(self.harmless[0]).decode()}" if self.harmless else ""
        return RequestError(
            f"{name} is not supported: {self.why}; leave it out{other}", name, code=UNSUPPORTED
        )


class Body(Struct, frozen=True, kw_only=True):
    """A JSON object of a request. As in OpenAI's API, a null field counts as absent.

    Unknown fields are ignored, because clients send many.
    """

    #: Known fields that are refused, by name.
    refused: ClassVar[Mapping[str, Refused]] = {}


_B = TypeVar("_B", bound=Body)


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`.

    Raises:
        RequestError: `body` is not valid JSON in UTF-8, not an object, or nested too deeply.
    """
    if not body.strip():
        raise RequestError("the body is empty; a JSON object is expected")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _nested_too_deeply() from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {_sort(value)}; a JSON object is expected")
    # Counting bytes is much faster than looking at all values, and rules out most bodies.
    if body.count(b"{") + body.count(b"[") > MAX_NESTING and _is_deeper(value, MAX_NESTING):
        raise _nested_too_deeply()
    return value


def validated(values: Mapping[str, Any], kind: type[_B], path: str = "") -> _B:
    """Return the object as `kind` declares it.

    Args:
        path: where the object is in the body.

    Raises:
        RequestError: a field is missing, invalid or not supported.
    """
    refuse_unsupported(values, kind.refused, path)
    try:
        return msgspec.convert(values, kind)
    except ValidationError as error:
        # The search for the fault may disagree with msgspec only by a defect of this module.
        raise _fault(inspect.type_info(kind), values, path) or RequestError(f"the body: {error}") from None


def refuse_unsupported(values: Mapping[str, Any], refused: Mapping[str, Refused], path: str = "") -> None:
    """Raise RequestError if a field has a value that would have an effect, but is not implemented."""
    for key in values:
        field = refused.get(key)
        if field is not None and not field.accepts(values[key]):
            raise field.error(_joined(path, key))


def without_nulls(value: Any) -> Any:
    """Return `value` without the fields that are null, in objects at every level."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def invalid(name: str, value: Any, expected: str, *, code: str = WRONG_VALUE) -> RequestError:
    """Return the error for a field with an invalid value."""
    return RequestError(f"{name} is {_shown(value)}; it must be {expected}", name, code=code)


def _nested_too_deeply() -> RequestError:
    return RequestError(f"the body is nested more than {MAX_NESTING} levels deep")


def _is_deeper(value: Any, levels: int) -> bool:
    """Return True if objects and lists are nested in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
    return bool(level)


def _fault(kind: inspect.Type, value: Any, path: str, expected: str = "") -> RequestError | None:
    """Return the error for the first field of `value` that is not as declared; None if there is none.

    Args:
        expected: what the declaration says in words, in place of words derived from its type.
    """
    match kind:
        case inspect.Metadata(type=inner, extra=extra):
            return _fault(inner, value, path, (extra or {}).get("expected", expected))
        case inspect.AnyType():
            return None
        case inspect.UnionType(types=types):
            fitting = [each for each in types if _is_of_type(each, value)]
            if fitting:
                return _fault(fitting[0], value, path, expected)
        case _ if not _is_of_type(kind, value):
            pass
        case inspect.StructType(fields=fields):
            return _first(_field_fault(field, value, path) for field in fields)
        case inspect.DictType(value_type=item):
            return _first(_fault(item, each, _joined(path, key)) for key, each in value.items())
        case inspect.ListType(item_type=item, min_length=least, max_length=most):
            if not (least or 0) <= len(value) <= (most if most is not None else len(value)):
                return _wrong_length(path, len(value), least, most, "items")
            return _first(_fault(item, each, f"{path}[{at}]") for at, each in enumerate(value))
        case inspect.StrType(min_length=least, max_length=most):
            if (least or 0) <= len(value) <= (most if most is not None else len(value)):
                return None
            return _wrong_length(path, len(value), least, most, "characters")
        case inspect.IntType(ge=least, le=most) | inspect.FloatType(ge=least, le=most):
            if (least is None or value >= least) and (most is None or value <= most):
                return None
            return invalid(path, value, _range(least, most))
        case inspect.LiteralType(values=values) if value not in values:
            return invalid(path, value, f"one of {', '.join(map(str, values))}")
        case _:
            return None
    if value is None:
        return _missing(path, expected or _noun(kind))
    return invalid(path, value, expected or _noun(kind), code=WRONG_TYPE)


def _field_fault(field: inspect.Field, values: Mapping[str, Any], path: str) -> RequestError | None:
    name = _joined(path, field.encode_name)
    if field.encode_name in values:
        return _fault(field.type, values[field.encode_name], name)
    return _missing(name, _expected(field.type)) if field.required else None


def _first(faults: Iterable[RequestError | None]) -> RequestError | None:
    return next((fault for fault in faults if fault is not None), None)


def _missing(name: str, expected: str) -> RequestError:
    return RequestError(f"{name} is missing; it must be {expected}", name, code=MISSING)


def _wrong_length(name: str, length: int, least: int | None, most: int | None, units: str) -> RequestError:
    if length == 0:
        return RequestError(f"{name} is empty; it must not be", name, code=WRONG_VALUE)
    limit = f"at most {most}" if most is not None and length > most else f"at least {least}"
    return RequestError(f"{name} has {length} {units}; it may have {limit}", name, code=WRONG_VALUE)


def _is_of_type(kind: inspect.Type, value: Any) -> bool:
    """Return True if `value` has the JSON type of `kind`, whatever its range, length or content."""
    match _bare(kind):
        case inspect.AnyType():
            return True
        case inspect.NoneType():
            return value is None
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool)
        case inspect.FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.LiteralType(values=values):
            return type(value) is type(values[0])
        case inspect.ListType():
            return isinstance(value, list)
        case inspect.StructType(tag_field=str() as field, tag=tag):
            return isinstance(value, dict) and value.get(field) == tag
        case inspect.StructType() | inspect.DictType():
            return isinstance(value, dict)
        case inspect.UnionType(types=types):
            return any(_is_of_type(each, value) for each in types)
    raise AssertionError(f"declarations do not use {kind}")


def _bare(kind: inspect.Type) -> inspect.Type:
    return _bare(kind.type) if isinstance(kind, inspect.Metadata) else kind


def _expected(kind: inspect.Type) -> str:
    extra = kind.extra if isinstance(kind, inspect.Metadata) else None
    return (extra or {}).get("expected") or _noun(_bare(kind))


def _noun(kind: inspect.Type) -> str:
    """Return the type as messages call it."""
    match kind:
        case inspect.Metadata():
            return _expected(kind)
        case inspect.UnionType(types=types):
            named = (each for each in types if not isinstance(each, inspect.NoneType))
            return " or ".join(dict.fromkeys(map(_noun, named)))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "an integer"
        case inspect.FloatType():
            return "a number"
        case inspect.StrType():
            return "a string"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
        case inspect.ListType():
            return "a list"
        case _:
            return "an object"


def _joined(path: str, key: str) -> str:
    # A key of the client must not make a message long or break its line.
    shown = key if len(key) <= 100 and key.isprintable() else "..."
    return f"{path}.{shown}" if path else shown


def _range(least: float | None, most: float | None) -> str:
    if most is None or most == sys.float_info.max:
        return f"{_short(least)} or more"
    return f"between {_short(least)} and {_short(most)}"


def _short(number: float | None) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def _shown(value: Any) -> str:
    """Return the value as JSON if it is short, else its type: a message must not repeat megabytes."""
    if isinstance(value, bool | float | str | None) or (isinstance(value, int) and value.bit_length() <= 64):
        try:
            text = msgspec.json.encode(value).decode()
        except UnicodeEncodeError:  # a lone surrogate
            return _sort(value)
        if len(text) <= 60:
            return text
    return _sort(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False  # an integer of hundreds of digits


def _sort(value: Any) -> str:
    match value:
        case None:
            return "null"
        case str():
            return "a string"
        case int():
            return "a very large integer"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "a number"
