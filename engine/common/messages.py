"""Messages between the API process and its worker: MessagePack over a ZeroMQ socket on loopback.

The API process binds a ROUTER socket at the replica's engine-worker-queue-port; the worker connects a DEALER.
The first message of a worker is `Hello` with the token from its environment; messages of a peer without a
valid `Hello` are dropped. Increment `PROTOCOL_VERSION` with every change of a struct below.
"""

from __future__ import annotations

import msgspec

from .request import FinishReason, SamplingParams
from .trace_context import parse_traceparent, trace_label

PROTOCOL_VERSION = 8


# ---- API process -> worker


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """One sequence to generate. A client request with n choices consists of n of these, with distinct ids."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    #: Tokens that another replica has already generated; they count as output of this request.
    output_token_ids: list[int] = []
    #: Only requests with the same one share cached blocks.
    cache_salt: str = ""
    #: The trace that the request belongs to, as in the header traceparent; empty if there is none.
    traceparent: str = ""

    @property
    def ids(self) -> str:
        """The ids of request and trace in log lines."""
        return self.request_id + trace_label(parse_traceparent(self.traceparent))


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    """The client disconnected or a stop string was found: free all resources and send no more output."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the engine loop and exit with status 0."""


ToWorker = AddRequest | AbortRequests | Shutdown


# ---- worker -> API process


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The first message of a worker; `token` proves that this API process started it."""

    token: str
    pid: int
    version: int = PROTOCOL_VERSION


class LoadProgress(msgspec.Struct, tag="loading", frozen=True):
    """Progress of the start; `fraction` is 0..1."""

    fraction: float
    stage: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine loop runs. The sizes are for metrics and for rejecting prompts that can never fit."""

    num_blocks: int
    block_size: int
    max_model_len: int
    #: UUID of its GPU; empty on a CPU.
    gpu_uuid: str = ""
    #: Version of the arithmetic: replicas with the same one generate the same text.
    numeric_version: str = ""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The worker cannot start or continue and exits; `message` is one line for the user."""

    message: str


class Logprobs(msgspec.Struct, frozen=True):
    """Natural log probabilities of the model, before temperature and penalties (vLLM's raw_logprobs)."""

    token_id: int
    logprob: float
    #: Most likely tokens first: (token id, logprob).
    top: list[tuple[int, float]]
    #: Of a prompt's token: its place among all tokens, the most likely first; 1 is the first.
    rank: int = 0


class Times(msgspec.Struct, frozen=True):
    """Unix times in nanoseconds."""

    #: When the first step with the sequence began; 0 if there was none.
    scheduled: int
    #: When the step that drew the token ended.
    drawn: int


class TokenOutput(msgspec.Struct, frozen=True):
    """Output of one step for one request. `token_ids` includes the stop token that ended the text."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    #: Log probabilities of the prompt tokens from the second on; only in the first output, if requested.
    prompt_logprobs: list[Logprobs] | None = None
    #: Prompt tokens found in the prefix cache; valid in the first output of a request.
    num_cached: int = 0
    #: The reason if finish_reason is ERROR.
    message: str | None = None
    #: True if the reason lies in the request.
    is_refused: bool = False
    #: In the first and the last output of a sequence whose request is traced.
    times: Times | None = None


class ExpertParallelStats(msgspec.Struct, frozen=True):
    """State of the expert-parallel group, and counters, as seen by one of its ranks."""

    epoch: int
    #: Members.
    active_ranks: list[int]
    #: Counters of the whole group since its creation.
    joins_total: int
    leaves_total: int
    losses_total: int
    #: Counters of this rank since it joined.
    restarted_steps_total: int
    steps_total: int
    step_seconds_total: float
    bytes_dispatched_total: int
    bytes_combined_total: int
    #: Time that this rank has waited for each rank, by rank.
    waited_seconds_total: list[float]
    #: Tokens that this rank has computed, by expert, over all layers. Includes earlier processes of the rank.
    expert_tokens_total: list[int]


class Stats(msgspec.Struct, frozen=True):
    """State of the engine after a step; `*_total` are counters since the start of the worker."""

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
    #: None without expert parallelism.
    expert_parallel: ExpertParallelStats | None = None


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    """Results of a step; without outputs, new statistics only."""

    outputs: list[TokenOutput]
    stats: Stats


FromWorker = Hello | LoadProgress | Ready | Failed | StepOutputs
