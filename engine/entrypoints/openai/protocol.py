"""The bodies of /v1/chat/completions and /v1/completions, validated and frozen.

Unknown fields are ignored, because clients send many. A known field that is not implemented is refused if its
value would change the response, which would otherwise be wrong without notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...common.errors import ConfigError, RequestError
from ...common.request import SamplingParams
from ...common.text_files import read_object
from .fields import Fields, without_nulls
from .prompts import MAX_TOKEN, is_token_id, read_messages, read_prompts, read_template_arguments

MAX_CHOICES = 128
MAX_SEQUENCES = 256
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 256

#: Fields that are not implemented -> values that would not change the response.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"}, {}),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "logit_bias": ({},),
    "bad_words": ([],),
    "bad_words_token_ids": ([],),
    "logits_processors_args": ({},),
    "suffix": ("",),
    "prompt_logprobs": (False,),
    "temp_scaled_logprobs": (False,),
    "top_p_normalized_logprobs": (False,),
    "reasoning_max_tokens": (),
    "response_max_tokens": (),
    "prompt_token_ids": ([],),
    "disable_chat_template": (False,),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "modalities": (["text"], []),
    "audio": ({},),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Defaults of sampling parameters: the checkpoint's recommendation, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def from_directory(cls, path: Path) -> SamplingDefaults:
        file = path / "generation_config.json"
        if not file.exists():
            return cls()
        try:
            fields = Fields(read_object(file).values)
            temperature = fields.number("temperature", cls().temperature, 0.0)
            return cls(
                # do_sample=false means greedy, whatever the temperature is.
                temperature=0.0 if fields.get("do_sample") is False else temperature,
                top_p=fields.number("top_p", cls().top_p, 0.0, 1.0),
                top_k=fields.integer("top_k", cls().top_k, 0, MAX_TOKEN) or 0,
                repetition_penalty=fields.number("repetition_penalty", cls().repetition_penalty, 0.01, 10.0),
            )
        except RequestError as error:
            raise ConfigError(f"{file}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Fields of both chat and completion requests."""

    #: Prefix of the response's id.
    id_prefix: ClassVar[str]
    #: Name of the prompt's field in the body.
    prompt_field: ClassVar[str]
    #: The output continues the prompt's text, rather than being a text of its own.
    continues_prompt: ClassVar[bool]

    model: str | None
    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    #: None: no log probabilities; 0: of the drawn tokens; n: also of the n most likely tokens.
    logprobs: int | None
    stream: bool
    #: The stream ends with an event with the usage of the whole request.
    include_usage: bool
    #: Each event of a choice has the choice's usage so far.
    continuous_usage: bool
    return_token_ids: bool
    request_id: str | None

    @property
    def prompt_logprobs(self) -> int | None:
        """Like `logprobs`, for the tokens of the prompt."""
        return None

    def sampling_params(
        self, *, max_tokens: int, seed: int, choice: int, eos_token_ids: tuple[int, ...]
    ) -> SamplingParams:
        ends = self.stop_token_ids if self.ignore_eos else (*eos_token_ids, *self.stop_token_ids)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            choice=choice,
            stop_token_ids=tuple(dict.fromkeys(ends)),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    id_prefix = "chatcmpl"
    prompt_field = "messages"
    continues_prompt = False
    messages: list[dict[str, Any]]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]

    @classmethod
    def parse(cls, body: dict[str, Any], defaults: SamplingDefaults) -> ChatRequest:
        fields = Fields(body)
        _refuse_unsupported(fields)
        top = fields.integer("top_logprobs", None, -1, MAX_LOGPROBS)
        if top is not None and top > 0 and not fields.boolean("logprobs"):
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        kwargs = fields.object("chat_template_kwargs")
        return cls(
            messages=read_messages(fields),
            chat_template=fields.string("chat_template", 1 << 16),
            chat_template_kwargs=read_template_arguments(kwargs) if kwargs else {},
            logprobs=max(top or 0, 0) if fields.boolean("logprobs") else None,
            **_common(fields, defaults),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    prompt_field = "prompt"
    continues_prompt = True
    #: Text or token ids.
    prompts: tuple[str | list[int], ...]
    echo: bool

    @property
    def prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @classmethod
    def parse(cls, body: dict[str, Any], defaults: SamplingDefaults) -> CompletionRequest:
        fields = Fields(body)
        _refuse_unsupported(fields)
        logprobs = fields.integer("logprobs", None, -1, MAX_LOGPROBS)
        common = _common(fields, defaults, fewest_tokens=0)
        best_of = fields.integer("best_of", common["n"], 1, MAX_CHOICES)
        if best_of != common["n"]:
            raise RequestError(f"best_of is {best_of}; only best_of equal to n is implemented", "best_of")
        prompts = read_prompts(fields)
        if len(prompts) * common["n"] > MAX_SEQUENCES:
            raise RequestError(
                f"{len(prompts)} prompts times n = {common['n']} is more than {MAX_SEQUENCES} choices",
                "prompt",
            )
        return cls(
            prompts=prompts,
            echo=fields.boolean("echo"),
            logprobs=None if logprobs is None or logprobs < 0 else logprobs,
            **common,
        )


def _common(fields: Fields, defaults: SamplingDefaults, fewest_tokens: int = 1) -> dict[str, Any]:
    max_tokens = fields.integer("max_tokens", None, fewest_tokens, MAX_TOKEN)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, fewest_tokens, MAX_TOKEN)
    min_tokens = fields.integer("min_tokens", 0, 0, MAX_TOKEN) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {min_tokens}; it must not exceed max_tokens ({max_tokens})", "min_tokens"
        )
    top_k = fields.integer("top_k", defaults.top_k, -1, MAX_TOKEN) or 0
    stream = fields.boolean("stream")
    include_usage, continuous_usage = _usage_options(fields, stream)
    return {
        "model": fields.string("model", 1024),
        "n": fields.integer("n", 1, 1, MAX_CHOICES),
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": fields.number("temperature", defaults.temperature, 0.0),
        # 0 leaves only the most likely token.
        "top_p": fields.number("top_p", defaults.top_p, 0.0, 1.0),
        "top_k": max(top_k, 0),
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "repetition_penalty": fields.number("repetition_penalty", defaults.repetition_penalty, 0.01, 10.0),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        "seed": fields.integer("seed", None, -(2**63), 2**63 - 1),
        "stop": _stop(fields),
        "stop_token_ids": _stop_token_ids(fields),
        "ignore_eos": fields.boolean("ignore_eos"),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "stream": stream,
        "include_usage": include_usage,
        "continuous_usage": continuous_usage,
        "return_token_ids": fields.boolean("return_token_ids"),
        "request_id": fields.string("request_id", 128),
    }


def _refuse_unsupported(fields: Fields) -> None:
    for key, harmless in _UNSUPPORTED.items():
        value = without_nulls(fields.get(key))
        # In Python 0 == False; JSON's 0 and false are both harmless here.
        if value is not None and value not in harmless:
            raise RequestError(f"{key} is not supported by this server; leave it out", key)


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise fields.wrong("stop", "a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} strings; it may have at most {MAX_STOP_STRINGS}", "stop")
    if not all(0 < len(s) <= MAX_STOP_LENGTH for s in strings):
        raise RequestError(f"each string of stop must have 1 to {MAX_STOP_LENGTH} characters", "stop")
    return tuple(strings)


def _stop_token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.get("stop_token_ids")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(is_token_id(v) for v in value):
        raise RequestError("stop_token_ids must be a list of token ids", "stop_token_ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(value)} ids; it may have at most {MAX_STOP_TOKEN_IDS}",
            "stop_token_ids",
        )
    return tuple(value)


def _usage_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """Return include_usage and continuous_usage_stats."""
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise RequestError("stream_options is allowed only together with stream: true", "stream_options")
    # As in FastDeploy, the object itself requests the usage.
    return options.boolean("include_usage", default=True), options.boolean("continuous_usage_stats")
