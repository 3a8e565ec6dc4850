"""The limits that measurements are compared with count every weight of a checkpoint."""

import json
from pathlib import Path

import pytest

from benchmarks.limits import WEIGHT_BYTES, Machine, Work, decode_work, distinct_experts, prefill_work
from fastdeploy.config import ModelConfig

from ..checkpoints import config_json, draw_tensors


def model_config(path: Path, **changes: object) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config_json(**changes)))
    return ModelConfig.from_directory(path)


def matrix_sizes(config: dict[str, object]) -> int:
    """Return the number of weights in all multiplied matrices, a tied embedding included."""
    tensors = draw_tensors(config, seed=0)
    skipped = ("correction_bias",) if config["tie_word_embeddings"] else ("correction_bias", "embed_tokens")
    return sum(
        values.size
        for name, values in tensors.items()
        if values.ndim == 2 and not any(part in name for part in skipped)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight_format", WEIGHT_BYTES)
def test_a_step_that_needs_every_expert_reads_every_matrix_once(
    tmp_path: Path, tied: bool, weight_format: str
) -> None:
    changes = {"tie_word_embeddings": tied}
    config = model_config(tmp_path, **changes)
    work = decode_work(config, weight_format, batch=1, context=0, experts=config.moe_num_experts)
    assert work.bytes_read == matrix_sizes(config_json(**changes)) * WEIGHT_BYTES[weight_format]


def test_a_token_computes_with_the_experts_that_it_picks(tmp_path: Path) -> None:
    every, some = model_config(tmp_path, moe_k=6), model_config(tmp_path, moe_k=2)
    moe_layers, expert = 2, 3 * every.hidden_size * every.moe_intermediate_size
    saved = decode_work(every, "float32", 1, 0).flops - decode_work(some, "float32", 1, 0).flops
    assert saved == 2 * moe_layers * 4 * expert


def test_keys_and_values_are_read_for_each_text(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    long, short = (decode_work(config, "bfloat16", 4, context).bytes_read for context in (300, 100))
    assert long - short == 4 * 200 * config.kv_bytes_per_token(2)


def test_only_the_last_token_of_a_prompt_needs_logits(tmp_path: Path) -> None:
    small, large = model_config(tmp_path, vocab_size=100), model_config(tmp_path, vocab_size=200)
    more = prefill_work(large, "float32", 64).flops - prefill_work(small, "float32", 64).flops
    assert more == 2 * 100 * small.hidden_size


def test_a_batch_needs_between_one_tokens_experts_and_all_of_them(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    found = [distinct_experts(config, tokens) for tokens in (1, 2, 8, 1000)]
    assert found[0] == pytest.approx(config.moe_k)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(config.moe_num_experts)


def test_slower_of_reading_and_computing_is_the_limit() -> None:
    machine = Machine(read_bytes_per_second=10, fma_flops_per_second=100)
    assert machine.seconds(Work(bytes_read=20, flops=100)) == 2
    assert machine.seconds(Work(bytes_read=20, flops=300)) == 3
