"""The grammar of a whole output: reasoning, then tool calls or a content."""

from __future__ import annotations

import re
from typing import Any

from ...common.errors import RequestError
from ...grammar.texts import json_rule, json_schema_grammar, lark_grammar, quoted, with_content
from ...grammar.validation import require_valid, require_valid_schema
from ...parsers.reasoning import BEGIN, END
from ...parsers.tool_format import ToolFormat
from ...tokenizer.tokenizer import Tokenizer
from .output_parsing import reasoning_splitter, shown_ids, tool_format_of
from .protocol import ChatRequest, GenerationRequest, ReasoningBudget
from .served_model import ServedModel
from .tool_fields import ToolUse
from .validation import UNSUPPORTED


def output_grammar(
    served: ServedModel, request: GenerationRequest, prompt: list[int], content: str | None
) -> str | None:
    """Return the grammar of an output; None if any text is allowed.

    Args:
        content: grammar of the content.

    Raises:
        RequestError: the calls have no grammar, or the reasoning cannot be limited.
    """
    if not isinstance(request, ChatRequest):
        return content
    use, budget = request.tool_use, request.reasoning_budget
    splitter = reasoning_splitter(served, request, prompt)
    if budget is not None and splitter is None:
        raise RequestError(
            f"{budget.field} needs a server that was started with --reasoning-parser", budget.field
        )
    has_calls = use is not None and (use.needs_grammar or content is not None)
    if not has_calls and budget is None and (content is None or splitter is None):
        return content
    tokenizer = served.tokenizer
    if has_calls:
        assert use is not None
        rules = _calls(tokenizer, use, tool_format_of(served, request), content is not None)
    elif content is not None:
        rules = ["output: @content"]
    else:
        # A special token is no text for a grammar, but the parsers may wait for it.
        ids = shown_ids(served, request) - {tokenizer.token_id(BEGIN), tokenizer.token_id(END)}
        markers = "".join(f" | <[{token_id}]>" for token_id in sorted(ids))
        rules = [f"output: (PLAIN{markers})*", _plain(BEGIN, END)]
    if splitter is not None:
        rules += _reasoning(tokenizer, budget, is_inside=splitter.has_reasoning)
    else:
        # The detokenizer strips the space.
        may_have_space = tokenizer.strips_first_space and not request.continues_prompt
        rules.append('start: " "? output' if may_have_space else "start: output")
    text = "\n".join(rules)
    return lark_grammar(text) if content is None else with_content(text, content)


class _Notation:
    """Terms of Lark for the formats of tool calls.

    Args:
        tokenizer: None: special tokens are written as text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, text: str) -> str:
        return quoted(text)

    def marker(self, text: str) -> str:
        found = None if self._tokenizer is None else _special_id(self._tokenizer, text)
        return quoted(text) if found is None else f"<[{found}]>"

    def json(self, schema: Any) -> str:
        # Schemas within a schema may be true or false, or wrong.
        return json_rule(schema if isinstance(schema, dict) else {"allOf": [schema]})


def _calls(
    tokenizer: Tokenizer, use: ToolUse, tool_format: ToolFormat | None, has_content: bool
) -> list[str]:
    """Return rules for calls, and for the text beside or instead of them unless they are required."""
    assert tool_format is not None, "the request has tools"
    # A grammar is checked without a vocabulary, so it must not name special tokens.
    checked = tool_format.grammar(use.allowed, _Notation(None), several=use.several)
    rules = tool_format.grammar(use.allowed, _Notation(tokenizer), several=use.several)
    if checked is None or rules is None:
        raise RequestError(
            "calls that have to follow a grammar (tool_choice, strict, parallel_tool_calls: false, or a "
            "response_format beside tools) are not supported by the server's --tool-call-parser",
            "tools",
            code=UNSUPPORTED,
        )
    _require_valid(checked, use)
    if use.is_required:
        return ["output: calls", rules]
    if has_content:
        return ["output: calls | @content", rules]
    opening = tool_format.opening
    if not opening:
        # A call begins the text.
        return ["output: (calls | OTHER)?", r"OTHER: /\s*[^\s\[{<](.|\n)*/", rules]
    many = "*" if use.several else "?"
    token_id = _special_id(tokenizer, opening)
    if token_id is None:
        lead = rf"lead[lazy]: /(.|\n)*{_escaped(opening)}/"
    else:
        lead = f"lead: PLAIN? <[{token_id}]>"
    return [f"output: (lead tail){many} PLAIN?", lead, _plain(opening), rules]


def _require_valid(rules: str, use: ToolUse) -> None:
    """Raise RequestError with the place of a schema that has no grammar."""
    try:
        require_valid(lark_grammar(f"start: calls\n{rules}"), "tools", has_place=False)
    except RequestError:
        for number, tool in enumerate(use.allowed, use.first):
            require_valid_schema(tool.parameters, f"tools[{number}].function.parameters", json_schema_grammar)
        raise


def _reasoning(tokenizer: Tokenizer, budget: ReasoningBudget | None, *, is_inside: bool) -> list[str]:
    """Return rules for the reasoning before the output.

    Raises:
        RequestError: the end of the reasoning is not one token, so no token can force it.
    """
    begin, end = tokenizer.token_id(BEGIN), tokenizer.token_id(END)
    if end is not None:
        limit = "" if budget is None else f"[max_tokens={budget.tokens}]"
        closing = f"<[{end}]>"
        rules = [f"thought{limit}: THOUGHT", rf"THOUGHT: /(.|\n)*/ & ~/(.|\n)*{_escaped(END)}(.|\n)*/"]
        if budget is not None and budget.tokens == 0:
            rules = ['thought: ""']
    elif budget is None:
        closing = ""
        rules = [rf"thought[lazy]: /(.|\n)*{_escaped(END)}/"]
    else:
        raise RequestError(
            f"{budget.field} is not supported: this model has no token {END}, which would end the reasoning",
            budget.field,
            code=UNSUPPORTED,
        )
    opening = quoted(BEGIN) if begin is None else f"<[{begin}]>"
    reasoned = f"thought {closing} gap output"
    start = reasoned if is_inside else f"({opening} {reasoned}) | output"
    return [f"start: {start}", r"gap: /[ \n]{0,4}/", *rules]


def _plain(*excluded: str) -> str:
    """Return the rule of a text that has none of these words."""
    words = "|".join(map(_escaped, excluded))
    return rf"PLAIN: /(.|\n)+/ & ~/(.|\n)*({words})(.|\n)*/"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _special_id(tokenizer: Tokenizer, text: str) -> int | None:
    found = tokenizer.token_id(text)
    return found if found is not None and tokenizer.is_special(found) else None
