"""Names of the fields that other servers and OpenAI have in the bodies of chat and completion requests."""

from __future__ import annotations

from typing import get_type_hints

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FASTDEPLOY = """
    model frequency_penalty logprobs include_draft_logprobs include_logprobs_decode_token
    prompt_logprobs temp_scaled_logprobs top_p_normalized_logprobs max_tokens n presence_penalty seed
    stop stream stream_options temperature top_p user request_id disaggregate_info top_k min_p
    repetition_penalty stop_token_ids min_tokens include_stop_str_in_output bad_words
    bad_words_token_ids logits_processors_args response_format guided_json guided_regex guided_choice
    guided_grammar max_streaming_response_tokens return_token_ids prompt_token_ids mm_hashes
    trace_context collect_metrics
"""
_FASTDEPLOY_CHAT = """
    messages tools top_logprobs max_completion_tokens metadata chat_template_kwargs chat_template
    reasoning_max_tokens response_max_tokens structural_tag disable_chat_template completion_token_ids
"""
_VLLM = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
    length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
    prompt_logprobs logprob_token_ids bad_words add_special_tokens response_format structured_outputs
    priority request_id session_id return_tokens_as_token_ids return_token_ids
    routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval echo
"""
_VLLM_CHAT = """
    messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
    parallel_tool_calls add_generation_prompt continue_final_message documents chat_template
    chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
"""
_SGLANG = """
    model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
    stop stream stream_options suffix temperature top_p user return_hidden_states return_routed_experts
    routed_experts_start_len return_cached_tokens_details return_token_ids top_k min_p min_tokens
    json_schema regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
    skip_special_tokens lora_path session_id session_params response_format custom_params
    custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
    disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority
    custom_labels
"""
_SGLANG_CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p user tools
    tool_choice parallel_tool_calls return_hidden_states return_routed_experts routed_experts_start_len
    return_cached_tokens_details return_prompt_token_ids return_token_ids return_meta_info reasoning
    reasoning_effort task top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex
    no_stop_trim ignore_eos continue_final_message skip_special_tokens lora_path session_id
    session_params separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch
    min_dynamic_patch use_audio_in_video images_config custom_logit_processor custom_params input_ids
    rid extra_key cache_salt ngram_corpus_id priority bootstrap_host bootstrap_port bootstrap_room
    routed_dp_rank disagg_prefill_dp_rank data_parallel_rank
"""

#: By server: the fields of /v1/chat/completions.
CHAT: dict[str, frozenset[str]] = {
    "FastDeploy": _names(_FASTDEPLOY + _FASTDEPLOY_CHAT),
    "vLLM": _names(_VLLM + _VLLM_CHAT),
    "SGLang": _names(_SGLANG_CHAT),
    "OpenAI": frozenset(get_type_hints(chat_completion_create_params.CompletionCreateParamsStreaming)),
}
#: By server: the fields of /v1/completions.
COMPLETIONS: dict[str, frozenset[str]] = {
    "FastDeploy": _names(_FASTDEPLOY + "prompt best_of echo suffix"),
    "vLLM": _names(_VLLM + "prompt suffix prompt_embeds"),
    "SGLang": _names(_SGLANG),
    "OpenAI": frozenset(get_type_hints(completion_create_params.CompletionCreateParamsStreaming)),
}
