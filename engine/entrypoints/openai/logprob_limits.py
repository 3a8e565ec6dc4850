"""Limits of the log probabilities in a response."""

from __future__ import annotations

from ...common.errors import RequestError
from .protocol import GenerationRequest, number_of_logprobs
from .served_model import ServedModel
from .validation import invalid

#: Maximum numbers of log probabilities, those of the most likely tokens included. A stream sends all log
#: probabilities of a prompt in one event, and the router does not pass on events of more than 4 MiB.
_MAX_PER_RESPONSE, _MAX_PER_EVENT = 1 << 20, 1 << 15
#: The same for the last events of a stream of /v1/responses, which have the whole output beside other fields.
_MAX_REPEATED = 1 << 14
#: Up to this number of most likely tokens, those of the output have no limit, unless a stream joins events.
_FEW = 20
#: A GPU returns no more most likely tokens.
_MAX_ON_GPU = 20


def check_logprobs(served: ServedModel, request: GenerationRequest, prompts: list[list[int]]) -> None:
    """Raise RequestError if the request asks for too many log probabilities."""
    for name, number in request.requested_logprobs.items():
        _check_number(served, name, number)
    vocab_size = served.model.vocab_size
    if request.scored_logprobs is not None:
        name = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
        _check_prompts(name, prompts, request, 1 + number_of_logprobs(request.scored_logprobs, vocab_size))
    if request.logprobs is not None:
        each = number_of_logprobs(request.logprobs, vocab_size)
        if request.repeats_logprobs:
            tokens = served.tokens_left(prompts[0], request.max_tokens, request.prompt_field)
            _check_size(request, request.logprobs_field, tokens * (1 + each), _MAX_REPEATED)
        if each > _FEW or request.tokens_per_event > 1:
            _check_output(served, request, prompts, 1 + each)


def _check_number(served: ServedModel, name: str, number: int) -> None:
    vocab_size = served.model.vocab_size
    limit = vocab_size if served.config.max_logprobs == -1 else served.config.max_logprobs
    origin = "--max-logprobs"
    if limit > _MAX_ON_GPU and served.is_on_gpu:
        limit, origin = _MAX_ON_GPU, "on a GPU"
    if number_of_logprobs(number, vocab_size) > limit:
        whole = f", and -1 is the whole vocabulary of {vocab_size}" if number == -1 else ""
        raise invalid(name, number, f"at most {limit} ({origin}){whole}")


def _check_prompts(name: str, prompts: list[list[int]], request: GenerationRequest, each: int) -> None:
    if request.stream:
        _check_size(request, name, max(map(len, prompts)) * each, _MAX_PER_EVENT)
    else:
        _check_size(request, name, sum(map(len, prompts)) * request.n * each, _MAX_PER_RESPONSE)


def _check_output(
    served: ServedModel, request: GenerationRequest, prompts: list[list[int]], each: int
) -> None:
    left = [served.tokens_left(prompt, request.max_tokens, request.prompt_field) for prompt in prompts]
    if request.stream:
        # A possible stop string withholds tokens, which the next event has too.
        tokens = min(request.tokens_per_event + max(map(len, request.stop), default=0), max(left))
        _check_size(request, request.logprobs_field, tokens * each, _MAX_PER_EVENT)
    elif each > 1 + _FEW:
        _check_size(request, request.logprobs_field, sum(left) * request.n * each, _MAX_PER_RESPONSE)


def _check_size(request: GenerationRequest, name: str, size: int, limit: int) -> None:
    if size > limit:
        where = "one event of a stream" if request.stream else "one response"
        what = "echo with logprobs" if name == "echo" else name
        raise RequestError(
            f"{what} would put {size} log probabilities into {where}; the limit is {limit}: request fewer "
            "logprobs, tokens or prompts" + (", or no stream" * request.stream),
            name,
        )
