"""A request as the engine sees it: what to sample, and how far it has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .messages import Logprobs


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Values are validated where they enter (entrypoints/openai/protocol.py)."""

    #: 0: compute the prompt for its log probabilities and draw nothing.
    max_tokens: int
    min_tokens: int = 0
    #: 0 means greedy.
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0 means all tokens.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: Together with `choice` and the position it fixes every random number: there is no sampler state.
    seed: int = 0
    #: Index of this choice among the `n` of one client request.
    choice: int = 0
    #: Ids that end the text: the model's eos ids (left out under ignore_eos) and the request's own.
    #: They are not drawn before `min_tokens`.
    stop_token_ids: tuple[int, ...] = ()
    #: None: no log probabilities. 0: of the drawn token only. n: and of the n most likely tokens.
    logprobs: int | None = None
    #: The same for the tokens of the prompt except the first, which follows nothing.
    prompt_logprobs: int | None = None


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One text being generated. Owned by the scheduler; nobody else changes it.

    Tokens at positions < num_computed have their keys and values in the cache blocks `block_ids`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float = 0.0
    output_token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    #: Prompt tokens whose keys and values were found in the prefix cache at first admission.
    num_cached: int = 0
    num_preemptions: int = 0
    #: Of the prompt's tokens from the second on, as far as they are known: entry i belongs to the token at
    #: position i + 1 and comes from the logits of position i. Preemption keeps them.
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    #: Chained hashes of the first full blocks, as far as needed. They stay valid: the text only grows.
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_scored(self) -> bool:
        """True while log probabilities of its prompt are wanted and not all known."""
        return (
            self.params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1
        )

    def token_ids(self, start: int, end: int) -> list[int]:
        """Ids at positions start..end-1, of prompt and output as one text."""
        prompt = len(self.prompt_token_ids)
        if end <= prompt:
            return self.prompt_token_ids[start:end]
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - prompt]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step: positions start .. start + num_tokens - 1 are computed.

    `block_ids` covers them. When `samples` is true the logits of the last position draw a new token;
    when it is false this is a chunk of prefill with more to come.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    #: Positions whose logits give the log probability of the prompt token behind them.
    scored: range = range(0)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes. Rows are in admission order; decode rows and prefill chunks mix freely."""

    rows: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)
