"""Messages name only what exists: flags, environment variables, dp.toml options, commands, documents."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastdeploy.daemon.config.declaration import options_of
from fastdeploy.daemon.config.options import SECTIONS
from fastdeploy.daemon.fdctl import main
from fastdeploy.entrypoints.openai import options

ROOT = Path(__file__).parent.parent
#: Flags of docker, pip, journalctl and aiperf.
FOREIGN_FLAGS = {
    *("--shm-size", "--dest", "--disable-pip-version-check", "--no-deps", "--only-binary"),
    *("--no-pager", "--lines", "--since", "--until"),
    *("--streaming", "--ui", "--endpoint-type", "--request-count", "--concurrency", "--extra-inputs"),
    *("--synthetic-input-tokens-mean", "--synthetic-input-tokens-stddev", "--random-seed"),
    *("--output-tokens-mean", "--output-tokens-stddev"),
}
#: Words after fdctl in sentences that are not commands.
VERBS = {"cannot"}


@cache
def trees() -> dict[str, ast.Module]:
    files = [file for room in ("daemon", "engine", "custom_ops") for file in (ROOT / room).rglob("*.py")]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


@cache
def texts() -> list[tuple[str, str]]:
    """Return the parts of all strings except docstrings, each with its file."""
    return [(text, file) for file, tree in trees().items() for text in _texts(tree)]


def _texts(tree: ast.Module) -> Iterator[str]:
    nodes = list(ast.walk(tree))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def named(pattern: str) -> dict[str, str]:
    """Map each match of the pattern in the texts to a file that has it."""
    return {match[1]: file for text, file in texts() for match in re.finditer(pattern, text)}


def declared_flags() -> set[str]:
    """Return the flags of all parsers."""
    calls = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = set()
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("add_argument", "add"):
            found |= {str(word.value) for word in call.args if isinstance(word, ast.Constant)}
    # Some flags are declared in a loop, or in pairs with "no".
    return found | {flag for action in options._parser()._actions for flag in action.option_strings}


def test_every_flag_that_is_named_exists() -> None:
    wanted = named(r"(?<![\w-])(--[a-z][\w-]*\w)")
    assert "--cors-origins" in wanted
    known = declared_flags() | FOREIGN_FLAGS
    assert {flag: file for flag, file in wanted.items() if flag not in known} == {}


def test_every_variable_that_is_named_is_one_of_the_code() -> None:
    exact = {text for text, _ in texts()}
    native = "".join(file.read_text() for file in ROOT.glob("custom_ops/cpu/**/*.cc"))
    wanted = named(r"\b(FD_[A-Z_]+[A-Z])\b")
    unknown = {name: file for name, file in wanted.items() if name not in exact and f'"{name}"' not in native}
    assert unknown == {}


def test_every_option_of_dp_toml_that_is_named_exists() -> None:
    known = {f"[{name}] {option}" for name, section in SECTIONS.items() for option in options_of(section)}
    # A word without an underscore may be ordinary prose.
    wanted = named(rf"(\[(?:{'|'.join(SECTIONS)})\] [a-z]+_[a-z_]+)")
    assert wanted
    assert {option: file for option, file in wanted.items() if option not in known} == {}


def test_every_command_that_is_named_exists() -> None:
    [commands] = [a.choices for a in main._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    wanted = named(r"\bfdctl ([a-z]+)")
    assert {word: file for word, file in wanted.items() if word not in {*commands, *VERBS}} == {}
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {name: file for name, file in named(r"`make ([a-z-]+)`").items() if name not in targets} == {}


def test_every_project_file_that_is_named_exists() -> None:
    wanted = named(r"(?<!/)\b((?:docs|etc)/[\w./-]+\.(?:md|toml|service))")
    assert wanted
    assert {name: file for name, file in wanted.items() if not (ROOT / name).exists()} == {}
