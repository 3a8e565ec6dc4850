"""dp.toml -> supervisord.conf -> fd-run: for any text in dp.toml, supervisord runs exactly the programs of
dp.toml, with exactly their arguments, or one line gives the reason for a refusal."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config import launch
from fastdeploy.daemon.config.launch import HASH, MARKER
from fastdeploy.daemon.config.loader import Config, parse
from fastdeploy.daemon.config.programs import Program, programs_of
from fastdeploy.daemon.process import supervisord_config
from fastdeploy.daemon.process.supervisor_client import Supervisor, SupervisorError
from fastdeploy.daemon.process.supervisord_config import Layout

from .conftest import wait_until
from .test_supervisor import FD_RUN, parsed

REPLICAS = 2
#: Texts that stopped supervisord, cut a command or were changed when they stood in its configuration, and
#: variations of these.
CASES = (
    *(
        "100%",
        "%",
        "%(ENV_HOME)s",
        "%(here)s/x",
        "%%",
        "0,1",
        "a,b=c",
        '"',
        "'",
        '\\"',
        "\\",
        '{"a": [1, "b"]}',
    ),
    *(
        "'{\"a\": 1}'",
        "a ;b",
        "a ; b",
        ";",
        "; autostart=true",
        "a #b",
        "# b",
        "#",
        "$HOME",
        "${HOME}",
        "`id`",
    ),
    *("$(id)", "a\nautostart=true", "x\n[program:evil]\ncommand=/bin/false", "x\n\n[supervisord]\nuser=root"),
    *(
        "\r\n",
        "\r",
        "\n\tcontinued",
        "\t",
        " ",
        "  a  ",
        "",
        "[program:replica0]",
        "command=/bin/false",
        "a:b",
    ),
    *(
        "startsecs=0.5",
        "a=b",
        "é",
        "\x7f",
        "\x1b[2J",
        "\x85",
        "\u2028",
        "\ufeff",
        "\U0001f600",
        "%(x",
        "%(x)",
    ),
    *("../../../etc", "/etc/passwd", "-c", "--", "&& id", "| id", "!!python", "x" * 5000),
)
TEXTS = st.one_of(
    st.sampled_from(CASES),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
    st.lists(st.one_of(st.sampled_from(CASES), st.text("%;#'\"\\\n[]= ", max_size=5)), max_size=4).map(
        "".join
    ),
)
NAMES = st.from_regex(r"\AX_[A-Za-z0-9_]{0,9}\Z")
ENVIRONMENTS = st.dictionaries(NAMES, TEXTS, max_size=3)
#: Every option of dp.toml whose text reaches a program.
OPTIONS = st.fixed_dictionaries(
    {
        "model.path": TEXTS,
        "model.served_name": TEXTS,
        "engine.host": TEXTS,
        "engine.api_keys_file": TEXTS,
        "engine.extra_args": st.lists(TEXTS, max_size=4),
        "engine.env": ENVIRONMENTS,
        "router.host": TEXTS,
        "router.api_keys_file": TEXTS,
        "router.extra_args": st.lists(TEXTS, max_size=3).map(
            lambda texts: [word for text in texts for word in ("--register-keys-file", text)]
        ),
        "router.env": ENVIRONMENTS,
    }
)


def toml(value: Any) -> str:
    """Return the value in TOML, with the escapes that a person would have to write."""
    if isinstance(value, str):
        shown = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{"".join(shown)}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(toml(each) for each in value) + "]"


def document(options: Mapping[str, Any]) -> str:
    sections: dict[str, list[str]] = {"parallel": [f"data_parallel_size = {REPLICAS}"]}
    for name, value in options.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, []).append(f"{key} = {toml(value)}")
    return "\n".join(line for name, lines in sections.items() for line in (f"[{name}]", *lines)) + "\n"


def read(options: Mapping[str, Any], prefix: Path) -> Config | None:
    """Return the configuration; None if it is refused, which must take one line."""
    try:
        config = parse(document(options), "dp.toml", prefix, prefix)
        programs_of(config)
    except ConfigError as error:
        refused = str(error)
    else:
        return config
    assert "\n" not in refused
    return None


def assert_runs_exactly(programs: list[Program], layout: Layout) -> None:
    """Check the programs that supervisord reads from its files, and the commands that fd-run executes."""
    found = parsed(layout.ini)
    assert {*found} == {program.name for program in programs}
    for program in programs:
        options = found[program.name]
        assert shlex.split(options.command) == [
            str(FD_RUN),
            *(program.name, program.hash, str(layout.launch)),
        ]
        assert options.stdout_logfile == str(layout.output(program.name))
        assert (options.autostart, options.autorestart, options.environment) == (False, False, {})
        argv, env = executed(options.command)
        assert argv == [*program.argv]
        marks = {MARKER: f"{layout.run}#{program.name}", HASH: program.hash}
        assert env == {**os.environ, **program.env, **marks}


def executed(command: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment with which fd-run would replace itself."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def execute(file: str, argv: list[str], env: dict[str, str]) -> NoReturn:
        found.append((argv, env))
        raise OSError(0, "not now")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(command))
        patch.setattr(os, "execvpe", execute)
        launch.main()
    return found[0]


def test_all_known_injection_cases_are_covered() -> None:
    assert len(set(CASES)) >= 27


@given(options=OPTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_in_dp_toml_cannot_alter_programs_or_their_arguments(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = read(options, tmp_path)
    event("refused" if config is None else "taken")
    if config is None:
        return
    programs = programs_of(config)
    assert [program.name for program in programs] == ["router", "replica0", "replica1"]
    for name, value in options["engine.env"].items():
        assert programs[1].env[name] == value
    extra = tuple(options["engine.extra_args"])
    assert programs[2].argv[len(programs[2].argv) - len(extra) :] == extra
    layout = Layout(config.paths.run, config.paths.logs)
    supervisord_config.write_files(layout, programs)
    assert_runs_exactly(programs, layout)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_each_case_reaches_the_program_as_it_was_written(case: str, tmp_path: Path) -> None:
    options = {
        "model.path": "/m",
        "model.served_name": case,
        "engine.extra_args": ["--x", case],
        "engine.env": {"X": case},
        "router.env": {"X": case},
    }
    config = read(options, tmp_path)
    assert config is not None
    router, replica, _ = programs = programs_of(config)
    assert (router.env["X"], replica.env["X"], replica.argv[-1]) == (case, case, case)
    layout = Layout(config.paths.run, config.paths.logs)
    supervisord_config.write_files(layout, programs)
    assert_runs_exactly(programs, layout)


@given(run=TEXTS, logs=TEXTS, state=TEXTS)
@example(run="run ", logs="logs\u00a0", state=" ")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_path_is_refused_or_used_literally(run: str, logs: str, state: str, tmp_path: Path) -> None:
    options = {"model.path": "/m"} | {
        f"paths.{name}": f"{name}/{text.replace('..', '')}"
        for name, text in (("run", run), ("logs", logs), ("state", state))
    }
    config = read(options, tmp_path)
    if config is None:
        return
    layout = Layout(config.paths.run, config.paths.logs)
    programs = programs_of(config)
    try:
        supervisord_config.write_files(layout, programs)
    except OSError:
        return  # longer than a file system's names may be
    if not config.paths.logs.is_dir():
        return  # the same, which `write_files` leaves to others to report
    assert_runs_exactly(programs, layout)


TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]), flush=True)"


def test_real_supervisord_passes_every_argument_unchanged(tmp_path: Path) -> None:
    """All cases are arguments at once; some are also in supervisord's own environment."""
    options = {
        "model.path": "/m",
        "engine.extra_args": [*CASES],
        "engine.env": {f"X_{number}": case for number, case in enumerate(CASES)},
    }
    config = read(options, tmp_path)
    assert config is not None
    layout = Layout(config.paths.run, config.paths.logs)
    programs = [
        replace(
            program,
            argv=(sys.executable, "-c", TELL, *program.argv),
            env=MappingProxyType({**program.env, "PYTHONIOENCODING": "utf-8"}),
        )
        for program in programs_of(config)
    ]
    supervisord_config.write_files(layout, programs)
    inherited = {**os.environ, "EVIL": "100% %(x)s", "EVIL_2": "a\n[program:evil]\ncommand=/bin/false"}
    supervisord = subprocess.Popen(
        [sys.executable, "-m", "fastdeploy.daemon.fd_supervisord", "-n", "-c", str(layout.ini)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=inherited,
    )
    client = Supervisor(layout)

    def answers() -> bool:
        try:
            return bool(client.pid())
        except SupervisorError:
            return False

    try:
        wait_until(answers, "supervisord")
        assert {*client.processes()} == {program.name for program in programs}
        for program in programs:
            client.start(program.name)
        for program in programs:
            output = layout.output(program.name)
            wait_until(lambda: output.exists() and output.read_text().endswith("\n"), "its output")  # noqa: B023
            argv, env = json.loads(output.read_text())
            assert argv == [*program.argv[3:]]
            assert {name: env[name] for name in program.env} == dict(program.env)
            assert (env["EVIL"], env["EVIL_2"]) == (inherited["EVIL"], inherited["EVIL_2"])
    finally:
        supervisord.terminate()
        supervisord.wait(timeout=30)
