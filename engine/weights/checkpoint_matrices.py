"""A uniform view of the tensors of ERNIE-4.5 checkpoints.

Hugging Face checkpoints store separate matrices [out, in]; Paddle checkpoints store [in, out], mostly fused,
under other names. This module presents both as float32 [out, in] under one set of names. Matrices are read a
few rows at a time, because the largest one may not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import CheckpointError
from ..config import ModelConfig
from ..custom_ops.packed_matrix import gate_up_order
from .stored_tensors import StoredTensor, open_directory

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Stored matrices with the same input, concatenated along their outputs."""

    parts: tuple[StoredTensor, ...]
    #: True: the parts are [out, in]. False: [in, out].
    out_in: bool
    biases: tuple[StoredTensor, ...] = ()
    #: Row i is row order[i] of the concatenation, or zeros if that is -1. None: the identity.
    order: NDArray[np.int64] | None = None

    @property
    def outputs(self) -> int:
        return sum(self._sizes) if self.order is None else len(self.order)

    @property
    def inputs(self) -> int:
        return self.parts[0].shape[1 if self.out_in else 0]

    def rows(self, start: int, stop: int) -> Floats:
        """Read rows `start` to `stop` from the file."""
        if len(self.parts) == 1 and self.order is None:
            return self._part(self.parts[0], start, stop)
        wanted = np.arange(start, stop) if self.order is None else self.order[start:stop]
        rows = np.zeros((len(wanted), self.inputs), np.float32)
        first = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            mine = (wanted >= first) & (wanted < first + size)
            if mine.any():
                indices = wanted[mine] - first
                lowest = indices.min()
                rows[mine] = self._part(part, lowest, indices.max() + 1)[indices - lowest]
            first += size
        return rows

    def bias(self) -> Floats | None:
        if not self.biases:
            return None
        joined = np.concatenate([bias.float32() for bias in self.biases])
        return joined if self.order is None else np.append(joined, np.float32(0))[self.order]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(part.shape[0 if self.out_in else 1] for part in self.parts)

    def _part(self, part: StoredTensor, start: int, stop: int) -> Floats:
        values = part.float32(start, stop, axis=0 if self.out_in else 1)
        return values if self.out_in else values.T


