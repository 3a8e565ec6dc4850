"""The reported cause of an exit: for real exits, and for real replicas that cannot start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.diagnosis.exit_cause import Cause, Exit, explain, killed_worker
from fastdeploy.daemon.diagnosis.exit_diagnosis import ExitDiagnosis
from fastdeploy.daemon.diagnosis.oom import OomWatcher
from fastdeploy.daemon.process import output_tail
from fastdeploy.daemon.process.supervisord_config import Layout

from ..ports import free_ports
from .conftest import wait_until

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
LOG = "2026-11-25 03:05:11,089 ERROR fastdeploy.entrypoints.openai.serve replica=1 pid=7 replica stops: "
WORKER = f"{LOG}worker pid=12 was killed by "


@pytest.mark.parametrize(
    ("how", "told", "cause"),
    [
        (
            "exit status 2",
            "api_server: ERROR (--port: port 1811 on 127.0.0.1 is taken by pid 3 (nc))",
            "port",
        ),
        ("", "dp.toml: port 1811 on 127.0.0.1 is taken; choose a free one", "port"),
        ("exit status 5", "fd-router: ERROR (cannot listen on 10.0.0.9 port 30000: in use)", "port"),
        ("exit status 2", "api_server: ERROR (unrecognized arguments: --surprise (x --help))", "flag"),
        (
            "exit status 2",
            "api_server: ERROR (--dtype is 'int3'; it must be 'bfloat16' or 'float32')",
            "flag",
        ),
        ("exit status 2", "api_server: ERROR (model '/x' is not a directory; give a checkpoint's)", "model"),
        ("exit status 2", "api_server: ERROR (/x/config.json: no such file; a checkpoint needs it)", "model"),
        ("exit status 3", f"{LOG}/models/m/weights: cannot be mapped ([Errno 5] I/O error)", "model"),
        ("exit status 3", f"{LOG}/x/model.safetensors: not a safetensors file, or truncated", "model"),
        ("exit status 3", f"{LOG}not enough memory", "memory"),
        ("exit status 3", f"{LOG}Unable to allocate 3.2 GiB for an array with shape (8,)", "memory"),
        ("exit status 3", f"{LOG}GPU: the arena for cache needs 9 GB of GPU memory; 1 GB is free", "memory"),
        ("exit status 3", f"{LOG}GPU: a step: unspecified launch failure", "gpu"),
        ("exit status 3", f"{LOG}GPU: a step: unspecified launch failure (PCI 0000:1b:00.0)", "gpu"),
        ("exit status 3", f"{LOG}--device is 'gpu', but the driver shows no GPU (libcuda.so.1)", "flag"),
        ("exit status 3", f"{LOG}/dev/shm is full: 9 MB more are needed (docker: --shm-size)", "memory"),
        ("exit status 3", f"{LOG}packed weights of /models/m cannot be written to /c (Quota)", "disk"),
        ("exit status 3", f"{WORKER}SIGKILL", "killed"),
        ("exit status 3", f"{WORKER}SIGSEGV", "crash"),
        ("exit status 3", f"{LOG}worker pid=12 exited with code 0", "operator"),
        ("exit status 3", f"{LOG}worker pid=12 exited with code 1", "exit"),
        ("exit status 3", f"{LOG}the worker failed with KeyError; worker.log has the details", "exit"),
        ("terminated by SIGKILL", "", "killed"),
        ("terminated by SIGSEGV (core dumped)", "", "crash"),
        ("terminated by SIGTERM", "", "operator"),
        ("exit status 0", "", "operator"),
        ("exit status 127", "", "exit"),
        ("exit status 1", "", "exit"),
        ("ended", "", "exit"),
    ],
)
def test_each_end_has_a_cause(how: str, told: str, cause: str) -> None:
    assert explain(Exit(how, told, model="/models/m")).cause == cause


def test_signal_9_of_unknown_origin_has_no_further_cause() -> None:
    told = f"{WORKER}SIGKILL"
    assert killed_worker(told) == 12
    unknown = explain(Exit("exit status 3", told))
    assert (unknown.cause, "perhaps out of memory: see dmesg" in unknown.words) == (Cause.KILLED, True)
    short = explain(Exit("exit status 3", told, out_of_memory="the kernel has just killed a process of x"))
    assert (short.cause, short.words) == (
        Cause.MEMORY,
        "killed by signal 9, out of memory: the kernel has just killed a process of x",
    )
    # The rank that killed the worker has left a note, which takes precedence.
    hung = explain(Exit("exit status 3", told, out_of_memory="somewhere", killed_by_rank=True))
    assert hung.cause is Cause.HANG


@given(st.text(), st.text(), st.text())
def test_any_output_of_a_program_can_be_classified(how: str, told: str, model: str) -> None:
    verdict = explain(Exit(how, told, model))
    assert "\n" not in verdict.words


# ---- messages of real replicas


def refusal(tmp_path: Path, *words: str) -> Exit:
    """Return the exit of a real api_server with these flags, as its supervisor would report it."""
    output = tmp_path / "output.log"
    with output.open("wb") as out:
        ended = subprocess.run(
            [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", *words],
            stdout=out,
            stderr=out,
            env={**os.environ, "FD_LOG_DIR": str(tmp_path)},
            timeout=120,
            check=False,
        )
    return Exit(f"exit status {ended.returncode}", output_tail.last_error(output, 0.0))


def port() -> str:
    return str(free_ports(1)[0])


def test_port_held_by_another_program(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        end = refusal(tmp_path, "--model", str(TINY), "--port", str(stranger.getsockname()[1]))
    assert explain(end).cause is Cause.PORT
    assert f"is taken by pid {os.getpid()}" in end.error


@pytest.mark.parametrize(
    "words", [("--surprise", "1"), ("--quantization", "int4"), ("--max-concurrency", "100000000")]
)
def test_a_wrong_flag(tmp_path: Path, words: tuple[str, str]) -> None:
    end = refusal(tmp_path, "--model", str(TINY), "--port", port(), *words)
    assert explain(end).cause is Cause.FLAG
    assert words[0] in end.error


@pytest.mark.parametrize("file", [None, "config.json", "model.safetensors", "tokenizer.json"])
def test_an_unreadable_model(tmp_path: Path, file: str | None) -> None:
    model = tmp_path / "checkpoint"
    if file is not None:
        model.mkdir()
        for one in TINY.iterdir():
            (model / one.name).write_bytes(one.read_bytes())
        (model / file).write_bytes(b"not what it should be")
    end = refusal(tmp_path, "--model", str(model), "--port", port())
    assert explain(end).cause is Cause.MODEL, end


# ---- messages of other ranks and of the kernel


def test_worker_killed_by_its_group_counts_as_hung(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    for name, line in (
        ("replica0", f"{WORKER}SIGKILL"),
        (
            "replica1",
            "2026-11-25 03:05:10,000 WARNING x expert group dp-1: rank 0 (pid 12) has made no progress for "
            "90.1 s (computing, layer 3); it is killed",
        ),
    ):
        layout.output(name).parent.mkdir()
        layout.output(name).write_text(line + "\n")
    program = Program("replica0", ("x", "--model", str(TINY)), {}, (1,))
    verdict, told = ExitDiagnosis(layout).diagnose(program, "exit status 3", 0.0, ["replica1"])
    assert (verdict.cause, told) == (Cause.HANG, f"{WORKER}SIGKILL")
    alone, _ = ExitDiagnosis(layout).diagnose(program, "exit status 3", 0.0, [])
    assert alone.cause is Cause.KILLED


def test_oom_kill_is_visible_for_some_seconds(tmp_path: Path) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 7\noom_kill 3\n")
    watcher = OomWatcher(counter)
    assert watcher.recent_kill() == "", "before the first look"
    watcher.poll([], 0.0)
    assert watcher.recent_kill() == ""
    counter.write_text("nr_free_pages 7\noom_kill 4\n")
    assert watcher.recent_kill() == "the kernel has just killed a process of this machine"
    for now in (5.0, 10.0, 15.0):
        watcher.poll([], now)
    assert watcher.recent_kill() == ""
    counter.unlink()
    assert watcher.recent_kill() == ""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup limited to 64 MB, of the version that this machine permits."""
    for mount, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")):
        directory = Path("/sys/fs/cgroup") / mount / f"fd-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            directory.mkdir()
            try:
                (directory / limit).write_text(str(64 << 20))
            except OSError:
                directory.rmdir()
                continue
            yield directory
            # The kernel needs a moment to reap the processes.
            wait_until(lambda: _removed(directory), "cgroup removed")  # noqa: B023
            return
    pytest.skip("no cgroup with a limit of memory can be made here")


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def test_real_oom_kill_is_detected(small_cgroup: Path) -> None:
    hungry = "import sys; sys.stdin.readline(); print(len(bytearray(b'x') * (1 << 28)))"
    watcher = OomWatcher(Path("/nowhere"))
    with subprocess.Popen([sys.executable, "-c", hungry], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        (small_cgroup / "cgroup.procs").write_text(str(process.pid))
        # With swap the process would survive; a container of that size has none.
        with contextlib.suppress(OSError):
            (small_cgroup / "memory.memsw.limit_in_bytes").write_text(str(64 << 20))
        with contextlib.suppress(OSError):
            (small_cgroup / "memory.swap.max").write_text("0")
        watcher.poll([process.pid], time.monotonic())
        assert watcher.recent_kill() == ""
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(60) == -signal.SIGKILL
    assert watcher.recent_kill() == f"the kernel has just killed a process of cgroup /{small_cgroup.name}"
