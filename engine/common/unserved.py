"""Endpoints of FastDeploy, vLLM, SGLang and OpenAI that this system does not serve, each with the reason."""

from __future__ import annotations

_NO_POOLING = "models here generate text; embeddings, scores and classes need a server for such models"
_NO_MEDIA = "models here read and write text only"
_NO_FILES = "this server keeps no files or batches; send each request by itself"
_NO_RESPONSES = "this server stores no responses; send their items in the input of the next /v1/responses"
_FIXED_WEIGHTS = "a replica keeps its weights until it ends; fdctl restart loads others"
_BALANCED = "experts are balanced automatically; /metrics has their load"
_USE_CHAT = "use /v1/chat/completions, /v1/completions or /v1/responses"
_SCHEDULED = "a replica's scheduler has no remote control; dp.toml has its settings"
_DRAIN = "fdctl drain and fdctl undrain take a replica out of service and back"

_PATHS: dict[str, tuple[str, ...]] = {
    _NO_POOLING: (
        *("/v1/embeddings", "/v1/reward", "/v1/score", "/v1/rerank", "/v2/rerank", "/v1/classify"),
        *("/v1/pooling", "/embeddings", "/reward", "/score", "/rerank", "/classify", "/pooling", "/encode"),
    ),
    _NO_MEDIA: (
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"),
        *("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/videos"),
        *("/v1/moderations", "/v1/realtime"),
    ),
    _NO_FILES: ("/v1/files", "/v1/uploads", "/v1/batches", "/v1/vector_stores", "/v1/fine_tuning/jobs"),
    _NO_RESPONSES: ("/v1/conversations", "/v1/assistants", "/v1/threads"),
    _FIXED_WEIGHTS: (
        *("/v1/sleep", "/v1/wakeup", "/sleep", "/wake_up", "/is_sleeping", "/v1/update_weights"),
        *("/update_model_weight", "/clear_load_weight", "/update_weights_from_disk"),
        *("/update_weights_from_tensor", "/update_weights_from_distributed", "/release_memory_occupation"),
        *("/resume_memory_occupation", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    ),
    _DRAIN: (
        *("/v1/pause", "/v1/resume", "/v1/is_paused", "/pause", "/resume", "/is_paused"),
        *("/pause_generation", "/continue_generation"),
    ),
    _BALANCED: (
        "/rearrange_experts",
        "/get_per_expert_tokens_stats",
        "/check_redundant",
        "/scale_elastic_ep",
    ),
    _SCHEDULED: ("/controller/scheduler", "/controller/reset_scheduler"),
    _USE_CHAT: (
        "/generate",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/inference/v1/generate",
        "/invocations",
    ),
    "the prefix cache frees its blocks by itself": ("/flush_cache", "/reset_prefix_cache"),
    "use /v1/abort_requests": ("/abort_request", "/abort_requests"),
    "use /tokenize": ("/v1/responses/input_tokens",),
}
_REASONS = {path: reason for reason, paths in _PATHS.items() for path in paths}
#: Endpoints with an id in their path.
_PREFIXES = {f"{path}/": reason for path, reason in _REASONS.items() if reason in (_NO_FILES, _NO_RESPONSES)}
_PREFIXES["/v1/responses/"] = _NO_RESPONSES


def reason_of(path: str) -> str | None:
    """Return why a known endpoint is not served; None for a path that no server knows."""
    path = path.rstrip("/")
    if path in _REASONS:
        return _REASONS[path]
    return next((reason for prefix, reason in _PREFIXES.items() if path.startswith(prefix)), None)
