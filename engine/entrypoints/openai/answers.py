"""Declarations of the responses, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

#: Present in a stream only if the request asks for it; otherwise null.
Ids = list[int] | UnsetType | None
TokenText = Annotated[str | UnsetType | None, Meta(description="The text of the ids with special tokens.")]
FinishReason = Literal["stop", "length", "abort"]
StopReason = Annotated[
    str | int | UnsetType | None,
    Meta(description="The stop string or stop token of the request that has ended the choice."),
]
ChatFinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Answer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of a response."""


class ErrorDetail(Answer, frozen=True, kw_only=True):
    """Description of an error."""

    message: str
    type: str
    param: Annotated[str | None, Meta(description="Path of the wrong field, such as messages[0].role.")]
    code: Annotated[str | None, Meta(description="OpenAI's word for the error.")]


class Error(Answer, frozen=True, kw_only=True):
    """Body of every response with an error status."""

    error: ErrorDetail


class PromptTokensDetails(Answer, frozen=True, kw_only=True):
    cached_tokens: Annotated[int, Meta(ge=0, description="Tokens taken from the prefix cache.")]


class CompletionTokensDetails(Answer, frozen=True, kw_only=True):
    reasoning_tokens: Annotated[int, Meta(ge=0, description="Tokens up to the end of the reasoning.")]


class Usage(Answer, frozen=True, kw_only=True):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TokenLogprob(Answer, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class DrawnLogprob(TokenLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer, frozen=True, kw_only=True):
    content: list[DrawnLogprob]
    refusal: None


class PromptLogprob(Answer, frozen=True, kw_only=True):
    logprob: float
    rank: Annotated[int, Meta(ge=1, description="1 is the most likely token.")]
    decoded_token: str


#: For each position of the prompt its token and the most likely tokens by id; null for the first one.
PromptLogprobs = list[dict[str, PromptLogprob] | None] | UnsetType | None


class CalledFunction(Answer, frozen=True, kw_only=True):
    name: str
    arguments: Annotated[str, Meta(description="JSON as the model wrote it, which may be invalid.")]


class AnsweredCall(Answer, frozen=True, kw_only=True):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answer, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: Annotated[str | None, Meta(description="null if there are only tool calls.")]
    refusal: None
    reasoning_content: str | None
    tool_calls: list[AnsweredCall] | None
    prompt_token_ids: list[int] | None
    completion_token_ids: list[int] | None
    prompt_tokens: TokenText
    completion_tokens: TokenText


class ChatChoice(Answer, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason
    token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs


class ChatCompletion(Answer, frozen=True, kw_only=True):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs
    system_fingerprint: None
    service_tier: None


class CalledFunctionDelta(Answer, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(Answer, frozen=True, kw_only=True):
    """More of a tool call. The first delta has id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunctionDelta


class ChatDelta(Answer, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET
    prompt_token_ids: Ids = UNSET
    completion_token_ids: Ids = UNSET
    prompt_tokens: TokenText = UNSET
    completion_tokens: TokenText = UNSET


class ChatChunkChoice(Answer, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: StopReason = UNSET
    token_ids: Ids = UNSET
    prompt_logprobs: PromptLogprobs = UNSET


class ChatCompletionChunk(Answer, frozen=True, kw_only=True):
    """An event of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: Ids = UNSET


class CompletionLogprobs(Answer, frozen=True, kw_only=True):
    """One list for each property of the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Annotated[FinishReason | None, Meta(description="null within a stream.")]
    stop_reason: StopReason = UNSET
    prompt_token_ids: Ids = UNSET
    completion_token_ids: Ids = UNSET
    prompt_tokens: TokenText = UNSET
    completion_tokens: TokenText = UNSET
    token_ids: Ids = UNSET
    prompt_logprobs: PromptLogprobs = UNSET


class Completion(Answer, frozen=True, kw_only=True):
    """Response of /v1/completions, or an event of its stream, whose usage may be null or missing."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelPermission(Answer, frozen=True, kw_only=True):
    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelCard(Answer, frozen=True, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(Answer, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer, frozen=True, kw_only=True):
    """Response of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer, frozen=True, kw_only=True):
    """Response of /detokenize."""

    prompt: str


class AbortedRequest(Answer, frozen=True, kw_only=True):
    request_id: str
    output_token_count: int


class AbortResult(Answer, frozen=True, kw_only=True):
    aborted: list[AbortedRequest]
    not_found: Annotated[list[str], Meta(description="Ids that no open request has.")]


class Abortion(Answer, frozen=True, kw_only=True):
    """Response of /v1/abort_requests, as in FastDeploy."""

    request_id: str
    status: Literal["success", "error"]
    error_message: Annotated[str | None, Meta(description="Replicas that did not answer the router.")]
    result: AbortResult


class Load(Answer, frozen=True, kw_only=True):
    """Response of /load."""

    server_load: Annotated[int, Meta(description="Number of open requests.")]
    max_concurrency: Annotated[int, Meta(description="Further requests are refused with 429.")]


class Version(Answer, frozen=True, kw_only=True):
    version: str
