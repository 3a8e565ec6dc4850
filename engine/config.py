"""Configuration of the engine: the shape of the network and the settings of one replica.

The objects are frozen and validated on construction. An invalid value raises a one-line `ConfigError` that
names the setting, its value and the accepted values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .common.errors import ConfigError
from .common.text_files import JsonObject, read_object, read_optional_object
from .expert_parallel.layout import MAX_RANKS
from .expert_parallel.options import STALL_KILL

_DEVICES = ("auto", "cpu", "gpu")
_DTYPES = ("bfloat16", "float32")
_QUANTIZATIONS = ("wint8", "wint4")
#: Defaults on a GPU that differ from those of `EngineConfig`: it needs larger steps to be well used.
GPU_DEFAULTS = {"max_num_batched_tokens": 4096, "max_prefill_beside_decode": 1024}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of an ERNIE-4.5 network, from `config.json` of a checkpoint."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    use_bias: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    #: 0 means that every layer is dense.
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = 0
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read `config.json` and the end-of-text ids of `generation_config.json`.

        Raises:
            ConfigError: a file is missing or unreadable, or a key is missing or has an invalid value. The
                message names file and key.
        """
        file = path / "config.json"
        raw = read_object(file)
        model_type = raw.text("model_type") or "?"
        architecture = (raw.items("architectures") or [model_type])[0]
        if "ernie4_5" not in model_type and "Ernie4_5" not in str(architecture):
            raise ConfigError(
                f"{file}: architectures is {architecture!r}; this engine runs ERNIE-4.5 text models "
                "(Ernie4_5ForCausalLM, Ernie4_5_MoeForCausalLM)"
            )
        if (activation := raw.text("hidden_act", "silu")) != "silu":
            raise ConfigError(f"{file}: hidden_act is {activation!r}; ERNIE-4.5 uses 'silu'")
        rope = raw.object("rope_parameters" if raw.values.get("rope_parameters") else "rope_scaling")
        if (kind := rope.text("rope_type", "default")) != "default":
            raise ConfigError(f"{file}: rope_type is {kind!r}; only 'default' is implemented")

        integer = raw.integer
        layers = integer("num_hidden_layers", least=1)
        heads = integer("num_attention_heads", least=1)
        hidden = integer("hidden_size", least=1)
        experts = integer("moe_num_experts", "num_experts", default=0)
        end = integer("moe_layer_end_index", default=-1, least=-1)
        config = cls(
            hidden_size=hidden,
            num_hidden_layers=layers,
            vocab_size=integer("vocab_size", least=1),
            num_attention_heads=heads,
            num_key_value_heads=integer("num_key_value_heads", default=heads, least=1),
            head_dim=integer("head_dim", default=hidden // heads, least=1),
            intermediate_size=integer("intermediate_size", least=1),
            rms_norm_eps=raw.number("rms_norm_eps", 1e-5),
            rope_theta=rope.number("rope_theta", raw.number("rope_theta", 500000.0, above=0), above=0),
            tie_word_embeddings=raw.boolean("tie_word_embeddings", True),
            use_bias=raw.boolean("use_bias", False),
            max_position_embeddings=integer("max_position_embeddings", default=131072, least=1),
            eos_token_ids=_eos_token_ids(path, raw),
            bos_token_id=next(iter(raw.integers("bos_token_id")), None),
            moe_num_experts=experts,
            moe_k=integer("moe_k", "num_experts_per_tok", default=0 if experts == 0 else None),
            moe_intermediate_size=integer("moe_intermediate_size", default=0 if experts == 0 else None),
            moe_num_shared_experts=integer("moe_num_shared_experts", default=0 if experts == 0 else 2),
            moe_layer_start_index=integer("moe_layer_start_index", default=1),
            moe_layer_end_index=layers - 1 if end == -1 else end,
            moe_layer_interval=integer("moe_layer_interval", default=1, least=1),
            moe_norm_min=raw.number("moe_norm_min", 1e-12),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"{file}: num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({config.num_key_value_heads})"
            )
        if config.moe_k > config.moe_num_experts:
            raise ConfigError(f"{file}: moe_k ({config.moe_k}) exceeds moe_num_experts ({experts})")
        return config

    def is_moe_layer(self, index: int) -> bool:
        return (
            self.moe_num_experts > 0
            and (index + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= index <= self.moe_layer_end_index
        )

    @property
    def num_moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers)))

    def context_of_double_cost(self) -> float:
        """Return the context length at which attention takes half of the operations of a token."""
        heads = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        width = self.moe_intermediate_size * (self.moe_k + self.moe_num_shared_experts)
        weights = sum(
            2 * heads * self.hidden_size
            + 3 * self.hidden_size * (width if self.is_moe_layer(index) else self.intermediate_size)
            for index in range(self.num_hidden_layers)
        )
        return weights / (2 * self.num_attention_heads * self.head_dim * self.num_hidden_layers)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Return the bytes of the keys and values of one token in all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_element


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one replica's worker."""

    model: Path
    #: "auto": a GPU if there is one that can be used, otherwise the CPU.
    device: str = "auto"
    #: Share of the GPU's memory for all replicas on it.
    gpu_memory_utilization: float = 0.9
    #: Replicas that share this one's GPU; 0: all replicas are dealt over the visible GPUs.
    replicas_per_gpu: int = 0
    #: Threads of the operations; 0: the number of cores divided by `data_parallel_size`.
    threads: int = 0
    #: Pin each thread to its own CPU, if there are enough for all replicas.
    pin_threads: bool = False
    max_model_len: int = 2048
    max_num_seqs: int = 8
    #: Maximum tokens of one step, over all sequences.
    max_num_batched_tokens: int = 512
    #: Maximum prompt tokens of a step while other sequences are decoding; it limits the time between two of
    #: their tokens. Reduced for long contexts, in which each token costs more.
    max_prefill_beside_decode: int = 32
    block_size: int = 64
    #: None: derived from the model and `max_num_seqs`, see `num_blocks`.
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    #: Name of the group of ranks that share the experts; unique per deployment on a machine.
    expert_parallel_group: str = "default"
    #: Extra copies of the most used experts of each layer.
    redundant_experts: int = 0
    #: Rebalance experts by measured load.
    enable_eplb: bool = False
    #: Seconds without progress after which a rank that others wait for is killed.
    expert_parallel_stall_kill: float = STALL_KILL
    #: Layout of a fused Paddle qkv tensor: "plain" (q|k|v) or "grouped" (per kv head: its q heads, k, v).
    qkv_order: str = "plain"
    #: dtype of the KV cache and of weights that are not quantised. Sums are always float32.
    dtype: str = "bfloat16"
    #: "wint8" or "wint4": 8-bit or 4-bit weights.
    quantization: str | None = None
    #: Settings of `GPU_DEFAULTS` that the user has not given.
    defaulted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_prefill_beside_decode",
            "block_size",
            "data_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.device not in _DEVICES:
            raise ConfigError(f"--device is {self.device!r}; it must be {_either(_DEVICES)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization:g}; it must be more than 0 and at "
                "most 1"
            )
        if self.replicas_per_gpu < 0:
            raise ConfigError(
                f"--replicas-per-gpu is {self.replicas_per_gpu}; it must be 0 (deal the visible GPUs) or more"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"--tensor-parallel-size is {self.tensor_parallel_size}; this is not supported; "
                "use 1 and raise --data-parallel-size instead"
            )
        if self.redundant_experts < 0:
            raise ConfigError(f"--redundant-experts is {self.redundant_experts}; it must be 0 or more")
        if self.expert_parallel_stall_kill <= 0:
            raise ConfigError(
                f"--expert-parallel-stall-kill is {self.expert_parallel_stall_kill:g}; it must be more than "
                "0 seconds"
            )
        if self.enable_expert_parallel and self.data_parallel_size > MAX_RANKS:
            raise ConfigError(
                f"--data-parallel-size is {self.data_parallel_size}; an expert-parallel group has "
                f"{MAX_RANKS} ranks at most"
            )
        if self.threads < 0:
            raise ConfigError(f"--threads is {self.threads}; it must be 0 (divide the cores) or more")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ConfigError(
                f"--local-data-parallel-id is {self.data_parallel_rank}; with --data-parallel-size "
                f"{self.data_parallel_size} it must be 0..{self.data_parallel_size - 1}"
            )
        if self.qkv_order not in ("plain", "grouped"):
            raise ConfigError(f"--qkv-order is {self.qkv_order!r}; it must be 'plain' or 'grouped'")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; it must be {_either(_DTYPES)}")
        if self.quantization not in (None, *_QUANTIZATIONS):
            raise ConfigError(
                f"--quantization is {self.quantization!r}; it must be {_either(_QUANTIZATIONS)}, or left out"
            )
        if self.quantization is not None and self.dtype == "float32":
            raise ConfigError(
                f"--dtype float32 contradicts --quantization {self.quantization}; leave one of them out"
            )
        blocks = self.num_gpu_blocks_override
        if blocks is not None and blocks < 1:
            raise ConfigError(f"--num-gpu-blocks-override is {blocks}; it must be at least 1")

    def on_gpu(self) -> EngineConfig:
        """Return the configuration on a GPU: with the defaults of GPUs for settings that were not given."""
        defaults: dict[str, Any] = {name: GPU_DEFAULTS[name] for name in self.defaulted}
        return replace(self, **defaults, defaulted=())

    @property
    def weight_format(self) -> str:
        """Format of the packed matrices: "float32", "bfloat16", "wint8" or "wint4"."""
        return self.quantization or self.dtype

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of cache blocks that this many tokens of a sequence occupy."""
        return math.ceil(num_tokens / self.block_size)

    def num_blocks(self, model: ModelConfig, memory_budget: int = 1 << 30) -> int:
        """Return the number of blocks of the KV cache.

        Unless overridden, it suffices for `max_num_seqs` sequences within `memory_budget` bytes, but always
        for one sequence of `max_model_len`.
        """
        if self.num_gpu_blocks_override is not None:
            return self.num_gpu_blocks_override
        wanted = self.max_num_seqs * self.blocks_for(self.max_model_len)
        element = 4 if self.dtype == "float32" else 2
        affordable = memory_budget // (model.kv_bytes_per_token(element) * self.block_size)
        return max(self.blocks_for(self.max_model_len), min(wanted, affordable))


def _either(values: Iterable[str]) -> str:
    return " or ".join(map(repr, values))


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _eos_token_ids(path: Path, config: JsonObject) -> tuple[int, ...]:
    """Return the ids of both files: chat models list the end-of-turn id only in generation_config.json."""
    sources = [config, read_optional_object(path / "generation_config.json")]
    return tuple(dict.fromkeys(value for source in sources for value in source.integers("eos_token_id")))
