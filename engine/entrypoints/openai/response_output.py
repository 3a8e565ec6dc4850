"""Output items of a response, and the events of /v1/responses that build them. Pure.

An event is a function of the text so far, so that another replica continues a stream with the same events.
"""

from __future__ import annotations

from typing import Any

#: An event without its number.
Event = dict[str, Any]


class ResponseOutput:
    """The items of one response, built from its text.

    Args:
        identity: suffix of the ids of items.
    """

    def __init__(self, identity: str) -> None:
        self._identity = identity
        #: The items that have ended.
        self.items: list[dict[str, Any]] = []
        self._message: _Message | None = None

    def add_text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        """Return the events of new text."""
        events = self._begin_message()
        assert self._message is not None
        return [*events, self._message.add(text, logprobs)]

    def finish(self, status: str) -> list[Event]:
        """Return the events that end the last item, with this status. A response has at least one item."""
        events = [] if self.items else self._begin_message()
        return [*events, *self._end_item(status)]

    def _begin_message(self) -> list[Event]:
        if self._message is not None:
            return []
        place = len(self.items)
        self._message = _Message(f"msg_{self._identity}_{place}", place)
        return self._message.begin()

    def _end_item(self, status: str) -> list[Event]:
        if self._message is None:
            return []
        events, item = self._message.end(status)
        self.items.append(item)
        self._message = None
        return events


class _Message:
    """A message that is being written. It has one part, its text."""

    def __init__(self, identity: str, place: int) -> None:
        self._item = {
            "id": identity,
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._place = place
        self._head = {"item_id": identity, "output_index": place, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        return [
            {"type": "response.output_item.added", "output_index": self._place, "item": self._item},
            {"type": "response.content_part.added", **self._head, "part": self._part()},
        ]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return {"type": "response.output_text.delta", **self._head, "delta": text, "logprobs": logprobs}

    def end(self, status: str) -> tuple[list[Event], dict[str, Any]]:
        """Return the last events and the item."""
        part = self._part()
        item = self._item | {"status": status, "content": [part]}
        whole = {"text": part["text"], "logprobs": part["logprobs"]}
        events = [
            {"type": "response.output_text.done", **self._head, **whole},
            {"type": "response.content_part.done", **self._head, "part": part},
            {"type": "response.output_item.done", "output_index": self._place, "item": item},
        ]
        return events, item

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}
