"""Joining a group; the record of its members, its lock, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy import custom_ops
from fastdeploy.common.errors import ConfigError
from fastdeploy.expert_parallel import join as join_module
from fastdeploy.expert_parallel import memory_file
from fastdeploy.expert_parallel.group import ExpertGroup
from fastdeploy.expert_parallel.join import group_fingerprint, join
from fastdeploy.expert_parallel.layout import (
    MAX_RANKS,
    PROTOCOL_VERSION,
    GroupHeader,
    GroupLayout,
    GroupWords,
    RankRow,
    RankSlot,
    RankSlotState,
)
from fastdeploy.expert_parallel.membership import Membership, RankLost, RankTaken, planner
from fastdeploy.expert_parallel.memory import FILE, Memory, layout_of
from fastdeploy.expert_parallel.options import GroupOptions

NAME = "group"
LAYOUT = GroupLayout(num_ranks=3, num_layers=2, num_experts=5, max_tokens=64, k=2, hidden=256)
#: Deadline in seconds for anything that works, even on a busy machine.
PATIENCE = 60.0

Join = Callable[..., ExpertGroup]
Start = Callable[..., "subprocess.Popen[str]"]
MemoryOf = Callable[..., Memory]


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a directory for this test's groups.

    In a shared one, any rank that starts elsewhere would remove a group without living members.
    """
    # The path of a doorbell socket has to be short.
    with TemporaryDirectory(prefix="fd-", dir=memory_file.SHARED_MEMORY) as root:
        yield Path(root)


@pytest.fixture
def joined(root: Path) -> Iterator[Join]:
    """Return a function that joins as a rank; the ranks are closed after the test."""
    with contextlib.ExitStack() as stack:

        def join_it(
            rank: int = 0,
            layout: GroupLayout = LAYOUT,
            root: Path = root,
            stall_kill: float = 60.0,
            **fingerprint: object,
        ) -> ExpertGroup:
            options = GroupOptions(NAME, rank, stall_kill=stall_kill)
            group = join(options, layout, fingerprint, lambda mine, taken: None, root)
            stack.callback(group.close)
            return group

        yield join_it


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Return a function that starts a `group_process` and, if `says` is given, waits for that line."""
    processes = []

    def run(*arguments: object, says: str | None) -> subprocess.Popen[str]:
        what, *rest = map(str, arguments)
        directory = str(memory_file.group_directory(NAME, root))
        command = [sys.executable, "-m", "tests.engine.group_process", what, directory, *rest]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        if says is not None:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{says}\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def memory(root: Path) -> Memory:
    """Memory of a group without living members."""
    fingerprint = group_fingerprint(LAYOUT, {})
    with memory_file.open_locked(NAME, LAYOUT, fingerprint, 60.0, root) as memory:
        return memory


@pytest.fixture
def small() -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system with a size in KiB."""
    # Not in pytest's directory, as the name of a socket has to be short.
    root = Path(mkdtemp())

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(root)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small file system, and not everywhere")
        return root

    yield mount
    # Lazily, as this process has files mapped.
    subprocess.run(["umount", "-l", str(root)], capture_output=True, check=False)
    root.rmdir()


# ---- missing or insufficient shared memory


