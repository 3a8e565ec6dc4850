"""Output items of a response, and the events of /v1/responses that build them. Pure.

An event is a function of the text so far, so that another replica continues a stream with the same events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from ...parsers.parts import CallArguments, CallBegin, CallEnd, Content, Part, Reasoning

#: An event without its number.
Event = dict[str, Any]
Logprobs = list[dict[str, Any]]


class ResponseOutput:
    """The items of one response, built from the parts of its text.

    Args:
        identity: suffix of the ids of items.
        call_id: returns the id of the call with this number.
    """

    def __init__(self, identity: str, call_id: Callable[[int], str]) -> None:
        self._identity = identity
        self._call_id = call_id
        #: The items that have ended.
        self.items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        #: Log probabilities of tokens whose text has not come yet.
        self._logprobs: Logprobs = []

    def add(self, parts: Iterable[Part], logprobs: Logprobs) -> list[Event]:
        """Return the events of new parts.

        Args:
            logprobs: of the tokens of these parts. Only those of text are kept.
        """
        self._logprobs += logprobs
        events: list[Event] = []
        for part in parts:
            match part:
                case Content(text):
                    events += self._continue(_Message)
                    events += self._add(text, self._logprobs)
                case Reasoning(text):
                    events += self._continue(_Reasoning)
                    events += self._add(text)
                case CallBegin(index, name):
                    events += self._end("completed")
                    identity = f"fc_{self._identity}_{len(self.items)}"
                    events += self._begin(_Call(identity, len(self.items), self._call_id(index), name))
                case CallArguments(_, text):
                    events += self._add(text)
                case CallEnd():
                    events += self._end("completed")
            self._logprobs = []
        return events

    def finish(self, status: str) -> list[Event]:
        """Return the events that end the last item, with this status. A response has at least one item."""
        events = [] if self.items or self._open is not None else self._continue(_Message)
        return [*events, *self._end(status)]

    def _continue(self, kind: type[_Message] | type[_Reasoning]) -> list[Event]:
        """Begin an item of this kind, unless one is open."""
        if isinstance(self._open, kind):
            return []
        events = self._end("completed")
        place = len(self.items)
        return [*events, *self._begin(kind(f"{kind.prefix}_{self._identity}_{place}", place))]

    def _begin(self, item: _Item) -> list[Event]:
        self._open = item
        return item.begin()

    def _add(self, text: str, logprobs: Logprobs | None = None) -> list[Event]:
        # A broken call may have text behind its end.
        return [] if self._open is None else [self._open.add(text, logprobs or [])]

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events, item = self._open.end(status)
        self.items.append(item)
        self._open = None
        return events


class _Item(ABC):
    """An item that is being written.

    Args:
        begun: the item before its text.
        place: its index in the output.
    """

    def __init__(self, begun: dict[str, Any], place: int) -> None:
        self._begun = begun
        self._place = place
        self._texts: list[str] = []

    def begin(self) -> list[Event]:
        return [{"type": "response.output_item.added", "output_index": self._place, "item": self._begun}]

    @abstractmethod
    def add(self, text: str, logprobs: Logprobs) -> Event:
        """Add text; return its event."""

    @abstractmethod
    def end(self, status: str) -> tuple[list[Event], dict[str, Any]]:
        """Return the last events and the whole item."""

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _done(self, **whole: Any) -> tuple[Event, dict[str, Any]]:
        item = self._begun | whole
        return {"type": "response.output_item.done", "output_index": self._place, "item": item}, item


class _PartItem(_Item):
    """An item with one part."""

    #: Beginning of its id.
    prefix: str
    #: Name of its text in events.
    kind: str

    def __init__(self, begun: dict[str, Any], place: int) -> None:
        super().__init__(begun, place)
        self._head = {"item_id": begun["id"], "output_index": place, "content_index": 0}

    def begin(self) -> list[Event]:
        return [
            *super().begin(),
            {"type": "response.content_part.added", **self._head, "part": self._part()},
        ]

    def add(self, text: str, logprobs: Logprobs) -> Event:
        self._texts.append(text)
        return {"type": f"response.{self.kind}.delta", **self._head, "delta": text}

    def end(self, status: str) -> tuple[list[Event], dict[str, Any]]:
        part = self._part()
        done, item = self._done(status=status, content=[part])
        events = [
            {"type": f"response.{self.kind}.done", **self._head, **self._whole()},
            {"type": "response.content_part.done", **self._head, "part": part},
            done,
        ]
        return events, item

    def _whole(self) -> dict[str, Any]:
        return {"text": self._text}

    @abstractmethod
    def _part(self) -> dict[str, Any]:
        """Return the part so far."""


class _Message(_PartItem):
    prefix = "msg"
    kind = "output_text"

    def __init__(self, identity: str, place: int) -> None:
        begun = {"id": identity, "type": "message", "role": "assistant"}
        super().__init__(begun | {"status": "in_progress", "content": []}, place)
        self._logprobs: Logprobs = []

    def add(self, text: str, logprobs: Logprobs) -> Event:
        self._logprobs += logprobs
        return super().add(text, logprobs) | {"logprobs": logprobs}

    def _whole(self) -> dict[str, Any]:
        return {"text": self._text, "logprobs": self._logprobs}

    def _part(self) -> dict[str, Any]:
        whole = {"text": self._text, "annotations": [], "logprobs": list(self._logprobs)}
        return {"type": "output_text", **whole}


class _Reasoning(_PartItem):
    prefix = "rs"
    kind = "reasoning_text"

    def __init__(self, identity: str, place: int) -> None:
        begun = {"id": identity, "type": "reasoning", "status": "in_progress"}
        super().__init__(begun | {"summary": [], "content": [], "encrypted_content": None}, place)

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self._text}


class _Call(_Item):
    def __init__(self, identity: str, place: int, call_id: str, name: str) -> None:
        begun = {"id": identity, "type": "function_call", "call_id": call_id, "name": name}
        super().__init__(begun | {"arguments": "", "status": "in_progress"}, place)
        self._head = {"item_id": identity, "output_index": place}

    def add(self, text: str, logprobs: Logprobs) -> Event:
        self._texts.append(text)
        return {"type": "response.function_call_arguments.delta", **self._head, "delta": text}

    def end(self, status: str) -> tuple[list[Event], dict[str, Any]]:
        done, item = self._done(status=status, arguments=self._text)
        kind = "response.function_call_arguments.done"
        event = {"type": kind, **self._head, "name": item["name"], "arguments": item["arguments"]}
        return [event, done], item
