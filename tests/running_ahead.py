"""A runner that runs ahead as a GPU does, on top of one that does not."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from fastdeploy.common.request import Batch, ScheduledSequence
from fastdeploy.device.device import Results, TensorRunner
from fastdeploy.device.draws import Draw


@dataclass
class _Step:
    batch: Batch
    sampled: Draw | None
    scored: Draw | None
    results: Results | None = None
    error: Exception | None = None

    @property
    def is_computed(self) -> bool:
        return self.results is not None or self.error is not None


class RunningAhead:
    """Computes steps in the order of their submission, by chance at once or only when they are awaited."""

    runs_ahead = True

    def __init__(self, runner: TensorRunner, seed: int) -> None:
        self._runner = runner
        self._random = random.Random(seed)
        self._steps: deque[_Step] = deque()
        #: Tokens that the latest step has drawn; empty if it has failed.
        self._drawn: list[int] = []
        self.num_ahead = 0

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> _Step:
        assert len(self._steps) < 2, "two steps are in progress already"
        self.num_ahead += len(self._steps)
        step = _Step(Batch(tuple(map(_copied, batch.rows))), sampled, scored)
        self._steps.append(step)
        if self._random.random() < 0.5:
            self._compute()
        return step

    def wait(self, ticket: _Step) -> Results:
        assert ticket is self._steps[0], "steps are awaited in the order of submission"
        self._compute(1)
        self._steps.popleft()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.results is not None
        return ticket.results

    def _compute(self, count: int = 2) -> None:
        for step in [step for step in list(self._steps)[:count] if not step.is_computed]:
            batch = Batch(tuple(map(self._with_token, step.batch.rows)))
            try:
                step.results = self._runner.submit(batch, step.sampled, step.scored)
                drawn, _ = step.results
                self._drawn = [] if drawn is None else drawn.token_ids
            except Exception as error:
                step.error, self._drawn = error, []

    def _with_token(self, row: ScheduledSequence) -> ScheduledSequence:
        if row.drawn_by is None:
            return row
        drawn = self._drawn[row.drawn_by] if self._drawn else 0
        # A row without finite logits draws no token.
        row.sequence.output_token_ids.append(max(drawn, 0))
        return replace(row, drawn_by=None)


def _copied(row: ScheduledSequence) -> ScheduledSequence:
    """Return the row with the tokens and blocks that its sequence has now."""
    sequence = row.sequence
    copied = replace(sequence, output_token_ids=[*sequence.output_token_ids], block_ids=[*sequence.block_ids])
    return replace(row, sequence=copied)
