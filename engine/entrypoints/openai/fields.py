"""Typed access to a client's JSON object; an error message names the wrong field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from ...common.errors import RequestError


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
        raise RequestError("the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {_kind(value)}; a JSON object is expected")
    return value


def without_nulls(value: Any) -> Any:
    """Return `value` without the fields that are null, in objects at every level."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


class Fields:
    """A JSON object of the request. As in OpenAI's API, a null field counts as absent.

    All readers raise RequestError for a wrong type or a value out of range.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, key: str) -> str:
        """Return the dotted path of a field in the body."""
        return f"{self._path}.{key}" if self._path else key

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def number(self, key: str, default: float, low: float, high: float = math.inf) -> float:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise self.wrong(key, "a number")
        if not low <= value <= high:
            raise self.wrong(key, _range(low, high))
        return float(value)

    def integer(self, key: str, default: int | None, low: int, high: int) -> int | None:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        if not low <= value <= high:
            raise self.wrong(key, _range(low, high))
        return value

    def boolean(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def string(self, key: str, max_length: int | None = None) -> str | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        if max_length is not None and len(value) > max_length:
            raise RequestError(
                f"{self.name(key)} has {len(value)} characters; it may have at most {max_length}",
                self.name(key),
            )
        return value

    def object(self, key: str) -> Fields | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, self.name(key))

    def as_dict(self) -> dict[str, Any]:
        """Return the object without null fields, at every level."""
        return without_nulls(self._values)

    def wrong(self, key: str, expected: str) -> RequestError:
        """Return the error for a field with an invalid value."""
        return RequestError(
            f"{self.name(key)} is {_shown(self.get(key))}; it must be {expected}", self.name(key)
        )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False  # an integer of hundreds of digits


def _range(low: float, high: float) -> str:
    return f"{low} or more" if high == math.inf else f"between {low} and {high}"


def _shown(value: Any) -> str:
    """Return the value as JSON if it is short, else its type: a message must not repeat megabytes."""
    if isinstance(value, bool | float | str | None) or (isinstance(value, int) and value.bit_length() <= 64):
        text = msgspec.json.encode(value).decode()
        if len(text) <= 60:
            return text
    return _kind(value)


def _kind(value: Any) -> str:
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
