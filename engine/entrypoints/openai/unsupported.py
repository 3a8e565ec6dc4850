"""Fields that FastDeploy, vLLM, SGLang or OpenAI know and this server refuses, each with the reason.

A value that is the default there, or would not change the response here, is accepted.
"""

from __future__ import annotations

from typing import Any

from .validation import Refused

_FALSE = (False, 0)
_TRUE = (True, 1)
_ANY_FLAG = (False, True, 0, 1)
_EMPTY: tuple[Any, ...] = ([], {}, "", False, 0)

_CHAT_TOOLS = "tools belong to /v1/chat/completions"
_USE_TOOLS = "tools and tool_choice have taken its place"
_NO_LOGPROBS = "this server has no such log probabilities"
_NO_THINKING = "only /v1/chat/completions separates reasoning from the response"
_NO_PLUGINS = "this server has no custom sampling code"
_NO_LIMIT = "this server does not look for repetitions"
_NO_RETURN = "this server does not return such data"
_TEXT_ONLY = "this server reads and writes text only"
_ONE_TEXT = "this server samples each choice on its own"
_ROUTED = "the router places requests"
_NO_STAGES = "each replica does the whole work for a request"
_CHAT_ONLY = "it belongs to /v1/chat/completions"

#: Fields without effect on a response, which are accepted with any value.
WITHOUT_EFFECT = frozenset(
    {
        # Bookkeeping; the router may use `user`.
        *("user", "store", "metadata", "service_tier", "safety_identifier", "session_id", "trace_context"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        # Hints that only make responses faster, or choose among equal ways to constrain the output.
        *("prediction", "guided_decoding_backend"),
    }
)

#: Of both endpoints.
REQUEST_FIELDS: dict[str, Refused] = {
    # Older names of tools.
    "functions": Refused(_USE_TOOLS, ([],)),
    "function_call": Refused(_USE_TOOLS, ("none", "auto")),
    # Sampling.
    "logits_processors": Refused(_NO_PLUGINS, ([],)),
    "logits_processors_args": Refused(_NO_PLUGINS, ({},)),
    "custom_logit_processor": Refused(_NO_PLUGINS, ([],)),
    "custom_params": Refused(_NO_PLUGINS, ({},)),
    "vllm_xargs": Refused(_NO_PLUGINS, ({},)),
    "watermarking": Refused(_NO_PLUGINS, _FALSE),
    "use_beam_search": Refused(_ONE_TEXT, _FALSE),
    "length_penalty": Refused(_ONE_TEXT, (1,)),
    "early_stopping": Refused(_ONE_TEXT, _FALSE),
    "repetition_detection": Refused(_NO_LIMIT, ({},)),
    "max_repetition_pattern_size": Refused(_NO_LIMIT, (0,)),
    "min_repetition_pattern_size": Refused(_NO_LIMIT, (0,)),
    "repetition_min_count": Refused(_NO_LIMIT, (0,)),
    "stop_regex": Refused("stop takes strings only", ([], "")),
    "no_stop_trim": Refused("include_stop_str_in_output does this", _FALSE),
    # Log probabilities.
    "temp_scaled_logprobs": Refused(_NO_LOGPROBS, _FALSE),
    "top_p_normalized_logprobs": Refused(_NO_LOGPROBS, _FALSE),
    "include_draft_logprobs": Refused(_NO_LOGPROBS, _FALSE),
    "include_logprobs_decode_token": Refused("log probabilities always name their token", _TRUE),
    "logprob_token_ids": Refused(_NO_LOGPROBS, ([],)),
    # Reasoning.
    "reasoning": Refused("reasoning_effort is its name", ({},)),
    "response_max_tokens": Refused("max_tokens limits reasoning and content together"),
    "verbosity": Refused("no model here has such a setting", ("medium",)),
    "task": Refused("no model here has such tasks"),
    # Prompts.
    "input_ids": Refused("prompt_token_ids is their name", ([],)),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "suffix": Refused("this server only continues a prompt", ("",)),
    "spaces_between_special_tokens": Refused("the text has no spaces but those of the model", _ANY_FLAG),
    "modalities": Refused(_TEXT_ONLY, (["text"], [])),
    "audio": Refused(_TEXT_ONLY, ({},)),
    "mm_hashes": Refused(_TEXT_ONLY, ([],)),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, ({},)),
    "media_io_kwargs": Refused(_TEXT_ONLY, ({},)),
    "images_config": Refused(_TEXT_ONLY, ({},)),
    "use_audio_in_video": Refused(_TEXT_ONLY, _FALSE),
    "max_dynamic_patch": Refused(_TEXT_ONLY),
    "min_dynamic_patch": Refused(_TEXT_ONLY),
    "web_search_options": Refused("this server does not search the web"),
    "moderation": Refused("this server does not moderate"),
    # The form of responses.
    "collect_metrics": Refused("/metrics has the measurements", _FALSE),
    "return_hidden_states": Refused(_NO_RETURN, _FALSE),
    "return_routed_experts": Refused(_NO_RETURN, _FALSE),
    "routed_experts_start_len": Refused(_NO_RETURN, (0,)),
    "routed_experts_prompt_start": Refused(_NO_RETURN, (0,)),
    "return_cached_tokens_details": Refused("usage has the number of cached tokens", _FALSE),
    "return_prompt_token_ids": Refused("return_token_ids returns the ids", _FALSE),
    "return_prompt_text": Refused(_NO_RETURN, _FALSE),
    "return_meta_info": Refused(_NO_RETURN, _FALSE),
    # vLLM ignores these two here as well.
    "return_token_offsets": Refused(_NO_RETURN, _ANY_FLAG),
    "return_mm_kwargs": Refused(_NO_RETURN, _ANY_FLAG),
    # Places and caches.
    "rid": Refused("request_id names a request"),
    "priority": Refused("requests are served in the order of arrival", (0,)),
    "extra_key": Refused("cache_salt does this", ([], "")),
    "custom_labels": Refused("metrics have no labels of clients", ({},)),
    "lora_path": Refused("this server has no adapters", ([], "")),
    "session_params": Refused("requests are independent of each other", ({},)),
    "ngram_corpus_id": Refused("this server does not draft tokens"),
    "routed_dp_rank": Refused(_ROUTED),
    "data_parallel_rank": Refused(_ROUTED),
    "disagg_prefill_dp_rank": Refused(_ROUTED),
    "disaggregate_info": Refused(_NO_STAGES, ({},)),
    "kv_transfer_params": Refused(_NO_STAGES, ({},)),
    "ec_transfer_params": Refused(_NO_STAGES, ({},)),
    "bootstrap_host": Refused(_NO_STAGES),
    "bootstrap_port": Refused(_NO_STAGES),
    "bootstrap_room": Refused(_NO_STAGES),
}

