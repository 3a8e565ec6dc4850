"""The sequences that one client request needs from the engine. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ...common.messages import AddRequest
from ...common.request import SamplingParams
from ...common.resumption import Delivered, Resumption
from .errors import ApiError
from .output import ChoiceOutput, Delta, ReplayMismatch
from .output_grammar import output_grammar
from .output_parsing import shown_ids
from .protocol import GenerationRequest
from .served_model import ServedModel
from .token_constraints import token_constraints


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """One choice of a response and the sequence that computes it."""

    output: ChoiceOutput
    params: SamplingParams
    #: None if another replica has finished the choice.
    sequence: AddRequest | None
    #: The part that another replica has sent, or would have sent; None if no replica has begun the choice.
    delivered: Delta | None = None
    #: The same in the steps in which it was emitted; empty if the choice has finished.
    steps: tuple[Delta, ...] = ()


def plan_sequences(
    served: ServedModel,
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    resumption: Resumption | None,
    *,
    engine_id: str,
    seed: int,
    arrival_time: float,
    traceparent: str = "",
) -> list[PlannedChoice]:
    """Return the n choices of each prompt, prompt by prompt.

    Args:
        resumption: tokens that another replica has drawn. They count as drawn here.
        engine_id: prefix of the sequences' ids.

    Raises:
        ApiError: a prompt is empty, has unknown token ids or is too long, or `resumption` does not fit.
        RequestError: see `token_constraints`.
    """
    started = {} if resumption is None else resumption.choices
    count = len(prompts) * request.n
    if started and max(started) >= count:
        raise _not_resumable(f"it has no choice {max(started)}")
    constraints = token_constraints(served, request)
    choices = []
    shown = shown_ids(served, request)
    grammar = output_grammar(served, request, prompts[0], constraints.get("grammar"))
    if grammar is not None:
        constraints |= {"grammar": grammar, "end_token_ids": served.tokenizer.eos_token_ids}
    for index in range(count):
        prompt = prompts[index // request.n]
        params = request.sampling_params(
            max_tokens=served.tokens_left(prompt, request.max_tokens, request.prompt_field),
            seed=seed,
            choice=index,
            eos_token_ids=served.tokenizer.eos_token_ids,
            vocab_size=served.model.vocab_size,
        )
        if constraints:
            params = msgspec.structs.replace(params, **constraints)
        output = ChoiceOutput(
            served.tokenizer.detokenizer(
                request.skip_special_tokens, continues=request.continues_prompt, shown_ids=shown
            ),
            stop=request.stop,
            include_stop=request.include_stop_str_in_output,
            min_tokens=request.min_tokens,
            stop_token_ids=request.stop_token_ids,
            # Ids and log probabilities must correspond one to one.
            stop_token_logprobs=request.echoes_logprobs or request.return_token_ids,
        )
        sequence = AddRequest(
            f"{engine_id}-{index}",
            prompt,
            params,
            arrival_time,
            cache_salt=request.cache_salt,
            traceparent=traceparent,
        )
        choice = PlannedChoice(output, params, sequence)
        if index in started:
            choice = _resumed(choice, index, started[index], request, served.model.vocab_size)
        choices.append(choice)
    return choices


def _resumed(
    choice: PlannedChoice, index: int, delivered: Delivered, request: GenerationRequest, vocab_size: int
) -> PlannedChoice:
    output, params, sequence, tokens = choice.output, choice.params, choice.sequence, delivered.tokens
    assert sequence is not None, "a choice is planned before it is resumed"
    if delivered.finished:
        if not request.stream:
            raise _not_resumable(f"choice {index} has finished, and its finish reason is unknown")
        output.token_ids = tokens
        return PlannedChoice(output, params, None, Delta("", (), ()))
    if max(tokens, default=0) >= vocab_size:
        raise _not_resumable(f"choice {index} has token {max(tokens)}, which this model does not have")
    # With max_tokens 0 a choice begins with its prompt and ends without a token.
    if len(tokens) >= max(1, params.max_tokens):
        raise _not_resumable(
            f"choice {index} already has {len(tokens)} of at most {params.max_tokens} tokens"
        )
    try:
        steps = output.replay(tokens, with_logprobs=params.logprobs is not None)
    except ReplayMismatch as error:
        raise _not_resumable(f"choice {index}: {error}") from None
    sequence = msgspec.structs.replace(
        sequence,
        # The client already has the log probabilities of the prompt.
        params=msgspec.structs.replace(params, prompt_logprobs=None),
        output_token_ids=output.token_ids[: output.num_tokens - output.num_repeated],
    )
    return PlannedChoice(output, params, sequence, Delta.joined(steps), tuple(steps))


def _not_resumable(why: str) -> ApiError:
    return ApiError(409, f"this response cannot be resumed here: {why}")
