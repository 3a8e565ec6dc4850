"""The ports and arguments of the servers that the launcher starts, and its refusals."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.common.ports import find_free
from fastdeploy.entrypoints.openai import multi_api_server
from fastdeploy.entrypoints.openai.multi_api_server import ServerProcess
from fastdeploy.entrypoints.openai.options import parse_arguments

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
LOG = Path("log")


def plan_servers(command: str) -> list[ServerProcess]:
    options, passed = multi_api_server._parser().parse_known_args(shlex.split(command))
    return multi_api_server.plan_servers(options, [*passed, *options.args], LOG, find_free)


def option(server: ServerProcess, flag: str) -> str:
    (value,) = [word.removeprefix(f"{flag}=") for word in server.arguments if word.startswith(f"{flag}=")]
    return value


DOCUMENTED = f"""
  --num-servers 8
  --ports "1811,1822,1833,1844,1855,1866,1877,1888"
  --metrics-ports "3101,3201,3301,3401,3501,3601,3701,3801"
  --args --model {TINY}
  --engine-worker-queue-port "25611,25621,25631,25641,25651,25661,25671,25681"
  --tensor-parallel-size 1
  --data-parallel-size 8
  --max-model-len 12288
  --max-num-seqs 64
  --num-gpu-blocks-override 256
  --enable-expert-parallel
  --router "0.0.0.0:30000"
"""


@pytest.fixture
def all_ports_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented ports may be in use on the machine that runs the tests; pretend that they are free."""
    monkeypatch.setattr(multi_api_server, "require_free", lambda *_: None)


@pytest.mark.usefixtures("all_ports_free")
def test_documented_command_plans_eight_servers_with_valid_arguments() -> None:
    servers = plan_servers(DOCUMENTED)
    assert [server.port for server in servers] == [1811, 1822, 1833, 1844, 1855, 1866, 1877, 1888]
    for index, server in enumerate(servers):
        config = parse_arguments(server.arguments)
        assert config.port == server.port
        assert config.metrics_port == 3101 + 100 * index
        assert config.engine_worker_queue_port == 25611 + 10 * index
        assert config.engine.data_parallel_rank == index
        assert config.engine.data_parallel_size == 8
        assert config.engine.enable_expert_parallel
        assert config.engine.expert_parallel_group == "port-1811"
        assert config.engine.max_model_len == 12288
        assert server.environment["FD_LOG_DIR"] == f"log/log_{index}"
        assert server.environment["FD_ENABLE_MULTI_API_SERVER"] == "1"
        assert server.command[1:3] == ["-m", "fastdeploy.entrypoints.openai.api_server"]


@pytest.mark.usefixtures("all_ports_free")
@pytest.mark.parametrize(
    "command",
    [
        "--num-servers 2 --ports 9811,9812 --model M --no-enable-prefix-caching --max-num-seqs 4",
        "--model M --ports 9811,9812 --num-servers 2 --args --max-num-seqs 4 --no-enable-prefix-caching",
    ],
)
def test_arguments_without_args_flag_reach_the_servers_too(command: str) -> None:
    for server in plan_servers(command):
        words = set(server.arguments)
        assert {"--model", "M", "--no-enable-prefix-caching", "--max-num-seqs", "4"} <= words


def test_ports_that_were_left_out_are_found_free_and_differ() -> None:
    servers = plan_servers("--num-servers 4 --ports -1 --args --model M")
    flags = ("--port", "--metrics-port", "--engine-worker-queue-port")
    ports = [int(option(server, flag)) for server in servers for flag in flags]
    assert len(set(ports)) == 12
    assert [option(server, "--data-parallel-size") for server in servers] == ["4"] * 4
    assert not any("--controller-port" in word for server in servers for word in server.arguments)


