"""The working memory of a step on a GPU: which buffers, how large, where. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import EngineConfig, ModelConfig
from .capacities import prompt_capacities, row_capacities
from .tiles import activation_bytes, aligned

#: Prompt positions of a step whose logits are kept, see the scheduler.
_MAX_SCORED = 256
#: 1 + the number of most likely tokens that a request may ask for.
DRAW_WIDTH = 21
#: Tokens with counts, over all sequences of a step, that penalties may refer to.
_MAX_TOKEN_COUNTS = 2 << 20
#: Stop tokens, biases and bad words of a request.
_MAX_LISTED = 2304
SAMPLING_ROW_BYTES = 96
_SEGMENT = 512
_INT, _FLOAT, _HALF, _DOUBLE = 4, 4, 2, 8


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Upper bounds of a step."""

    sequences: int
    tokens: int
    #: Rows of logits.
    rows: int
    #: Columns of the block tables.
    table_width: int
    #: Pairs of token and count, and other entries of that size.
    token_counts: int

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig) -> StepLimits:
        # Penalties, biases and bad words, and the bits of a mask.
        per_sequence = min(config.max_model_len, model.vocab_size) + _MAX_LISTED + -(-model.vocab_size // 64)
        return cls(
            sequences=config.max_num_seqs,
            tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
            rows=config.max_num_seqs + _MAX_SCORED,
            table_width=config.blocks_for(config.max_model_len),
            token_counts=min(config.max_num_seqs * per_sequence, _MAX_TOKEN_COUNTS),
        )

    @property
    def decode_capacities(self) -> list[int]:
        return row_capacities(self.sequences)

    @property
    def prompt_capacities(self) -> list[int]:
        return prompt_capacities(self.tokens)

    @property
    def logits_capacities(self) -> list[int]:
        return row_capacities(self.rows)

    @property
    def step_integers(self) -> int:
        """Return the most integers of custom_ops/include/step.h."""
        sequences = self.sequences
        return 4 + (sequences + 1) + sequences + sequences * self.table_width + self.tokens + self.rows


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Byte offsets of what a step sends to the device. What varies in length comes last."""

    limits: StepLimits

    @property
    def logit_tokens(self) -> int:
        return self.limits.rows * SAMPLING_ROW_BYTES

    @property
    def step(self) -> int:
        return aligned(self.logit_tokens + self.limits.rows * _INT)

    def token_counts(self, step_integers: int) -> int:
        """Return the offset of the token counts behind a step of this length: a multiple of their size."""
        return self.step + -(-step_integers // 2) * 2 * _INT

    @property
    def bytes(self) -> int:
        return self.token_counts(self.limits.step_integers) + self.limits.token_counts * 2 * _INT


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """Byte offsets of what a step sends back."""

    rows: int

    @property
    def top_tokens(self) -> int:
        return aligned(self.rows * _INT)

    @property
    def logprobs(self) -> int:
        return aligned(self.top_tokens + self.rows * DRAW_WIDTH * _INT)

    @property
    def bytes(self) -> int:
        return self.logprobs + self.rows * DRAW_WIDTH * _DOUBLE


@dataclass(frozen=True, slots=True)
class KernelSizes:
    """Sizes that the kernel library computes."""

    #: (segments, kv heads, head_dim) -> bytes
    attention_work: Callable[[int, int, int], int]
    #: (tokens, k, experts) -> rows, with each expert's padding
    expert_rows: Callable[[int, int, int], int]
    #: vocabulary -> bytes of a row
    draw_work: Callable[[int], int]


def work_buffers(
    model: ModelConfig, limits: StepLimits, max_model_len: int, sizes: KernelSizes
) -> dict[str, int]:
    """Return the buffers of a step with their bytes."""
    tokens, hidden, head_dim = limits.tokens, model.hidden_size, model.head_dim
    heads, kv_heads, k = model.num_attention_heads, model.num_key_value_heads, model.moe_k
    segments = limits.sequences * -(-max_model_len // _SEGMENT)
    buffers = {
        "hidden_states": tokens * hidden * _FLOAT,
        "rotary_cos_sin": tokens * head_dim * _FLOAT,
        "slot_mapping": tokens * _INT,
        "normed": activation_bytes(tokens, hidden),
        "qkv": tokens * (heads + 2 * kv_heads) * head_dim * _HALF,
        "attended": activation_bytes(tokens, heads * head_dim),
        "attention_work": sizes.attention_work(segments, kv_heads, head_dim),
        "final": activation_bytes(limits.rows, hidden),
        "logits": limits.rows * model.vocab_size * _FLOAT,
        # Scored rows, which come after the drawn ones, need none.
        "draw_work": limits.sequences * sizes.draw_work(model.vocab_size),
    }
    shared = model.moe_intermediate_size * model.moe_num_shared_experts if model.num_moe_layers else 0
    dense = model.intermediate_size if model.num_moe_layers < model.num_hidden_layers else 0
    if widest := max(shared, dense):
        buffers["activated"] = activation_bytes(tokens, widest)
    if model.num_moe_layers:
        capacities = {*limits.decode_capacities, *limits.prompt_capacities}
        rows = max(sizes.expert_rows(capacity, k, model.moe_num_experts) for capacity in capacities)
        buffers |= {
            "router_logits": tokens * model.moe_num_experts * _FLOAT,
            "expert_counts": model.moe_num_experts * _INT,
            "topk_ids": tokens * k * _INT,
            "topk_weights": tokens * k * _FLOAT,
            "rows_in_expert": tokens * k * _INT,
            "expert_rows": activation_bytes(rows, hidden),
            "expert_activated": activation_bytes(rows, model.moe_intermediate_size),
            "assignments": rows * _INT,
            "expert_results": tokens * k * hidden * _HALF,
            "shared_results": tokens * hidden * _FLOAT,
        }
    return buffers


def offsets(buffers: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return where each buffer begins, and the size of all."""
    places, end = {}, 0
    for name, size in buffers.items():
        places[name] = end
        end += aligned(size)
    return places, end


def cache_blocks(
    config: EngineConfig, block_bytes: int, *, total: int, free: int, own: int, num_replicas: int
) -> int:
    """Return the number of blocks of the KV cache; it may be less than one sequence needs.

    Args:
        total: bytes of the GPU's memory.
        free: of these, what is free now.
        own: what this replica has taken already.
        num_replicas: replicas that share the GPU.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    share = int(total * config.gpu_memory_utilization) // num_replicas - own
    return max(0, min(share, free - _RESERVE)) // block_bytes


#: Left to the driver: graphs, and what it allocates with the first launches.
_RESERVE = 512 << 20
