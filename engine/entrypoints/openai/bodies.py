"""Declarations of the bodies of requests."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from .constraint_bodies import ConstraintBody
from .field_types import MAX_TOKEN, Name, TokenId
from .tool_fields import ToolCalls, ToolChoice, Tools
from .unsupported import CHAT_FIELDS, COMPLETION_FIELDS, MESSAGE_FIELDS, TOKENIZE_FIELDS
from .validation import Body, Refused

MAX_CHOICES = 128
MAX_SEQUENCES = 256
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 256

TokenIds = Annotated[list[TokenId], Meta(extra={"expected": "a list of token ids"})]
#: A number of tokens.
Count = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
AtLeastOne = Annotated[int, Meta(ge=1, le=MAX_TOKEN)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
#: -1: of the whole vocabulary. --max-logprobs limits it.
Logprobs = Annotated[int, Meta(ge=-1, le=MAX_TOKEN)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Temperature = Annotated[float, Meta(ge=0.0, le=sys.float_info.max)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=10.0)]
#: 0 or -1: all tokens.
TopK = Annotated[int, Meta(ge=-1, le=MAX_TOKEN)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ChatTemplate = Annotated[str, Meta(max_length=1 << 16)]
TemplateArguments = Annotated[dict[str, Any], Meta(description="Further variables of the template.")]
Documents = Annotated[list[dict[str, Any]], Meta(description="For the chat template.")]
Truncation = Annotated[int, Meta(ge=-1, le=MAX_TOKEN)]
Role = Annotated[
    str, Meta(min_length=1, max_length=64, description="Usually system, user, assistant or tool.")
]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[str, Meta(max_length=MAX_STOP_LENGTH, description="Empty: none.")]
    | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
    | None,
    Meta(extra={"expected": "a string or a list of strings"}),
]
StopTokenIds = Annotated[
    Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None,
    Meta(extra={"expected": "a list of token ids"}),
]
_TOKEN_IDS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN},
}
#: A list has items of one kind, which msgspec's types cannot say.
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _TOKEN_IDS_SCHEMA},
        {"type": "null"},
    ]
}


class TextPart(Struct, tag_field="type", tag="text", frozen=True):
    """Text of a message."""

    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal", frozen=True):
    """Refusal in an assistant's message."""

    refusal: str


Part = Annotated[
    TextPart | RefusalPart,
    Meta(extra={"expected": '{"type": "text", "text": ...}, because this model reads text only'}),
]


class Message(Body, frozen=True, kw_only=True):
    """A message of a conversation. Only the content of an assistant's message may be null.

    The chat template decides which roles there are.
    """

    refused: ClassVar[Mapping[str, Refused]] = MESSAGE_FIELDS

    role: Role
    content: Annotated[
        str | list[Part] | None, Meta(extra={"expected": "a string or a list of text parts"})
    ] = None
    name: Name | None = None
    refusal: Annotated[str | None, Meta(description="Used if the content is null.")] = None
    tool_calls: Annotated[ToolCalls, Meta(description="Calls of an assistant's message.")] = None
    tool_call_id: Annotated[Name | None, Meta(description="For the chat template.")] = None
    reasoning_content: Annotated[str | None, Meta(description="For the chat template.")] = None
    reasoning: Annotated[str | None, Meta(description="The newer name of reasoning_content.")] = None
    thoughts: Annotated[str | None, Meta(description="For the chat template.")] = None


class StreamOptions(Body, frozen=True, kw_only=True):
    """Options of a stream."""

    include_usage: Annotated[bool | None, Meta(description="End with the usage. Default: true.")] = None
    continuous_usage_stats: Annotated[bool | None, Meta(description="Usage so far in each event.")] = None