@pytest.mark.usefixtures("all_ports_free")
@pytest.mark.parametrize(
    "queue",
    [
        "--engine-worker-queue-port 71,72",
        "--engine-worker-queue-port=71,72",
        "--engine_worker_queue_port '71, 72'",
    ],
)
def test_each_server_gets_its_own_of_the_queue_ports(queue: str) -> None:
    servers = plan_servers(f"--ports 81,82 --controller-ports 91,92 --args {queue} --model M")
    assert [option(server, "--engine-worker-queue-port") for server in servers] == ["71", "72"]
    assert [option(server, "--controller-port") for server in servers] == ["91", "92"]
    assert servers[0].arguments[:2] == ("--model", "M")


@pytest.mark.usefixtures("all_ports_free")
@pytest.mark.parametrize(
    ("flags", "group"),
    [
        ("--enable-expert-parallel", "port-81"),
        ("--enable_expert_parallel", "port-81"),
        ("--enable-expert-parallel --expert-parallel-group mine", "mine"),
        ("--enable-expert-parallel --expert_parallel_group=mine", "mine"),
        ("--expert-parallel-group mine", "mine"),
        ("", "default"),
    ],
)
def test_servers_of_one_launch_share_a_group_that_no_other_launch_has(flags: str, group: str) -> None:
    for server in plan_servers(f"--ports 81,82 --args --model {TINY} {flags}"):
        assert parse_arguments(server.arguments).engine.expert_parallel_group == group


@pytest.mark.usefixtures("all_ports_free")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--num-servers 3 --ports 1,2", "--ports has 2 ports and --num-servers is 3"),
        ("--num-servers 2 --ports 1,2 --metrics-ports 3", "--metrics-ports has 1 ports"),
        ("--ports 1,2 --args --engine-worker-queue-port 5,6,7", "--engine-worker-queue-port has 3 ports"),
        ("--ports 1,x", "--ports: 'x' is not a port"),
        ("--ports 1,70000", "'70000' is not a port"),
        ("--ports 1,", "--ports: '' is not a port"),
        ("--ports 1,2 --metrics-ports 2,3", "port 2 is given twice: --ports and --metrics-ports"),
        ("--ports 7,7", "port 7 is given twice: --ports and --ports"),
        ("--num-servers 0", "--num-servers is 0"),
        ("--ports 1,2 --args --data-parallel-size 8", "--num-servers is 2 and --data-parallel-size is 8"),
        ("--ports 1,2 --args --port 5", "--port after --args: every server gets its own, see --ports"),
    ],
)
def test_commands_that_cannot_work_are_refused_in_one_line(command: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_servers(command)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--ports", "--metrics-ports", "--engine-worker-queue-port"])
def test_a_port_that_is_taken_is_named_with_its_flag_and_exit_status_2(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = {
            "--ports": "-1",
            "--metrics-ports": "-1",
            "--engine-worker-queue-port": "-1",
            flag: str(port),
        }
        argv = [word for pair in given.items() for word in pair]
        assert multi_api_server.main(["--num-servers", "1", *argv, "--args", "--model", str(TINY)]) == 2
    error = capsys.readouterr().err
    assert f"multi_api_server: ERROR ({flag}: port {port}" in error
    assert error.count("\n") == 1


def test_missing_model_is_reported_before_any_start(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--num-servers", "2", "--ports", "-1", "--args", "--model", "/nowhere"]
    assert multi_api_server.main(argv) == 2
    assert "'/nowhere'" in capsys.readouterr().err


@given(
    rest=st.lists(st.sampled_from(["--model", "M", "-x", "--flag=1", "7"])),
    spelling=st.sampled_from([["--a-b", "V"], ["--a-b=V"], ["--a_b", "V"]]),
    position=st.integers(0, 5),
)
def test_removing_an_option_keeps_the_others(rest: list[str], spelling: list[str], position: int) -> None:
    arguments = [*rest[:position], *spelling, *rest[position:]]
    assert multi_api_server._pop_flag(arguments, "--a-b") == ("V", rest)
    assert multi_api_server._pop_flag(rest, "--a-b") == (None, rest)
