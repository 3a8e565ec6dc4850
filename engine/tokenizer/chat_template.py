"""Renders a conversation as the text a model was trained on, with the checkpoint's Jinja template.

Templates are written for Hugging Face's renderer, so the environment offers what that one offers:
`raise_exception`, `strftime_now`, a `tojson` that leaves non-ASCII text alone, loop controls, and the
`{% generation %}` mark (which only matters in training).

A checkpoint's own template is trusted as much as its weights. One that a client sends is not: Jinja's sandbox
keeps it away from Python, but nothing in it bounds time or memory (``{{ "a" * 10 ** 10 }}``). Those are
rendered in a process of their own with limits from the kernel; see `render_untrusted`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

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
#: Characters of a message of `raise_exception` or of Jinja.
_MAX_ERROR_CHARACTERS = 500
#: The child computes for _CPU_SECONDS at most; this covers a machine too busy to run it.
_WALL_SECONDS = 30


def compile_template(source: str) -> Callable[[dict[str, Any], float | None], str]:
    """Returns the function that renders `source` with the given variables, at the given time or now.

    Raises:
        RequestError: the template has a syntax error; the function raises it for any error while rendering.
    """
    try:
        template = _environment().from_string(source)
    except (RecursionError, MemoryError):
        raise RequestError(
            "the chat template cannot be compiled: its expressions are nested too deep, or too large",
            "chat_template",
        ) from None
    # Not only TemplateError: Jinja translates it to Python, whose compiler raises errors of its own (a break
    # outside of a loop, a number of too many digits).
    except Exception as error:
        raise RequestError(
            f"the chat template cannot be compiled: {_one_line(error)}", "chat_template"
        ) from None

    def render(variables: dict[str, Any], rendered_at: float | None = None) -> str:
        moment = datetime.now() if rendered_at is None else datetime.fromtimestamp(rendered_at)
        try:
            return template.render({"strftime_now": moment.strftime} | variables)
        except _Refusal as error:
            raise RequestError(
                f"the chat template refuses these messages: {_one_line(error)}", "messages"
            ) from None
        except (RecursionError, MemoryError):
            raise RequestError(
                "the chat template failed: it needs too much memory", "chat_template"
            ) from None
        # It runs as Python, so it can raise whatever Python does.
        except Exception as error:
            raise RequestError(f"the chat template failed: {_one_line(error)}", "messages") from None

    return render


def render_untrusted(source: str, variables: dict[str, Any], rendered_at: float | None = None) -> str:
    """Renders a client's template in a child with limits on CPU time and memory. Costs about 0.1 s."""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise RequestError(
            f"chat_template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are taken",
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
            # What tells a server's process group to end is for the server, which first answers what it has.
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


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` in a template raises: the conversation is not one the model knows."""


class _GenerationMark(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` matters in training; here it does nothing."""

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
        # Its line number belongs to the Python that Jinja has generated.
        line, text = None, error.msg
    text = printable(text or type(error).__name__, _MAX_ERROR_CHARACTERS)
    return f"line {line}: {text}" if line else text


def _main() -> None:
    """The child of `render_untrusted`: JSON in on stdin, JSON out on stdout."""
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = compile_template(job["source"])(job["variables"], job["at"])
        if len(text) > _MAX_TEXT_CHARACTERS:
            raise RequestError(
                f"chat_template renders {len(text)} characters; at most {_MAX_TEXT_CHARACTERS} are taken",
                "chat_template",
            )
        answer = {"text": text}
    except RequestError as error:
        answer = {"error": str(error), "param": error.param or "chat_template"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
