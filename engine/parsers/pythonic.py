"""Calls as a Python list, `[f(a=1), g()]`: Llama 3.2 and others."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from .json_text import json_text, without_surrogates
from .parts import Call
from .tool_format import Notation, Tool, ToolFormat, alternatives
from .tool_parser import MAX_NAME_LENGTH, ToolParser, may_begin

#: Llama 4 writes the list between these.
_START, _END = "<|python_start|>", "<|python_end|>"
_HEAD = re.compile(rf"\s*(?:{re.escape(_START)}\s*)?\[\s*(?=[A-Za-z_][\w.]*\()")
_MAY_BE_HEAD = re.compile(rf"\s*(?:{re.escape(_START)}\s*)?(?:\[\s*(?:[A-Za-z_][\w.]*)?)?")
_NAME = re.compile(rf"\s*([A-Za-z_][\w.]{{0,{MAX_NAME_LENGTH - 1}}})\(")
_MAY_BE_NAME = re.compile(r"\s*(?:[A-Za-z_][\w.]*)?")
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_PLAIN = re.compile(r"""[^'"()\[\]{}]*""")
_WORDS = {"true": True, "false": False, "null": None}


class Pythonic(ToolFormat):
    markers = (_START, _END)
    instruction = (
        "For function calls, return nothing but [<function name>(<argument name>=<argument value>, ...), "
        "...], a Python list with one or several calls."
    )

    def parser(self) -> PythonicParser:
        return PythonicParser()

    def render(self, calls: Sequence[Call]) -> str:
        return f"[{', '.join(map(_rendered, calls))}]"

    def grammar(self, tools: Sequence[Tool], notation: Notation, *, several: bool) -> str:
        more = ' (", " call)*' if several else ""
        lines = [f'calls: "[" call{more} "]"', alternatives("call", tools)]
        for number, tool in enumerate(tools):
            lines += _call_rules(f"call_{number}", tool, notation)
        return "\n".join(lines)


class PythonicParser(ToolParser):
    """A call is one part, because its arguments are translated as a whole."""

    def _start(self, finished: bool) -> bool:
        head = _HEAD.match(self._buffer)
        if head is not None:
            self._opened = head.end()
            self._state = self._in_section
            return True
        if not finished and (
            _MAY_BE_HEAD.fullmatch(self._buffer) or may_begin(self._buffer.lstrip(), _START)
        ):
            return False
        return self._no_call()

    def _in_section(self, finished: bool) -> bool:
        """State before a name."""
        name = _NAME.match(self._buffer, self._opened)
        if name is not None:
            self._scanned, self._depth = name.end(), 1
            self._state = self._in_call
            return True
        if not finished and _MAY_BE_NAME.fullmatch(self._buffer, self._opened):
            return False
        return self._no_call()

    def _in_call(self, finished: bool) -> bool:
        while self._depth and self._scanned < len(self._buffer):
            plain = _PLAIN.match(self._buffer, self._scanned)
            assert plain is not None, "the expression matches an empty text"
            self._scanned = plain.end()
            character = self._buffer[self._scanned : self._scanned + 1]
            if character in ("'", '"'):
                string = _STRING.match(self._buffer, self._scanned)
                if string is None:
                    break
                self._scanned = string.end()
            elif character:
                self._depth += 1 if character in "([{" else -1
                self._scanned += 1
        if self._depth:
            return self._no_call() if finished else False
        call = _call_of(self._buffer[self._opened : self._scanned])
        if call is None:
            return self._no_call()
        self._begin(call.name, self._scanned, self._after_arguments)
        self._add_arguments(call.arguments)
        return True

    def _after_arguments(self, finished: bool) -> bool:
        """State behind a call."""
        rest = self._buffer.lstrip()
        if not rest:
            return False
        end = len(self._buffer) - len(rest) + 1
        if rest[0] in ",]":
            return self._go(end, self._in_section if rest[0] == "," else self._after_list)
        self._state = self._in_content
        return True

    def _after_list(self, finished: bool) -> bool:
        rest = self._buffer.lstrip()
        if rest.startswith(_END):
            return self._go(len(self._buffer) - len(rest) + len(_END), self._in_content)
        if not finished and may_begin(rest, _END):
            return False
        self._state = self._in_content
        return True

    def _no_call(self) -> bool:
        self._state = self._in_content
        return True

    def _in_content(self, finished: bool) -> bool:
        """Last state; calls are at the beginning only."""
        shown = self._buffer if not self.num_calls else self._buffer.rstrip()
        self._content(len(shown))
        return False


def _call_rules(rule: str, tool: Tool, notation: Notation) -> list[str]:
    """Return Lark rules for a call: required arguments, then optional ones, in the order of the schema."""
    properties, required = tool.parameters.get("properties"), tool.parameters.get("required")
    if not isinstance(properties, dict):
        properties = {}
    if not isinstance(required, list):
        required = []
    names = sorted(properties, key=lambda name: name not in required)
    lines = []
    for number, name in enumerate(names):
        schema = properties[name]
        value = notation.json(schema | tool.definitions if isinstance(schema, dict) else schema)
        lines.append(f"{rule}_{number}: {notation.text(f'{name}=')} {rule}_value_{number}")
        lines.append(f"{rule}_value_{number}: {value}")
    count = sum(name in required for name in names)
    first = [f"{rule}_{number}" for number in range(count)]
    rest = [f'(", " {rule}_{number})?' for number in range(count, len(names))]
    if count:
        bodies = [" ".join([' ", " '.join(first), *rest])]
    else:
        bodies = [" ".join([f"{rule}_{at}", *rest[at + 1 :]]) for at in range(len(names))] + ['""']
    begin = notation.text(f"{tool.name}(")
    return [f'{rule}: {begin} ({" | ".join(bodies)}) ")"', *lines]


def _call_of(text: str) -> Call | None:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        arguments = {_key(each): _value(each.value) for each in tree.keywords}
        return Call(ast.unparse(tree.func), json_text(arguments))
    # The compiler has many ways to refuse a text.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("**arguments")
    return keyword.arg


def _value(node: ast.expr) -> Any:
    """Return the value of a literal; JSON's words are literals too."""
    match node:
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.Dict(keys=keys, values=values):
            return {_text_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Constant(value=str(text)):
            return without_surrogates(text)
        case ast.Constant(value=bool() | int() | float() | None as value):
            return value
        case _:
            return ast.literal_eval(node)


def _text_key(key: ast.expr | None) -> str:
    value = None if key is None else _value(key)
    if not isinstance(value, str):
        raise ValueError("a key is not a string")
    return value


def _rendered(call: Call) -> str:
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = {}
    items = arguments.items() if isinstance(arguments, dict) else ()
    return f"{call.name}({', '.join(f'{key}={json_text(value)}' for key, value in items)})"
