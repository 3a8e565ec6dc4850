"""Weights from a checkpoint directory: Hugging Face and Paddle layouts -> `Weights`.

Float32 tensors stay where they are: they are mapped, not copied, and the replicas of a machine share their
pages. Matrices are never transposed; a `Projection` says which way round it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import paddle

from .config import ModelConfig
from .custom_ops import MLPWeights, Projection
from .errors import CheckpointError
from .layers.moe import MoEWeights
from .models.ernie45 import LayerWeights, Weights
from .stored_tensors import StoredTensor, open_directory


def load_weights(
    path: Path,
    config: ModelConfig,
    *,
    qkv_order: str = "plain",
    progress: Callable[[float, str], None],
) -> Weights:
    """Loads what `config` asks for to the current device; other tensors (multi-token prediction) are ignored.

    Args:
        qkv_order: inside a fused qkv tensor, "plain" (all q, all k, all v) or "grouped" (per kv head: its
            queries, its key, its value). Nothing in a file tells.
        progress: called with the fraction that is done and a word on what was.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or type, or a file is damaged.
    """
    return _Loader(path, config, qkv_order).load(progress)


class _Loader:
    def __init__(self, path: Path, config: ModelConfig, qkv_order: str) -> None:
        self.path = path
        self.config = config
        self.qkv_order = qkv_order
        self.stored = open_directory(path)
        self.prefix = "ernie" if "ernie.embed_tokens.weight" in self.stored else "model"
        self.out_in = self._is_out_in()

    def load(self, progress: Callable[[float, str], None]) -> Weights:
        config = self.config
        embedding = self._tensor(f"{self.prefix}.embed_tokens.weight", config.vocab_size, config.hidden_size)
        # Only Hugging Face's mixture of experts has this bias, and only under use_bias.
        bias = config.use_bias and "lm_head.bias" in self.stored
        if not config.tie_word_embeddings:
            lm_head = self._projection("", ["lm_head"], config.hidden_size, [config.vocab_size], bias=bias)
        else:
            lm_bias = self._tensor("lm_head.bias", config.vocab_size) if bias else None
            lm_head = Projection((embedding,), out_in=True, bias=lm_bias)
        layers = []
        for index in range(config.num_hidden_layers):
            layers.append(self._layer(index))
            done = index + 1
            progress(done / config.num_hidden_layers, f"layer {done} of {config.num_hidden_layers}")
        return Weights(
            embedding=embedding,
            layers=tuple(layers),
            final_norm=self._tensor(f"{self.prefix}.norm.weight", config.hidden_size),
            lm_head=lm_head,
        )

    def _layer(self, index: int) -> LayerWeights:
        config = self.config
        name = f"{self.prefix}.layers.{index}."
        queries = config.num_attention_heads * config.head_dim
        return LayerWeights(
            input_norm=self._tensor(f"{name}input_layernorm.weight", config.hidden_size),
            qkv=self._qkv(f"{name}self_attn."),
            attention_output=self._projection(
                f"{name}self_attn.", ["o_proj"], queries, [config.hidden_size], bias=config.use_bias
            ),
            post_attention_norm=self._tensor(f"{name}post_attention_layernorm.weight", config.hidden_size),
            mlp=(
                self._moe(f"{name}mlp.")
                if config.is_moe_layer(index)
                else self._mlp(f"{name}mlp.", config.intermediate_size, bias=config.use_bias)
            ),
        )

    def _qkv(self, name: str) -> Projection:
        config = self.config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if f"{name}qkv_proj.weight" not in self.stored:
            return self._projection(
                name, ["q_proj", "k_proj", "v_proj"], config.hidden_size, [q, kv, kv], bias=config.use_bias
            )
        order = None
        if self.qkv_order == "grouped" and config.num_key_value_heads > 1:
            group = config.num_attention_heads // config.num_key_value_heads
            columns = np.arange(q + 2 * kv).reshape(config.num_key_value_heads, group + 2, config.head_dim)
            parts = (columns[:, :group], columns[:, group], columns[:, group + 1])
            order = np.concatenate([part.reshape(-1) for part in parts])
        return self._projection(
            name, ["qkv_proj"], config.hidden_size, [q + 2 * kv], bias=config.use_bias, order=order
        )

    def _mlp(self, name: str, width: int, *, bias: bool) -> MLPWeights:
        hidden = self.config.hidden_size
        if f"{name}up_gate_proj.weight" in self.stored:
            # The gate half comes first, in spite of the name.
            gate_up = self._projection(name, ["up_gate_proj"], hidden, [2 * width], bias=bias)
        else:
            gate_up = self._projection(name, ["gate_proj", "up_proj"], hidden, [width, width], bias=bias)
        return MLPWeights(gate_up, self._projection(name, ["down_proj"], width, [hidden], bias=bias))

    def _moe(self, name: str) -> MoEWeights:
        config = self.config
        width, shared = config.moe_intermediate_size, config.moe_num_shared_experts
        bias = f"{name}moe_statics.e_score_correction_bias"
        return MoEWeights(
            router=self._projection(name, ["gate"], config.hidden_size, [config.moe_num_experts], bias=False),
            # Trained without balancing by bias: no tensor, no bias.
            correction_bias=(
                self._tensor(bias, 1, config.moe_num_experts).flatten()
                if bias in self.stored
                else paddle.zeros([config.moe_num_experts])
            ),
            experts=tuple(
                self._mlp(f"{name}experts.{expert}.", width, bias=False)
                for expert in range(config.moe_num_experts)
            ),
            shared=(
                self._mlp(f"{name}shared_experts.", width * shared, bias=config.use_bias) if shared else None
            ),
        )

    def _projection(
        self,
        prefix: str,
        names: Sequence[str],
        inputs: int,
        outputs: Sequence[int],
        *,
        bias: bool,
        order: np.ndarray | None = None,
    ) -> Projection:
        """Matrices `names`, which act on the same input; `order` rearranges the outputs."""
        stored = [
            self._stored(f"{prefix}{name}.weight", (size, inputs) if self.out_in else (inputs, size))
            for name, size in zip(names, outputs, strict=True)
        ]
        axis = 0 if self.out_in else 1
        arrays = [tensor.float32() for tensor in stored]
        if order is not None:
            arrays = [np.take(array, order, axis=axis) for array in arrays]
        elif not all(tensor.is_mappable for tensor in stored):
            # Converted values are ours already; joined, they cost one product in place of several.
            arrays = [np.concatenate(arrays, axis=axis)] if len(arrays) > 1 else arrays
        biases = None
        if bias:
            values = [
                self._stored(f"{prefix}{name}.bias", (size,)).float32()
                for name, size in zip(names, outputs, strict=True)
            ]
            joined = np.concatenate(values)
            biases = _place(joined if order is None else joined[order])
        return Projection(tuple(_place(array) for array in arrays), self.out_in, biases)

    def _tensor(self, name: str, *shape: int) -> paddle.Tensor:
        return _place(self._stored(name, shape).float32())

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self.stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; expected shape {list(shape)}")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; expected {list(shape)} "
                "from config.json"
            )
        return tensor

    def _is_out_in(self) -> bool:
        """Whether matrices are [out, in] (Hugging Face) or [in, out] (Paddle).

        Shapes tell, where a matrix is not square. config.json does not: newer checkpoints of either kind
        carry the same keys.
        """
        config = self.config
        hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        queries = config.num_attention_heads * config.head_dim
        shapes = {
            "self_attn.qkv_proj.weight": (queries + 2 * kv, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.down_proj.weight": (hidden, config.intermediate_size),
            "mlp.gate.weight": (config.moe_num_experts, hidden),
            "mlp.experts.0.down_proj.weight": (hidden, config.moe_intermediate_size),
        }
        for index in range(config.num_hidden_layers):
            for name, shape in shapes.items():
                tensor = self.stored.get(f"{self.prefix}.layers.{index}.{name}")
                if tensor is not None and shape[0] != shape[1] and tensor.shape in (shape, shape[::-1]):
                    return tensor.shape == shape
        fused = any(".qkv_proj." in name or ".up_gate_proj." in name for name in self.stored)
        return self.prefix == "model" and not fused


def _place(array: np.ndarray) -> paddle.Tensor:
    """To the current device; on a CPU the tensor is the array, and keeps what it maps alive."""
    if paddle.device.get_device() == "cpu":
        return paddle.utils.dlpack.from_dlpack(array)
    return paddle.to_tensor(array)
