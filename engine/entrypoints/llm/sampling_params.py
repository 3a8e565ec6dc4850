"""Sampling parameters of `LLM`, with FastDeploy's names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ...common.errors import RequestError
from ..openai.protocol import CompletionRequest, SamplingDefaults

#: Fields with another name in the body of a request.
_REQUEST_NAMES = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
    "structural_tag": "structural_tag",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedDecodingParams:
    """Structure of the output. Set one field."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None

    def request_fields(self) -> dict[str, Any]:
        """Return the fields of a request to the server with the same meaning."""
        given = {
            _REQUEST_NAMES[name]: value
            for name in _REQUEST_NAMES
            if (value := getattr(self, name)) is not None
        }
        return given | ({"response_format": {"type": "json_object"}} if self.json_object else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a prompt. None: the recommendation of the checkpoint, else OpenAI's default.

    Raises:
        ValueError: a value is wrong, as the server would refuse it.
    """

    #: Number of outputs.
    n: int = 1
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    #: 0: greedy.
    temperature: float | None = None
    top_p: float | None = None
    #: 0 or -1: all tokens.
    top_k: int | None = None
    min_p: float | None = None
    #: The same seed gives the same tokens as on a server. None: a random one, or from `seed` of `LLM`.
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    #: None: as many as fit.
    max_tokens: int | None = None
    #: Limit of the tokens of the reasoning, with a `reasoning_parser` of `LLM`.
    reasoning_max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    #: Number of most likely tokens at each position whose log probabilities are returned.
    logprobs: int | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[int | list[int]] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        given = self.request_fields()
        # Only chats have reasoning; LLM.chat checks this field.
        given.pop("reasoning_max_tokens", None)
        try:
            CompletionRequest.parse({"prompt": "x", **given}, SamplingDefaults())
        except RequestError as error:
            raise ValueError(f"SamplingParams: {error}") from None

    def request_fields(self) -> dict[str, Any]:
        """Return the fields of a request to /v1/completions with the same meaning."""
        given: dict[str, Any] = {
            field.name: value
            for field in fields(self)
            if field.name != "guided_decoding" and (value := getattr(self, field.name)) is not None
        }
        if self.logit_bias is not None:
            given["logit_bias"] = {str(token_id): bias for token_id, bias in self.logit_bias.items()}
        return given | ({} if self.guided_decoding is None else self.guided_decoding.request_fields())
