"""Which parsers the choices of a request need."""

from __future__ import annotations

from functools import lru_cache

from ...common.errors import RequestError
from ...parsers.formats import HERMES
from ...parsers.message import MessageParser
from ...parsers.reasoning import BEGIN, END, ReasoningFormat, ReasoningSplitter
from ...parsers.tool_format import ToolFormat
from ...tokenizer.tokenizer import Tokenizer
from .protocol import ChatRequest, GenerationRequest
from .served_model import ServedModel

#: Tokens at the end of a prompt in which the beginning of the reasoning is looked for.
_TAIL = 16


def tool_format_of(served: ServedModel, request: ChatRequest) -> ToolFormat | None:
    """Return the format of the calls; None if the model is not to call tools.

    Raises:
        RequestError: the format is unknown.
    """
    use = request.tool_use
    if use is None:
        return None
    if served.tool_format is not None:
        return served.tool_format
    is_rendered = request.prompt_token_ids is None and not request.disable_chat_template
    # The server has told the model how to call, or makes it do so.
    if use.is_required or (
        is_rendered and not served.tokenizer.template_reads("tools", request.chat_template)
    ):
        return HERMES
    raise RequestError(
        "tools needs a server that was started with --tool-call-parser, because the chat template does not "
        'say how this model writes tool calls; tool_choice "none" and "required" work without the flag',
        "tools",
    )


def message_parser(
    served: ServedModel, request: GenerationRequest, prompt: list[int]
) -> MessageParser | None:
    """Return a new parser for a choice; None if its text is its content."""
    if not isinstance(request, ChatRequest):
        return None
    tool_format, splitter = tool_format_of(served, request), reasoning_splitter(served, request, prompt)
    if tool_format is None and splitter is None:
        return None
    return MessageParser(splitter, None if tool_format is None else tool_format.parser())


def reasoning_splitter(
    served: ServedModel, request: GenerationRequest, prompt: list[int]
) -> ReasoningSplitter | None:
    """Return a new splitter for a choice; None if its reasoning is not separated."""
    if not isinstance(request, ChatRequest) or (found := _reasoning_format(served, request)) is None:
        return None
    return ReasoningSplitter(
        found,
        is_inside=_ends_in_reasoning(served.tokenizer, request, prompt),
        in_one_piece=not request.stream_reasoning,
    )


def shown_ids(served: ServedModel, request: GenerationRequest) -> frozenset[int]:
    """Return the special tokens that the parsers of a request need to see."""
    if not isinstance(request, ChatRequest):
        return frozenset()
    formats = (tool_format_of(served, request), _reasoning_format(served, request))
    markers = tuple(marker for each in formats if each is not None for marker in each.markers)
    return _ids(served.tokenizer, markers)


def _reasoning_format(served: ServedModel, request: ChatRequest) -> ReasoningFormat | None:
    return served.reasoning_format if request.separate_reasoning else None


def _ends_in_reasoning(tokenizer: Tokenizer, request: ChatRequest, prompt: list[int]) -> bool:
    if request.continue_final_message:
        begun = request.messages[-1]["content"]
        return begun.rfind(BEGIN) > begun.rfind(END)
    # Only the end: a message may have the word in it.
    return tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip().endswith(BEGIN)


@lru_cache(maxsize=32)
def _ids(tokenizer: Tokenizer, markers: tuple[str, ...]) -> frozenset[int]:
    return frozenset(found for marker in markers if (found := tokenizer.token_id(marker)) is not None)
