"""A dense SwiGLU MLP and the experts made of it compute the same function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fastdeploy.demo_model.conversion import (
    MIRROR,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    Array,
    SafetensorsFile,
    experts_of,
)

HIDDEN = 32
NEURONS = 4 * (ROUTED_EXPERTS + SHARED_EXPERTS)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    score = x @ gate.T
    return (score / (1 + np.exp(-score)) * (x @ up.T)) @ down.T


def picks(x: Array, tensors: dict[str, Array]) -> np.ndarray:
    """Return the experts that ERNIE-4.5's router picks: softmax, bias for the choice only, top k."""
    scores = x @ tensors["gate.weight"].T
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    biased = weights + tensors["moe_statics.e_score_correction_bias"]
    return np.argsort(-biased, axis=1, kind="stable")[:, :ROUTED_EXPERTS]


def mixture(x: Array, tensors: dict[str, Array]) -> Array:
    """Compute an ERNIE-4.5 MoE layer token by token."""
    scores = x @ tensors["gate.weight"].T
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    result = swiglu(x, *(tensors[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
    for row, chosen in enumerate(picks(x, tensors)):
        for expert in chosen:
            parts = [tensors[f"experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            result[row] += weights[row, expert] / weights[row, chosen].sum() * swiglu(x[row], *parts)
    return result


@pytest.fixture
def layer() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    shapes = {
        "gate": (NEURONS, HIDDEN),
        "up": (NEURONS, HIDDEN),
        "down": (HIDDEN, NEURONS),
        "norm": (HIDDEN,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def normalised_rows(layer: dict[str, Array]) -> Array:
    x = np.random.default_rng(4).standard_normal((200, HIDDEN)).astype(np.float32)
    return x / np.sqrt((x * x).mean(1, keepdims=True)) * layer["norm"]


def test_experts_compute_what_the_dense_mlp_computes(layer: dict[str, Array]) -> None:
    tensors = dict(experts_of(**layer, rng=np.random.default_rng(0)))
    x = normalised_rows(layer)
    dense = swiglu(x, layer["gate"], layer["up"], layer["down"])
    # Weights are 1/R * (1 + O(MIRROR)), |g . x| a few times MIRROR at most.
    assert np.abs(mixture(x, tensors) - dense).max() < 10 * MIRROR * np.abs(dense).max()


def test_routing_takes_one_copy_of_each_expert_and_depends_on_the_token(layer: dict[str, Array]) -> None:
    chosen = picks(normalised_rows(layer), dict(experts_of(**layer, rng=np.random.default_rng(0))))
    assert all(sorted(row // 2) == list(range(ROUTED_EXPERTS)) for row in chosen)
    used = np.bincount(chosen.ravel(), minlength=2 * ROUTED_EXPERTS) / len(chosen)
    assert ((used > 0.2) & (used < 0.8)).all()


def test_file_is_read_by_the_library_and_is_aligned(tmp_path: Path) -> None:
    tensors = {f"t{size}": np.arange(size * 16, dtype=np.float32).reshape(size, 16) for size in (1, 3, 7)}
    path = tmp_path / "model.safetensors"
    with SafetensorsFile(path) as file:
        for name, value in tensors.items():
            file.add(name, value)
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(tensors)
        for name, value in tensors.items():
            assert (opened.get_tensor(name) == value).all()
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header_length) % 4096 == 0


def test_a_tensor_that_would_break_the_alignment_is_refused(tmp_path: Path) -> None:
    with SafetensorsFile(tmp_path / "x") as file, pytest.raises(AssertionError, match="odd"):
        file.add("odd", np.zeros(3, np.float32))
