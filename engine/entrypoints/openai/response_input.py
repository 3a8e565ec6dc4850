"""A request to /v1/responses as a chat request. No I/O."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ...common.errors import RequestError
from .protocol import ChatRequest, SamplingDefaults
from .response_bodies import (
    INCLUDE_LOGPROBS,
    SHARED_FIELDS,
    ChosenTool,
    FunctionTool,
    InputItem,
    InputPart,
    OutputRefusalPart,
    ReasoningOptions,
    ResponsesBody,
    SummaryTextPart,
    TextFormat,
    TextOptions,
)
from .validation import MISSING, UNSUPPORTED, WRONG_VALUE, refuse_unsupported, validated

#: A field of a chat request in an error, and its name here.
_NAMES = (
    (re.compile(r"response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"max_(completion_)?tokens"), "max_output_tokens"),
    (re.compile(r"reasoning_effort"), "reasoning.effort"),
    (re.compile(r"(tools\[\d+\]|tool_choice)\.function"), r"\1"),
)
#: Fields that events of a stream return as they are, and the limit of their size: the router limits an event.
_RETURNED = ("instructions", "tools", "tool_choice", "text", "reasoning", "metadata")
_MAX_RETURNED = 1 << 20
_MESSAGE = re.compile(r"messages\[(\d+)\]")


class ResponsesRequest(ChatRequest):
    """The chat request of a request to /v1/responses."""

    __slots__ = ()
    id_prefix = "resp"

    @property
    def prompt_field(self) -> str:
        return "input"

    @property
    def repeats_logprobs(self) -> bool:
        # In the events that end a text.
        return self.stream and self.logprobs is not None

    def response_id(self, request_id: str) -> str:
        """Return the id as OpenAI's clients know it."""
        return request_id if request_id.startswith("resp_") else f"resp_{request_id}"


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """A valid request."""

    body: ResponsesBody
    #: The chat request that it stands for.
    chat: ResponsesRequest
    #: By message of the chat request: the field from which it has been made.
    places: list[str]

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error in the chat request with the names of this endpoint's fields."""
        return _renamed(error, self.places)


