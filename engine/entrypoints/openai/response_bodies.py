"""Declaration of the body of /v1/responses, and the fields that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from .bodies import AtLeastOne, ChatBody, Count, GenerationBody, TemplateArguments, Truncation
from .constraint_bodies import Schema
from .field_types import MAX_TOKEN, Name
from .tool_fields import MAX_TOOLS, FunctionName
from .unsupported import CHAT_FIELDS, REQUEST_FIELDS
from .validation import Body, Refused

_STATELESS = "this server stores no responses"
_ITEMS_AGAIN = f"{_STATELESS}; send the earlier items in input"
_ONE_STEP = "each event has the tokens of one step"
_OF_CHAT = "it belongs to /v1/chat/completions"

#: A value of `include` that asks for log probabilities.
INCLUDE_LOGPROBS = "message.output_text.logprobs"


class InputTextPart(Struct, tag_field="type", tag="input_text", frozen=True):
    """Text of a user."""

    text: str


class OutputTextPart(Struct, tag_field="type", tag="output_text", frozen=True):
    """Text of an earlier response."""

    text: str


class OutputRefusalPart(Struct, tag_field="type", tag="refusal", frozen=True):
    """Refusal in an earlier response."""

    refusal: str


class ReasoningTextPart(Struct, tag_field="type", tag="reasoning_text", frozen=True):
    """Reasoning of an earlier response."""

    text: str


class SummaryTextPart(Struct, tag_field="type", tag="summary_text", frozen=True):
    """Summary of the reasoning of an earlier response."""

    text: str


_PARTS = {"expected": '{"type": "input_text", "text": ...}, because this model reads text only'}
InputPart = Annotated[
    InputTextPart | OutputTextPart | OutputRefusalPart | ReasoningTextPart, Meta(extra=_PARTS)
]
InputContent = Annotated[
    str | list[InputPart] | None, Meta(extra={"expected": "a string or a list of parts"})
]


class InputItem(Body, frozen=True, kw_only=True):
    """An item of the conversation: a message, a call of a function, its result, or reasoning.

    The items of an earlier response can be sent as they are.
    """

    refused: ClassVar[Mapping[str, Refused]] = {
        "encrypted_content": Refused("reasoning items of this server have their text in content", ("",)),
    }

    type: Annotated[
        Literal["message", "function_call", "function_call_output", "reasoning"] | None,
        Meta(description="Default: message."),
    ] = None
    role: Annotated[
        Literal["user", "assistant", "system", "developer"] | None, Meta(description="Of a message.")
    ] = None
    content: Annotated[InputContent, Meta(description="Of a message, or the text of reasoning.")] = None
    summary: Annotated[
        list[SummaryTextPart] | None, Meta(description="Of reasoning; used if there is no content.")
    ] = None
    call_id: Annotated[Name | None, Meta(description="Of a call and its result.")] = None
    name: Annotated[FunctionName | None, Meta(description="Of the called function.")] = None
    arguments: Annotated[str | None, Meta(description="Of a call, as JSON.")] = None
    output: Annotated[InputContent, Meta(description="Result of a call.")] = None


class TextFormat(Body, frozen=True, kw_only=True):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[Name | None, Meta(description="A note of the client.")] = None
    description: Annotated[str | None, Meta(description="A note of the client.")] = None
    schema: Annotated[Schema, Meta(description="For the type json_schema.")] = None
    strict: Annotated[bool | None, Meta(description="A schema is always enforced.")] = None


class TextOptions(Body, frozen=True, kw_only=True):
    """The form of the text."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "verbosity": Refused("no model here has such a setting", ("medium",)),
    }

    format: Annotated[TextFormat | None, Meta(description="Default: text.")] = None


