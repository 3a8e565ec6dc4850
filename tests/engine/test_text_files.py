"""Files that people edit or a checkpoint brings: an error is one line with file and place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.common.text_files import decode, read_object, read_text
from fastdeploy.config import ModelConfig
from fastdeploy.daemon.diagnosis.exit_cause import Cause, Exit, explain
from fastdeploy.entrypoints.openai.protocol import SamplingDefaults
from fastdeploy.tokenizer.tokenizer import Tokenizer

from ..ports import free_ports
from .test_tokenizer import sentencepiece_directory

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny"
BOM = b"\xef\xbb\xbf"
HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}\n{{ m.content }}{% endfor %}"
JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint's files, without its weights."""
    for name in JSON_FILES:
        shutil.copy(TINY / name, tmp_path / name)
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "<unk>"}')
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_directory(tmp_path_factory.mktemp("sentencepiece") / "model")


@pytest.fixture
def sentencepiece_model(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def load(model: Path) -> Tokenizer:
    ModelConfig.from_directory(model)
    SamplingDefaults.from_directory(model)
    return Tokenizer.from_directory(model)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text() or "{}"), **values}))


def assert_is_a_line_about_the_model(message: str, file: Path) -> None:
    assert str(file) in message
    assert "\n" not in message
    # The verdict must not depend on the directory's name.
    told = f"ERROR replica {message.replace(str(file.parent), '/x')}"
    assert explain(Exit("exit status 3", told)).cause is Cause.MODEL


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"a\r\nb\r\ncaf\xe9", r"F: byte 9 \(line 3\) is not UTF-8"),
        (BOM + b"a\ncaf\xe9", r"F: byte 8 \(line 2\) is not UTF-8"),
        ("hello".encode("utf-16"), "F: is UTF-16"),
        ("hello".encode("utf-16-be"), "F: line 1 contains the character NUL"),
        (b"a\nb\0c", "F: line 2 contains the character NUL"),
        (b"\x1f\x8b\x08\x00", r"F: byte 1 \(line 1\) is not UTF-8"),
    ],
)
def test_invalid_utf_8_is_reported_with_its_position(content: bytes, place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{place}"):
        decode(content, "F")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(BOM + b"a\r\nb")
    assert read_text(tmp_path / "f") == "a\r\nb"


def test_a_directory_or_a_missing_file_is_named(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=f"^{file}: cannot be read"):
            read_text(file)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "line 1 column 2"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
        ("[1]", "found a list"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_json_other_than_an_object_is_a_one_line_error(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what) as refused:
        read_object(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*JSON_FILES, "special_tokens_map.json", "chat_template.jinja"])
def test_a_checkpoint_of_a_windows_editor_is_read(model: Path, name: str) -> None:
    before = load(model)
    file = model / name
    file.write_bytes(BOM + file.read_bytes().replace(b"\n", b"\r\n"))
    after = load(model)
    assert after.apply_chat_template(HELLO) == before.apply_chat_template(HELLO)
    assert after.eos_token_ids == before.eos_token_ids


@pytest.mark.parametrize("name", [*JSON_FILES, "special_tokens_map.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", ["caf\u00e9".encode("latin-1"), "{}".encode("utf-16"), b"{}\0"])
def test_a_checkpoints_file_that_is_no_text_is_named(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load(model)
    assert_is_a_line_about_the_model(str(refused.value), model / name)


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"architectures": "Ernie4_5ForCausalLM"}, "architectures"),
    ("config.json", {"architectures": {"a": 1}}, "architectures"),
    ("config.json", {"model_type": 7}, "model_type"),
    ("config.json", {"hidden_act": ["silu"]}, "hidden_act"),
    ("config.json", {"rope_scaling": [1], "rope_parameters": None}, "rope_scaling"),
    ("config.json", {"rope_parameters": {"rope_theta": "10000"}}, r"rope_parameters\.rope_theta"),
    ("config.json", {"rope_parameters": {"rope_type": 1}}, r"rope_parameters\.rope_type"),
    ("config.json", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ("config.json", {"rms_norm_eps": [1e-5]}, "rms_norm_eps"),
    ("config.json", {"rope_parameters": None, "rope_theta": 0}, "rope_theta"),
    ("config.json", {"num_attention_heads": 0}, "num_attention_heads"),
    ("config.json", {"num_key_value_heads": 0}, "num_key_value_heads"),
    ("config.json", {"hidden_size": -1}, "hidden_size"),
    ("config.json", {"vocab_size": 1.5}, "vocab_size"),
    ("config.json", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("config.json", {"moe_layer_interval": 0}, "moe_layer_interval"),
    ("config.json", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("config.json", {"eos_token_id": "2"}, "eos_token_id"),
    ("config.json", {"eos_token_id": [2, None]}, "eos_token_id"),
    ("config.json", {"bos_token_id": {}}, "bos_token_id"),
    ("generation_config.json", {"eos_token_id": {"a": 1}}, "eos_token_id"),
    ("generation_config.json", {"temperature": "warm"}, "temperature"),
    ("tokenizer_config.json", {"eos_token": 2}, "eos_token"),
    ("tokenizer_config.json", {"eos_token": {"lstrip": True}}, "eos_token"),
    ("tokenizer_config.json", {"eos_token": ["</s>"]}, "eos_token"),
    ("special_tokens_map.json", {"bos_token": 1.0}, "bos_token"),
    ("special_tokens_map.json", {"bos_token": "\ud800"}, "surrogate"),
]


@pytest.mark.parametrize(("name", "values", "key"), WRONG_TYPES)
def test_a_value_of_a_wrong_type_is_named(model: Path, name: str, values: dict[str, Any], key: str) -> None:
    change(model / name, **values)
    with pytest.raises(ConfigError, match=key) as refused:
        load(model)
    assert_is_a_line_about_the_model(str(refused.value), model / name)


@pytest.mark.parametrize(
    "template", [7, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}]]
)
def test_a_chat_template_of_a_wrong_type_is_named(model: Path, template: Any) -> None:
    (model / "chat_template.jinja").unlink()
    change(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template") as refused:
        load(model)
    assert_is_a_line_about_the_model(str(refused.value), model / "tokenizer_config.json")


def test_a_chat_template_with_a_syntax_error_is_named(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="cannot be compiled") as refused:
        load(model)
    assert_is_a_line_about_the_model(str(refused.value), model / "chat_template.jinja")


@pytest.mark.parametrize("ids", [{"a": "1"}, {"a": -1}, {"a": 1 << 40}, {"a": [1]}])
def test_added_tokens_have_ids_of_tokens(sentencepiece_model: Path, ids: dict[str, Any]) -> None:
    (sentencepiece_model / "added_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(ConfigError, match=r"added_tokens\.json: a is") as refused:
        Tokenizer.from_directory(sentencepiece_model)
    assert_is_a_line_about_the_model(str(refused.value), sentencepiece_model / "added_tokens.json")


@pytest.mark.parametrize(
    "decoder", [[1], {"x": "a"}, {"-1": "a"}, {"9" * 11: "a"}, {"9" * 5000: "a"}, {"1": 2}]
)
def test_the_decoder_of_added_tokens_has_ids_of_tokens(sentencepiece_model: Path, decoder: Any) -> None:
    (sentencepiece_model / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.from_directory(sentencepiece_model)


def test_a_token_id_beyond_all_models_is_refused(model: Path) -> None:
    """The id would lead to a table with as many entries."""
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["model"]["vocab"]["beyond"] = (1 << 32) - 1
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        load(model)


def test_a_replica_that_cannot_read_its_template_ends_with_one_line(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"{% for m in messages %}caf\xe9{% endfor %}")
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", "--model", str(model)]
    port = free_ports(1)[0]
    run = subprocess.run(
        [*command, "--port", str(port)],
        cwd=model,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "FD_LOG_DIR": str(model)},
    )
    assert run.returncode == 3, run.stderr
    assert f"{model / 'chat_template.jinja'}: byte 26 (line 1) is not UTF-8" in run.stderr
    assert "Traceback" not in run.stderr
