"""Results of `LLM`, in FastDeploy's shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of a token at one position."""

    logprob: float
    #: 1: the most likely token; None: the drawn token is not among those that were requested.
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One generated text."""

    #: Number of the output among the `n` of its prompt.
    index: int
    text: str
    #: The generated tokens, with the stop token that ended the text.
    token_ids: list[int]
    #: "stop" or "length".
    finish_reason: str
    #: The stop string or stop token of the parameters that ended the text.
    stop_reason: str | int | None = None
    #: None unless `reasoning_parser` is given and the model has reasoned.
    reasoning_content: str | None = None
    #: For each token the log probabilities by token id; None unless requested.
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of a prompt, in seconds."""

    #: Unix time at which the engine got the prompt.
    arrival_time: float
    #: From then to the first token.
    first_token_time: float | None
    #: From then to the last token.
    model_execute_time: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """An output and the prompt that it belongs to. A prompt with `n` outputs has one of these for each."""

    request_id: str
    #: As given to `generate`; the rendered conversation of `chat`.
    prompt: str | list[int]
    prompt_token_ids: list[int]
    outputs: CompletionOutput
    metrics: RequestMetrics
    #: Prompt tokens whose keys and values were in the prefix cache.
    num_cached_tokens: int
    finished: bool = True
