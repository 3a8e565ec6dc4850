"""The flags file, and the flags that a running router can reload."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.router.config.flags import changed_flags, file_parser, fixed_flags
from fastdeploy.daemon.router.config.flags_file import fingerprint, read_flags_file
from fastdeploy.daemon.router.config.loader import read


def write(path: Path, content: object, mode: int = 0o600) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    path.chmod(mode)
    return path


# ---- the file


def test_flags_of_the_file_follow_those_of_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "flags", ["--policy", "session", "--allow-host", "10.0.0.0/24"])
    words = ["--policy", "random", "--port", "1234", "--allow-host", "10.1.0.0/24", "--flags-file", str(file)]
    settings = read(words).settings
    assert (settings.policy.name, settings.port) == ("session", 1234)
    assert list(map(str, settings.allow_hosts)) == ["10.1.0.0/24", "10.0.0.0/24"]
    assert settings.flags == fingerprint(file.read_bytes())


def test_without_a_file_there_is_no_fingerprint() -> None:
    assert read([]).settings.flags is None


@given(content=st.binary(max_size=50))
def test_fingerprint_is_the_first_12_digits_of_the_sha256(content: bytes) -> None:
    assert fingerprint(content) == hashlib.sha256(content).hexdigest()[:12]


@given(words=st.lists(st.text(max_size=8), max_size=5))
def test_every_argument_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    file = write(tmp_path_factory.mktemp("flags") / "flags", words)
    try:
        as_bytes = [word.encode() for word in words]
        possible = not any(b"\0" in word for word in as_bytes)
    except UnicodeEncodeError:
        possible = False
    if possible:
        assert read_flags_file(file).words == tuple(words)
    else:
        with pytest.raises(ConfigError, match="cannot be a command-line argument"):
            read_flags_file(file)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"--port 30000", 0o600, 'must be a JSON array of words, e.g. ["--policy", "session"]'),
        (b"[" * 100_000, 0o600, "must be a JSON array of words"),
        (b"\xff", 0o600, "must be a JSON array of words"),
        ({"--port": 30000}, 0o600, "must be a JSON array of words"),
        (["--port", 30000], 0o600, "must be a JSON array of words"),
        (b" " * (1 << 20) + b"[]", 0o600, "is larger than 1 MiB"),
        ([], 0o620, "others may write to it (mode 0620); chmod 600 it"),
        ([], 0o602, "others may write to it (mode 0602)"),
        (["--help"], 0o600, "unrecognized arguments: --help"),
        (["-V"], 0o600, "unrecognized arguments: -V"),
        (["--flags-file", "another"], 0o600, "unrecognized arguments: --flags-file"),
        (["--port"], 0o600, "argument --port: expected one argument"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(
    tmp_path: Path, content: object, mode: int, words: str
) -> None:
    file = write(tmp_path / "flags", content, mode)
    with pytest.raises(ConfigError) as caught:
        read(["--flags-file", str(file)])
    assert str(caught.value).startswith(f"--flags-file {file}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directory_pipe_or_missing_flags_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="must be a regular file"):
            read_flags_file(path)
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_flags_file(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "flags", [])
    os.chown(file, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534; it must belong to root or to the user"):
        read_flags_file(file)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_times_must_be_positive(seconds: str) -> None:
    with pytest.raises(ConfigError, match="it must be more than 0"):
        read(["--keep-alive-secs", seconds])


@pytest.mark.parametrize("flag", ["--worker-timeout-secs", "--graceful-timeout-secs"])
def test_values_are_limited_to_what_gunicorn_can_handle(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"it must be \d\.\.86400"):
        read([flag, "9" * 400])


# ---- flags that can change


def keeps_it_from_changing(old: list[str], new: list[str]) -> tuple[str, ...]:
    return changed_flags(*(fixed_flags(file_parser().parse_args(words)) for words in (old, new)))


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ([], [], ()),
        ([], ["--port", "30000", "--host", "127.0.0.1"], ()),
        # With IPv6 the name resolves to two addresses.
        ([], ["--host", "localhost"], ("--host",)),
        (["--port", "1"], ["--port", "2"], ("--port",)),
        (["--port", "1"], ["--port=2", "--port", "1"], ()),
        ([], ["--admin-socket", "x", "--host", "0.0.0.0"], ("--admin-socket", "--host")),
        (["--registry-file", "a"], [], ("--registry-file",)),
        (["--certfile", "a", "--keyfile", "b"], ["--certfile", "c", "--keyfile", "d"], ()),
        (["--certfile", "a", "--keyfile", "b"], [], ("--certfile",)),
        (["--workers", "2"], ["--workers", "3", "--policy", "session", "--board", "redis://x"], ()),
    ],
)
def test_only_listening_and_registry_flags_need_a_router_restart(
    old: list[str], new: list[str], names: tuple[()] | tuple[str, str] | tuple[str]
) -> None:
    assert keeps_it_from_changing(old, new) == names


@given(data=st.data())
def test_every_other_flag_can_change(data: st.DataObject) -> None:
    actions = [action for action in file_parser()._actions if action.nargs is None]
    action = data.draw(st.sampled_from(actions))
    value = "7" if action.type is int else "7.5" if action.type is float else "seven"
    flag = action.option_strings[0]
    fixed = {"--host", "--port", "--admin-socket", "--registry-file", "--certfile"}
    expected = (flag,) if flag in fixed else ()
    assert keeps_it_from_changing([], [flag, value]) == expected
    assert keeps_it_from_changing([flag, value], []) == expected


def test_reading_flags_loads_no_server_modules() -> None:
    program = (
        "import fastdeploy.daemon.router.config.flags, fastdeploy.daemon.router.config.flags_file, sys; "
        "print({'flask', 'gunicorn', 'ssl', 'socket', 'asyncio', 'requests'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "set()"
