"""Endpoints of FastDeploy, vLLM, SGLang and OpenAI that this system does not serve, each with the reason."""

from __future__ import annotations

_NO_POOLING = "models here generate text; they compute no embeddings, scores or classes"
_NO_MEDIA = "models here read and write text only"
_NO_STORE = "this server keeps no files, batches or responses"
_FIXED_WEIGHTS = "a replica keeps its weights until it ends; fdctl restart loads others"
_BALANCED = "experts are balanced automatically; /metrics has their load"
_USE_CHAT = "use /v1/chat/completions or /v1/completions"

_REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/v1/reward", "/v1/score", "/v1/rerank", "/v2/rerank", "/v1/classify"),
            *(
                "/embeddings",
                "/reward",
                "/score",
                "/rerank",
                "/classify",
                "/pooling",
                "/encode",
                "/v1/pooling",
            ),
        ),
        _NO_POOLING,
    ),
    **dict.fromkeys(
        (
            *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"),
            *("/v1/images/generations", "/v1/images/edits", "/v1/moderations"),
        ),
        _NO_MEDIA,
    ),
    **dict.fromkeys(("/v1/files", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/assistants"), _NO_STORE),
    **dict.fromkeys(
        (
            *("/v1/sleep", "/v1/wakeup", "/sleep", "/wake_up", "/is_sleeping", "/v1/update_weights"),
            *(
                "/update_model_weight",
                "/clear_load_weight",
                "/update_weights_from_disk",
                "/v1/load_lora_adapter",
            ),
        ),
        _FIXED_WEIGHTS,
    ),
    **dict.fromkeys(
        ("/v1/pause", "/v1/resume", "/v1/is_paused"),
        "fdctl drain and fdctl undrain take a replica out of service and back",
    ),
    **dict.fromkeys(("/rearrange_experts", "/get_per_expert_tokens_stats", "/check_redundant"), _BALANCED),
    **dict.fromkeys(
        ("/controller/scheduler", "/controller/reset_scheduler"),
        "a replica's scheduler has no remote control",
    ),
    **dict.fromkeys(("/generate", "/v1/messages", "/invocations"), _USE_CHAT),
    "/flush_cache": "the prefix cache frees its blocks by itself",
}


def reason_of(path: str) -> str | None:
    """Return why a known endpoint is not served; None for a path that no server knows."""
    return _REASONS.get(path.rstrip("/"))
