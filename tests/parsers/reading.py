"""Reading a text with a parser, in any pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from fastdeploy.parsers.message import MessageParser
from fastdeploy.parsers.parts import Call, CallArguments, CallBegin, CallEnd, Content, Part, Reasoning
from fastdeploy.parsers.tool_format import ToolFormat


def parts_of(parser: MessageParser, text: str, cuts: Iterable[int] = ()) -> list[Part]:
    """Return the parts of a text that arrives in pieces, with neighbouring parts of a kind joined."""
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    found: list[Part] = []
    for number, piece in enumerate(pieces):
        for part in parser.push(piece, finished=number == len(pieces) - 1):
            found.append(part)
            match found[-2:]:
                case [Content(before), Content(after)]:
                    found[-2:] = [Content(before + after)]
                case [Reasoning(before), Reasoning(after)]:
                    found[-2:] = [Reasoning(before + after)]
                case [CallArguments(index, before), CallArguments(_, after)]:
                    found[-2:] = [CallArguments(index, before + after)]
    return found


def read(tool_format: ToolFormat, text: str, cuts: Iterable[int] = ()) -> list[Part]:
    return parts_of(MessageParser(None, tool_format.parser()), text, cuts)


def content_of(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """Return the calls; check that the parts of each are complete and in order."""
    calls: list[Call] = []
    open_call: int | None = None
    for part in parts:
        match part:
            case CallBegin(index, name):
                assert open_call is None
                assert index == len(calls)
                open_call = index
                calls.append(Call(name, ""))
            case CallArguments(index, text):
                assert index == open_call
                calls[index] = Call(calls[index].name, calls[index].arguments + text)
            case CallEnd(index):
                assert index == open_call
                open_call = None
    assert open_call is None
    return calls
