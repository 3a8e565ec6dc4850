"""What the API process and its worker say to each other, as MessagePack over a ZeroMQ socket on loopback.

The API process binds a ROUTER socket at the replica's engine-worker-queue-port; the worker connects a DEALER.
The first message of a worker is `Hello` with the token it was given in its environment; anything from
a peer that has not said it is dropped. `PROTOCOL_VERSION` rises with every change of a struct below.
"""

from __future__ import annotations

import msgspec

from .request import FinishReason, SamplingParams

PROTOCOL_VERSION = 4


# ---- API process -> worker


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """One sequence to generate. A client request with n choices is n of these with ids of their own."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    #: The beginning of the output, which another replica has drawn; it counts as if it had been drawn here.
    output_token_ids: list[int] = []


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    """Their client has gone or a stop string was found: free everything, answer nothing more."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Leave the loop and exit 0."""


ToWorker = AddRequest | AbortRequests | Shutdown


# ---- worker -> API process


class Hello(msgspec.Struct, tag="hello", frozen=True):
    token: str
    pid: int
    version: int = PROTOCOL_VERSION


class LoadProgress(msgspec.Struct, tag="loading", frozen=True):
    """`fraction` of the weights is in place, 0..1."""

    fraction: float
    stage: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine loop runs. Sizes of the cache, for metrics and for refusing prompts that can never fit."""

    num_blocks: int
    block_size: int
    max_model_len: int


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The worker cannot start (bad checkpoint, no memory) or go on: one line for a person. It then exits."""

    message: str


class Logprobs(msgspec.Struct, frozen=True):
    """Natural logarithms, of the model's distribution before temperature and penalties (raw_logprobs)."""

    token_id: int
    logprob: float
    #: Most likely tokens first: (token id, logprob).
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True):
    """What one step drew for one request. `token_ids` holds a stop token too when it ended the text."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    #: Of the prompt's tokens from the second on; only in the first output of a request that asks for them.
    prompt_logprobs: list[Logprobs] | None = None
    #: Prompt tokens found in the prefix cache; meaningful in a request's first output.
    num_cached: int = 0
    #: Why, when finish_reason is ERROR.
    message: str | None = None


class ExpertParallelStats(msgspec.Struct, frozen=True):
    """The expert-parallel group, as a rank sees it that is in it."""

    epoch: int
    active_seats: list[int]
    #: Of the whole group, since it exists.
    joins_total: int
    leaves_total: int
    losses_total: int
    #: Of this rank, since it joined.
    restarted_steps_total: int
    steps_total: int
    step_seconds_total: float
    bytes_dispatched_total: int
    bytes_combined_total: int
    #: For each seat.
    waited_seconds_total: list[float]
    #: Of each expert, over all layers, computed at this rank's seat since the group exists.
    expert_tokens_total: list[int]


class Stats(msgspec.Struct, frozen=True):
    """The engine after a step; gauges as they are, `*_total` since the worker started."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    preemptions_total: int
    prefix_cache_hit_tokens_total: int
    prefix_cache_query_tokens_total: int
    steps_total: int
    batch_tokens: int
    max_num_seqs: int
    #: None where there is no group.
    expert_parallel: ExpertParallelStats | None = None


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    outputs: list[TokenOutput]
    stats: Stats


FromWorker = Hello | LoadProgress | Ready | Failed | StepOutputs
