"""Fields of requests that other servers know and this one refuses, each with the reason."""

from __future__ import annotations

from typing import Any

from .validation import Refused

_FALSE = (False, 0)
_EMPTY: tuple[Any, ...] = ([], {}, "", False, 0)
_NO_TOOLS = "this server does not parse tool calls"
_NO_GRAMMAR = "this server does not constrain its output"
_NO_LOGPROBS = "this server has no such log probabilities"
_NO_BIAS = "this server does not change single probabilities"
_NO_THINKING = "this server has no limit for a part of the output"
_TEXT_ONLY = "this server reads and writes text only"

#: Of both endpoints.
REQUEST_FIELDS: dict[str, Refused] = {
    "tools": Refused(_NO_TOOLS, ([],)),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
    "functions": Refused(_NO_TOOLS, ([],)),
    "function_call": Refused(_NO_TOOLS, ("none", "auto")),
    "response_format": Refused(_NO_GRAMMAR, ({"type": "text"}, {})),
    "guided_json": Refused(_NO_GRAMMAR),
    "guided_regex": Refused(_NO_GRAMMAR),
    "guided_choice": Refused(_NO_GRAMMAR),
    "guided_grammar": Refused(_NO_GRAMMAR),
    "structural_tag": Refused(_NO_GRAMMAR),
    "logit_bias": Refused(_NO_BIAS, ({},)),
    "bad_words": Refused(_NO_BIAS, ([],)),
    "bad_words_token_ids": Refused(_NO_BIAS, ([],)),
    "logits_processors_args": Refused("this server has no logits processors", ({},)),
    "suffix": Refused("this server only continues a prompt", ("",)),
    "prompt_logprobs": Refused("completions return these with echo and logprobs", (False,)),
    "temp_scaled_logprobs": Refused(_NO_LOGPROBS, _FALSE),
    "top_p_normalized_logprobs": Refused(_NO_LOGPROBS, _FALSE),
    "reasoning_max_tokens": Refused(_NO_THINKING),
    "response_max_tokens": Refused(_NO_THINKING),
    "prompt_token_ids": Refused("completions take token ids as their prompt", ([],)),
    "disable_chat_template": Refused("completions have no chat template", _FALSE),
    "continue_final_message": Refused("each response is a new message", _FALSE),
    "use_beam_search": Refused("this server samples", _FALSE),
    "modalities": Refused(_TEXT_ONLY, (["text"], [])),
    "audio": Refused(_TEXT_ONLY, ({},)),
    "web_search_options": Refused("this server does not search the web"),
}

#: Of a message.
MESSAGE_FIELDS: dict[str, Refused] = {
    "tool_calls": Refused(_NO_TOOLS, _EMPTY),
    "function_call": Refused(_NO_TOOLS, _EMPTY),
    "audio": Refused(_TEXT_ONLY, _EMPTY),
}
