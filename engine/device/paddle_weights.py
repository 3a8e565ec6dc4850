"""Loads the weights of a checkpoint from the packed file that all replicas of the machine map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle

from ..config import ModelConfig
from ..models.ernie45 import LayerWeights, MLPWeights, MoEWeights, Weights
from ..weights.stored_tensors import StoredTensor
from ..weights.weight_cache import Packing, packed_tensors

#: Stored dtype -> NumPy dtype. NumPy has no bfloat16; int16, because Paddle does not accept uint16.
_DTYPES = {"U8": np.uint8, "BF16": np.int16, "F32": np.float32}


def load_weights(
    path: Path,
    config: ModelConfig,
    *,
    weight_format: str,
    qkv_order: str = "plain",
    progress: Callable[[float, str], None],
) -> Weights:
    """Map the weights of a checkpoint, after packing them if necessary. Pages are read on first use.

    Args:
        weight_format: "float32", "bfloat16", "wint8" or "wint4".
        qkv_order: layout of a fused qkv tensor: "plain" (all q, all k, all v) or "grouped" (per kv head: its
            queries, its key, its value). Checkpoints do not specify it.
        progress: called with the completed fraction and a description of the current stage.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype, or a file is damaged.
        FastDeployError: the packed weights cannot be written.
    """
    stored = packed_tensors(Packing(path, weight_format, qkv_order), config, progress)
    weights = _Network(stored, config).weights()
    progress(1.0, "weights mapped")
    return weights


class _Network:
    def __init__(self, stored: dict[str, StoredTensor], config: ModelConfig) -> None:
        self.stored = stored
        self.config = config

    def weights(self) -> Weights:
        return Weights(
            embedding=self._tensor("embedding"),
            layers=tuple(self._layer(index) for index in range(self.config.num_hidden_layers)),
            final_norm=self._tensor("final_norm"),
            lm_head=self._tensor("lm_head"),
        )

    def _layer(self, index: int) -> LayerWeights:
        name = f"layers.{index}."
        mlp = self._moe(f"{name}mlp.") if self.config.is_moe_layer(index) else self._mlp(f"{name}mlp.")
        return LayerWeights(
            input_norm=self._tensor(f"{name}input_norm"),
            qkv=self._tensor(f"{name}qkv"),
            attention_output=self._tensor(f"{name}attention_output"),
            post_attention_norm=self._tensor(f"{name}post_attention_norm"),
            mlp=mlp,
        )

    def _moe(self, name: str) -> MoEWeights:
        return MoEWeights(
            router=self._tensor(f"{name}router"),
            correction_bias=self._tensor(f"{name}correction_bias").flatten(),
            experts=self._mlp(f"{name}experts."),
            shared=self._mlp(f"{name}shared.") if self.config.moe_num_shared_experts else None,
        )

    def _mlp(self, name: str) -> MLPWeights:
        return MLPWeights(self._tensor(f"{name}gate_up"), self._tensor(f"{name}down"))

    def _tensor(self, name: str) -> paddle.Tensor:
        """Return a tensor that shares the mapped pages and keeps them alive."""
        tensor = self.stored[name]
        values = tensor.data.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
        placed = paddle.utils.dlpack.from_dlpack(values)
        return placed.view(paddle.bfloat16) if tensor.dtype == "BF16" else placed