CHAT_FIELDS: dict[str, Refused] = REQUEST_FIELDS | {
    "prompt": Refused("it belongs to /v1/completions; this endpoint reads messages", ("", [])),
    "echo": Refused("it belongs to /v1/completions", _FALSE),
    "best_of": Refused("it belongs to /v1/completions", (1,)),
}

COMPLETION_FIELDS: dict[str, Refused] = REQUEST_FIELDS | {
    "messages": Refused("it belongs to /v1/chat/completions; this endpoint reads prompt", ([],)),
    "top_logprobs": Refused("it belongs to /v1/chat/completions; here logprobs is a number", (0, -1)),
    "tools": Refused(_CHAT_TOOLS, ([],)),
    "tool_choice": Refused(_CHAT_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Refused(_CHAT_TOOLS, _ANY_FLAG),
    "reasoning_max_tokens": Refused(_NO_THINKING),
    "thinking_token_budget": Refused(_NO_THINKING, (-1,)),
    "include_reasoning": Refused(_NO_THINKING, _TRUE),
    "separate_reasoning": Refused(_NO_THINKING, _ANY_FLAG),
    "stream_reasoning": Refused(_NO_THINKING, _ANY_FLAG),
    "chat_template": Refused(_CHAT_ONLY),
    "chat_template_kwargs": Refused(_CHAT_ONLY, ({},)),
    "reasoning_effort": Refused(_CHAT_ONLY, ("none",)),
    "completion_token_ids": Refused("append them to the prompt", ([],)),
    "disable_chat_template": Refused("completions have no chat template", _FALSE),
    "continue_final_message": Refused("a completion continues its prompt anyway", _FALSE),
    "documents": Refused(_CHAT_ONLY, ([],)),
    "add_generation_prompt": Refused(_CHAT_ONLY, _ANY_FLAG),
}

#: Of /tokenize.
TOKENIZE_FIELDS: dict[str, Refused] = {
    name: REQUEST_FIELDS[name] for name in ("mm_processor_kwargs", "media_io_kwargs")
}

#: Of a message.
MESSAGE_FIELDS: dict[str, Refused] = {
    "function_call": Refused("tool_calls has taken its place", _EMPTY),
    "audio": Refused(_TEXT_ONLY, _EMPTY),
    "tools": Refused("tools is a field of the request", _EMPTY),
}
