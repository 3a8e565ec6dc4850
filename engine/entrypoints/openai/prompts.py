"""Messages of a chat request and prompts of a completion request, from declared bodies.

All readers raise RequestError for a combination that the declarations allow and the API does not.
"""

from __future__ import annotations

from typing import Any

from ...common.errors import RequestError
from .bodies import Message, RefusalPart
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
    }


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


def read_template_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `chat_template_kwargs`, which must not replace variables that the server sets."""
    arguments = without_nulls(arguments)
    for key in _RESERVED_ARGUMENTS:
        if key in arguments:
            name = f"chat_template_kwargs.{key}"
            raise RequestError(f"{name} is reserved", name)
    return arguments


def read_prompts(prompt: str | list[Any]) -> tuple[str | list[int], ...]:
    """Return `prompt` as a tuple of prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (prompt,)
    if len(kinds) == 1 and all(prompt if kinds == {list} else (True,)):
        return tuple(prompt)
    raise invalid(
        "prompt",
        prompt,
        "a string, a non-empty list of token ids, or a list of strings or of such lists",
        code=WRONG_TYPE,
    )
