"""libFuzzer on the router's fast path and on the expert group, with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BUILT = ROOT / ".cache" / "fuzz"
_FLAGS = ("-std=c++17", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined")
MISSING = "clang with libFuzzer is missing; apt-get install clang libclang-rt-dev"

_EVENT = b'data: {"a":1}\n: fd 0 1 2\n\n'


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    #: Code under test: files compiled with the target, and files that the target includes.
    sources: tuple[str, ...]
    included: tuple[str, ...]
    #: Valid inputs from which the fuzzer starts.
    seeds: tuple[bytes, ...]

    @property
    def source(self) -> Path:
        return ROOT / "tests" / "fuzz" / f"{self.name}_fuzzer.cc"

    @property
    def binary(self) -> Path:
        return _BUILT / self.name

    @property
    def corpus(self) -> Path:
        return _BUILT / f"{self.name}.corpus"


TARGETS = (
    Target(
        "fast_path",
        (),
        ("daemon/router/http/fast_path.cc",),
        (
            b"\1\xff" + b"\xff".join([_EVENT, b":\n\n", _EVENT]),
            b"\0\7" + b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT) * 3 + b"0\r\n\r\n",
            b'\1\3data: {"error":1}\n\n',
        ),
    ),
    Target(
        "expert_group",
        ("custom_ops/cpu/collective/expert_group.cc", "custom_ops/cpu/runtime/workspace.cc"),
        (
            *("custom_ops/include/expert_group.h", "custom_ops/include/workspace.h"),
            "custom_ops/cpu/runtime/waiting.h",
        ),
        # The picks; then a seat and whether more follows, an offset, and a word.
        (
            bytes(4),
            b"\x11\x22\x33\x44\x80\xff\x0f" + bytes(8) + b"\x81\xc0\0" + (4 << 6).to_bytes(8, "little"),
            b"\x11\x22\x33\x44\x80\xff\x0f" + bytes(8) + b"\x80\x28\0" + (9 << 8).to_bytes(8, "little"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    inputs: int
    #: The fuzzer's report, empty without a finding.
    finding: str


def is_possible() -> bool:
    """Return True if a clang that can link libFuzzer is installed."""
    clang = shutil.which("clang++")
    if clang is None:
        return False
    command = [clang, "-fsanitize=fuzzer", "-print-file-name=libclang_rt.fuzzer-x86_64.a"]
    runtime = subprocess.run([clang, "-print-runtime-dir"], capture_output=True, text=True, check=False)
    directories = [Path(runtime.stdout.strip())]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return Path(found).is_absolute() or any(
        list(directory.glob("libclang_rt.fuzzer*")) for directory in directories if directory.is_dir()
    )


def build(target: Target) -> None:
    """Compile the target, unless the existing program is newer than all its sources."""
    parts = [target.source, *(ROOT / name for name in (*target.sources, *target.included))]
    newest = max(part.stat().st_mtime for part in parts)
    if target.binary.exists() and target.binary.stat().st_mtime > newest:
        return
    _BUILT.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / 'custom_ops' / folder}" for folder in ("include", "cpu")]
    sources = [str(target.source), *(str(ROOT / name) for name in target.sources)]
    command = ["clang++", *_FLAGS, *includes, *sources, "-o", f"{target.binary}.new"]
    subprocess.run(command, check=True)
    os.replace(f"{target.binary}.new", target.binary)


def run(target: Target, seconds: int) -> Outcome:
    """Run the target; the corpus is kept for the next run."""
    target.corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (target.corpus / f"seed-{number}").write_bytes(seed)
    done = subprocess.run(
        [
            *(str(target.binary), f"-max_total_time={seconds}", "-max_len=2000", "-timeout=20"),
            *("-print_final_stats=1", f"-artifact_prefix={_BUILT}/{target.name}.", str(target.corpus)),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    executed = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    finding = "" if done.returncode == 0 else done.stderr[-6000:]
    return Outcome(int(executed[1]) if executed else 0, finding)