class ReasoningOptions(Body, frozen=True, kw_only=True):
    """Options of reasoning."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "summary": Refused("responses have the reasoning itself, not a summary", ("auto",)),
        "generate_summary": Refused("responses have the reasoning itself, not a summary", ("auto",)),
        "context": Refused("the chat template decides which reasoning it shows", ("auto",)),
        "mode": Refused("no model here has such a setting", ("standard",)),
    }

    effort: Annotated[Name | None, Meta(description="A variable of the chat template.")] = None


class FunctionTool(Body, frozen=True, kw_only=True):
    """A function of the client that the model may call."""

    type: Annotated[Name, Meta(description="Only function: no tools run in the server.")]
    name: FunctionName | None = None
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="JSON Schema of the arguments.")] = None
    strict: Annotated[bool | None, Meta(description="Calls always follow the schema. Default: false.")] = None


class ChosenTool(Body, frozen=True, kw_only=True):
    """The function that the model has to call."""

    type: Literal["function"]
    name: FunctionName


_OWN_FIELDS = ("reasoning",)
RESPONSES_FIELDS: dict[str, Refused] = {
    **{name: field for name, field in REQUEST_FIELDS.items() if name not in _OWN_FIELDS},
    # Names of the other endpoints.
    "messages": Refused("input is its name here", ([],)),
    "max_tokens": Refused("max_output_tokens is its name here"),
    "max_completion_tokens": Refused("max_output_tokens is its name here"),
    "response_format": Refused("text.format is its name here", ({"type": "text"}, {})),
    "reasoning_effort": Refused("reasoning.effort is its name here"),
    "logprobs": Refused(f"include with {INCLUDE_LOGPROBS}, or top_logprobs, asks for them", (False,)),
    "n": Refused("a response has one text", (1,)),
    "prompt_logprobs": Refused(_OF_CHAT),
    "return_token_ids": Refused(_OF_CHAT, (False,)),
    "prompt_token_ids": Refused(_OF_CHAT, ([],)),
    "completion_token_ids": Refused(_OF_CHAT, ([],)),
    "chat_template": Refused(_OF_CHAT),
    "disable_chat_template": Refused(_OF_CHAT, (False,)),
    "add_generation_prompt": Refused(_OF_CHAT, (True,)),
    "continue_final_message": Refused(_OF_CHAT, (False,)),
    "documents": Refused(_OF_CHAT, ([],)),
    "include_reasoning": Refused(_OF_CHAT, (True,)),
    "separate_reasoning": Refused(_OF_CHAT, (True,)),
    "stream_reasoning": Refused(_OF_CHAT, (True,)),
    "max_streaming_response_tokens": Refused(_ONE_STEP, (1,)),
    "stream_interval": Refused(_ONE_STEP, (1,)),
    "echo": CHAT_FIELDS["echo"],
    "best_of": CHAT_FIELDS["best_of"],
    # Fields of this endpoint.
    "prompt": Refused("this server stores no prompts; send input and instructions", ("",)),
    "store": Refused(f"{_STATELESS}; send the items of a response in the next input", (False,)),
    "previous_response_id": Refused(_ITEMS_AGAIN),
    "conversation": Refused(_ITEMS_AGAIN),
    "background": Refused(f"{_STATELESS}; stream the response", (False,)),
    "context_management": Refused("truncation is the only way to shorten the input", ([],)),
    "image": Refused("this server reads and writes text only"),
    "stream_options": Refused(
        "a stream always ends with its usage, and is not obfuscated",
        ({"include_obfuscation": False}, {"include_usage": True}, {}),
    ),
}


class ResponsesBody(GenerationBody, frozen=True, kw_only=True):
    """Body of /v1/responses."""

    refused: ClassVar[Mapping[str, Refused]] = RESPONSES_FIELDS

    input: Annotated[
        str | Annotated[list[InputItem], Meta(min_length=1)],
        Meta(
            extra={"expected": "a string or a list of items"}, description="A user's text, or a conversation."
        ),
    ]
    instructions: Annotated[str | None, Meta(description="The system's message before the input.")] = None
    max_output_tokens: AtLeastOne | None = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKEN)] | None,
        Meta(description="Return so many log probabilities of each token."),
    ] = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None,
        Meta(description="Reasoning is never encrypted: its items have the text."),
    ] = None
    tools: Annotated[
        Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(extra={"expected": "a list of tools"}),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool | None,
        Meta(
            extra={"expected": 'none, auto, required or {"type": "function", "name": ...}'},
            description="Default: auto.",
        ),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Several calls. Default: true.")] = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="auto: leave out the oldest items if the input is too long. Default: disabled."),
    ] = None
    metadata: Annotated[
        dict[str, Annotated[str, Meta(max_length=512)]] | None, Meta(description="Returned as it is.")
    ] = None
    user: Annotated[Name | None, Meta(description="Returned as it is; the router may use it.")] = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_max_tokens: Annotated[Count | None, Meta(description="Most tokens of the reasoning.")] = None
    thinking_token_budget: Annotated[
        Truncation | None, Meta(description="vLLM's name of reasoning_max_tokens; -1: no limit.")
    ] = None
    max_tool_calls: Annotated[
        int | None, Meta(description="Without effect: it limits tools that run in the server.")
    ] = None


_TRANSLATED = ("metadata", "top_logprobs", "tools", "tool_choice")
#: Fields with the same meaning in a chat request.
SHARED_FIELDS = tuple(
    name
    for name in ResponsesBody.__struct_fields__
    if name in ChatBody.__struct_fields__ and name not in RESPONSES_FIELDS and name not in _TRANSLATED
)
