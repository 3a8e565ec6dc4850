"""Hardware limits, measured by limits.cc, and the minimum work of a step."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fastdeploy.config import ModelConfig

from .rows import CACHE, CORES

#: Bytes per weight in a packed matrix. wint4 includes a bfloat16 scale and minimum per 32 weights.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "wint8": 1.0, "wint4": 0.5 + 4 / 32}

_SOURCE = Path(__file__).with_name("limits.cc")
#: Larger than CPU caches; about the size of the weights of the benchmark's model.
_MEGABYTES = 512


@dataclass(frozen=True, slots=True)
class Machine:
    #: All cores together.
    read_bytes_per_second: float
    fma_flops_per_second: float

    @classmethod
    def measure(cls, threads: int = CORES) -> Machine:
        found = subprocess.run([_probe(), str(threads), str(_MEGABYTES)], capture_output=True, check=True)
        return cls(**json.loads(found.stdout))

    def better(self, other: Machine) -> Machine:
        """Return the higher of two measurements, because noise only reduces them."""
        return Machine(
            max(self.read_bytes_per_second, other.read_bytes_per_second),
            max(self.fma_flops_per_second, other.fma_flops_per_second),
        )

    def seconds(self, work: Work) -> float:
        """Return the minimum seconds of `work` if reading and computing overlap fully."""
        return max(work.bytes_read / self.read_bytes_per_second, work.flops / self.fma_flops_per_second)


@dataclass(frozen=True, slots=True)
class Work:
    """Minimum work of one step: bytes to read and operations to compute."""

    bytes_read: float
    flops: float


def decode_work(
    config: ModelConfig, weight_format: str, batch: int, context: float, experts: float | None = None
) -> Work:
    """Return the work of one step in which each of `batch` sequences adds a token to `context` others.

    Args:
        experts: distinct experts per layer; None: expected number for uniform, independent routing.
    """
    if experts is None:
        experts = distinct_experts(config, batch)
    read = _weights(config, experts) + _lm_head(config)
    active = _weights(config, config.moe_k) + _lm_head(config)
    kv_bytes = config.kv_bytes_per_token(4 if weight_format == "float32" else 2)
    return Work(
        read * WEIGHT_BYTES[weight_format] + batch * context * kv_bytes,
        2.0 * batch * active + batch * _attention_flops(config, context),
    )


def prefill_work(config: ModelConfig, weight_format: str, tokens: int) -> Work:
    """Return the work of a single prompt; only its last position needs logits."""
    read = _weights(config, config.moe_num_experts) + _lm_head(config)
    flops = 2.0 * tokens * _weights(config, config.moe_k) + 2.0 * _lm_head(config)
    return Work(
        read * WEIGHT_BYTES[weight_format],
        flops + tokens * _attention_flops(config, (tokens + 1) / 2),
    )


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Return the expected number of distinct experts of `tokens` tokens with uniform, independent routing."""
    if config.moe_num_experts == 0:
        return 0.0
    return config.moe_num_experts * (1 - (1 - config.moe_k / config.moe_num_experts) ** tokens)


def _weights(config: ModelConfig, experts: float) -> float:
    """Return the weights of all layers with `experts` experts each, without embedding and `lm_head`."""
    c = config
    total = 0.0
    for layer in range(c.num_hidden_layers):
        total += c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        if c.is_moe_layer(layer):
            total += 3 * c.hidden_size * c.moe_intermediate_size * (experts + c.moe_num_shared_experts)
            total += c.hidden_size * c.moe_num_experts
        else:
            total += 3 * c.hidden_size * c.intermediate_size
    return total


def _lm_head(config: ModelConfig) -> float:
    return float(config.vocab_size * config.hidden_size)


def _attention_flops(config: ModelConfig, context: float) -> float:
    """Return the operations of one query in all layers: products with keys and with values."""
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context


def _probe() -> Path:
    """Return the compiled limits.cc for the processor of this machine."""
    if shutil.which("g++") is None:
        raise SystemExit("g++ is not installed; the hardware's limits cannot be measured without it")
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line)
    key = hashlib.sha256(_SOURCE.read_bytes() + processor.encode()).hexdigest()[:16]
    binary = CACHE / f"limits-{key}"
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        subprocess.run(["g++", *flags, str(_SOURCE), "-o", str(binary)], check=True)
    return binary
