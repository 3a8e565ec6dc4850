"""Renders conversations with Jinja chat templates.

Templates are written for Hugging Face's renderer, so the environment provides the same extensions:
`raise_exception`, `strftime_now`, a `tojson` that does not escape non-ASCII text, loop controls, and the
`{% generation %}` tag (which only matters for training).

A checkpoint's own template is trusted like its weights. A client's template is not: Jinja's sandbox keeps it
from Python, but does not limit time or memory (``{{ "a" * 10 ** 10 }}``). It is therefore rendered in a child
process with resource limits; see `render_untrusted`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..common.errors import RequestError
from ..common.foreign_text import printable

MAX_TEMPLATE_CHARACTERS = 64 * 1024
_CPU_SECONDS = 2
_MEMORY_BYTES = 512 << 20
_MAX_TEXT_CHARACTERS = 8 << 20
#: Maximum length of a message of `raise_exception` or of Jinja.
_MAX_ERROR_CHARACTERS = 500
#: Longer than _CPU_SECONDS, for machines too busy to run the child.
_WALL_SECONDS = 30


class Render(Protocol):
    def __call__(self, variables: dict[str, Any], rendered_at: float | None = None) -> str: ...


def compile_template(source: str, blamed: str = "messages") -> Render:
    """Return a function that renders `source` with the given variables, at the given time or now.

    Args:
        blamed: field of the request that an error names if the template fails while rendering.

    Raises:
        RequestError: the template cannot be compiled. The function raises it for any error while rendering.
    """
    try:
        template = _environment().from_string(source)
    except (RecursionError, MemoryError):
        raise RequestError(
            "the chat template cannot be compiled: its expressions are nested too deeply or too large",
            "chat_template",
        ) from None
    # Not only TemplateError: Jinja generates Python code, whose compiler has its own errors (a break outside
    # of a loop, a number with too many digits).
    except Exception as error:
        raise RequestError(
            f"the chat template cannot be compiled: {_one_line(error)}", "chat_template"
        ) from None

    def render(variables: dict[str, Any], rendered_at: float | None = None) -> str:
        moment = datetime.now() if rendered_at is None else datetime.fromtimestamp(rendered_at)
        try:
            return template.render({"strftime_now": moment.strftime} | _with_arguments(variables))
        except _Refusal as error:
            raise RequestError(
                f"the chat template rejects these messages: {_one_line(error)}", "messages"
            ) from None
        except (RecursionError, MemoryError):
            raise RequestError(
                "the chat template failed: it needs too much memory", "chat_template"
            ) from None
        # A template runs as Python code and can raise any exception.
        except Exception as error:
            raise RequestError(f"the chat template failed: {_one_line(error)}", blamed) from None

    return render


@lru_cache(maxsize=32)
def reads(source: str, name: str) -> bool:
    """Return True if the template reads a variable or a field with this name."""
    try:
        # Only parsed: jinja2.meta would compute constants, and a client's may be huge.
        tree = _environment().parse(source)
        return (
            any(node.name == name for node in tree.find_all(jinja2.nodes.Name))
            or any(node.attr == name for node in tree.find_all(jinja2.nodes.Getattr))
            or any(node.value == name for node in tree.find_all(jinja2.nodes.Const))
        )
    # `compile_template` reports what is wrong with the template.
    except Exception:
        return False


def render_untrusted(source: str, variables: dict[str, Any], rendered_at: float | None = None) -> str:
    """Render a client's template in a child with limits on CPU time and memory. Takes about 0.1 s."""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise RequestError(
            f"chat_template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are allowed",
            "chat_template",
        )
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps({"source": source, "variables": variables, "at": rendered_at}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS,
            check=False,
            # A signal to the server's process group must not end the child of a running request.
            process_group=0,
        )
        answer = json.loads(child.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        raise RequestError(
            f"chat_template was stopped: it may use {_CPU_SECONDS} s of processor time and "
            f"{_MEMORY_BYTES >> 20} MiB of memory",
            "chat_template",
        ) from None
    if "error" in answer:
        raise RequestError(answer["error"], answer["param"])
    return answer["text"]


class _Arguments(dict[str, Any]):
    """Arguments of a tool call: an object for most templates, text for those that append it to a string."""

    def __str__(self) -> str:
        return _to_json(self)

    def __radd__(self, text: str) -> str:
        return text + str(self)

    def __add__(self, text: str) -> str:
        return str(self) + text


def _with_arguments(variables: dict[str, Any]) -> dict[str, Any]:
    messages = variables.get("messages") or ()
    if not any("tool_calls" in message for message in messages):
        return variables
    return variables | {"messages": [_with_arguments_of_calls(message) for message in messages]}


def _with_arguments_of_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return message | {"tool_calls": [call | {"function": _function(call["function"])} for call in calls]}


def _function(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    return function | {"arguments": _Arguments(arguments) if isinstance(arguments, dict) else arguments}


class _Refusal(jinja2.TemplateError):
    """Raised by `raise_exception` in a template: it does not support this conversation."""


class _GenerationMark(jinja2.ext.Extension):
    """Ignores the tags `{% generation %}` and `{% endgeneration %}`, which only matter for training."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationMark]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _one_line(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        # The line number refers to the generated Python code.
        line, text = None, error.msg
    text = printable(text or type(error).__name__, _MAX_ERROR_CHARACTERS)
    return f"line {line}: {text}" if line else text


def _main() -> None:
    """Run as the child of `render_untrusted`: JSON on stdin and stdout."""
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = compile_template(job["source"], "chat_template")(job["variables"], job["at"])
        if len(text) > _MAX_TEXT_CHARACTERS:
            raise RequestError(
                f"chat_template renders {len(text)} characters; at most {_MAX_TEXT_CHARACTERS} are allowed",
                "chat_template",
            )
        answer = {"text": text}
    except RequestError as error:
        answer = {"error": str(error), "param": error.param or "chat_template"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
