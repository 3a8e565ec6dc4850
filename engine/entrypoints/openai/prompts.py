"""Messages of a chat request and prompts of a completion request, read from the body.

All readers raise RequestError for an invalid field.
"""

from __future__ import annotations

from typing import Any

from ...common.errors import RequestError
from .fields import Fields, without_nulls

#: The engine has 32-bit token ids and counts.
MAX_TOKEN = 2**31 - 1

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return `messages`, each with role, content as one string, and name if given."""
    value = fields.get("messages")
    if value is None:
        raise RequestError("messages is missing; it must be a list of messages", "messages")
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of at least one message", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{path} must be an object with role and content", path)
    fields = Fields(value, path)
    role = fields.get("role")
    if role not in _ROLES:
        raise fields.wrong("role", f"one of {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call", "audio"):
        if without_nulls(fields.get(key)):
            raise RequestError(f"{fields.name(key)} is not supported by this server", fields.name(key))
    # "developer" is OpenAI's newer name; templates of open models expect "system".
    message = {"role": "system" if role == "developer" else role, "content": _content(fields, role)}
    name = fields.string("name", 1024)
    return message | ({"name": name} if name is not None else {})


def _content(fields: Fields, role: str) -> str:
    content = fields.get("content")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        # A response of OpenAI's API has either content or a refusal.
        return fields.string("refusal") or ""
    if not isinstance(content, list):
        raise fields.wrong("content", "a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        path = f"{fields.name('content')}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        is_readable = kind == "text" or (kind == "refusal" and role == "assistant")
        if is_readable and isinstance(part.get(kind), str):
            texts.append(part[kind])
        else:
            raise RequestError(
                f'{path} must be {{"type": "text", "text": ...}}; this model reads text only', path
            )
    return "".join(texts)


def read_template_arguments(fields: Fields) -> dict[str, Any]:
    """Return `chat_template_kwargs`, which must not replace variables that the server sets."""
    arguments = fields.as_dict()
    for key in ("self", "messages", "tools", "chat_template", "rendered_at"):
        if key in arguments:
            raise RequestError(f"{fields.name(key)} is reserved", fields.name(key))
    return arguments


def read_prompts(fields: Fields) -> tuple[str | list[int], ...]:
    """Return `prompt` as a tuple of prompts, each a text or token ids."""
    value = fields.get("prompt")
    if value is None:
        raise RequestError("prompt is missing; it must be a string, token ids, or a list of either", "prompt")
    if isinstance(value, str) or _is_token_list(value):
        return (value,)
    if isinstance(value, list) and value and _is_uniform(value):
        return tuple(value)
    raise RequestError(
        "prompt must be a string, a non-empty list of token ids, or a list of strings or of such lists",
        "prompt",
    )


def _is_uniform(values: list[Any]) -> bool:
    return all(isinstance(item, str) for item in values) or all(_is_token_list(item) for item in values)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_token_id(item) for item in value)


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN
