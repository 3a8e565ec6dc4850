"""Internals of supervisor that this project uses: a new version that lacks one fails here."""

from __future__ import annotations

import inspect
import signal
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from supervisor import datatypes, loggers, options, rpcinterface, states, supervisord, xmlrpc
from supervisor.medusa import asyncore_25 as asyncore

from fastdeploy.daemon.fd_supervisord import Options, Supervisor
from fastdeploy.daemon.process import supervisor_client
from fastdeploy.daemon.process.exit_interface import make_ends_interface
from fastdeploy.daemon.process.output_files import OutputFile

from ..stored_attributes import stored

#: Module -> names in it. setup.cfg bounds the version.
MODULE_NAMES = {
    # fd_supervisord.py
    "supervisor.datatypes": ("existing_directory", "existing_dirpath"),
    "supervisor.loggers": ("Handler", "LogRecord", "RotatingFileHandler"),
    "supervisor.medusa.asyncore_25": ("ExitNow",),
    "supervisor.options": ("ServerOptions", "decode_wait_status", "existing_directory", "existing_dirpath"),
    "supervisor.rpcinterface": ("make_main_rpcinterface",),
    # process/exit_interface.py
    "supervisor.xmlrpc": ("Faults", "RPCError"),
}
#: Class -> attributes and methods.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    options.ServerOptions: (
        *("close_httpservers", "close_logger", "httpservers", "logger", "mood", "pidhistory", "realize"),
        "waitpid",
    ),
    supervisord.Supervisor: ("main", "options", "runforever", "tick"),
    # process/output_files.py
    loggers.Handler: ("fmt", "level", "setFormat", "setLevel"),
    loggers.LogRecord: ("asdict", "msg"),
    # process/supervisor_client.py
    rpcinterface.SupervisorNamespaceRPCInterface: (
        *("addProcessGroup", "getAllProcessInfo", "getPID", "getProcessInfo", "reloadConfig"),
        *("removeProcessGroup", "shutdown", "signalProcess", "startProcess", "stopProcess"),
    ),
}
#: Names of faults in daemon/.
FAULTS = (
    *("ALREADY_ADDED", "ALREADY_STARTED", "BAD_NAME", "NOT_EXECUTABLE", "NOT_RUNNING", "NO_FILE"),
    *("SHUTDOWN_STATE", "SPAWN_ERROR", "STILL_RUNNING", "UNKNOWN_METHOD"),
)


def names_in(function: Any) -> set[str]:
    """Return the globals and attributes that a function uses."""
    return {*function.__code__.co_names}


@pytest.mark.parametrize("module", MODULE_NAMES)
def test_the_names_in_a_module_exist(module: str) -> None:
    assert [name for name in MODULE_NAMES[module] if not hasattr(import_module(module), name)] == []


@pytest.mark.parametrize("kind", ATTRIBUTES, ids=lambda kind: kind.__name__)
def test_the_attributes_of_a_class_exist(kind: type) -> None:
    assert [name for name in ATTRIBUTES[kind] if not hasattr(kind, name) and name not in stored(kind)] == []


@pytest.mark.parametrize("kind", [Options, Supervisor, OutputFile])
def test_an_overriding_method_takes_the_arguments_of_the_original(kind: type) -> None:
    for name, method in vars(kind).items():
        original = getattr(kind.__mro__[1], name, None)
        if isinstance(method, FunctionType) and isinstance(original, FunctionType) and name != "__init__":
            own, theirs = inspect.signature(method).parameters, inspect.signature(original).parameters
            assert [*own] == [*theirs], name


def test_supervisord_calls_what_is_overridden() -> None:
    own_main = {"close_httpservers", "close_logger", "first", "mood", "realize", "test"}
    assert own_main <= names_in(supervisord.main)
    assert {"openhttpservers", "runforever"} <= names_in(supervisord.Supervisor.run)
    assert {"options", "waitpid"} <= names_in(supervisord.Supervisor.reap)
    assert {"tick", "ExitNow"} <= names_in(supervisord.Supervisor.runforever)
    assert issubclass(asyncore.ExitNow, Exception)


def test_supervisord_looks_up_what_is_replaced_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "RotatingFileHandler", OutputFile)
    logger = loggers.Logger()
    loggers.handle_file(logger, str(tmp_path / "log"), "%(message)s\n", rotating=True, maxbytes=10, backups=2)
    assert [type(handler) for handler in logger.handlers] == [OutputFile]
    logger.info("one")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    assert "existing_dirpath" in names_in(datatypes.logfile_name)
    assert {"existing_directory", "existing_dirpath"} <= names_in(options.ServerOptions.__init__)


def test_the_states_and_faults_of_xmlrpc_have_the_names_that_are_expected() -> None:
    known = {name for name in vars(states.ProcessStates) if name.isupper()}
    assert known == supervisor_client._STATES
    assert known >= supervisor_client.UP | supervisor_client.DOWN
    assert [name for name in FAULTS if not hasattr(xmlrpc.Faults, name)] == []
    assert xmlrpc.RPCError(xmlrpc.Faults.NO_FILE, "x").text == "NO_FILE: x"
    assert states.SupervisorStates.SHUTDOWN < states.SupervisorStates.RESTARTING


def test_the_end_of_a_process_is_described_as_the_diagnosis_expects() -> None:
    assert options.decode_wait_status(3 << 8)[1] == "exit status 3"
    assert options.decode_wait_status(signal.SIGKILL)[1] == "terminated by SIGKILL"
    assert options.decode_wait_status(signal.SIGSEGV | 0x80)[1] == "terminated by SIGSEGV (core dumped)"


def test_an_interface_gets_the_running_supervisord() -> None:
    class Running:
        options = Options()

    Running.options.ends["replica0"] = "exit status 3"
    assert make_ends_interface(Running()).howItEnded("replica0") == "exit status 3"
