"""The Xid messages that `fdctl why` shows after the failure of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.diagnosis.xid import around_exit, lost_gpu, xid_of
from fastdeploy.daemon.fdctl import kernel_log
from fastdeploy.daemon.fdctl.kernel_log import parse_journal, parse_record

from .conftest import FDCTL, Running

#: Messages in NVIDIA's documentation and from its driver: GPU, number, text.
REAL = [
    ("0000:03:00", 14, "Xid (0000:03:00): 14, Channel 00000001"),
    ("0000:5a:00", 79, "Xid (PCI:0000:5a:00): 79, GPU has fallen off the bus."),
    (
        "0000:05:00",
        79,
        "Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    ),
    (
        "0000:01:00",
        94,
        "Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No",
    ),
    ("0000:3b:00", 13, "Xid (PCI:0000:3b:00 GPU-I:01 GPU-CI:02): 13, pid=9, name=a, Graphics Exception"),
    (
        "0000:10:1c",
        63,
        "Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to "
        "activate.",
    ),
    (
        "0002:00:00",
        119,
        "Xid (PCI:0002:00:00): 119, pid=1582259, name=nvc:[driver], Timeout after 6s of waiting for RPC "
        "response from GPU1 GSP! Expected function 76 (GSP_RM_CONTROL) (0x20802a02 0x8).",
    ),
    (
        "0000:00:06",
        31,
        "Xid (PCI:0000:00:06): 31, pid=79749, name=exe, Ch 0000000a, intr 00000000. MMU Fault: ENGINE "
        "GRAPHICS GPC2 GPCCLIENT_T1_7 faulted @ 0x2b57_b3000000. Fault is of type FAULT_PDE "
        "ACCESS_TYPE_VIRT_WRITE",
    ),
]
OTHERS = [
    "NVRM: GPU at PCI:0000:03:00: GPU-b850f46d-d5ea-c752-ddf3-c4453e44d3f7",
    "NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.",
    "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 28006, Non-fatal, Link 46 MC TS crumbstore MCTO",
    "audit: type=1400 comm=Xid",
]


@pytest.mark.parametrize(("gpu", "number", "text"), REAL)
@pytest.mark.parametrize("before", ["NVRM: ", "[16450076.435595] NVRM: ", "  NVRM: "])
def test_real_messages_are_recognised(gpu: str, number: int, text: str, before: str) -> None:
    xid = xid_of(5.0, before + text)
    assert xid is not None
    assert (xid.at, xid.gpu, xid.number, xid.text) == (5.0, gpu, number, text)


@pytest.mark.parametrize("message", OTHERS)
def test_other_messages_are_no_xids(message: str) -> None:
    assert xid_of(0.0, message) is None


@given(st.text() | st.sampled_from([text for *_, text in REAL]), st.text())
def test_any_message_becomes_one_printable_line(before: str, after: str) -> None:
    xid = xid_of(0.0, f"NVRM: {before}{after}")
    assert xid is None or (xid.text.isprintable() and len(xid.text) < 400)


@given(st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(1, 999))
def test_the_gpu_of_a_replica_is_that_of_its_xid(domain: int, bus: int, device: int, number: int) -> None:
    place = f"{bus:02x}:{device:02x}"
    message = f"NVRM: Xid (PCI:{domain:04x}:{place}): {number}, pid=1"
    other = f"NVRM: Xid (PCI:{domain:04x}:{(bus + 1) % 256:02x}:{device:02x}): 1, pid=1"
    output = f"ERROR replica stops: GPU: a step: failed (PCI {domain:08X}:{place.upper()}.0)\nlater\n"
    found = around_exit([(9.0, other), (10.0, message), (10.0, OTHERS[0])], 10.0, lost_gpu(output))
    assert [xid.number for xid in found] == [number]


@given(st.lists(st.integers(0, 2000)), st.integers(0, 2000))
def test_only_the_last_xids_around_the_exit_count(times: list[int], exit_time: int) -> None:
    messages = [(float(at), f"NVRM: Xid (PCI:0000:01:00): {at}, pid=1") for at in sorted(times)]
    near = [at for at in sorted(times) if exit_time - 300 <= at <= exit_time + 60]
    assert [xid.number for xid in around_exit(messages, exit_time, "")] == near[-3:]


@given(st.binary() | st.from_regex(rb"[0-9]+,[0-9]+,[0-9]+,.;.*", fullmatch=True))
def test_any_record_of_the_kernel_can_be_read(record: bytes) -> None:
    message = parse_record(record, 1e9)
    assert message is None or (message[0] >= 1e9 and "\n" not in message[1])


def test_a_record_has_time_and_text() -> None:
    record = b"6,1234,5000000,-,caller=T1;NVRM: Xid (PCI:0000:01:00): 79\n SUBSYSTEM=pci\n"
    assert parse_record(record, 100.0) == (105.0, "NVRM: Xid (PCI:0000:01:00): 79")


@given(st.text())
def test_any_output_of_journalctl_can_be_read(text: str) -> None:
    assert all(isinstance(at, float) for at, _ in parse_journal(f"-- No entries --\n1.5 h kernel: x\n{text}"))


def test_the_kernels_buffer_can_be_read_or_says_why() -> None:
    problem, messages = "", []
    try:
        messages = kernel_log._buffer(0.0, time.time())
    except OSError as error:
        problem = str(error)
    assert problem.startswith("/dev/kmsg: ") or problem == ""
    assert all(at <= time.time() + 60 for at, _ in messages)


# ---- fdctl why

Journal = Callable[[str], None]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Replace journalctl by a script."""

    def replace(script: str) -> None:
        command = tmp_path / "bin/journalctl"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
        command.chmod(0o755)

    return replace


