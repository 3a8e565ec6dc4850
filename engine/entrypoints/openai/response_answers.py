"""Declarations of the responses of /v1/responses, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from .answers import Answer, DrawnLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer, tag_field="type", tag="output_text", frozen=True, kw_only=True):
    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)]
    logprobs: Annotated[list[DrawnLogprob], Meta(description="Empty unless asked for.")]


class OutputMessage(Answer, tag_field="type", tag="message", frozen=True, kw_only=True):
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(Answer, tag_field="type", tag="reasoning_text", frozen=True, kw_only=True):
    text: str


class ReasoningItem(Answer, tag_field="type", tag="reasoning", frozen=True, kw_only=True):
    id: str
    status: ItemStatus
    summary: Annotated[list[Any], Meta(max_length=0)]
    content: list[ReasoningText]
    encrypted_content: None


class FunctionCallItem(Answer, tag_field="type", tag="function_call", frozen=True, kw_only=True):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: Annotated[str, Meta(description="JSON.")]


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(Answer, frozen=True, kw_only=True):
    cached_tokens: Annotated[int, Meta(ge=0, description="Tokens taken from the prefix cache.")]
    cache_write_tokens: Annotated[Literal[0], Meta(description="Writes to the prefix cache are not counted.")]


class OutputTokensDetails(Answer, frozen=True, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(Answer, frozen=True, kw_only=True):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseProblem(Answer, frozen=True, kw_only=True):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(Answer, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


class ResponseObject(Answer, frozen=True, kw_only=True):
    """Response of /v1/responses. Fields of the request are returned as they were understood."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Annotated[
        Literal["in_progress", "completed", "incomplete", "cancelled"],
        Meta(description="cancelled: ended by /v1/abort_requests."),
    ]
    background: Literal[False]
    error: ResponseProblem | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: Annotated[ResponseUsage | None, Meta(description="null until the response has ended.")]
    user: str | None


class ResponseEvent(Answer, frozen=True, kw_only=True):
    """An event of a stream of /v1/responses. Its type decides which fields it has."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[DrawnLogprob] | UnsetType = UNSET
