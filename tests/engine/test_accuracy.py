"""The distance of logits from those of the network in float64, with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdeploy import custom_ops
from tests.checkpoints import draw_tensors, write_checkpoint
from tests.network import Network
from tests.random_traffic import draw_config
from tests.reference_network import ReferenceNetwork, as_bfloat16_stores_them, bfloat16, relative_errors

MODELS = 24


def errors(path: Path, weight_format: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors of all models' logits for every token: ours, and those of plain bfloat16."""
    ours, plain = [], []
    for seed in range(MODELS):
        random = np.random.default_rng(seed)
        config = draw_config(random)
        tensors = as_bfloat16_stores_them(draw_tensors(config, seed))
        write_checkpoint(path / str(seed), config, tensors, dtype="BF16")
        network = Network(path / str(seed), weight_format=weight_format)
        prompt = random.integers(0, config["vocab_size"], 40).tolist()
        exact = ReferenceNetwork(config, tensors).logits(prompt)
        ours.append(relative_errors(network.prefill(network.sequence(prompt)), exact))
        plain.append(relative_errors(ReferenceNetwork(config, tensors, bfloat16).logits(prompt), exact))
    return np.concatenate(ours), np.concatenate(plain)


def test_bfloat16_weights_give_better_logits_than_bfloat16_throughout(tmp_path: Path) -> None:
    """Keys, values and operands of AMX are rounded, but no sums and no results between operations.

    The mean includes tokens for which rounding changed the choice of experts.
    """
    ours, plain = errors(tmp_path, "bfloat16")
    assert np.median(ours) < (0.75 if custom_ops.instruction_set() == "amx" else 0.5) * np.median(plain)
    assert ours.mean() < 0.7 * plain.mean()


def test_float32_is_exact_but_for_the_roundings_of_its_sums(tmp_path: Path) -> None:
    ours, _ = errors(tmp_path, "float32")
    assert np.median(ours) < 2e-6
    assert ours.max() < 1e-4
