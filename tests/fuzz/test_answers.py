"""Any bytes from replicas, the router, supervisord or fdctl's clients give a value or a one-line error."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError, FastDeployError, RequestError
from fastdeploy.common.http_client import HttpError
from fastdeploy.common.messages import AbortRequests, LoadProgress, StepOutputs
from fastdeploy.common.resumption import Delivered, Resumption, decode_resumption, encode_resumption
from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.control import protocol, server
from fastdeploy.daemon.fdctl import generation, scrapes
from fastdeploy.daemon.process.supervisor_client import Process, Supervisor, SupervisorError
from fastdeploy.daemon.process.supervisord_config import Layout
from fastdeploy.daemon.router.board.memory import text_of
from fastdeploy.daemon.router.config.flags_file import read_flags_file
from fastdeploy.daemon.router.control import health
from fastdeploy.daemon.router.control.redis_board import _sum
from fastdeploy.daemon.router.control.registration import from_fields, parse, parse_deregistration
from fastdeploy.daemon.router.control.registry import RegistryFile
from fastdeploy.daemon.router.control.shared_replicas import SharedState, _heard, _instance, _state
from fastdeploy.daemon.router.instance import Instance, RegistrationError
from fastdeploy.daemon.supervision import probes, router_client
from fastdeploy.daemon.supervision.adoption import _flags_of
from fastdeploy.daemon.supervision.hang_detection import ProgressTracker, WorkerProgress
from fastdeploy.daemon.supervision.intents import DesiredState, Intents
from fastdeploy.entrypoints.openai import engine_client

from .foreign import Answering, answering, any_json, damaged, http_answer, json_of, mutated, one_line

HEALTH = {"status": "ok", "message": "", "worker": {"steps": 5, "requests": 2, "silent": 0.5}}
ROUTER_HEALTH = {"flags": "abc", "reload": {"number": 1, "outcome": "done"}}
ROW: dict[str, object] = {"url": "http://127.0.0.1:8180", "leaving": False, "draining": False}
ROW |= {"in_flight": 3, "in_flight_elsewhere": 0}
REGISTERED = {"mixed": [ROW], "down": [ROW]}
REGISTRATION = Instance("127.0.0.1", 8180, 0, instance="x", features=("resume",), token="t").registration()
LAUNCH: dict[str, object] = {
    "name": "replica0",
    "argv": ["a"],
    "env": {"A": "b"},
    "ports": [1],
    "host": "h",
    "model": "m",
}
LAUNCH |= {"stop_timeout": 30, "flags_file": "", "fixed": []}
PROCESSES = """<?xml version='1.0'?><methodResponse><params><param><value><array><data><value><struct>
<member><name>name</name><value><string>replica0</string></value></member>
<member><name>statename</name><value><string>RUNNING</string></value></member>
<member><name>pid</name><value><int>17</int></value></member>
<member><name>start</name><value><int>1700000000</int></value></member>
</struct></value></data></array></value></param></params></methodResponse>""".replace("\n", "").encode()
PID = b"<?xml version='1.0'?><methodResponse><params><param><value><int>5</int></value>"
PID += b"</param></params></methodResponse>"
METRICS = b"""# TYPE fastdeploy:num_requests_running gauge
fastdeploy:num_requests_running{rank="0"} 3.0
fastdeploy:num_requests_waiting 1e0
"""
_CLOSED = ExitStack()


@cache
def _directory() -> Path:
    # Not pytest's tmp_path, which `python -m tests.fuzz` lacks; and a socket path has to be short.
    return Path(_CLOSED.enter_context(tempfile.TemporaryDirectory()))


@cache
def _server(name: str | None) -> Answering:
    return _CLOSED.enter_context(answering(_directory() / name if name else None))


def teardown_module() -> None:
    _server.cache_clear()
    _directory.cache_clear()
    _CLOSED.close()


def answers_of(valid: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy of HTTP answers whose bodies are JSON like `valid`, or nearly."""
    whole = json_of(valid).map(http_answer)
    return whole | whole.flatmap(mutated) | st.binary(max_size=60)


@given(damaged(HEALTH) | any_json)
def test_worker_progress_is_valid_or_absent(told: Any) -> None:
    pulse = WorkerProgress.of(told) if isinstance(told, dict) else None
    tracker = ProgressTracker()
    tracker.update(pulse, 5.0)
    assert pulse is None or (pulse.requests >= 0 and pulse.silent >= 0 and math.isfinite(pulse.silent))
    assert math.isfinite(tracker.stalled_for(6.0))
    assert math.isfinite(tracker.idle_for(6.0))


@given(answers_of(HEALTH))
def test_a_probe_ends_with_a_reading(answer: bytes) -> None:
    server = _server(None)
    server.answer = answer
    program = Program("replica0", ("x",), {}, (server.port,))
    for reading in (probes.health_probe(program, 1), probes.token_probe(program, 1)):
        one_line(reading.problem)
        assert reading.ok or reading.problem


@given(answers_of(ROUTER_HEALTH) | answers_of(REGISTERED))
def test_admin_answers_are_valid_or_count_as_no_answer(answer: bytes) -> None:
    server = _server("admin")
    server.answer = answer
    for ask in (router_client.flags, router_client.registered):
        try:
            found: Any = ask(_directory() / "admin")
        except router_client.RouterUnavailable as error:
            one_line(str(error))
            continue
        if isinstance(found, router_client.Flags):
            assert (type(found.number), type(found.outcome)) == (int, str)
        else:
            assert all(type(row.in_flight) is int and type(row.leaving) is bool for row in found.values())


