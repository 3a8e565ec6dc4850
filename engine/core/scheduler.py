"""Decides what each sequence computes in the next step. Pure: no clock, no I/O, no tensors.

A step is a transaction: `schedule` reserves blocks and describes the step, `commit` makes its results visible
(tokens, computed positions, prefix hashes). A failed step is not committed; its sequences can be scheduled
again or aborted.

Sequences are always in arrival order, running ones before waiting ones. When blocks run out, the youngest
running sequence returns all of its blocks and becomes the first waiting one; the part of its text that is no
longer in the prefix cache is recomputed later. No sequence delays the oldest one, which therefore ends. Then
another one is the oldest, so none starves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import islice
from typing import TYPE_CHECKING

from ..common.errors import RequestError
from ..common.request import Batch, FinishReason, ScheduledSequence, Sequence
from ..config import EngineConfig
from .block_pool import BlockPool, hash_block, root_hash

if TYPE_CHECKING:
    from ..common.messages import Logprobs


#: Maximum prompt positions of a step whose logits are kept for log probabilities. A row of logits is as long
#: as the vocabulary, so this limits the memory of a step. Results do not depend on where a prompt is split.
MAX_SCORED = 256


class Scheduler:
    """Owns all live sequences and, through them, the blocks of the cache."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, context_of_double_cost: float = math.inf
    ) -> None:
        """
        Args:
            context_of_double_cost: see `ModelConfig.context_of_double_cost`.
        """
        self._config = config
        self._pool = pool
        self._context_of_double_cost = context_of_double_cost
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        #: Maximum tokens of prompt and output together: --max-model-len, or the whole cache if it is smaller.
        self.max_num_tokens = min(config.max_model_len, pool.num_tokens)
        self.preemptions_total = 0
        self.prefix_cache_hit_tokens_total = 0
        self.prefix_cache_query_tokens_total = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to the queue.

        Raises:
            RequestError: the prompt is empty, or prompt and initial output leave no room for another token.
        """
        assert sequence.request_id not in self._sequences, f"request {sequence.request_id} exists already"
        length = sequence.num_tokens
        room = self.max_num_tokens if sequence.params.max_tokens == 0 else self.max_num_tokens - 1
        if not sequence.prompt_token_ids:
            raise RequestError("the prompt has no tokens; it must have at least one", "prompt")
        if length > room:
            raise RequestError(
                f"the prompt has {length} tokens; prompt and output together may have {self.max_num_tokens} "
                f"here ({self._limit()})",
                "prompt",
            )
        self._sequences[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Remove these sequences and free their blocks; unknown ids are ignored."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is None:
                continue
            if sequence.block_ids:
                self._running.remove(sequence)
                self._release(sequence)
            else:
                self._waiting.remove(sequence)

    def schedule(self) -> Batch:
        """Return the next step: running sequences, then waiting ones within the limits of tokens and blocks.

        It is empty only if there is no sequence.
        """
        budget = self._config.max_num_batched_tokens
        prefill = self._prefill_budget()
        scored = MAX_SCORED
        rows: list[ScheduledSequence] = []
        # By index, because preemption removes sequences from the end of the list. Those have no row yet.
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            count = min(self._chunk(sequence, prefill), budget, self._scorable(sequence, scored))
            count = self._make_room(sequence, count)
            if count > 0:
                rows.append(self._reserve(sequence, count))
                budget -= count
                prefill -= self._prefill_cost(rows[-1])
                scored -= len(rows[-1].scored)
            index += 1
        rows += self._admit(budget, prefill, scored)
        assert rows or not self._sequences, "there are sequences but none can be computed"
        return Batch(tuple(rows))

    def schedule_ahead(self, batch: Batch) -> Batch:
        """Return the step after `batch`, which is not committed yet, as if no token ended its sequence.

        It is empty if it is not known yet, because a sequence may be admitted or preempted, or has more than
        one token to compute. Sequences that end with their next token have no row. When `batch` has ended
        others, their rows mean nothing (see `holds`).
        """
        if self._admissible() is not None or not all(row.samples for row in batch.rows):
            return Batch(())
        known = [(index, row) for index, row in enumerate(batch.rows) if self.holds(row.sequence)]
        if len(known) < len(self._running):
            return Batch(())
        rows = [
            ScheduledSequence(row.sequence, row.end, 1, samples=True, drawn_by=index)
            for index, row in known
            if not self._is_full(row.sequence, row.end + 1)
        ]
        size = self._pool.block_size
        growing = [row for row in rows if row.end > len(row.sequence.block_ids) * size]
        if len(growing) > self._pool.num_free:
            return Batch(())
        for row in growing:
            row.sequence.block_ids += self._pool.allocate(1)
        return Batch(tuple(rows))

    def holds(self, sequence: Sequence) -> bool:
        """Return True unless the sequence has ended."""
        return self._sequences.get(sequence.request_id) is sequence

    def commit(
        self, batch: Batch, token_ids: Many[int], prompt_logprobs: Many[Logprobs] = ()
    ) -> list[FinishReason | None]:
        """Apply the results of a step.

        Args:
            token_ids: one token for each sampling row, in batch order.
            prompt_logprobs: one entry for each scored position, in batch order.

        Returns:
            For each token, the reason why it ended its sequence, or None. Ended sequences are removed.
        """
        assert len(token_ids) == sum(row.samples for row in batch.rows), "one token for each sampling row"
        assert len(prompt_logprobs) == sum(len(row.scored) for row in batch.rows), (
            "one entry for each scored position"
        )
        reasons: list[FinishReason | None] = []
        drawn, scores = iter(token_ids), iter(prompt_logprobs)
        for row in batch.rows:
            sequence = row.sequence
            assert sequence.num_computed == row.start, (
                f"request {sequence.request_id} changed since it was scheduled"
            )
            sequence.num_computed = row.end
            sequence.prompt_logprobs += islice(scores, len(row.scored))
            self._publish(row)
            if row.samples:
                token_id = next(drawn)
                if sequence.params.max_tokens > 0:
                    sequence.output_token_ids.append(token_id)
                reasons.append(self._finish_reason(sequence, token_id))
                if reasons[-1] is not None:
                    self.abort([sequence.request_id])
        return reasons

    def check(self) -> None:
        """Check the block pool against the sequences; see `BlockPool.check`."""
        self._pool.check(sequence.block_ids for sequence in self._sequences.values())

    # ---- prefill beside decode

    def _prefill_budget(self) -> float:
        """Return the cost limit of this step's prefill, in tokens without context."""
        decoding = any(sequence.num_tokens - sequence.num_computed == 1 for sequence in self._running)
        return self._config.max_prefill_beside_decode if decoding else math.inf

    def _chunk(self, sequence: Sequence, prefill: float) -> int:
        """Return the maximum tokens of the sequence for a step with this prefill budget left."""
        left = sequence.num_tokens - sequence.num_computed
        if left == 1 or prefill == math.inf:
            return left
        # At least one token while any budget is left: a prompt with a very long context must finish.
        affordable = math.ceil(prefill / (1 + sequence.num_computed / self._context_of_double_cost))
        return min(left, max(0, affordable))

    def _scorable(self, sequence: Sequence, scored: int) -> int:
        """Return the maximum tokens of the sequence for a step with `scored` scored positions left."""
        left = sequence.num_tokens - sequence.num_computed
        if not sequence.needs_scoring or len(_scored(sequence, sequence.num_tokens)) <= scored:
            return left
        return len(sequence.prompt_logprobs) - sequence.num_computed + scored

    def _prefill_cost(self, row: ScheduledSequence) -> float:
        if row.num_tokens == 1:
            return 0
        return row.num_tokens * (1 + row.start / self._context_of_double_cost)

    # ---- blocks

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Return how many of `count` tokens get blocks, after preempting younger sequences if necessary.

        The youngest sequence keeps its blocks and waits for the next step, which costs nothing until an older
        sequence needs them.
        """
        if sequence.num_computed + count <= len(sequence.block_ids) * self._pool.block_size:
            return count
        missing = self._config.blocks_for(sequence.num_computed + count) - len(sequence.block_ids)
        while missing > self._pool.num_free and self._running[-1] is not sequence:
            self._preempt(self._running.pop())
        room = (len(sequence.block_ids) + self._pool.num_free) * self._pool.block_size
        return min(count, room - sequence.num_computed)

    def _reserve(self, sequence: Sequence, count: int) -> ScheduledSequence:
        end = sequence.num_computed + count
        missing = self._config.blocks_for(end) - len(sequence.block_ids)
        if missing > 0:
            sequence.block_ids += self._pool.allocate(missing)
        samples = end == sequence.num_tokens
        return ScheduledSequence(sequence, sequence.num_computed, count, samples, _scored(sequence, end))

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.preemptions_total += 1
        self._waiting.appendleft(sequence)

    def _admit(self, budget: int, prefill: float, scored: int) -> list[ScheduledSequence]:
        rows: list[ScheduledSequence] = []
        while budget > 0 and prefill > 0:
            cached = self._admissible()
            if cached is None or (self._waiting[0].needs_scoring and scored <= 0):
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            self._pool.share(cached)
            sequence.block_ids = cached
            sequence.num_computed = len(cached) * self._pool.block_size
            if sequence.num_preemptions == 0:
                # The cached prefix may extend into an initial output.
                sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_token_ids))
                self.prefix_cache_hit_tokens_total += sequence.num_computed
                self.prefix_cache_query_tokens_total += sequence.num_tokens
            count = min(self._chunk(sequence, prefill), budget, self._scorable(sequence, scored))
            rows.append(self._reserve(sequence, count))
            budget -= rows[-1].num_tokens
            prefill -= self._prefill_cost(rows[-1])
            scored -= len(rows[-1].scored)
        return rows

    def _admissible(self) -> list[int] | None:
        """Return the cached blocks of the first waiting sequence; None if there is none or no room for it."""
        if not self._waiting or len(self._running) >= self._config.max_num_seqs:
            return None
        sequence = self._waiting[0]
        cached = self._find_prefix(sequence)
        # The whole text must fit, not only its first chunk, and each running sequence must be able to grow by
        # a block: otherwise the new sequence would soon be preempted and its prefill wasted. This also
        # excludes sequences that this step has preempted.
        missing = self._config.blocks_for(sequence.num_tokens) - len(cached) + len(self._running)
        return None if missing > self._pool.num_free - self._pool.num_free_among(cached) else cached

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = []

    # ---- prefix cache

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not self._config.enable_prefix_caching:
            return []
        # The last token is always computed: its logits are needed, and the cache holds none.
        count = (sequence.num_tokens - 1) // self._pool.block_size
        if sequence.needs_scoring:
            # The same holds for all positions that are not yet scored.
            count = min(count, len(sequence.prompt_logprobs) // self._pool.block_size)
        self._extend_hashes(sequence, count)
        return self._pool.find(sequence.block_hashes[:count])

    def _publish(self, row: ScheduledSequence) -> None:
        if not self._config.enable_prefix_caching:
            return
        sequence = row.sequence
        first, full = row.start // self._pool.block_size, row.end // self._pool.block_size
        if first == full:
            return
        self._extend_hashes(sequence, full)
        for index in range(first, full):
            self._pool.publish(sequence.block_ids[index], sequence.block_hashes[index])

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, size = sequence.block_hashes, self._pool.block_size
        for index in range(len(hashes), count):
            parent = hashes[-1] if hashes else root_hash(sequence.cache_salt)
            hashes.append(hash_block(parent, sequence.token_ids(index * size, (index + 1) * size)))

    # ---- ends

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.params
        num_outputs = len(sequence.output_token_ids)
        if token_id in params.stop_token_ids and num_outputs > params.min_tokens:
            return FinishReason.STOP
        if token_id in params.end_token_ids:
            return FinishReason.STOP
        if self._is_full(sequence, sequence.num_tokens):
            return FinishReason.LENGTH
        return None

    def _is_full(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return True if the sequence cannot grow beyond this number of tokens."""
        num_outputs = num_tokens - len(sequence.prompt_token_ids)
        return num_outputs >= sequence.params.max_tokens or num_tokens >= self.max_num_tokens

    def _limit(self) -> str:
        if self.max_num_tokens == self._config.max_model_len:
            return f"--max-model-len {self._config.max_model_len}"
        return f"{self._pool.num_blocks} blocks of {self._pool.block_size} tokens, --num-gpu-blocks-override"


def _scored(sequence: Sequence, end: int) -> range:
    """Return the positions before `end` that are not yet scored. The last of the prompt is never scored."""
    if not sequence.needs_scoring:
        return range(0)
    first = len(sequence.prompt_logprobs)
    return range(first, max(first, min(end, len(sequence.prompt_token_ids) - 1)))
