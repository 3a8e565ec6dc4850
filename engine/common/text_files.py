"""Text and JSON files that users edit or that belong to a checkpoint.

Errors are `ConfigError`s of one line with the file and the position. A byte order mark, which Windows editors
write, is accepted.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError
from .foreign_text import parse_json, printable

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
#: Maximum characters of an invalid value in an error.
_MAX_SHOWN = 60

T = TypeVar("T")


def read_text(file: Path, name: str = "") -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Args:
        name: the file's name in errors; its path by default.

    Raises:
        ConfigError: the file cannot be read or is not UTF-8 text.
    """
    name = name or str(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
    return decode(content, name)


def decode(content: bytes, name: str) -> str:
    """Return `content` as text, without a byte order mark.

    Raises:
        ConfigError: it is not UTF-8 text. The message does not quote it, because it may be a secret.
    """
    if content.startswith(_UTF_16):
        raise ConfigError(f"{name}: is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error's offset does not include a byte order mark.
        start = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, start) + 1
        raise ConfigError(f"{name}: byte {start} (line {line}) is not UTF-8; save it as UTF-8") from None
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise ConfigError(f"{name}: line {line} contains the character NUL; save it as UTF-8 text")
    return text


def read_object(file: Path) -> JsonObject:
    """Read a file that contains a JSON object. Raises ConfigError."""
    if not file.exists():
        raise ConfigError(f"{file}: no such file; a checkpoint directory needs it")
    return _parsed(file, read_text(file))


def read_optional_object(file: Path) -> JsonObject:
    """Read a file that contains a JSON object; a missing file is an empty object. Raises ConfigError."""
    return read_object(file) if file.exists() else JsonObject(file, {})


def _parsed(file: Path, text: str) -> JsonObject:
    try:
        # Only an escape can denote a surrogate in UTF-8 text.
        value = parse_json(text, allow_surrogates="\\ud" not in text.lower())
    except UnicodeEncodeError:
        raise ConfigError(
            f"{file}: contains half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {kind_of(value)}")
    return JsonObject(file, value)


class JsonObject:
    """Typed access to the keys of a JSON object.

    All methods raise ConfigError for a value of another type. A key with null counts as missing.

    Args:
        at: dotted path of the object in the file, with a trailing dot; "" for the whole file.
    """

    def __init__(self, file: Path, values: dict[str, Any], at: str = "") -> None:
        self.file = file
        self.values = values
        self._at = at

    def wrong(self, key: str, must_be: str) -> ConfigError:
        """Return the error for a key with an invalid value."""
        value = self.values.get(key)
        shown = repr(value) if isinstance(value, str | int | float | None) else kind_of(value)
        return ConfigError(
            f"{self.file}: {self._at}{key} is {printable(shown, _MAX_SHOWN)}; it must be {must_be}"
        )

    def integer(
        self, *names: str, default: int | None = None, least: int = 0, most: int | None = None
    ) -> int:
        """Return the value of the first key in `names` that exists, checked to be `least` to `most`.

        Without a default, one of the keys must exist.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if type(value) is not int:
                raise self.wrong(name, "an integer")
            if value < least or (most is not None and value > most):
                raise self.wrong(name, f"at least {least}" if most is None else f"between {least} and {most}")
            return value
        if default is None:
            raise ConfigError(f"{self.file}: {self._at}{names[0]} is missing")
        return default

    def number(self, name: str, default: float, above: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        # Python integers may be too large for a float.
        if type(value) not in (int, float) or abs(value) > 1e300 or math.isnan(value):
            raise self.wrong(name, "a finite number")
        if above is not None and value <= above:
            raise self.wrong(name, f"more than {above:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        return self._typed(name, bool, "true or false", lambda: default)

    def text(self, name: str, default: str | None = None) -> str | None:
        return self._typed(name, str, "a string", lambda: default)

    def object(self, name: str) -> JsonObject:
        """Return an object; empty if the key is missing."""
        values = self._typed(name, dict, "an object", dict)
        return JsonObject(self.file, values, f"{self._at}{name}.")

    def items(self, name: str) -> list[Any]:
        """Return a list; empty if the key is missing."""
        return self._typed(name, list, "a list", list)

    def integers(self, name: str) -> list[int]:
        """Return one integer or a list of integers as a list; empty if the key is missing."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(each) is not int or each < 0 for each in found):
            raise self.wrong(name, "a token id or a list of token ids")
        return found

    def _typed(self, name: str, kind: type, must_be: str, default: Callable[[], T]) -> Any:
        value = self.values.get(name)
        if value is None:
            return default()
        if not isinstance(value, kind):
            raise self.wrong(name, must_be)
        return value


def kind_of(value: Any) -> str:
    """Return the JSON type of a value, as a noun for messages."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a string"
        case bool():
            return "true" if value else "false"
        case None:
            return "null"
        case _:
            return "a number"
