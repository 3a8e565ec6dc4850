"""Conversations become text; clients' templates get a limited share of the machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastdeploy.common.errors import ConfigError, RequestError
from fastdeploy.tokenizer.chat_template import MAX_TEMPLATE_CHARACTERS, compile_template, reads
from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..waiting import wait_until

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
HELLO = [{"role": "user", "content": "hello"}]


def checkpoint(path: Path, **settings: object) -> Tokenizer:
    path.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", path)
    original = json.loads((TINY / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**original, **settings}))
    return Tokenizer.from_directory(path)


def test_template_sees_messages_specials_and_further_variables(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].role }}: {{ messages[0].content }}{% if loud %}!{% endif %}"
    tokenizer = checkpoint(tmp_path, chat_template=source)
    assert tokenizer.apply_chat_template(HELLO) == "<s>user: hello"
    assert tokenizer.apply_chat_template(HELLO, loud=True) == "<s>user: hello!"
    assert tokenizer.encode("<s>")[0] == 1


def test_a_variable_of_the_request_cannot_replace_the_messages(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, chat_template="{{ messages[0].content }}{{ add_generation_prompt }}")
    assert tokenizer.apply_chat_template(HELLO, add_generation_prompt=False, documents=[{}]) == "helloFalse"


def test_template_file_takes_precedence_over_the_settings(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert checkpoint(tmp_path, chat_template="settings").apply_chat_template(HELLO) == "file"


def test_the_template_named_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert checkpoint(tmp_path, chat_template=named).apply_chat_template(HELLO) == "plain"


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, chat_template="{{ messages[0].content }}")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == "hello"
    assert tokenizer.apply_chat_template([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    "content",
    [[{"type": "image_url", "image_url": {"url": "x"}}], ["text"], [{"type": "text"}], 5, {"type": "text"}],
)
def test_parts_that_are_not_text_are_refused_by_position(tmp_path: Path, content: object) -> None:
    tokenizer = checkpoint(tmp_path, chat_template="{{ messages[0].content }}")
    with pytest.raises(RequestError, match="text only") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": content}])
    assert caught.value.param == "messages[0].content[0]"


def test_a_checkpoint_without_template_says_that_one_can_be_sent() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        Tokenizer.from_directory(TINY).apply_chat_template(HELLO)
    assert caught.value.param == "chat_template"


def test_a_checkpoint_with_a_broken_template_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        checkpoint(tmp_path, chat_template="{% if %}")


NOT_PYTHON = {
    "{% break %}": "cannot be compiled: 'break' outside loop",
    "{{ " + "(" * 5000: "cannot be compiled: its expressions are nested too deep",
    "{{ 2**100000 }}": "cannot be compiled: Exceeds the limit",
}


@pytest.mark.parametrize("source", NOT_PYTHON, ids=lambda source: source[:11])
def test_a_template_that_python_cannot_compile_is_one_line(tmp_path: Path, source: str) -> None:
    for refused in (
        lambda: compile_template(source),
        lambda: Tokenizer.from_directory(TINY).apply_chat_template(HELLO, chat_template=source),
    ):
        with pytest.raises(RequestError, match=NOT_PYTHON[source]) as caught:
            refused()
        assert caught.value.param == "chat_template"
    with pytest.raises(ConfigError, match=NOT_PYTHON[source]) as failed:
        checkpoint(tmp_path, chat_template=source)
    assert str(failed.value).startswith(str(tmp_path / "tokenizer_config.json"))


def test_a_long_refusal_of_a_template_is_cut() -> None:
    with pytest.raises(RequestError, match=r"rejects these messages: a b.* \(\d+ characters\)$") as caught:
        compile_template("{{ raise_exception('a\nb\x1b' * 100000) }}")({})
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "rejects these messages: roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_errors_of_a_template_are_one_line(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compile_template(source)({"messages": HELLO})
    assert "\n" not in str(caught.value)


def test_templates_have_hugging_face_functions() -> None:
    source = (
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}\n"
        "    {% generation %}\n"
        "{{ {'k': 'é'} | tojson }} {{ [1] | tojson(indent=1) }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert compile_template(source)({}) == '13{"k": "é"} [\n 1\n]4'


def test_a_template_of_the_request_is_rendered() -> None:
    tokenizer = Tokenizer.from_directory(TINY)
    text = tokenizer.apply_chat_template(
        HELLO, chat_template="{{ eos_token }}{{ messages[0].content }} é{{ x }}", x=3
    )
    assert text == "</s>hello é3"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "2 s of processor time",
        ),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ '%9999999999d' | format(1) }}", "too much memory|was stopped"),
        ("{{ 'a' * 10 ** 7 }}", "renders 10000000 characters"),
        ("{% if %}", "line 1"),
        ("{{ raise_exception('no') }}", "rejects these messages: no"),
        (" " * (MAX_TEMPLATE_CHARACTERS + 1), "at most 65536"),
    ],
)
def test_a_template_of_the_request_is_bounded(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Tokenizer.from_directory(TINY).apply_chat_template(HELLO, chat_template=source)


def test_rendering_completes_while_the_server_is_stopping(tmp_path: Path) -> None:
    """supervisord and terminals signal the whole process group, which includes the renderer."""
    server = (
        "import signal; from fastdeploy.tokenizer.chat_template import render_untrusted;"
        "signal.signal(signal.SIGTERM, lambda *_: None);"
        "print(render_untrusted('{% for i in range(99999) %}{% endfor %}done', {}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", server], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_until(psutil.Process(process.pid).children, "a child renders", deadline=60)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "done\n"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ tools | tojson }}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}", True),
        ("{% for m in messages %}{{ m.tools }}{{ m['tools'] }}{% endfor %}", True),
        # Constants of a client's template are not computed.
        ('{{ "a" * 10 ** 11 }}{{ tools }}', True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}tools", False),
        ("{{ broken", False),
    ],
)
def test_whether_a_template_reads_a_name(source: str, wanted: bool) -> None:
    assert reads(source, "tools") == wanted
