"""The bodies of /v1/chat/completions and /v1/completions, validated and frozen.

Unknown fields are ignored, because clients send many. A known field that is not implemented is refused if its
value would change the response, which would otherwise be wrong without notice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from ...common.errors import ConfigError, RequestError
from ...common.request import SamplingParams
from ...common.text_files import read_object
from .bodies import MAX_SEQUENCES, ChatBody, CompletionBody, GenerationBody, GenerationConfig
from .constraints import read_constraints
from .prompts import read_messages, read_prompts, template_arguments
from .tool_fields import ToolUse, read_tools
from .validation import MISSING, WRONG_VALUE, validated

_T = TypeVar("_T")


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
            config = validated(read_object(file).values, GenerationConfig)
        except RequestError as error:
            raise ConfigError(f"{file}: {error}") from None
        defaults = cls()
        temperature = _given(config.temperature, defaults.temperature)
        return cls(
            # do_sample=false means greedy, whatever the temperature is.
            temperature=0.0 if config.do_sample is False else temperature,
            top_p=_given(config.top_p, defaults.top_p),
            top_k=_given(config.top_k, defaults.top_k),
            repetition_penalty=_given(config.repetition_penalty, defaults.repetition_penalty),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(ABC):
    """Fields of both chat and completion requests."""

    #: Prefix of the response's id.
    id_prefix: ClassVar[str]
    #: Field with the number of most likely tokens.
    logprobs_field: ClassVar[str]
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
    #: None: no log probabilities; 0: of the drawn tokens; n: also of the n most likely tokens; -1: of all.
    logprobs: int | None
    #: The same for the tokens of the prompt, in a list of their own.
    prompt_logprobs: int | None
    #: Log probabilities name a token by its id.
    names_token_ids: bool
    stream: bool
    #: The stream ends with an event with the usage of the whole request.
    include_usage: bool
    #: Each event of a choice has the choice's usage so far.
    continuous_usage: bool
    return_token_ids: bool
    request_id: str | None
    skip_special_tokens: bool
    #: None: a chat template writes them, and a text begins with them.
    add_special_tokens: bool | None
    #: Only requests with the same one share cached prompts.
    cache_salt: str
    #: Number of tokens in an event of a stream, except in the first and the last of a choice.
    tokens_per_event: int
    #: None: a prompt that is too long is an error; -1: keep what fits.
    truncate_prompt_tokens: int | None
    truncation_side: str
    #: Grammar of the output (grammar/texts.py); None: any text is allowed.
    grammar: str | None
    #: Field of the request with the grammar.
    grammar_field: str | None
    logit_bias: tuple[tuple[int, float], ...]
    bad_words: tuple[str, ...]
    bad_words_token_ids: tuple[tuple[int, ...], ...]
    allowed_token_ids: tuple[int, ...]

    @property
    @abstractmethod
    def prompt_field(self) -> str:
        """Return the name of the prompt's field in the body."""

    @property
    @abstractmethod
    def continues_prompt(self) -> bool:
        """Return True if the output continues the prompt's text, rather than being a text of its own."""

    def response_id(self, request_id: str) -> str:
        """Return the id with the prefix, which the client's id may have already."""
        prefix = f"{self.id_prefix}-"
        return request_id if request_id.startswith(prefix) else prefix + request_id

    def truncated(self, prompt: list[int], room: int) -> list[int]:
        """Return the part of a prompt that the request keeps.

        Args:
            room: number of tokens that fit.
        """
        limit = room if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        if limit is None or len(prompt) <= limit:
            return prompt
        return prompt[:limit] if self.truncation_side == "right" else prompt[len(prompt) - limit :]

    @property
    def echoes_logprobs(self) -> bool:
        """Return True if the log probabilities of a choice begin with those of its prompt."""
        return False

    @property
    def scored_logprobs(self) -> int | None:
        """Like `logprobs`, for the tokens of the prompt, for whatever reason the engine computes them."""
        echoed = self.logprobs if self.echoes_logprobs else None
        wanted = [number for number in (self.prompt_logprobs, echoed) if number is not None]
        return -1 if -1 in wanted else max(wanted, default=None)

    @property
    def repeats_logprobs(self) -> bool:
        """Return True if an event of the stream has the log probabilities of the whole output."""
        return False

    @property
    def requested_logprobs(self) -> dict[str, int]:
        """Return the requested numbers of most likely tokens by field."""
        fields = {self.logprobs_field: self.logprobs, "prompt_logprobs": self.prompt_logprobs}
        return {name: number for name, number in fields.items() if number is not None}

    def sampling_params(
        self, *, max_tokens: int, seed: int, choice: int, eos_token_ids: tuple[int, ...], vocab_size: int
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
            logprobs=_of_all(self.logprobs, vocab_size),
            prompt_logprobs=_of_all(self.scored_logprobs, vocab_size),
        )


