"""The command `fastdeploy`: help, errors, Ctrl-C, and what each command prints."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.api_client import Event, ServerRefused, ServerUnreachable, read_event
from fastdeploy.entrypoints.cli.collect_env import environment

from ..ports import free_ports
from .commands import ScriptedServer, begin_stream, run, send_event, silent_server, start
from .conftest import TINY, ApiServer, wait_until

JSON = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(st.dictionaries(st.text(), st.none())), "error": st.text()}
)
COMMANDS = ("serve", "chat", "complete", "bench", "run-batch", "tokenizer", "collect-env")
#: Arguments without which the options of a command are not checked.
REQUIRED = {
    "serve": (str(TINY),),
    "bench": ("serve",),
    "run-batch": ("-i", "in", "-o", "out", "--url", "http://127.0.0.1:9"),
    "tokenizer": ("-m", str(TINY)),
}
#: Option -> the same with a mistake.
MISTAKES = {
    "serve": ("--max-model-len", "--max-modl-len"),
    "chat": ("--system-prompt", "--sytem-prompt"),
    "complete": ("--model-name", "--modelname"),
    "bench": ("--num-prompts", "--num-promts"),
    "run-batch": ("--max-concurrency", "--max-concurency"),
    "tokenizer": ("--vocab-size", "--vocab-sise"),
    "collect-env": ("--help", "--hlep"),
}


def test_help_lists_all_commands_and_imports_no_engine() -> None:
    script = (
        "import sys; from fastdeploy.entrypoints.cli.main import main; sys.argv[1:] = ['--help']; main(); "
        "print(sorted({'paddle', 'flask', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_its_options(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert MISTAKES[command][0] in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_one_line_with_the_nearest_name(command: str) -> None:
    right, wrong = MISTAKES[command]
    done = run(command, *REQUIRED.get(command, ()), wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{wrong}; did you mean {right}?" in done.stderr


def test_an_unknown_command_is_one_line_with_the_nearest_name() -> None:
    done = run("server")
    assert done.returncode == 2
    assert "'server'; did you mean serve?" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("chat", "-q", "x"), ("complete", "-q", "x"), ("run-batch", "-i", "in", "-o", "out")]
)
def test_without_a_server_there_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    [port] = free_ports(1)
    file = tmp_path / "in"
    file.write_text("{}\n")
    words = tuple({"in": str(file), "out": str(tmp_path / "out")}.get(word, word) for word in words)
    done = run(*words, "--url", f"http://127.0.0.1:{port}/v1")
    assert done.returncode == 1
    assert f"the server at http://127.0.0.1:{port}/v1 does not answer (Connection refused)" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["chat", "complete", "run-batch"])
def test_ctrl_c_ends_a_command_that_waits_for_a_server(command: str, tmp_path: Path) -> None:
    file = tmp_path / "in"
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    file.write_text(json.dumps(line))
    words = {"run-batch": ("-i", str(file), "-o", str(tmp_path / "out"))}.get(command, ("-q", "x"))
    with silent_server() as server:
        process = start(command, *words, "--url", server.url)
        wait_until(lambda: server.bodies, "a request")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_chat_prints_the_answer_of_a_replica(server: ApiServer) -> None:
    done = run("chat", "-q", "hi", "--max-tokens", "6", "--url", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_each_line_of_standard_input_is_completed(server: ApiServer) -> None:
    done = run("complete", "--max-tokens", "3", "--url", server.url, stdin="the sea\n\nthe sky\n")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 2


def test_a_chat_remembers_its_answers() -> None:
    with ScriptedServer(_echo) as server:
        done = run("chat", "--system-prompt", "Be brief.", "--url", server.url, stdin="one\ntwo\n")
    assert done.stdout == "heard one\nheard two\n"
    contents = [message["content"] for message in server.bodies[1]["messages"]]
    assert contents == ["Be brief.", "one", "heard one", "two"]
    assert server.bodies[1]["model"] == "scripted"


def test_at_a_terminal_ctrl_c_stops_an_answer_and_not_the_chat() -> None:
    def stall(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        begin_stream(handler)
        send_event(handler, "\033[2Jbeginning")
        server.released.wait()

    with ScriptedServer(stall) as server:
        ours, theirs = pty.openpty()
        process = start("chat", "--url", server.url, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        screen = _Screen(ours)
        screen.wait_for("> ")
        os.write(ours, b"hi\n")
        shown = screen.wait_for("beginning")
        process.send_signal(signal.SIGINT)
        screen.wait_for("> ")
        os.write(ours, b"\x04")
        assert process.wait(20) == 0
        os.close(ours)
    # Text of a model must not command the terminal.
    assert "\033[2J" not in shown


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_an_event_that_is_not_valid_has_one_line(data: bytes) -> None:
    with contextlib.suppress(ServerUnreachable, ServerRefused):
        assert isinstance(read_event(data), Event)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    def break_off(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        begin_stream(handler)
        send_event(handler, "half")
        handler.close_connection = True

    with ScriptedServer(break_off) as server:
        done = run("complete", "-q", "x", "--url", server.url)
    assert (done.returncode, done.stdout) == (1, "half")
    assert "has broken off" in done.stderr


def test_an_api_key_leaves_the_command_line() -> None:
    with silent_server() as server:
        process = start("chat", "-q", "x", "--api-key", "sk-secret", "--url", server.url)
        wait_until(lambda: server.bodies, "a request")
        words = psutil.Process(process.pid).cmdline()
        process.kill()
        process.communicate()
    assert "sk-secret" not in " ".join(words)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}


def test_serve_takes_the_model_as_its_first_word_and_hides_its_key(tmp_path: Path) -> None:
    [port] = free_ports(1)
    words = ("serve", str(TINY), "--port", str(port), "--threads", "1", "--api-key=sk-secret")
    process = start(
        *words, env={"FD_LOG_DIR": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    asked = ("complete", "-q", "x", "--max-tokens", "1", "--url", f"http://127.0.0.1:{port}")
    wait_until(lambda: run(*asked, env={"FD_API_KEY": "sk-secret"}).returncode == 0, "an answer")
    refused = run(*asked)
    processes = [server := psutil.Process(process.pid), *server.children(recursive=True)]
    shown = [word for each in processes for word in each.cmdline()]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "sk-secret" not in "".join(shown)
    assert "the server answered 401" in refused.stderr
    assert refused.stderr.endswith("; set FD_API_KEY)\n")


def test_bench_calls_the_load_generator(tmp_path: Path) -> None:
    program = tmp_path / "aiperf"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    with silent_server() as server:
        words = ("bench", "serve", "--url", server.url, "--num-prompts", "7", "--", "--extra-verbose")
        done = run(*words, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    given = done.stdout.split("\n")
    assert given[:5] == ["profile", "--model", "scripted", "--url", server.url.removesuffix("/v1")]
    assert given[given.index("--request-count") + 1] == "7"
    assert "--extra-verbose" in given


def test_bench_without_a_load_generator_says_how_to_install_it(tmp_path: Path) -> None:
    done = run("bench", "serve", env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "pip install aiperf" in done.stderr
    assert done.stderr.count("\n") == 1


def test_tokenizer_encodes_decodes_and_exports(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    words = ("-m", str(TINY), "-e", "the sea", "-d", "[261, 224, 86]", "-vs", "-ve", str(file))
    done = run("tokenizer", *words)
    assert done.stdout.splitlines()[:3] == [
        "Encoded tokens: [261, 224, 86, 72, 68]",
        "Decoded text: the s",
        "Vocabulary size: 506",
    ]
    assert json.loads(file.read_text())["261"] == "the"


@pytest.mark.parametrize("token_ids", ["[1, x]", "[-1]", "506", "1e3"])
def test_tokenizer_refuses_wrong_ids(token_ids: str) -> None:
    done = run("tokenizer", "-m", str(TINY), f"--decode={token_ids}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_collect_env_shows_versions() -> None:
    done = run("collect-env")
    assert done.returncode == 0
    assert "fd-dp: " in done.stdout
    assert "paddlepaddle: " in done.stdout


def test_collect_env_shows_no_secrets() -> None:
    variables = {
        "FD_API_KEY": "sk-1",
        "OTEL_EXPORTER_OTLP_HEADERS": "x=sk-2",
        "HTTPS_PROXY": "http://me:sk-3@proxy:80",
        "FD_LOG_DIR": "/logs",
        "HOME": "/root",
    }
    shown = dict(environment(variables))
    assert "sk-" not in str(shown)
    assert shown["FD_LOG_DIR"] == "/logs"
    assert shown["HTTPS_PROXY"] == "http://***@proxy:80"
    assert "HOME" not in shown


def _echo(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    begin_stream(handler)
    send_event(handler, "heard ")
    send_event(handler, body["messages"][-1]["content"])
    handler.wfile.write(b"data: [DONE]\n\n")
    handler.close_connection = True


class _Screen:
    """The output of a process on a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""

    def wait_for(self, text: str) -> str:
        """Read until the text appears; return everything up to it and forget it."""
        while text not in self._text:
            self._text += os.read(self._descriptor, 4096).decode(errors="replace")
        shown, _, self._text = self._text.partition(text)
        return shown + text
