"""Messages for chat templates that have no place for tools or for earlier tool calls."""

from __future__ import annotations

import json
from typing import Any

from ...parsers.parts import Call
from ...parsers.tool_format import ToolFormat


def with_written_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """Return the messages with the tools in the system message, which may be new."""
    paragraph = _paragraph(tools, tool_format)
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{paragraph}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": paragraph}, *messages]


def with_written_calls(messages: list[dict[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Return the messages with tool calls and their results as text."""
    written: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            # Results of several calls are one message, because templates expect the roles to alternate.
            if follows_result:
                written[-1] = written[-1] | {"content": f"{written[-1]['content']}\n{content}"}
            else:
                written.append({"role": "user", "content": content})
        elif "tool_calls" in message:
            written.append(_with_calls_as_text(message, tool_format))
        else:
            written.append(message)
        follows_result = is_result
    return written


def _with_calls_as_text(message: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    calls = [_call(each["function"]) for each in message["tool_calls"]]
    texts = [text for text in (message["content"], tool_format.render(calls)) if text]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join(texts)}


def _call(function: dict[str, Any]) -> Call:
    arguments = function["arguments"]
    return Call(
        function["name"],
        arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )


def _paragraph(tools: list[dict[str, Any]], tool_format: ToolFormat) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{lines}\n</tools>\n\n{tool_format.instruction}"
    ).rstrip()