@dataclass(frozen=True, slots=True)
class MatrixStack:
    """Matrices of one shape, packed into one blob: the experts of a layer, or a single matrix."""

    name: str
    matrices: tuple[Matrix, ...]
    #: Always packed as float32.
    is_exact: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor that is not packed: the embedding, norms, biases of routers."""

    name: str
    shape: tuple[int, ...]
    #: None: zeros.
    stored: StoredTensor | None
    is_exact: bool = True

    def rows(self, start: int, stop: int) -> Floats:
        if self.stored is None:
            return np.zeros((stop - start, *self.shape[1:]), np.float32)
        return self.stored.float32(start, stop)


def read_directory(path: Path, config: ModelConfig, qkv_order: str) -> list[MatrixStack | Table]:
    """Return the tensors that `config` requires; others (multi-token prediction) are ignored.

    Names: ``embedding``, ``final_norm``, ``lm_head``; below ``layers.N.``: ``input_norm``, ``qkv``,
    ``attention_output``, ``post_attention_norm``; below ``layers.N.mlp.``: ``gate_up`` and ``down`` of a
    dense layer, or ``router``, ``correction_bias`` and both matrices below ``experts.`` and ``shared.``.

    Args:
        qkv_order: layout of a fused qkv tensor: "plain" (all q, all k, all v) or "grouped" (per kv head: its
            queries, its key, its value). Checkpoints do not specify it.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape, or a file is damaged.
    """
    return _Reader(path, config, qkv_order).network()


class _Reader:
    def __init__(self, path: Path, config: ModelConfig, qkv_order: str) -> None:
        self.path = path
        self.config = config
        self.qkv_order = qkv_order
        self.stored = open_directory(path)
        self.prefix = "ernie" if "ernie.embed_tokens.weight" in self.stored else "model"
        self.out_in = self._is_out_in()

    def network(self) -> list[MatrixStack | Table]:
        config, hidden = self.config, self.config.hidden_size
        words = self._stored(f"{self.prefix}.embed_tokens.weight", (config.vocab_size, hidden))
        found: list[MatrixStack | Table] = [Table("embedding", words.shape, words, is_exact=False)]
        for index in range(config.num_hidden_layers):
            found += self._layer(
                f"layers.{index}.", f"{self.prefix}.layers.{index}.", config.is_moe_layer(index)
            )
        found.append(self._table("final_norm", f"{self.prefix}.norm.weight", hidden))
        # Only Hugging Face MoE checkpoints with use_bias have this bias.
        bias = config.use_bias and "lm_head.bias" in self.stored
        if not config.tie_word_embeddings:
            head = self._matrix("", ["lm_head"], hidden, [config.vocab_size], bias=bias)
        else:
            biases = (self._stored("lm_head.bias", (config.vocab_size,)),) if bias else ()
            # The embedding is [vocabulary, hidden] in Paddle's layout, too.
            head = Matrix((words,), out_in=True, biases=biases)
        found.append(MatrixStack("lm_head", (head,)))
        return found

    def _layer(self, name: str, prefix: str, is_moe: bool) -> list[MatrixStack | Table]:
        config, hidden = self.config, self.config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        output = self._matrix(f"{prefix}self_attn.", ["o_proj"], queries, [hidden], bias=config.use_bias)
        found: list[MatrixStack | Table] = [
            self._table(f"{name}input_norm", f"{prefix}input_layernorm.weight", hidden),
            MatrixStack(f"{name}qkv", (self._qkv(f"{prefix}self_attn."),)),
            MatrixStack(f"{name}attention_output", (output,)),
            self._table(f"{name}post_attention_norm", f"{prefix}post_attention_layernorm.weight", hidden),
        ]
        if is_moe:
            return found + self._moe(f"{name}mlp.", f"{prefix}mlp.")
        width = config.intermediate_size
        return [*found, *self._mlp(f"{name}mlp.", [f"{prefix}mlp."], width, bias=config.use_bias)]

    def _qkv(self, prefix: str) -> Matrix:
        config = self.config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if f"{prefix}qkv_proj.weight" not in self.stored:
            names = ["q_proj", "k_proj", "v_proj"]
            return self._matrix(prefix, names, config.hidden_size, [q, kv, kv], bias=config.use_bias)
        order = None
        if self.qkv_order == "grouped" and config.num_key_value_heads > 1:
            group = config.num_attention_heads // config.num_key_value_heads
            rows = np.arange(q + 2 * kv).reshape(config.num_key_value_heads, group + 2, config.head_dim)
            parts = (rows[:, :group], rows[:, group], rows[:, group + 1])
            order = np.concatenate([part.reshape(-1) for part in parts])
        return self._matrix(
            prefix, ["qkv_proj"], config.hidden_size, [q + 2 * kv], bias=config.use_bias, order=order
        )

    def _mlp(self, name: str, prefixes: Sequence[str], width: int, *, bias: bool) -> list[MatrixStack]:
        """Return the stacked MLPs at `prefixes`."""
        hidden, order = self.config.hidden_size, _gate_up_order(width)
        gate_up = []
        for prefix in prefixes:
            if f"{prefix}up_gate_proj.weight" in self.stored:
                # Despite its name, the gate half comes first.
                names, sizes = ["up_gate_proj"], [2 * width]
            else:
                names, sizes = ["gate_proj", "up_proj"], [width, width]
            gate_up.append(self._matrix(prefix, names, hidden, sizes, bias=bias, order=order))
        down = [self._matrix(prefix, ["down_proj"], width, [hidden], bias=bias) for prefix in prefixes]
        return [MatrixStack(f"{name}gate_up", tuple(gate_up)), MatrixStack(f"{name}down", tuple(down))]

    def _moe(self, name: str, prefix: str) -> list[MatrixStack | Table]:
        config = self.config
        experts, width = config.moe_num_experts, config.moe_intermediate_size
        router = self._matrix(prefix, ["gate"], config.hidden_size, [experts], bias=False)
        # Absent if the model was trained without load balancing by bias.
        correction = None
        if f"{prefix}moe_statics.e_score_correction_bias" in self.stored:
            correction = self._stored(f"{prefix}moe_statics.e_score_correction_bias", (1, experts))
        found: list[MatrixStack | Table] = [
            MatrixStack(f"{name}router", (router,), is_exact=True),
            Table(f"{name}correction_bias", (1, experts), correction),
        ]
        prefixes = [f"{prefix}experts.{expert}." for expert in range(experts)]
        found += self._mlp(f"{name}experts.", prefixes, width, bias=False)
        if shared := config.moe_num_shared_experts:
            shared_experts = [f"{prefix}shared_experts."]
            found += self._mlp(f"{name}shared.", shared_experts, width * shared, bias=config.use_bias)
        return found

    def _matrix(
        self,
        prefix: str,
        names: Sequence[str],
        inputs: int,
        outputs: Sequence[int],
        *,
        bias: bool,
        order: NDArray[np.int64] | None = None,
    ) -> Matrix:
        parts = [
            self._stored(f"{prefix}{name}.weight", (size, inputs) if self.out_in else (inputs, size))
            for name, size in zip(names, outputs, strict=True)
        ]
        biases: list[StoredTensor] = []
        if bias:
            biases = [
                self._stored(f"{prefix}{name}.bias", (size,))
                for name, size in zip(names, outputs, strict=True)
            ]
        return Matrix(tuple(parts), self.out_in, tuple(biases), order)

    def _table(self, name: str, stored_name: str, *shape: int) -> Table:
        return Table(name, shape, self._stored(stored_name, shape))

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self.stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; expected shape {list(shape)}")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; expected {list(shape)} "
                "from config.json"
            )
        tensor.require_floats()
        return tensor

    def _is_out_in(self) -> bool:
        """Return True if matrices are [out, in] (Hugging Face), False if [in, out] (Paddle).

        The shape of any matrix that is not square decides. config.json does not, because newer checkpoints of
        both kinds have the same keys.
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


@cache
def _gate_up_order(width: int) -> NDArray[np.int64]:
    """Return one shared array for the thousands of experts of a large model."""
    return gate_up_order(width)
