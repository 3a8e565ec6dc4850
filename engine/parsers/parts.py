"""Parts of a response that parsers find in the text of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More text of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More text of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The beginning of a tool call."""

    #: Number of the call in its choice, from 0.
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More text of a call's arguments, which are JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of a tool call."""

    index: int


Part = Reasoning | Content | CallBegin | CallArguments | CallEnd


@dataclass(frozen=True, slots=True)
class Call:
    """A whole tool call."""

    name: str
    #: JSON, normally of an object; as the model wrote it.
    arguments: str