def test_missing_directory_is_reported(joined: Join, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/missing is missing.*mount a tmpfs"):
        joined(root=tmp_path / "missing")


def test_shared_memory_that_cannot_be_written_is_named(joined: Join, small: Callable[[int], Path]) -> None:
    root = small(1024)
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    with pytest.raises(
        ConfigError, match=rf"{root}/fd-ep-.*Read-only file system.*a writable tmpfs on {root}"
    ):
        joined(root=root)


def test_a_directory_that_others_may_read_is_refused(joined: Join, tmp_path: Path) -> None:
    directory = memory_file.group_directory(NAME, tmp_path)
    directory.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not a directory of this user alone"):
        joined(root=tmp_path)


def test_a_name_that_cannot_be_a_directorys_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 40 letters"):
        memory_file.group_directory("../elsewhere")


def test_too_little_memory_is_reported_with_the_need_and_leaves_nothing(
    joined: Join, small: Callable[[int], Path]
) -> None:
    root, layout = small(1024), replace(LAYOUT, max_tokens=1024)
    megabytes = -(-layout.rank_bytes >> 20)
    with pytest.raises(ConfigError, match=rf"{root} has no room.*: {megabytes} MB are needed .*--shm-size"):
        joined(root=root, layout=layout)
    assert list(root.iterdir()) == []


def test_a_rank_that_is_taken_again_needs_no_second_part(small: Callable[[int], Path]) -> None:
    root = small((LAYOUT.first_rank_offset + LAYOUT.rank_bytes) // 1024 * 4 // 3)
    with memory_file.open_locked(NAME, LAYOUT, {}, 1.0, root) as memory:
        memory.allocate(0)
        memory.pages[LAYOUT.rank_offset(0) : LAYOUT.rank_offset(1)] = bytes(LAYOUT.rank_bytes)
        memory.allocate(0)
        with pytest.raises(ConfigError, match="no room"):
            memory.allocate(1)


def fill(root: Path, but: int) -> None:
    """Fill the file system except for `but` KiB."""
    room = os.statvfs(root)
    (root / "of another").write_bytes(bytes(room.f_bavail * room.f_frsize - (but << 10)))


def dispatch(group: ExpertGroup, tokens: int) -> None:
    x, picks = paddle.ones([tokens, LAYOUT.hidden]), paddle.full([tokens, LAYOUT.k], -1, "int32")

    def compute() -> None:
        try:
            custom_ops.ep_dispatch_send(x, picks, group.handle, 0)
        except RuntimeError:
            group.check()

    group.run_step(tokens, compute)


def test_memory_that_runs_out_in_a_step_ends_the_rank_in_a_line(
    joined: Join, small: Callable[[int], Path]
) -> None:
    root = small(2048)
    group = joined(root=root)
    fill(root, but=32)
    with pytest.raises(RankLost, match=rf"{root} is full: 1 MB more are needed.*--shm-size"):
        dispatch(group, 64)


def test_memory_grows_by_no_more_than_is_needed(joined: Join, small: Callable[[int], Path]) -> None:
    root = small(4096)
    group = joined(root=root, layout=replace(LAYOUT, max_tokens=256))
    # Each token takes 1 KiB.
    dispatch(group, 128)
    fill(root, but=64)
    dispatch(group, 190)
    assert group.status().steps_total == 2


# ---- admission


def test_refusal_names_the_other_rank_and_all_differences(joined: Join) -> None:
    joined(0, weights="abc", balance=True)
    with pytest.raises(ConfigError) as raised:
        joined(1, weights="xyz", layout=replace(LAYOUT, max_tokens=32))
    said = str(raised.value)
    assert said.startswith(
        f"rank 1 (pid {os.getpid()}) cannot join the expert group of rank 0 (pid {os.getpid()}): "
    )
    for difference in (
        "balance is None here and True there",
        "max_tokens is 32 here and 64 there",
        "weights is 'xyz' here and 'abc' there",
    ):
        assert difference in said
    assert "hidden" not in said


def test_refused_rank_releases_lock_and_seat(joined: Join, memory_of: MemoryOf) -> None:
    joined(0, weights="abc")
    with pytest.raises(ConfigError) as raised:
        joined(1, weights="xyz")
    # The error, and the objects that its traceback refers to, must not keep the lock.
    with memory_of(patience=0.5).locked() as _:
        assert raised.value is not None
    assert memory_of().rank_slots[1].state == RankSlotState.FREE


def test_newer_protocol_is_reported(joined: Join, memory_of: MemoryOf) -> None:
    joined(0)
    memory_of().header.version += 1
    here, there = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    with pytest.raises(
        ConfigError, match=f"speaks protocol {there}, this process {here}; all ranks must run one"
    ):
        joined(1)


def test_unused_memory_of_a_newer_protocol_is_recreated(joined: Join, memory: Memory) -> None:
    memory.header.version += 1
    assert joined(0).is_member


def test_a_rank_that_a_living_process_has_is_refused(joined: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_module, "_TAKEOVER_SECONDS", 0.3)
    # The wait for a rank lasts longer than the lock may be held.
    joined(0, stall_kill=0.1)
    with pytest.raises(
        RankTaken, match=f"rank 0 of expert group .* is held by pid {os.getpid()}, which is alive"
    ):
        joined(0, stall_kill=0.1)


def test_a_rank_is_waited_for_while_its_process_ends(joined: Join, memory: Memory, start: Start) -> None:
    start("rank", 0, 0.5, says="registered")
    assert joined(0).is_member


# ---- the lock


@pytest.fixture
def memory_of(root: Path) -> Iterator[MemoryOf]:
    """Return a function that opens another mapping of the memory."""
    opened = []

    def look(patience: float = 60.0) -> Memory:
        directory = memory_file.group_directory(NAME, root)
        descriptor = os.open(directory / FILE, os.O_RDWR)
        opened.append(descriptor)
        return Memory(directory, descriptor, layout_of(descriptor, directory), patience)

    yield look
    for descriptor in opened:
        os.close(descriptor)


def test_only_the_stopped_holder_of_the_lock_is_killed(memory: Memory, start: Start) -> None:
    stopped = start("lock", 60, "stop", says="locked")
    # All lose patience with the stopped holder together; then each holds the lock in turn.
    waiting = [start("lock", 0.5, 0.1, says=None) for _ in range(4)]
    for process in waiting:
        assert process.communicate(timeout=PATIENCE)[0] == "locked\nunlocked\n"
        assert process.returncode == 0
    assert stopped.wait(PATIENCE) == -signal.SIGKILL


def test_no_process_is_killed_if_the_lock_is_released_in_time(memory: Memory, start: Start) -> None:
    holder = start("lock", 60, 0.5, says="locked")
    waiting = start("lock", 30, 0, says="locked")
    assert holder.wait(PATIENCE) == waiting.wait(PATIENCE) == 0


@pytest.mark.parametrize("pid", [None, 0, 1 << 31, (1 << 64) - 1])
def test_a_pid_that_is_not_the_holders_is_not_killed(
    memory: Memory, start: Start, memory_of: MemoryOf, pid: int | None
) -> None:
    """The pid is that of an earlier holder, reused by another process, or no valid pid."""
    other = start("lock", 60, 60, says=None)
    with memory_of().locked():
        memory.header.holder = other.pid if pid is None else pid
        waiting = start("lock", 0.05, 0, says=None)
        time.sleep(1)
        assert (other.poll(), waiting.poll()) == (None, None)


@pytest.mark.parametrize("fingerprint", [b"", b"[" * 8192, b"1", b"\xff"])
def test_a_damaged_fingerprint_is_one_line(joined: Join, memory_of: MemoryOf, fingerprint: bytes) -> None:
    joined(0)
    found = memory_of()
    found.header.fingerprint_bytes = len(fingerprint) or 1 << 63
    found.pages[LAYOUT.fingerprint : LAYOUT.fingerprint + len(fingerprint)] = fingerprint
    with pytest.raises(ConfigError, match="the fingerprint of the expert group is damaged"):
        joined(1)


def test_lock_is_released_when_its_holder_is_killed(memory: Memory, start: Start) -> None:
    start("lock", 60, 60, says="locked").kill()
    began = time.monotonic()
    start("lock", 60, 0, says="locked")
    assert time.monotonic() - began < 30


# ---- membership


@pytest.fixture
def membership(memory: Memory) -> Membership:
    return Membership(memory, planner(LAYOUT.num_experts, 0))


def admit(memory: Memory, membership: Membership, *ranks: int) -> None:
    for rank in ranks:
        membership.register(rank, "a test")
    membership.apply_requests()


def test_unfinished_record_has_no_effect(memory: Memory, membership: Membership) -> None:
    """The writer died before it raised the epoch."""
    admit(memory, membership, 0, 2)
    before = membership.read()
    begin = LAYOUT.records + (before.epoch + 1) % 2 * LAYOUT.record_bytes
    for end in (8, 16, 16 + LAYOUT.placement_bytes // 2, LAYOUT.record_bytes):
        memory.pages[begin : begin + end] = os.urandom(end)
        assert membership.read() == before
    admit(memory, membership, 1)
    after = membership.read()
    assert (after.epoch, after.ranks) == (before.epoch + 1, (0, 1, 2))
    assert all(1 <= len(placement.experts_of(1)) <= 2 for placement in after.placements)


def test_records_are_read_as_they_were_written(memory: Memory, membership: Membership) -> None:
    epochs = []
    for change in (
        lambda: admit(memory, membership, 0),
        lambda: admit(memory, membership, 1),
        membership.restart_step,
    ):
        change()
        record = membership.read()
        epochs.append(record.epoch)
        for placement in record.placements:
            assert len(placement.replicas) == LAYOUT.num_experts
            assert {replica.rank for replicas in placement.replicas for replica in replicas} == set(
                record.ranks
            )
    assert epochs == [1, 2, 3]


def test_dead_members_lose_ranks_and_experts(memory: Memory, membership: Membership, start: Start) -> None:
    admit(memory, membership, 0)
    dying = start("rank", 1, 60, says="registered")
    membership.apply_requests()
    assert membership.read().ranks == (0, 1)
    dying.kill()
    dying.wait()
    with memory.locked():
        assert membership.remove_dead() == [(1, dying.pid)]
        assert membership.remove_dead() == []
    record = membership.read()
    assert record.ranks == (0,)
    assert all(placement.experts_of(0) == tuple(range(LAYOUT.num_experts)) for placement in record.placements)
    assert memory.header.losses == 1


def test_candidate_that_dies_is_not_admitted(memory: Memory, membership: Membership, start: Start) -> None:
    admit(memory, membership, 0)
    dying = start("rank", 1, 60, says="registered")
    dying.kill()
    dying.wait()
    membership.apply_requests()
    assert membership.read().ranks == (0,)


def test_a_pid_that_another_process_has_now_holds_no_rank(memory: Memory, membership: Membership) -> None:
    admit(memory, membership, 0)
    memory.rank_slots[0].start_time += 1
    assert membership.remove_dead() == [(0, os.getpid())]


def test_last_rank_removes_the_group_even_after_unnoticed_deaths(
    joined: Join, memory: Memory, root: Path, start: Start
) -> None:
    group = joined(0)
    dying = start("rank", 1, 60, says="registered")
    dying.kill()
    dying.wait()
    group.close()
    assert not memory_file.group_directory(NAME, root).exists()


def test_removed_member_removes_no_group(joined: Join, root: Path, memory: Memory) -> None:
    """The memory may be that of a finished group whose name a new group uses."""
    memory_file.remove(memory)
    group = joined(0)
    memory_file.remove(memory)
    assert group.is_member
    assert (memory_file.group_directory(NAME, root) / FILE).exists()
    assert Path(memory.doorbell(0)).exists()


@pytest.mark.parametrize("is_alive", [False, True])
def test_an_empty_file_is_abandoned_unless_ranks_live(joined: Join, root: Path, is_alive: bool) -> None:
    """Ranks whose file was removed go on, and one that joins them leaves an empty file."""
    directory = memory_file.group_directory(NAME, root)
    if is_alive:
        joined(0)
        shutil.rmtree(directory)
    directory.mkdir(mode=0o700)
    (directory / FILE).touch()
    with memory_file.open_locked("another", LAYOUT, {}, 60.0, root) as another:
        memory_file.remove(another)
    assert directory.exists() == is_alive


# ---- layout


layouts = st.builds(
    GroupLayout,
    num_ranks=st.integers(1, MAX_RANKS),
    num_layers=st.integers(0, 60),
    num_experts=st.integers(1, 256),
    max_tokens=st.integers(1, 4096),
    k=st.integers(1, 8),
    hidden=st.integers(1, 8192),
)


@given(layout=layouts)
def test_parts_do_not_overlap_and_are_aligned(layout: GroupLayout) -> None:
    """As in `custom_ops/include/expert_group.h`: words begin on cache lines, rows on pages."""
    picks = layout.max_tokens * layout.k
    file = {
        0: ctypes.sizeof(GroupHeader),
        layout.words: ctypes.sizeof(GroupWords),
        layout.rank_slots: MAX_RANKS * ctypes.sizeof(RankSlot),
        layout.fingerprint: 4096,
        layout.records: layout.record_bytes,
        layout.records + layout.record_bytes: layout.record_bytes,
        layout.first_rank_offset: layout.num_ranks * layout.rank_bytes,
        layout.file_bytes: 0,
    }
    rank = {
        0: ctypes.sizeof(RankRow),
        layout.expert_token_counts: 8 * layout.num_layers * layout.num_experts,
        layout.dispatch_targets: 4 * picks,
        layout.return_slots: 4 * layout.num_ranks * picks,
        layout.tokens: 4 * layout.max_tokens * layout.hidden,
        layout.results: 4 * layout.num_ranks * picks * layout.hidden,
        layout.rank_bytes: 0,
    }
    for parts in (file, rank):
        offsets = list(parts)
        for (begin, size), end in zip(parts.items(), offsets[1:], strict=False):
            assert begin + size <= end
        assert all(offset % 64 == 0 for offset in offsets)
    # A page that one part takes from the system must not belong to another part.
    assert all(
        offset % 4096 == 0
        for offset in (layout.first_rank_offset, layout.tokens, layout.results, layout.rank_bytes)
    )
    assert layout.rank_offset(layout.num_ranks - 1) + layout.rank_bytes == layout.file_bytes
    assert layout.record_bytes >= 16 + 2 * layout.num_layers * layout.num_experts * layout.num_ranks


def test_words_have_the_sizes_that_the_compiled_side_asserts() -> None:
    assert (ctypes.sizeof(RankRow), ctypes.sizeof(GroupWords)) == (128, 192)
    assert [getattr(GroupWords, word).offset for word in ("epoch", "bell", "sleepers")] == [0, 64, 128]
    assert ctypes.sizeof(RankSlot) % 64 == 0