class GenerationBody(ConstraintBody, frozen=True, kw_only=True):
    """Fields of both endpoints."""

    model: Name | None = None
    n: Annotated[Choices | None, Meta(description="Number of choices for each prompt. Default: 1.")] = None
    min_tokens: Annotated[Count | None, Meta(description="No choice ends before.")] = None
    temperature: Annotated[Temperature | None, Meta(description="0: always the most likely token.")] = None
    top_p: Fraction | None = None
    top_k: Annotated[TopK | None, Meta(description="0 or -1: all tokens.")] = None
    min_p: Fraction | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[Seed | None, Meta(description="Equal seeds give equal responses.")] = None
    stop: Stop = None
    stop_token_ids: StopTokenIds = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Only with stream: true.")] = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[
        Logprobs | None, Meta(description="Log probabilities of the prompt; 0: only of its own tokens.")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="Log probabilities name tokens as token_id:ID.")
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text. Default: true.")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Begin with the special tokens. Default: false for a chat template, else true."),
    ] = None
    truncate_prompt_tokens: Annotated[
        Truncation | None, Meta(description="Keep so many tokens of a prompt; -1: as many as fit.")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Meta(description="Where tokens are dropped. Default: left.")
    ] = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None
    cache_salt: Annotated[
        Name | None, Meta(description="Only requests with the same one share cached prompts.")
    ] = None
    max_streaming_response_tokens: Annotated[
        AtLeastOne | None,
        Meta(description="Tokens in an event of a stream, except in the first and the last. Default: 1."),
    ] = None
    stream_interval: Annotated[
        AtLeastOne | None, Meta(description="vLLM's name of max_streaming_response_tokens.")
    ] = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Refused]] = CHAT_FIELDS

    messages: Annotated[
        list[Message] | None,
        Meta(extra={"expected": "a list of messages"}, description="Required without prompt_token_ids."),
    ] = None
    prompt_token_ids: Annotated[TokenIds | None, Meta(description="The prompt, in place of messages.")] = None
    completion_token_ids: Annotated[TokenIds | None, Meta(description="Appended to the prompt.")] = None
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: Annotated[
        AtLeastOne | None, Meta(description="The newer name of max_tokens; wins over it.")
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Logprobs | None, Meta(description="Needs logprobs: true.")] = None
    chat_template: ChatTemplate | None = None
    chat_template_kwargs: TemplateArguments | None = None
    disable_chat_template: Annotated[
        bool | None, Meta(description="The first message's content is the prompt.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End the prompt with the beginning of a response. Default: true.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="The response continues the last message.")
    ] = None
    documents: Documents | None = None
    tools: Annotated[Tools, Meta(description="Functions that the model may call.")] = None
    tool_choice: Annotated[ToolChoice, Meta(description="Default: auto.")] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Several calls. Default: true.")] = None
    reasoning_max_tokens: Annotated[Count | None, Meta(description="Most tokens of the reasoning.")] = None
    thinking_token_budget: Annotated[
        Truncation | None, Meta(description="vLLM's name of reasoning_max_tokens; -1: no limit.")
    ] = None
    include_reasoning: Annotated[bool | None, Meta(description="Return the reasoning. Default: true.")] = None
    separate_reasoning: Annotated[
        bool | None, Meta(description="Keep the reasoning out of the content. Default: true.")
    ] = None
    stream_reasoning: Annotated[
        bool | None, Meta(description="Send the reasoning as it comes. Default: true.")
    ] = None
    reasoning_effort: Annotated[
        Name | None, Meta(description="A variable of the template; wins over chat_template_kwargs.")
    ] = None
    metadata: Annotated[
        Any, Meta(description="As in FastDeploy, values that are no strings count as fields of the request.")
    ] = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    refused: ClassVar[Mapping[str, Refused]] = COMPLETION_FIELDS

    prompt: Annotated[
        str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)] | None,
        Meta(
            extra={"expected": "a string, token ids, or a list of either"},
            extra_json_schema=_PROMPT_SCHEMA,
            description="Required without prompt_token_ids.",
        ),
    ] = None
    prompt_token_ids: Annotated[
        list[TokenId | list[TokenId]] | None,
        Meta(description="One or several prompts, in place of prompt."),
    ] = None
    max_tokens: Annotated[Count | None, Meta(description="0 is useful with echo and logprobs.")] = None
    max_completion_tokens: Count | None = None
    logprobs: Annotated[Logprobs | None, Meta(description="0: only of the drawn tokens.")] = None
    best_of: Annotated[Choices | None, Meta(description="Only equal to n.")] = None
    echo: Annotated[bool | None, Meta(description="Begin with the prompt.")] = None


class TokenizeBody(Body, frozen=True, kw_only=True):
    """Body of /tokenize: either a text or messages."""

    refused: ClassVar[Mapping[str, Refused]] = TOKENIZE_FIELDS

    model: Name | None = None
    prompt: Annotated[str | None, Meta(description="A text.")] = None
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)] | None,
        Meta(extra={"expected": "a list of messages"}, description="For the chat template."),
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Default: true for a text, false for messages.")
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Return the text of each token too.")] = None
    chat_template: ChatTemplate | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: Annotated[bool | None, Meta(description="Default: true.")] = None
    continue_final_message: bool | None = None
    documents: Documents | None = None
    tools: Tools = None
    reasoning_effort: Name | None = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """Body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Meta(extra={"expected": "a list of token ids"})]
    skip_special_tokens: Annotated[bool | None, Meta(description="Default: false.")] = None


class AbortBody(Body, frozen=True, kw_only=True):
    """Body of /v1/abort_requests."""

    abort_all: Annotated[bool | None, Meta(description="End all open requests.")] = None
    req_ids: Annotated[
        Annotated[list[Name], Meta(max_length=4096)] | None,
        Meta(description="Ids of responses or requests. Required without abort_all."),
    ] = None


class GenerationConfig(Body, frozen=True, kw_only=True):
    """A checkpoint's generation_config.json: recommended parameters."""

    do_sample: Any = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Count | None = None
    repetition_penalty: RepetitionPenalty | None = None