def read_responses_request(values: dict[str, Any], defaults: SamplingDefaults) -> ResponsesCall:
    """Validate the body of a request.

    Raises:
        RequestError: a field is missing, invalid or not supported.
    """
    body = validated(values, ResponsesBody)
    for name, kind in (("text", TextOptions), ("reasoning", ReasoningOptions)):
        refuse_unsupported(values.get(name) or {}, kind.refused, name)
    returned = {name: getattr(body, name) for name in _RETURNED}
    if (size := len(msgspec.json.encode(returned))) > _MAX_RETURNED:
        raise RequestError(
            f"instructions, tools, text and metadata have {size} bytes together; they may have "
            f"{_MAX_RETURNED}, because each response returns them",
            "instructions",
            code=WRONG_VALUE,
        )
    messages, places = _conversation(values, body)
    chat = {name: values[name] for name in SHARED_FIELDS if name in values}
    chat["messages"] = messages
    chat["max_completion_tokens"] = body.max_output_tokens
    chat["logprobs"] = INCLUDE_LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    chat["top_logprobs"] = body.top_logprobs
    chat["reasoning_effort"] = body.reasoning and body.reasoning.effort
    chat["response_format"] = body.text and body.text.format and _response_format(body.text.format)
    chat["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    if isinstance(choice, ChosenTool):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        chat["tool_choice"] = choice
    try:
        return ResponsesCall(body, ResponsesRequest.parse(chat, defaults), places)
    except RequestError as error:
        raise _renamed(error, places) from None


def without_oldest(request: ResponsesRequest, fits: Callable[[ResponsesRequest], bool]) -> ResponsesRequest:
    """Return the request without as many of its oldest messages as needed.

    What is left begins with the system's messages and then one of a user. If not even the last of these fits,
    it is left alone.
    """
    messages = request.messages
    begin = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    cuts = [at for at in range(begin, len(messages)) if at == begin or messages[at]["role"] == "user"]

    def cut(at: int) -> ResponsesRequest:
        return replace(request, messages=messages[:begin] + messages[at:])

    first = bisect.bisect_left(cuts, True, key=lambda at: fits(cut(at)))
    return cut(cuts[min(first, len(cuts) - 1)]) if cuts else request


def _conversation(values: dict[str, Any], body: ResponsesBody) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of a chat request, and the field from which each has been made."""
    turns = _Turns()
    if body.instructions is not None:
        turns.add({"role": "system", "content": body.instructions}, "instructions")
    if isinstance(body.input, str):
        turns.add({"role": "user", "content": body.input}, "input")
        return turns.messages, turns.places
    for index, item in enumerate(body.input):
        place = f"input[{index}]"
        refuse_unsupported(values["input"][index], InputItem.refused, place)
        turns.add_item(item, place)
    turns.end_reasoning()
    return turns.messages, turns.places


class _Turns:
    """The messages so far. The reasoning, text and calls of an assistant's turn become one message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        #: Reasoning for the assistant's next message, and its place.
        self._reasoning: tuple[str, str] | None = None

    def add(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    def add_item(self, item: InputItem, place: str) -> None:
        match item.type:
            case "function_call":
                self._add_call(item, place)
            case "function_call_output":
                self.end_reasoning()
                call_id = _required(item.call_id, f"{place}.call_id", "the id of a call")
                content = _text(_required(item.output, f"{place}.output", "a string or a list of parts"))
                self.add({"role": "tool", "tool_call_id": call_id, "content": content}, place)
            case "reasoning":
                self.end_reasoning()
                texts = item.content if item.content is not None else item.summary
                self._reasoning = (_text(texts or ""), place)
            case _:
                role = _required(item.role, f"{place}.role", "user, assistant, system or developer")
                content = _text(_required(item.content, f"{place}.content", "a string or a list of parts"))
                if role == "assistant":
                    self.add({"role": role, "content": content, **self._take_reasoning()}, place)
                else:
                    self.end_reasoning()
                    self.add({"role": role, "content": content}, place)

    def end_reasoning(self) -> None:
        """Give reasoning that no message or call follows a message of its own."""
        if self._reasoning is not None:
            place = self._reasoning[1]
            self.add({"role": "assistant", "content": "", **self._take_reasoning()}, place)

    def _add_call(self, item: InputItem, place: str) -> None:
        call = {
            "id": _required(item.call_id, f"{place}.call_id", "the id of a call"),
            "type": "function",
            "function": {
                "name": _required(item.name, f"{place}.name", "the name of a function"),
                "arguments": _required(item.arguments, f"{place}.arguments", "a string with JSON"),
            },
        }
        is_continued = self.messages and self.messages[-1]["role"] == "assistant"
        if not is_continued or self._reasoning is not None:
            self.add({"role": "assistant", "content": None, **self._take_reasoning()}, place)
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _take_reasoning(self) -> dict[str, str]:
        taken, self._reasoning = self._reasoning, None
        return {} if taken is None else {"reasoning_content": taken[0]}


def _text(content: str | Sequence[InputPart | SummaryTextPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, OutputRefusalPart) else part.text for part in content)


def _required(value: Any, place: str, expected: str) -> Any:
    if value is None:
        raise RequestError(f"{place} is missing; it must be {expected}", place, code=MISSING)
    return value


def _tool(tool: FunctionTool, place: str) -> dict[str, Any]:
    if tool.type != "function":
        raise RequestError(
            f"{place}.type is {tool.type[:100]!r}; no tools run in this server, only functions of the client "
            'are supported: {"type": "function", "name": ...}',
            f"{place}.type",
            code=UNSUPPORTED,
        )
    name = _required(tool.name, f"{place}.name", "the name of a function")
    function = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {"name": name, **function}}


def _response_format(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    return {"type": "json_schema", "json_schema": {"name": given.name, "schema": given.schema}}


def _renamed(error: RequestError, places: list[str]) -> RequestError:
    """Return an error in a chat request with the names of this endpoint's fields."""
    if error.param is None:
        return error
    param = _MESSAGE.sub(lambda found: places[int(found[1])], error.param)
    for chat, own in _NAMES:
        if chat.match(param):
            param = chat.sub(own, param, count=1)
    return RequestError(str(error).replace(error.param, param), param, code=error.code)
