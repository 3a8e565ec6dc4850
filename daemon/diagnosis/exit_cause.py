"""Classification of unexpected exits: a cause and a few words for people. Without I/O.

The evidence is the exit status, the last error line, and what the kernel and the other ranks report. Who sent
a signal 9 remains unknown, because the kernel does not report it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    #: Another process uses the port.
    PORT = "port"
    #: The checkpoint cannot be read.
    MODEL = "model"
    #: The program rejects its command line or an environment variable.
    FLAG = "flag"
    #: The kernel killed it because of memory, or an allocation failed.
    MEMORY = "memory"
    #: The GPU or its driver failed.
    GPU = "gpu"
    #: A disk is full or cannot be written.
    DISK = "disk"
    #: No progress, or no answer to health checks.
    HANG = "hang"
    #: Not READY in time.
    STARTUP = "startup"
    #: A signal that people and programs use to end others, and not from fd-dp.
    OPERATOR = "operator"
    #: Signal 9 from an unknown sender.
    KILLED = "killed"
    #: A signal caused by the program itself, such as SIGSEGV.
    CRASH = "crash"
    #: It ended because supervisord ended.
    SUPERVISORD = "supervisord"
    #: Any other exit code.
    EXIT = "exit"


#: Causes outside the program. No request can be blamed for such an exit.
FROM_OUTSIDE = frozenset({Cause.KILLED, Cause.OPERATOR, Cause.SUPERVISORD})

#: Causes that only a person can remove, so that a quick retry is useless, and why.
NO_QUICK_RETRY = {
    Cause.MODEL: "a retry cannot fix an unreadable model",
    Cause.FLAG: "a retry cannot fix a wrong flag",
}


@dataclass(frozen=True, slots=True)
class Exit:
    """Evidence about one exit."""

    #: As reported by supervisord: "exit status 3", "terminated by SIGKILL"; "" if it could not be started.
    how: str
    #: Last error line, or why it could not be started.
    error: str = ""
    #: Directory of the model that it serves.
    model: str = ""
    #: Where the kernel has just killed a process because of memory, for people; "" if it has not.
    out_of_memory: str = ""
    #: Another rank of its expert group reports that it killed its worker.
    killed_by_rank: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    cause: Cause
    #: Explanation for people; "" if `how` and `error` suffice.
    words: str = ""


#: Signals that end another process on purpose.
_OPERATOR_SIGNALS = frozenset(
    {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE"}
)
_SIGNAL = re.compile(r"(?:terminated|killed) by (SIG\w+)")
_STOPPED_WORKER = re.compile(r"worker pid=\d+ exited with code 0\b")
_USAGE = re.compile(r"exit status (?:2|78)\b")
_NOT_STARTED = re.compile(r"exit status 127\b")
_PORT = re.compile(
    r"\bport \d+ (?:on \S+ )?is taken\b|\bcannot listen on\b|Address (?:already )?in use", re.I
)
_MEMORY = re.compile(
    r"not enough memory|\bGPU memory\b|Cannot allocate memory|Unable to allocate|MemoryError|bad_alloc"
    r"|--shm-size",
    re.I,
)
#: Beginnings of errors, see choice.py and cuda_library.py in engine/device.
_NO_GPU = "--device is 'gpu', but "
_GPU = re.compile(r"\bGPU: ")
_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|cannot be written to\b"
)
#: Errors about a checkpoint begin with the name of one of its files.
_MODEL = re.compile(
    r"\bmodel '|\b(?:config|generation_config|tokenizer_config|special_tokens_map|added_tokens|tokenizer)"
    r"\.json\b|\bchat_template\.jinja\b|\b(?:tokenizer|spm)\.model\b|\.safetensors\b|: tensor "
    r"|: no weights\b|: no tokenizer\b|\bwas changed while it was packed\b"
)


def explain(end: Exit) -> Verdict:
    """Return the cause of an exit that the daemon did not bring about."""
    if by := _SIGNAL.search(end.how) or _SIGNAL.search(end.error):
        return _explain_signal(by[1], end)
    if end.how == "exit status 0" or _STOPPED_WORKER.search(end.error):
        return Verdict(Cause.OPERATOR, "stopped, but not by fd-dp")
    if _PORT.search(end.error):
        return Verdict(Cause.PORT)
    if _MEMORY.search(end.error):
        return Verdict(Cause.MEMORY, "out of memory")
    if _GPU.search(end.error):
        return Verdict(Cause.GPU, "the GPU or its driver failed; fdctl why shows its Xid")
    if _DISK.search(end.error):
        return Verdict(Cause.DISK, "a disk is full or read-only")
    if _MODEL.search(end.error) or (end.model and end.model in end.error):
        return Verdict(Cause.MODEL, "unreadable model")
    if (_USAGE.search(end.how) and end.error) or _NO_GPU in end.error:
        return Verdict(Cause.FLAG, "wrong flag")
    if _NOT_STARTED.search(end.how):
        return Verdict(Cause.EXIT, "fd-run could not start it; see its output")
    return Verdict(Cause.EXIT)


def killed_worker(error: str) -> int | None:
    """Return the pid of the worker that was killed by signal 9 according to its replica, or None."""
    found = re.search(r"worker pid=(\d+) was killed by SIGKILL\b", error)
    return int(found[1]) if found else None


def _explain_signal(name: str, end: Exit) -> Verdict:
    if name in _OPERATOR_SIGNALS:
        return Verdict(Cause.OPERATOR, f"{name}, not from fd-dp")
    if name != "SIGKILL":
        return Verdict(Cause.CRASH, f"crashed with {name}")
    if end.killed_by_rank:
        return Verdict(Cause.HANG, "killed by a rank that waited for it: collective_timeout")
    if end.out_of_memory:
        return Verdict(Cause.MEMORY, f"killed by signal 9, out of memory: {end.out_of_memory}")
    return Verdict(Cause.KILLED, "killed by signal 9, not from fd-dp; perhaps out of memory: see dmesg")
