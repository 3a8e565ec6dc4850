"""Models and options that the kernels behind the C interface do not support. Pure."""

from __future__ import annotations

from ..config import EngineConfig, ModelConfig

_BLOCK_SIZE = 64
_HEAD_DIMS = (64, 128)
_MAX_GROUP_HEADS = 16
_MAX_EXPERTS = 256
_MAX_PICKS = 16
_MAX_SEQUENCES = 1024
_MAX_WIDTH = 16384


def unsupported(config: EngineConfig, model: ModelConfig) -> str | None:
    """Return why GPUs cannot serve this model with this configuration, or None."""
    return _unsupported_option(config, model) or _unsupported_model(model)


def unsupported_on_cpu(config: EngineConfig, model: ModelConfig) -> str | None:
    """Return why libfd_cpu.so cannot serve this model with this configuration, or None."""
    if config.quantization is not None:
        return f"--quantization {config.quantization} is computed through Paddle only"
    if config.enable_expert_parallel and model.num_moe_layers:
        return "--enable-expert-parallel is computed through Paddle only"
    return None


def _unsupported_option(config: EngineConfig, model: ModelConfig) -> str | None:
    if config.weight_format != "bfloat16":
        name = "quantization" if config.quantization else "dtype"
        return f"--{name} {config.weight_format} is computed on CPUs only; GPUs compute in bfloat16"
    if config.enable_expert_parallel and model.num_moe_layers:
        return "--enable-expert-parallel works on CPUs only; on a GPU each replica holds all experts"
    if config.block_size != _BLOCK_SIZE:
        return f"--block-size is {config.block_size}; on GPUs it must be {_BLOCK_SIZE}"
    if config.max_num_seqs > _MAX_SEQUENCES:
        return f"--max-num-seqs is {config.max_num_seqs}; on GPUs it can be {_MAX_SEQUENCES} at most"
    return None


def _unsupported_model(model: ModelConfig) -> str | None:
    if model.head_dim not in _HEAD_DIMS:
        return f"config.json: head_dim is {model.head_dim}; GPUs compute heads of 64 or 128 columns"
    if model.num_attention_heads > _MAX_GROUP_HEADS * model.num_key_value_heads:
        return (
            f"config.json: num_attention_heads is {model.num_attention_heads}; on GPUs it can be "
            f"{_MAX_GROUP_HEADS} for each of the {model.num_key_value_heads} kv heads at most"
        )
    if model.hidden_size > _MAX_WIDTH or model.hidden_size % 4:
        return (
            f"config.json: hidden_size is {model.hidden_size}; on GPUs it must be a multiple of 4, "
            f"{_MAX_WIDTH} at most"
        )
    if model.vocab_size % 2:
        return f"config.json: vocab_size is {model.vocab_size}; on GPUs it must be even"
    has_dense_layer = model.num_moe_layers < model.num_hidden_layers
    if has_dense_layer and model.intermediate_size % 8:
        return f"config.json: intermediate_size is {model.intermediate_size}; on GPUs 8 must divide it"
    if model.num_moe_layers == 0:
        return None
    if model.moe_intermediate_size % 8:
        return (
            f"config.json: moe_intermediate_size is {model.moe_intermediate_size}; on GPUs 8 must divide it"
        )
    if model.moe_num_experts > _MAX_EXPERTS:
        return f"config.json: moe_num_experts is {model.moe_num_experts}; on GPUs at most {_MAX_EXPERTS}"
    if model.moe_k > _MAX_PICKS:
        return f"config.json: moe_k is {model.moe_k}; on GPUs it can be {_MAX_PICKS} at most"
    return None
