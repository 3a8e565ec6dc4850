"""The cache of packed weights: concurrent processes, processes that die while packing, and damaged files."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from fastdeploy.common.errors import CheckpointError
from fastdeploy.config import ModelConfig
from fastdeploy.custom_ops.packed_matrix import LAYOUT_VERSION
from fastdeploy.weights import weight_cache
from fastdeploy.weights.weight_cache import Packing, packed_tensors
from tests.checkpoints import config_json, draw_tensors, write_checkpoint
from tests.small_disk import SmallDisk

COMMAND = (sys.executable, "-W", "ignore", "-m", "fastdeploy.weight_cache")
#: Packs, and stalls in the middle until it is killed.
STALLS = (
    sys.executable,
    "-W",
    "ignore",
    "-c",
    """
import sys, time
from pathlib import Path
from fastdeploy.config import ModelConfig
from fastdeploy.weights.weight_cache import Packing, packed_tensors

def stall(fraction, stage):
    if fraction > 0.4:
        print(stage, flush=True)
        time.sleep(600)

path = Path(sys.argv[1])
packed_tensors(Packing(path, "bfloat16"), ModelConfig.from_directory(path), stall)
""",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FD_MODEL_CACHE", str(tmp_path / "models"))
    return tmp_path / "models" / "packed"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = config_json()
    write_checkpoint(tmp_path / "tiny-model", config, draw_tensors(config, seed=5))
    return tmp_path / "tiny-model"


def pack(path: Path, weight_format: str = "bfloat16") -> tuple[dict[str, bytes], list[str]]:
    """Return the packed tensors and the reported stages."""
    stages: list[str] = []
    found = packed_tensors(
        Packing(path, weight_format),
        ModelConfig.from_directory(path),
        lambda fraction, stage: stages.append(stage),
    )
    return {name: tensor.data.tobytes() for name, tensor in found.items()}, stages


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture
def stalled(cache: Path, checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """A packer in the middle of its work."""
    process = subprocess.Popen([*STALLS, str(checkpoint)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("packing ")
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_checkpoint_is_packed_once_and_found_afterwards(cache: Path, checkpoint: Path) -> None:
    made, stages = pack(checkpoint)
    assert stages[-1] == f"packing {len(stages)} of {len(stages)}"
    found, stages = pack(checkpoint)
    assert stages == []
    assert found == made


def test_the_file_is_safetensors_with_every_tensor_at_a_page(cache: Path, checkpoint: Path) -> None:
    made, _ = pack(checkpoint)
    file = Packing(checkpoint, "bfloat16").file
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [file.name]
    assert re.fullmatch(r"tiny-model-[0-9a-f]{12}\.bfloat16\.safetensors", file.name)
    with safe_open(file, "np") as opened:
        assert set(opened.keys()) == set(made)
        assert opened.get_tensor("layers.0.qkv").tobytes() == made["layers.0.qkv"]
        assert opened.metadata()["checkpoint"] == str(checkpoint)
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    places = [
        entry["data_offsets"][0] for name, entry in header.items() if not name.startswith(("_", "gap."))
    ]
    assert [place for place in places if (start + place) % 4096] == []


def test_formats_and_orders_are_files_of_their_own(cache: Path, checkpoint: Path) -> None:
    for weight_format in ("bfloat16", "wint4"):
        pack(checkpoint, weight_format)
    packed_tensors(
        Packing(checkpoint, "bfloat16", "grouped"),
        ModelConfig.from_directory(checkpoint),
        lambda fraction, stage: None,
    )
    assert len(list(cache.glob("*.safetensors"))) == 3


def test_the_version_follows_the_layout_of_matrices() -> None:
    assert weight_cache.VERSION.split(".")[0] == str(LAYOUT_VERSION)


def test_four_concurrent_processes_pack_once(cache: Path, checkpoint: Path) -> None:
    packers = [
        subprocess.Popen(
            [*COMMAND, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    told = [packer.communicate(timeout=120) for packer in packers]
    assert [packer.returncode for packer in packers] == [0] * 4
    assert {out.strip() for out, _ in told} == {str(Packing(checkpoint, "bfloat16").file)}
    assert sum("there is no packed file yet" in error for _, error in told) == 1


def test_waiting_process_names_the_one_that_packs(
    cache: Path, checkpoint: Path, stalled: subprocess.Popen[str]
) -> None:
    class Enough(Exception):
        pass

    seen: list[tuple[float, str]] = []

    def report(fraction: float, stage: str) -> None:
        seen.append((fraction, stage))
        raise Enough

    with pytest.raises(Enough):
        packed_tensors(Packing(checkpoint, "bfloat16"), ModelConfig.from_directory(checkpoint), report)
    (fraction, stage) = seen[0]
    assert 0.4 < fraction < 1
    assert re.fullmatch(rf"waiting for process {stalled.pid}, which is packing \d+ of \d+", stage)


def test_next_process_packs_after_a_packer_was_killed(
    cache: Path, checkpoint: Path, stalled: subprocess.Popen[str]
) -> None:
    waiting = subprocess.Popen([*COMMAND, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    (leftover,) = cache.glob(".*.partial")
    stalled.send_signal(signal.SIGKILL)
    stalled.wait()
    _, error = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, error
    assert not leftover.exists()
    assert run(checkpoint, "--verify").returncode == 0


def test_a_packer_that_is_terminated_says_nothing(cache: Path, checkpoint: Path) -> None:
    """Paddle's own handler would print a stack trace of C++."""
    command = [*STALLS, str(checkpoint)]
    packer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert packer.stdout is not None
    assert packer.stdout.readline().startswith("packing ")
    packer.terminate()
    assert packer.communicate(timeout=60) == ("", "")
    assert packer.returncode == -signal.SIGTERM


