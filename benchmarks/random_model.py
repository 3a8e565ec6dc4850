"""The model of the engine benchmarks: a random ERNIE-4.5 MoE with 250M parameters, 109M active per token."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoints import config_json, draw_tensors, write_checkpoint

from .rows import CACHE

#: The first layer is dense, as in the released ERNIE-4.5 models.
SHAPE = config_json(
    hidden_size=768,
    num_hidden_layers=12,
    vocab_size=32000,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=3072,
    moe_num_experts=16,
    moe_k=4,
    moe_intermediate_size=384,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    tie_word_embeddings=False,
    max_position_embeddings=16384,
)
#: A minimal model to test the scripts.
TINY = config_json(vocab_size=512, max_position_embeddings=16384)
SEED = 250


def random_model(*, tiny: bool = False) -> Path:
    """Return the checkpoint directory (bfloat16, Hugging Face names), generated on first use."""
    path = CACHE / ("random-tiny" if tiny else "random-250m")
    if not path.exists():
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shape = TINY if tiny else SHAPE
        write_checkpoint(part, shape, draw_tensors(shape, SEED), dtype="BF16")
        # Last, so that an existing directory is complete.
        part.rename(path)
    return path
