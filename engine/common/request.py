"""A request inside the engine: its sampling parameters and its progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .messages import Logprobs


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters. The API validates the values (entrypoints/openai/protocol.py)."""

    #: 0: compute only the log probabilities of the prompt.
    max_tokens: int
    min_tokens: int = 0
    #: 0: greedy.
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0: all tokens.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: The random numbers depend only on seed, `choice` and position; the sampler has no state.
    seed: int = 0
    #: Index of this choice among the `n` of one client request.
    choice: int = 0
    #: Ids that end the text: the model's eos ids (unless ignore_eos) and those of the request.
    #: They are not drawn before `min_tokens`.
    stop_token_ids: tuple[int, ...] = ()
    #: None: no log probabilities. 0: of the drawn token. n: also of the n most likely tokens.
    logprobs: int | None = None
    #: The same for the tokens of the prompt except the first.
    prompt_logprobs: int | None = None
    #: Grammar of the text, in llguidance's notation (grammar/texts.py); None: any text.
    grammar: str | None = None
    #: Ids that end a text with a grammar, where the grammar allows it; not only from `min_tokens` on.
    end_token_ids: tuple[int, ...] = ()
    #: Added to the logits of these ids.
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: Sequences of ids of which the last is not drawn after the others.
    bad_words: tuple[tuple[int, ...], ...] = ()
    #: The only ids that are drawn; empty: all.
    allowed_token_ids: tuple[int, ...] = ()


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """A text being generated. Only the scheduler modifies it.

    The keys and values of positions < num_computed are in the cache blocks `block_ids`.
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
    #: Entry i belongs to the prompt token at position i + 1 and comes from the logits of position i. Grows as
    #: the prompt is computed; kept on preemption.
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    #: Only sequences with the same one share cached blocks.
    cache_salt: str = ""
    #: Chained hashes of the leading full blocks, computed on demand. The text only grows, so they stay valid.
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs_scoring(self) -> bool:
        """True while requested log probabilities of the prompt are missing."""
        return (
            self.params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1
        )

    def token_ids(self, start: int, end: int) -> list[int]:
        """Return the ids at positions start..end-1 of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        if end <= prompt:
            return self.prompt_token_ids[start:end]
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - prompt]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The part of a step that belongs to one sequence: positions start .. start + num_tokens - 1.

    Its `block_ids` cover these positions. If `samples` is true, a token is drawn from the logits of the last
    position; otherwise this is a prefill chunk that is not the last.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    #: Positions whose logits are needed for the log probability of the following prompt token.
    scored: range = range(0)
    #: The sampling row of the step before that draws the token at `start`; None: the token is known.
    drawn_by: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one step. Rows are in admission order and mix decoding and prefill chunks."""

    rows: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)