@given(st.sampled_from([PROCESSES, PID]).flatmap(mutated), st.sampled_from(["text/xml", "x"]), st.booleans())
def test_supervisord_answer_is_valid_or_an_error(body: bytes, kind: str, is_whole: bool) -> None:
    server = _server("supervisor.sock")
    server.answer = http_answer(body, content_type=kind)[: None if is_whole else -9]
    client = Supervisor(Layout(_directory(), _directory()))
    with suppress(SupervisorError):
        for process in client.processes().values():
            assert isinstance(process, Process)
            assert process.pid >= 0
    try:
        assert client.pid() >= 0
    except SupervisorError as error:
        one_line(str(error))


@given(mutated(METRICS).map(lambda body: http_answer(body, content_type="text/plain")))
def test_the_load_of_a_replica_is_two_numbers_or_nothing(answer: bytes) -> None:
    server = _server(None)
    server.answer = answer
    instance = Instance("127.0.0.1", server.port)
    load = health.read_load(instance)
    assert load is None or all(0 <= number < 1 << 31 for number in load)
    one_line(str(health.check(instance)))
    with suppress(HttpError, ValueError):
        scrapes.scrape("127.0.0.1", server.port)


@given(json_of(REGISTRATION))
def test_a_registration_is_taken_or_refused(body: bytes) -> None:
    for read in (parse, parse_deregistration):
        try:
            found = read(body)
        except RegistrationError as error:
            one_line(str(error))
            continue
        if isinstance(found, Instance):
            assert from_fields(found.registration()) == found
            with suppress(RegistrationError):
                assert len(text_of(found)) <= 8192
            assert found.authority.isprintable()


@given(json_of({"instances": [REGISTRATION]}), json_of({"replica0": {"intent": "held", "draining": True}}))
def test_files_of_an_earlier_run_are_read_or_ignored(registry: bytes, intents: bytes) -> None:
    file = _directory() / "registry"
    file.write_bytes(registry)
    assert all(isinstance(instance, Instance) for instance, _ in RegistryFile(file)._read())
    (_directory() / "intents.json").write_bytes(intents)
    assert isinstance(Intents(_directory()).of("replica0"), DesiredState)


@given(json_of(LAUNCH))
def test_a_launch_file_is_a_program_or_none(text: bytes) -> None:
    try:
        program = Program.from_launch_text(text.decode(errors="surrogateescape"))
    except ValueError as error:
        one_line(str(error))
        return
    assert isinstance(program.hash, str)
    assert program.replica is None or program.replica >= 0
    json.loads(program.launch_text(Path("/run")))


@given(json_of(["--policy", "session"]))
def test_flags_file_is_a_list_of_arguments_or_one_line(content: bytes) -> None:
    file = _directory() / "flags"
    file.write_bytes(content)
    file.chmod(0o600)
    try:
        words = read_flags_file(file).words
    except ConfigError as error:
        one_line(str(error))
    else:
        assert all("\0" not in word for word in words)
    program = Program("router", ("x",), {}, (1,), flags_file=str(file))
    assert all(isinstance(word, str) for word in _flags_of(program))


@given(json_of({"do": "restart", "name": "all", "wait": True}).map(lambda line: line + b"\n"))
def test_a_command_is_texts_and_booleans_or_none(received: bytes) -> None:
    try:
        command = server._command_in(received, complete=True)
    except ValueError as error:
        one_line(str(error))
    else:
        assert isinstance(command, dict)
        assert all(isinstance(value, str | bool) for value in command.values())


@given(json_of({"code": 0, "status": {}}).map(lambda line: line.replace(b"\n", b"") + b"\n"))
def test_invalid_answer_of_fd_dp_is_one_line(answer: bytes) -> None:
    server = _server("fd-dp.sock")
    server.answer = answer
    try:
        messages = list(protocol.request(_directory() / "fd-dp.sock", {"do": "status"}, 10.0))
    except FastDeployError as error:
        one_line(str(error))
    else:
        assert all(isinstance(message, dict) for message in messages)


@given(json_of({"choices": [{"delta": {"content": "x"}}]}), st.sampled_from(["200 OK", "400 No"]))
def test_invalid_stream_of_the_router_is_one_line(event: bytes, status: str) -> None:
    server = _server(None)
    server.answer = http_answer(b"data: " + event.replace(b"\n", b"") + b"\n\n", status, "text/event-stream")
    try:
        list(generation._pieces("127.0.0.1", server.port, "x", 1))
    except FastDeployError as error:
        one_line(str(error))


@given(
    json_of({"registration": REGISTRATION, "state": "here"}),
    any_json,
    json_of({"http://127.0.0.1:1": [1, 2]}),
)
def test_data_of_other_routers_is_valid_or_ignored(entry: bytes, heard: Any, counts: bytes) -> None:
    text = entry.decode(errors="replace")
    with suppress(RegistrationError):
        assert isinstance(_instance(text), Instance)
    assert isinstance(_state(text), str)
    assert math.isfinite(_heard(SharedState({}, {}, {"x": str(heard)}), "x"))
    _sum([counts.decode(errors="replace")], {})


_MESSAGES = [LoadProgress(0.5, "x"), AbortRequests(["a"]), StepOutputs([], None)]  # type: ignore[arg-type]


@given(st.sampled_from([msgspec.msgpack.encode(message) for message in _MESSAGES]).flatmap(mutated))
def test_messages_of_a_worker_are_understood_or_refused(data: bytes) -> None:
    with suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        engine_client._decoder.decode(data)


_RESUMPTION = Resumption("/v1/completions", b"{}", "id", 5, {0: Delivered([1, 2])})


@given(mutated(encode_resumption(_RESUMPTION)))
def test_a_resumption_is_understood_or_refused(data: bytes) -> None:
    try:
        decode_resumption(data)
    except RequestError as error:
        one_line(str(error))
