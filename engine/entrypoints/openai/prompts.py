"""Messages of a chat request and prompts of a completion request, from declared bodies.

All readers raise RequestError for a combination that the declarations allow and the API does not.
"""

from __future__ import annotations

from typing import Any

from ...common.errors import RequestError
from .bodies import ChatBody, Message, RefusalPart, TokenizeBody
from .tool_fields import template_call
from .validation import MISSING, WRONG_TYPE, invalid, refuse_unsupported, without_nulls

#: Fields of a message that a template may use.
_TEMPLATE_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thoughts")
#: Variables that the server sets.
_RESERVED_ARGUMENTS = ("self", "messages", "tools", "chat_template", "rendered_at")


def read_messages(values: list[dict[str, Any]], messages: list[Message]) -> list[dict[str, Any]]:
    """Return the messages, each with role, content as one string, and fields for the template if given.

    Args:
        values: the same as the client sent them.
    """
    for index, value in enumerate(values):
        refuse_unsupported(value, Message.refused, f"messages[{index}]")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, path: str) -> dict[str, Any]:
    # "developer" is OpenAI's newer name; templates of open models expect "system".
    role = "system" if message.role == "developer" else message.role
    return {
        "role": role,
        "content": _content(message, f"{path}.content"),
        **{key: value for key in _TEMPLATE_FIELDS if (value := getattr(message, key)) is not None},
        **_tool_calls(message, f"{path}.tool_calls"),
    }


def _tool_calls(message: Message, path: str) -> dict[str, Any]:
    if not message.tool_calls:
        return {}
    if message.role != "assistant":
        raise RequestError(f"{path}: only an assistant's message may have tool calls", path)
    return {"tool_calls": [template_call(call) for call in message.tool_calls]}


def _content(message: Message, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            # A response of OpenAI's API has either content or a refusal.
            return message.refusal or ""
        raise RequestError(
            f"{path} is missing; it must be a string or a list of text parts", path, code=MISSING
        )
    texts = []
    for index, part in enumerate(message.content):
        if not isinstance(part, RefusalPart):
            texts.append(part.text)
        elif message.role == "assistant":
            texts.append(part.refusal)
        else:
            place = f"{path}[{index}]"
            raise RequestError(f"{place} is a refusal, which only an assistant's message may have", place)
    return "".join(texts)


def template_arguments(body: ChatBody | TokenizeBody, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the further variables of the chat template; fields of the body win over chat_template_kwargs."""
    arguments: dict[str, Any] = without_nulls(body.chat_template_kwargs or {})
    for key in _RESERVED_ARGUMENTS:
        if key in arguments:
            name = f"chat_template_kwargs.{key}"
            raise RequestError(f"{name} is reserved", name)
    given = {
        "reasoning_effort": body.reasoning_effort,
        "add_generation_prompt": body.add_generation_prompt,
        "documents": body.documents,
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    if body.continue_final_message:
        _check_continuation(body, messages)
        arguments["add_generation_prompt"] = False
    return arguments


def _check_continuation(body: ChatBody | TokenizeBody, messages: list[dict[str, Any]]) -> None:
    problem = None
    if body.add_generation_prompt:
        problem = "add_generation_prompt must then be false or left out"
    elif not messages or not messages[-1]["content"].strip():
        problem = "the last message must then have a text to continue"
    if problem is not None:
        raise RequestError(f"continue_final_message is true; {problem}", "continue_final_message")


def read_prompts(name: str, prompt: str | list[Any] | None) -> tuple[str | list[int], ...]:
    """Return the field `name` as a tuple of prompts, each a text or token ids."""
    if prompt is None:
        raise RequestError(
            f"{name} is missing; it must be a string, token ids, or a list of either", name, code=MISSING
        )
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (prompt,)
    if len(kinds) == 1 and all(prompt if kinds == {list} else (True,)):
        return tuple(prompt)
    raise invalid(
        name,
        prompt,
        "a string, a non-empty list of token ids, or a list of strings or of such lists",
        code=WRONG_TYPE,
    )