def test_fdctl_why_shows_the_xid_after_a_fault(running: Running, journal: Journal, tmp_path: Path) -> None:
    def why(*words: str) -> str:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = [str(FDCTL), "--prefix", str(running.prefix), "why", *words]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True
        )
        return done.stdout

    fault = tmp_path / "fault"
    running.write(replicas=1, extra_args=(f"--gpu-fault={fault}",))
    running.start_and_wait()
    assert json.loads(why("0", "--json"))["xid"] is None
    journal(
        "print('-- Boot --')\n"
        "print(f'{time.time():.6f} host kernel: NVRM: Xid (PCI:0000:1c:00): 31, of another GPU')\n"
        "print(f'{time.time():.6f} host kernel: NVRM: Xid (PCI:0000:1b:00): 79, pid=7, off the bus')"
    )
    pid = running.pids()["replica0"]
    fault.touch()
    running.wait_ready_again("replica0", pid)
    told = why("0")
    assert "(cause: gpu)" in told
    [line] = [line for line in told.splitlines() if line.startswith("  kernel log: ")]
    assert line.endswith(" Xid (PCI:0000:1b:00): 79, pid=7, off the bus")
    found = json.loads(why("0", "--json"))["xid"]
    assert (found["gpu"], found["problem"]) == ("0000:1b:00.0", None)
    assert [one["number"] for one in found["messages"]] == [79]
    journal("print('-- No entries --')")
    assert "  kernel log: no Xid of GPU 0000:1b:00.0 at that time\n" in why("0")


def test_an_unreadable_log_is_said(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_log, "_DEVICE", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    missing = f"{tmp_path / 'none'}: No such file or directory"
    assert kernel_log.xids(0.0, "") == ([], f"journalctl: not found; {missing}")
    hint = "Hint: You are currently not seeing messages from other users and the system."
    journal(f"print({hint!r}, 'more', sep='\\n', file=sys.stderr)\nprint('-- No entries --')")
    assert kernel_log.xids(0.0, "") == (
        [],
        f"journalctl: {hint.removeprefix('Hint: ')}; {missing}",
    )
    monkeypatch.setattr(kernel_log, "_JOURNAL_SECONDS", 0.5)
    journal("time.sleep(600)")
    assert kernel_log.xids(0.0, "") == ([], f"journalctl: no answer within 0.5 s; {missing}")