def number_of_logprobs(asked: int, vocab_size: int) -> int:
    """Return the number of most likely tokens that a request asks for; -1 asks for the whole vocabulary."""
    return vocab_size if asked == -1 else asked


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """Limit of the tokens of the reasoning."""

    #: Name in the request.
    field: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    id_prefix = "chatcmpl"
    logprobs_field = "top_logprobs"
    messages: list[dict[str, Any]]
    #: The prompt, in place of the messages.
    prompt_token_ids: list[int] | None
    #: Appended to the prompt.
    completion_token_ids: list[int]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    disable_chat_template: bool
    continue_final_message: bool
    #: None: the model does not call tools.
    tool_use: ToolUse | None
    include_reasoning: bool
    separate_reasoning: bool
    stream_reasoning: bool
    reasoning_budget: ReasoningBudget | None

    @property
    def prompt_field(self) -> str:
        return "messages" if self.prompt_token_ids is None else "prompt_token_ids"

    @property
    def continues_prompt(self) -> bool:
        return self.continue_final_message

    @classmethod
    def parse(cls, values: dict[str, Any], defaults: SamplingDefaults) -> Self:
        values = _with_metadata(values)
        body = validated(values, ChatBody)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        messages = read_messages(values.get("messages") or [], body.messages or [])
        if not messages and not body.prompt_token_ids:
            problem, code = ("missing", MISSING) if body.messages is None else ("empty", WRONG_VALUE)
            raise RequestError(
                f"messages is {problem}; it must be a list of at least one message", "messages", code=code
            )
        return cls(
            messages=messages,
            prompt_token_ids=body.prompt_token_ids or None,
            completion_token_ids=body.completion_token_ids or [],
            chat_template=body.chat_template,
            chat_template_kwargs=template_arguments(body, messages),
            disable_chat_template=body.disable_chat_template or False,
            continue_final_message=body.continue_final_message or False,
            tool_use=read_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
            include_reasoning=body.include_reasoning is not False,
            separate_reasoning=body.separate_reasoning is not False,
            stream_reasoning=body.stream_reasoning is not False,
            reasoning_budget=_reasoning_budget(body),
            logprobs=body.top_logprobs or 0 if body.logprobs else None,
            **_common(body, body.max_tokens, body.max_completion_tokens, defaults),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    logprobs_field = "logprobs"
    #: Text or token ids.
    prompts: tuple[str | list[int], ...]
    prompt_field: str
    echo: bool

    @property
    def continues_prompt(self) -> bool:
        return True

    @property
    def echoes_logprobs(self) -> bool:
        return self.echo and self.logprobs is not None

    @classmethod
    def parse(cls, values: dict[str, Any], defaults: SamplingDefaults) -> CompletionRequest:
        body = validated(values, CompletionBody)
        common = _common(body, body.max_tokens, body.max_completion_tokens, defaults)
        if body.best_of is not None and body.best_of != common["n"]:
            raise RequestError(
                f"best_of is {body.best_of}; only best_of equal to n is implemented", "best_of"
            )
        # As in FastDeploy, ids win over text.
        name = "prompt_token_ids" if body.prompt_token_ids else "prompt"
        prompts = read_prompts(name, body.prompt_token_ids or body.prompt)
        if len(prompts) * common["n"] > MAX_SEQUENCES:
            raise RequestError(
                f"{len(prompts)} prompts times n = {common['n']} is more than {MAX_SEQUENCES} choices",
                name,
            )
        return cls(
            prompts=prompts,
            prompt_field=name,
            echo=body.echo or False,
            logprobs=body.logprobs,
            **common,
        )


def _reasoning_budget(body: ChatBody) -> ReasoningBudget | None:
    for field in ("reasoning_max_tokens", "thinking_token_budget"):
        tokens: int | None = getattr(body, field)
        if tokens is not None and tokens >= 0:
            return ReasoningBudget(field, tokens)
    return None


def _with_metadata(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with those that FastDeploy's clients put into `metadata`.

    OpenAI's metadata consists of strings, which are notes of the client.
    """
    metadata = values.get("metadata")
    if not isinstance(metadata, dict):
        return values
    known = ChatBody.__struct_fields__
    moved = {
        key: value
        for key, value in metadata.items()
        if (key in known or key in ChatBody.refused)
        and not isinstance(value, str)
        and values.get(key) is None
    }
    return values | moved


def _common(
    body: GenerationBody,
    max_tokens: int | None,
    max_completion_tokens: int | None,
    defaults: SamplingDefaults,
) -> dict[str, Any]:
    max_tokens = _given(max_completion_tokens, max_tokens)
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {min_tokens}; it must not exceed max_tokens ({max_tokens})", "min_tokens"
        )
    include_usage, continuous_usage = _usage_options(body)
    return {
        "model": body.model,
        "n": _given(body.n, 1),
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": _given(body.temperature, defaults.temperature),
        # 0 leaves only the most likely token.
        "top_p": _given(body.top_p, defaults.top_p),
        "top_k": max(_given(body.top_k, defaults.top_k), 0),
        "min_p": body.min_p or 0.0,
        "repetition_penalty": _given(body.repetition_penalty, defaults.repetition_penalty),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "seed": body.seed,
        "stop": (body.stop,) if isinstance(body.stop, str) and body.stop else tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": body.ignore_eos or False,
        "include_stop_str_in_output": body.include_stop_str_in_output or False,
        "stream": body.stream or False,
        "include_usage": include_usage,
        "continuous_usage": continuous_usage,
        "return_token_ids": body.return_token_ids or False,
        "prompt_logprobs": body.prompt_logprobs,
        "names_token_ids": body.return_tokens_as_token_ids or False,
        "request_id": body.request_id,
        "cache_salt": body.cache_salt or "",
        "tokens_per_event": body.max_streaming_response_tokens or body.stream_interval or 1,
        "skip_special_tokens": _given(body.skip_special_tokens, True),
        "add_special_tokens": body.add_special_tokens,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "truncation_side": body.truncation_side or "left",
        **read_constraints(body),
    }


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _of_all(logprobs: int | None, vocab_size: int) -> int | None:
    return None if logprobs is None else number_of_logprobs(logprobs, vocab_size)


def _usage_options(body: GenerationBody) -> tuple[bool, bool]:
    """Return include_usage and continuous_usage_stats."""
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        raise RequestError("stream_options is allowed only together with stream: true", "stream_options")
    # As in FastDeploy, the object itself requests the usage.
    return _given(options.include_usage, True), options.continuous_usage_stats or False
