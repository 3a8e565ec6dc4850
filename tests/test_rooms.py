"""Rooms of the code: a room imports only from rooms below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Rooms from bottom to top. A file belongs to the room with the longest name that its path begins with.
ROOMS = {
    "engine": [
        *("engine/common", "engine/expert_parallel", "engine", "engine/demo_model", "engine/models"),
        *("engine/weights", "engine/weight_cache", "engine/tokenizer", "engine/grammar", "engine/device"),
        *("engine/core", "engine/parsers", "engine/entrypoints", "engine/entrypoints/openai"),
        *("engine/entrypoints/llm", "engine/entrypoints/batch", "engine/entrypoints/cli"),
    ],
    "router": [
        *("daemon/router", "daemon/router/policy", "daemon/router/board", "daemon/router/config"),
        *("daemon/router/metrics", "daemon/router/http", "daemon/router/relay", "daemon/router/page"),
        *("daemon/router/control", "daemon/router/server"),
    ],
    "daemon": [
        *("daemon/config", "daemon/process", "daemon/diagnosis", "daemon/supervision", "daemon/control"),
        *("daemon/operations", "daemon/fdctl", "daemon"),
    ],
}
#: Modules of other programs that a program may import.
FOREIGN = {
    "engine": (),
    # The router never loads the engine, nor the supervisor that starts it.
    "router": ("engine/common", "engine"),
    # Options are checked by the parsers that will read them; expert groups are observed, not joined.
    "daemon": (
        *("engine/common", "engine", "engine/expert_parallel", "engine/entrypoints/openai"),
        *("daemon/router", "daemon/router/policy", "daemon/router/config", "daemon/router/control"),
    ),
}


@pytest.mark.parametrize("program", ROOMS)
def test_no_room_imports_from_one_above_it(program: str) -> None:
    order = ROOMS[program]
    upward = [
        f"{file} imports {target}"
        for file, target in imports()
        if room(file) in order
        and room(target) in order
        and order.index(room(target)) > order.index(room(file))
    ]
    assert upward == []


@pytest.mark.parametrize("program", ROOMS)
def test_a_program_imports_few_rooms_of_another(program: str) -> None:
    allowed = (*ROOMS[program], *FOREIGN[program], "custom_ops")
    foreign = [
        f"{file} imports {target}"
        for file, target in imports()
        if room(file) in ROOMS[program] and room(target) not in allowed
    ]
    assert foreign == []


def test_every_file_is_in_a_room() -> None:
    files = [f"{file.relative_to(ROOT)}" for file in [*(ROOT / "engine").rglob("*.py"), *daemon_files()]]
    assert [file for file in files if Path(file).parent.as_posix() not in all_rooms()] == []


def daemon_files() -> Iterator[Path]:
    return (ROOT / "daemon").rglob("*.py")


def all_rooms() -> set[str]:
    return {name for rooms in ROOMS.values() for name in rooms}


@cache
def room(file: str) -> str:
    stem = file.removesuffix(".py")
    return max(
        (name for name in (*all_rooms(), "custom_ops") if f"{stem}/".startswith(f"{name}/")),
        key=len,
        default="",
    )


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """Return pairs of a file and a file that it imports from, relative to the repository."""
    files = [
        file.relative_to(ROOT)
        for top in ("engine", "daemon", "custom_ops")
        for file in (ROOT / top).rglob("*.py")
    ]
    return tuple(
        (file.as_posix(), target)
        for file in files
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for target in targets(file, node)
    )


def targets(file: Path, node: ast.ImportFrom) -> Iterator[str]:
    # daemon/ and custom_ops/ are packages inside the package that engine/ is.
    package = list(file.parts[:-1]) if file.parts[0] == "engine" else ["engine", *file.parts[:-1]]
    base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        for parts in ([*base, alias.name], base):
            path = Path(*parts[1:]) if parts[1:2] in (["daemon"], ["custom_ops"]) else Path(*parts)
            if (ROOT / path).with_suffix(".py").is_file():
                yield path.with_suffix(".py").as_posix()
                break
            if parts is base and (ROOT / path / "__init__.py").is_file():
                yield (path / "__init__.py").as_posix()
