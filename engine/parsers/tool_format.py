"""Interface of a format in which models write tool calls. Plugins implement it (docs/api.md)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .parts import Call
from .tool_parser import ToolParser

#: Keys of a schema to which its other keys refer.
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    #: JSON Schema of the arguments.
    parameters: dict[str, Any]

    @property
    def definitions(self) -> dict[str, Any]:
        """Return the part of the schema to which its other parts refer."""
        return {key: self.parameters[key] for key in _DEFINITIONS if key in self.parameters}


class Notation(Protocol):
    """Terms of Lark."""

    def text(self, text: str) -> str:
        """Return the term of a text."""

    def marker(self, text: str) -> str:
        """Return the term of a marker, which may be a special token."""

    def json(self, schema: Any) -> str:
        """Return the term of a JSON value that fits a schema."""


class ToolFormat(ABC):
    """Texts of one format. Immutable; all requests share it."""

    #: Special tokens that the parser needs to see in the text.
    markers: ClassVar[tuple[str, ...]] = ()
    #: Text before each section of calls, which may follow other text; empty: calls begin the text.
    opening: ClassVar[str] = ""
    #: Number of letters and digits of a call's id behind its prefix.
    id_prefix: ClassVar[str] = "call_"
    id_length: ClassVar[int] = 24
    #: Tells a model how to call, where its chat template does not.
    instruction: ClassVar[str] = ""

    @abstractmethod
    def parser(self) -> ToolParser:
        """Return a parser for one choice."""

    @abstractmethod
    def render(self, calls: Sequence[Call]) -> str:
        """Return calls as the model would write them, for a chat template that has no place for them."""

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str | None:
        """Return Lark rules; `calls` is a text of calls only, and `tail` the same without the `opening`.

        Args:
            tools: the functions that may be called.
            several: allow more than one call.

        Returns:
            None if the format has no grammar; tool_choice can then only be auto or none.
        """
        return None


def json_call(call: Call, arguments_key: str = "arguments") -> str:
    """Return a call as a JSON object."""
    return f'{{"name": {_json(call.name)}, "{arguments_key}": {call.arguments or "{}"}}}'


def alternatives(rule: str, tools: Sequence[Tool]) -> str:
    """Return a Lark rule that stands for one of the rules RULE_0, RULE_1, ..., one for each tool."""
    return f"{rule}: " + " | ".join(f"{rule}_{number}" for number in range(len(tools)))


def object_rules(tools: Sequence[Tool], notation: Notation) -> str:
    """Return Lark rules for the JSON object of one call, the first of them named `object`."""
    lines = [alternatives("object", tools)]
    for number, tool in enumerate(tools):
        begin = notation.text(f'{{"name": {_json(tool.name)}, "arguments": ')
        lines.append(f"object_{number}: {begin} arguments_{number} {notation.text('}')}")
        lines.append(f"arguments_{number}: {notation.json(tool.parameters)}")
    return "\n".join(lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
