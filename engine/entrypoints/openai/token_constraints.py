"""The constraints of a request in the tokens of the served model."""

from __future__ import annotations

from typing import Any

from ...common.errors import RequestError
from ...grammar.texts import with_optional_space
from ...grammar.validation import names_special_tokens, require_valid
from .protocol import GenerationRequest
from .served_model import ServedModel
from .validation import UNSUPPORTED


def token_constraints(served: ServedModel, request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of `SamplingParams` for the constraints of a request.

    Raises:
        ApiError: a token id is not one of this model.
        RequestError: the server or the model has no structured output, or a grammar names an unknown token.
    """
    fields: dict[str, Any] = {}
    if request.grammar is not None:
        fields["grammar"] = _grammar(served, request, request.grammar)
        fields["end_token_ids"] = served.tokenizer.eos_token_ids
    if request.logit_bias:
        served.require_known([token_id for token_id, _ in request.logit_bias], "logit_bias")
        fields["logit_bias"] = request.logit_bias
    if request.allowed_token_ids:
        served.require_known(list(request.allowed_token_ids), "allowed_token_ids")
        fields["allowed_token_ids"] = request.allowed_token_ids
    words = list(request.bad_words_token_ids)
    for word in words:
        served.require_known(list(word), "bad_words_token_ids")
    for text in request.bad_words:
        words += _spellings(served, text)
    if words:
        fields["bad_words"] = tuple(dict.fromkeys(words))
    return fields


def _grammar(served: ServedModel, request: GenerationRequest, grammar: str) -> str:
    if served.config.guided_decoding_backend == "off":
        raise RequestError(
            "this server was started with --guided-decoding-backend off, so it has no structured output",
            request.grammar_field,
            code=UNSUPPORTED,
        )
    if not served.tokenizer.eos_token_ids:
        raise RequestError(
            "this model has no end-of-text token, so its output cannot be structured", request.grammar_field
        )
    if names_special_tokens(grammar):
        require_valid(grammar, request.grammar_field or "grammar", served.grammar_vocabulary)
    if served.tokenizer.strips_first_space and not request.continues_prompt:
        return with_optional_space(grammar)
    return grammar


def _spellings(served: ServedModel, word: str) -> list[tuple[int, ...]]:
    """Return the tokens of a word, without and with a space before it."""
    bare = word.lstrip()
    if not bare:
        raise RequestError("bad_words has a word of spaces only", "bad_words")
    tokenizer = served.tokenizer
    return [tuple(tokenizer.encode_inside(text) or tokenizer.encode(text)) for text in (bare, " " + bare)]