def test_an_end_in_the_middle_leaves_nothing_behind(cache: Path, checkpoint: Path) -> None:
    """A worker that is stopped while it loads ends this way."""

    def report(fraction: float, stage: str) -> None:
        if fraction > 0.5:
            raise SystemExit(0)

    with pytest.raises(SystemExit):
        packed_tensors(Packing(checkpoint, "bfloat16"), ModelConfig.from_directory(checkpoint), report)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def _exchange_norms(raw: bytes) -> bytes:
    """Return the file with two tensors of the same size under each other's name."""
    names = b'"layers.0.input_norm"', b'"layers.1.input_norm"'
    assert all(raw.count(name) == 1 for name in names)
    return raw.replace(names[0], b"?").replace(names[1], names[0]).replace(b"?", names[1], 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[: len(raw) // 2], "damaged: .* truncated"),
        (lambda raw: raw[:-4096], "damaged: .* truncated"),
        (lambda raw: raw + bytes(9), "damaged: .* bytes of tensors where the header lists"),
        (lambda raw: b"", "damaged: .* cannot be mapped"),
        (lambda raw: raw[:300], "damaged: .* truncated"),
        (lambda raw: raw[:8] + b"?" + raw[9:], "damaged: .* header is damaged"),
        (lambda raw: raw.replace(b'"sha256"', b'"sha257"'), "damaged: "),
        (
            lambda raw: raw.replace(b'"final_norm"', b'"finel_norm"'),
            "damaged: .*: the SHA-256 of the header",
        ),
        (
            lambda raw: raw.replace(b'"F32"', b'"F16"', 1),
            "do not hold F16|the SHA-256 of the header",
        ),
        (_exchange_norms, "damaged: .*: the SHA-256 of the header"),
        (lambda raw: raw.replace(b'"header_sha256":"', b'"header_sha256":"0', 1), "damaged: "),
        (
            lambda raw: raw.replace(f'"version":"{weight_cache.VERSION}"'.encode(), b'"version":"0.1"'),
            f"layout 0.1, the current one is {weight_cache.VERSION}",
        ),
    ],
)
def test_a_damaged_or_outdated_file_is_packed_again_and_the_log_says_why(
    cache: Path, checkpoint: Path, damage: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = pack(checkpoint)
    file = Packing(checkpoint, "bfloat16").file
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level("INFO"):
        again, stages = pack(checkpoint)
    assert stages
    assert again == made
    assert re.search(reason, caplog.messages[-1])
    assert len(caplog.messages) == 1


def touch(checkpoint: Path) -> None:
    os.utime(checkpoint / "model.safetensors", (1, 1))


def reword(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))


def replace(checkpoint: Path) -> None:
    write_checkpoint(checkpoint, config_json(), draw_tensors(config_json(), seed=6), dtype="BF16")


@pytest.mark.parametrize("change", [touch, reword, replace])
def test_packed_file_of_a_changed_checkpoint_replaces_the_old_one(
    cache: Path, checkpoint: Path, change: Callable[[Path], None]
) -> None:
    made, _ = pack(checkpoint)
    change(checkpoint)
    again, stages = pack(checkpoint)
    assert stages
    assert (again != made) == (change is replace)
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_processes_keep_the_old_file_mapped(cache: Path, checkpoint: Path) -> None:
    """A replica keeps its weights until it is restarted."""
    config = ModelConfig.from_directory(checkpoint)
    mapped = packed_tensors(Packing(checkpoint, "bfloat16"), config, lambda fraction, stage: None)
    before = {name: tensor.data.tobytes() for name, tensor in mapped.items()}
    replace(checkpoint)
    pack(checkpoint)
    assert {name: tensor.data.tobytes() for name, tensor in mapped.items()} == before


