"""Why a program has ended that should run: one of a few words, and some more for people. Pure.

What is known is how it ended, its last error line, and what the kernel and its neighbours tell. No more is
claimed than that: who has sent a signal 9, the kernel tells nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    #: Another process has the port.
    PORT = "port"
    #: The checkpoint cannot be read, or is none.
    MODEL = "model"
    #: It refuses its command line or an environment variable.
    FLAG = "flag"
    #: It was killed for want of memory, or says that it got none.
    MEMORY = "memory"
    #: A disk is full or cannot be written to.
    DISK = "disk"
    #: It made no progress, or did not answer.
    HANG = "hang"
    #: It did not become READY in time.
    STARTUP = "startup"
    #: A signal by which people and programs end others, and not from fd-dp.
    OPERATOR = "operator"
    #: Signal 9, and nobody knows from whom.
    KILLED = "killed"
    #: A signal for which the program itself was the reason, as 11.
    CRASH = "crash"
    #: It ended with supervisord.
    SUPERVISORD = "supervisord"
    #: Any other exit code.
    EXIT = "exit"


#: Causes outside the program: no request is to blame for such an end.
FROM_OUTSIDE = frozenset({Cause.KILLED, Cause.OPERATOR, Cause.SUPERVISORD})

#: To try again at once would be in vain: only a person can change them.
HOPELESS = {
    Cause.MODEL: "a model that cannot be read will not heal by itself",
    Cause.FLAG: "a wrong flag will not heal by itself",
}


@dataclass(frozen=True, slots=True)
class End:
    #: In supervisord's words: "exit status 3", "terminated by SIGKILL"; empty if it could not be started.
    how: str
    #: The last error that it has told, or that kept it from being started.
    told: str = ""
    #: The directory of the model that it serves.
    model: str = ""
    #: Where the kernel has killed somebody for want of memory just now; empty if nowhere.
    out_of_memory: str = ""
    #: Another rank of its expert group tells that it has killed its worker.
    killed_by_rank: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    cause: Cause
    #: A few words for people; empty where `how` and `told` say it all.
    words: str = ""


#: Signals by which one process ends another on purpose.
_OF_OPERATORS = frozenset(
    {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE"}
)
_SIGNAL = re.compile(r"(?:terminated|killed) by (SIG\w+)")
_OBEYED = re.compile(r"worker pid=\d+ exited with code 0\b")
_USAGE = re.compile(r"exit status (?:2|78)\b")
_NOT_STARTED = re.compile(r"exit status 127\b")
_PORT = re.compile(
    r"\bport \d+ (?:on \S+ )?is taken\b|\bcannot listen on\b|Address (?:already )?in use", re.I
)
_MEMORY = re.compile(
    r"not enough memory|Cannot allocate memory|Unable to allocate|MemoryError|bad_alloc|--shm-size", re.I
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|cannot be written to")
#: In front of what a checkpoint is refused for stands one of its files.
_MODEL = re.compile(
    r"\bmodel '|\b(?:config|generation_config|tokenizer_config|special_tokens_map|added_tokens|tokenizer)"
    r"\.json\b|\bchat_template\.jinja\b|\b(?:tokenizer|spm)\.model\b|\.safetensors\b|: tensor "
    r"|: no weights\b|: no tokenizer\b|\bwas changed while it was packed\b"
)


def explain(end: End) -> Verdict:
    """The cause of an end that the daemon did not bring about itself."""
    if by := _SIGNAL.search(end.how) or _SIGNAL.search(end.told):
        return _of_signal(by[1], end)
    if end.how == "exit status 0" or _OBEYED.search(end.told):
        return Verdict(Cause.OPERATOR, "told to end, and not by fd-dp")
    if _PORT.search(end.told):
        return Verdict(Cause.PORT)
    if _MEMORY.search(end.told):
        return Verdict(Cause.MEMORY, "out of memory")
    if _DISK.search(end.told):
        return Verdict(Cause.DISK, "no room on a disk")
    if _MODEL.search(end.told) or (end.model and end.model in end.told):
        return Verdict(Cause.MODEL, "unreadable model")
    if _USAGE.search(end.how) and end.told:
        return Verdict(Cause.FLAG, "wrong flag")
    if _NOT_STARTED.search(end.how):
        return Verdict(Cause.EXIT, "fd-run could not start it, its output says why")
    return Verdict(Cause.EXIT)


def killed_worker(told: str) -> int | None:
    """The pid of a worker of which its replica tells that a signal 9 has ended it."""
    found = re.search(r"worker pid=(\d+) was killed by SIGKILL\b", told)
    return int(found[1]) if found else None


def _of_signal(name: str, end: End) -> Verdict:
    if name in _OF_OPERATORS:
        return Verdict(Cause.OPERATOR, f"{name}, not from fd-dp")
    if name != "SIGKILL":
        return Verdict(Cause.CRASH, f"crashed with {name}")
    if end.killed_by_rank:
        return Verdict(Cause.HANG, "killed by a rank that waited for it: collective_timeout")
    if end.out_of_memory:
        return Verdict(Cause.MEMORY, f"killed by signal 9, out of memory: {end.out_of_memory}")
    return Verdict(Cause.KILLED, "killed by signal 9, not from fd-dp; perhaps out of memory: see dmesg")
