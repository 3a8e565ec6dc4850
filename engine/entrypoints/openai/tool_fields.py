"""Tools of a chat request: their declarations, and what a valid request wants of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ...common.errors import RequestError
from ...parsers.tool_format import Tool
from ...parsers.tool_parser import MAX_NAME_LENGTH
from .field_types import Name
from .validation import WRONG_VALUE, Body

MAX_TOOLS = 256
MAX_CALLS = 1024
#: Limit of the JSON of all tools together, in bytes.
MAX_TOOLS_SIZE = 1 << 20

FunctionName = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
Arguments = Annotated[str | dict[str, Any] | None, Meta(extra={"expected": "a string of JSON or an object"})]


class FunctionDefinition(Body, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="JSON Schema of the arguments.")] = None
    strict: Annotated[bool | None, Meta(description="Calls always follow the schema.")] = None


class ToolDefinition(Body, frozen=True, kw_only=True):
    """A tool; only functions are supported."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body, frozen=True, kw_only=True):
    name: FunctionName


class NamedTool(Body, frozen=True, kw_only=True):
    """The function that the model has to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class FunctionCall(Body, frozen=True, kw_only=True):
    name: FunctionName
    arguments: Arguments = None


class ToolCall(Body, frozen=True, kw_only=True):
    """A call in an assistant's message."""

    id: Name | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


Tools = Annotated[
    Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] | None,
    Meta(extra={"expected": "a list of tools"}),
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | None,
    Meta(extra={"expected": 'none, auto, required or {"type": "function", "function": {"name": ...}}'}),
]
ToolCalls = Annotated[
    Annotated[list[ToolCall], Meta(max_length=MAX_CALLS)] | None,
    Meta(extra={"expected": "a list of tool calls"}),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how the model may use them."""

    #: As the chat template gets them.
    definitions: list[dict[str, Any]]
    #: The same; only the one that has to be called if the request names it.
    allowed: tuple[Tool, ...]
    #: Index in the request of the first of `allowed`.
    first: int
    #: The response consists of calls.
    is_required: bool
    #: More than one call is allowed.
    several: bool
    #: Calls have to follow the schema even if the model decides whether to call.
    is_strict: bool

    @property
    def needs_grammar(self) -> bool:
        return self.is_required or self.is_strict or not self.several


def read_tools(
    tools: Sequence[ToolDefinition] | None, choice: str | NamedTool | None, parallel: bool | None
) -> ToolUse | None:
    """Return the use of tools; None if the model is not to call any. Raises RequestError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            problem = "tool_choice needs tools to choose from, and there are none"
            raise RequestError(problem, "tool_choice", code=WRONG_VALUE)
        return None
    definitions = [_definition(tool) for tool in tools]
    if (size := len(msgspec.json.encode(definitions))) > MAX_TOOLS_SIZE:
        raise RequestError(
            f"tools has {size} bytes of JSON; it may have {MAX_TOOLS_SIZE}", "tools", code=WRONG_VALUE
        )
    names: dict[str, None] = {}
    for index, tool in enumerate(tools):
        place = f"tools[{index}].function.name"
        if not tool.function.name.isprintable():
            raise RequestError(f"{place} has characters that cannot be printed", place, code=WRONG_VALUE)
        if tool.function.name in names:
            raise RequestError(
                f"{place} is {tool.function.name!r}, as that of an earlier tool", place, code=WRONG_VALUE
            )
        names[tool.function.name] = None
    chosen = choice.function.name if isinstance(choice, NamedTool) else None
    if chosen is not None and chosen not in names:
        place = "tool_choice.function.name"
        raise RequestError(
            f"{place} is {chosen!r}, which is not the name of one of the tools", place, code=WRONG_VALUE
        )
    if choice == "none":
        return None
    return ToolUse(
        definitions,
        tuple(_tool(tool) for tool in tools if chosen in (None, tool.function.name)),
        first=0 if chosen is None else list(names).index(chosen),
        is_required=choice not in (None, "auto"),
        several=parallel is not False and chosen is None,
        is_strict=any(tool.function.strict for tool in tools),
    )


def template_call(call: ToolCall) -> dict[str, Any]:
    """Return a call of an earlier message as chat templates expect it, with the arguments as an object."""
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            decoded = msgspec.json.decode(arguments)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            decoded = None
        # The model may have written anything, and the client returns it as it was.
        arguments = decoded if isinstance(decoded, dict) else arguments
    function = {"name": call.function.name, "arguments": {} if arguments in (None, "") else arguments}
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}


def _definition(tool: ToolDefinition) -> dict[str, Any]:
    function = tool.function
    given = {
        "description": function.description,
        "parameters": function.parameters,
        "strict": function.strict,
    }
    return {
        "type": "function",
        "function": {"name": function.name}
        | {key: value for key, value in given.items() if value is not None},
    }


def _tool(tool: ToolDefinition) -> Tool:
    # Arguments are always an object.
    return Tool(tool.function.name, (tool.function.parameters or {}) | {"type": "object"})