def test_a_checkpoint_that_changes_while_it_is_packed_is_not_kept(cache: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="was changed while it was packed"):
        packed_tensors(
            Packing(checkpoint, "bfloat16"),
            ModelConfig.from_directory(checkpoint),
            lambda fraction, stage: touch(checkpoint),
        )
    assert list(cache.glob("*.safetensors")) == []


def test_verify_finds_one_wrong_bit_and_packs_again(cache: Path, checkpoint: Path) -> None:
    made, _ = pack(checkpoint)
    assert run(checkpoint, "--verify").stderr.strip() == ""
    file = Packing(checkpoint, "bfloat16").file
    raw = bytearray(file.read_bytes())
    raw[-5000] ^= 4
    file.write_bytes(raw)
    assert pack(checkpoint)[1] == [], "opening reads the header only"
    done = run(checkpoint, "--verify")
    assert done.returncode == 0
    assert "damaged: SHA-256 is" in done.stderr
    assert pack(checkpoint)[0] == made


def test_a_cache_that_cannot_be_written_is_one_line_with_the_way_out(cache: Path, checkpoint: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    # Root may write everywhere, unless it drops this capability.
    humble = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*humble, *COMMAND, str(checkpoint)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    for word in (str(cache), "Permission denied", "FD_MODEL_CACHE", str(checkpoint)):
        assert word in line


def test_reading_a_packed_file_needs_no_write_permission(cache: Path, checkpoint: Path) -> None:
    pack(checkpoint)
    cache.chmod(0o555)
    (cache / f".{Packing(checkpoint, 'bfloat16').file.name}.lock").chmod(0o444)
    humble = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*humble, *COMMAND, str(checkpoint)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_a_cache_is_made_as_soon_as_its_disk_allows_it(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(tmp_path / "disk", size="64m")
    monkeypatch.setenv("FD_MODEL_CACHE", str(tmp_path / "disk" / "models"))
    command = [*disk.prefix, *COMMAND, str(checkpoint)]

    def ask() -> tuple[int, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stderr.strip()

    disk.make_read_only()
    status, line = ask()
    assert (status, line.count("\n"), "(Read-only file system); make room there" in line) == (1, 0, True)
    disk.make_writable()
    disk.fill()
    status, text = ask()
    line = text.splitlines()[-1]
    assert (status, "(No space left on device); make room there" in line) == (1, True)
    assert "Traceback" not in text
    disk.make_room()
    assert ask()[0] == 0
    shutil.rmtree(disk.path / "models")
    assert ask()[0] == 0
    disk.fill()
    disk.make_read_only()
    assert ask() == (0, ""), "a packed file needs no disk that can be written"
    disk.close()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(cache: Path, checkpoint: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(checkpoint, preexec_fn=small_files)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    for word in (str(cache), "File too large", "make room there", "FD_MODEL_CACHE"):
        assert word in line
    assert "Traceback" not in done.stderr
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "'nowhere' is not a directory"),
        (["{checkpoint}", "--dtype", "float16"], "--dtype is 'float16'; it must be 'bfloat16' or 'float32'"),
        (
            ["{checkpoint}", "--quantization", "int3"],
            "--quantization is 'int3'; it must be 'wint8' or 'wint4'",
        ),
        (["{checkpoint}", "--quantization", "wint4", "--dtype", "float32"], "contradicts"),
        (["{checkpoint}", "--format", "wint4"], "--format"),
    ],
)
def test_wrong_command_line_is_a_one_line_error(
    cache: Path, checkpoint: Path, words: list[str], complaint: str
) -> None:
    done = run(*(word.format(checkpoint=checkpoint) for word in words))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert complaint in line


def test_finding_a_packed_file_imports_nothing_heavy(cache: Path, checkpoint: Path) -> None:
    """`make serve` does so at each start, and must not be slow."""
    pack(checkpoint)
    code = (
        "import sys; from fastdeploy import weight_cache; status = weight_cache.main();"
        "print(status, *{'paddle', 'fastdeploy.custom_ops'} & set(sys.modules))"
    )
    told = subprocess.check_output([sys.executable, "-c", code, str(checkpoint)], text=True)
    assert told.splitlines()[-1] == "0"
