"""The engine: accepts requests, and computes one batch of tokens per step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..common.errors import FastDeployError, RequestError
from ..common.messages import AddRequest, ExpertParallelStats, Logprobs, Stats, StepOutputs, TokenOutput
from ..common.request import Batch, FinishReason, Sequence
from ..config import EngineConfig, ModelConfig
from ..device.device import Runner, Ticket
from ..device.draws import Draw, Drawn
from ..device.errors import DeviceBroken
from ..expert_parallel.membership import RankLost
from .block_pool import BlockPool
from .sampler import Sampled, Sampler
from .scheduler import Scheduler

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from ..grammar.matchers import Grammars

_log = logging.getLogger(__name__)

#: A bad request or a brief lack of memory fails one step. After this many consecutive failures the process is
#: considered broken and should be restarted.
_MAX_FAILED_STEPS = 3
#: Time to wait for a grammar while there is nothing to compute; messages wait as long.
_COMPILE_SECONDS = 0.01


class EngineBroken(FastDeployError):
    """Too many consecutive steps have failed; the process should be restarted."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A submitted step."""

    batch: Batch
    draw: Draw | None = None
    scores: Draw | None = None
    ticket: Ticket = None
    #: Why it could not be submitted.
    error: Exception | None = None


class EngineCore:
    """Scheduler, runner and sampler combined. Single-threaded; the caller decides when to step."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        runner: Runner,
        num_blocks: int,
        grammars: Grammars | None = None,
    ) -> None:
        self._config = config
        #: Reads the statistics of the expert-parallel group; None without a group.
        self.read_group: Callable[[], ExpertParallelStats] | None = None
        self._vocab_size = model_config.vocab_size
        self._runner = runner
        self._pool = BlockPool(num_blocks, config.block_size)
        self._scheduler = Scheduler(config, self._pool, model_config.context_of_double_cost())
        self._sampler = Sampler(model_config.vocab_size, grammars)
        self._grammars = grammars
        #: Sequences whose grammar is being compiled; not queued yet.
        self._compiling: dict[str, tuple[Sequence, Future[LLMatcher]]] = {}
        #: Keeps the grammars of live sequences compiled.
        self._compiled: WeakKeyDictionary[Sequence, Future[LLMatcher]] = WeakKeyDictionary()
        #: The step after the one that `step` has returned last, if it is being computed already.
        self._ahead: _Step | None = None
        # Errors of requests that were not queued; sent with the outputs of the next step.
        self._refusals: list[TokenOutput] = []
        self._steps_total = 0
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        scheduler = self._scheduler
        return bool(
            self._ahead or self._refusals or self._compiling or scheduler.num_running or scheduler.num_waiting
        )

    def add(self, request: AddRequest) -> None:
        """Queue a request. An invalid request gets an error in the outputs of the next step."""
        try:
            self._add(request)
        except RequestError as error:
            self._refusals.append(_error(request.request_id, str(error)))
        except Exception as error:
            # It must not end the engine loop, and with it all other requests.
            _log.error("request=%s cannot be queued", request.request_id, exc_info=error)
            self.abort([request.request_id])
            self._refusals.append(_error(request.request_id, "the engine failed to queue this request"))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Free all resources of these requests immediately; they get no further output."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            self._compiling.pop(request_id, None)
        self._scheduler.abort(request_ids)

    def step(self) -> StepOutputs:
        """Compute one batch. If that fails, its requests end with an error and the engine continues.

        If the device allows it, the batch after it is submitted before the results are awaited.

        Raises:
            EngineBroken: too many consecutive steps have failed.
            RankLost: the other ranks continue without this one.
            DeviceBroken: the device computes no more in this process.
        """
        self._queue_compiled()
        outputs, self._refusals = self._refusals, []
        step = self._ahead
        if step is None:
            batch = self._scheduler.schedule()
            if not batch:
                return StepOutputs(outputs, self._stats(batch_tokens=0))
            step = self._submit(batch)
        self._ahead = self._submit_ahead(step) if self._runner.runs_ahead else None
        self._steps_total += 1
        outputs += self._finish(step)
        return StepOutputs(outputs, self._stats(step.batch.num_tokens))

    def on_idle(self) -> StepOutputs:
        """Check the bookkeeping of the cache and return statistics. Call it when there is no work.

        Raises:
            AssertionError: the bookkeeping is inconsistent. Continuing could mix up texts.
        """
        self._scheduler.check()
        return StepOutputs([], self._stats(batch_tokens=0))

    def _add(self, request: AddRequest) -> None:
        request_id, prompt = request.request_id, request.prompt_token_ids
        if request_id in self._scheduler or request_id in self._compiling:
            # The API process cannot tell the two apart, so both must end.
            self.abort([request_id])
            raise RequestError(f"request id {request_id!r} is in use already; ids must be unique")
        # An id outside of the embedding would fail the whole batch.
        for token_ids in (prompt, request.output_token_ids):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                raise RequestError(f"the prompt has token ids outside of 0..{self._vocab_size - 1}", "prompt")
        sequence = Sequence(
            request_id,
            prompt,
            request.params,
            request.arrival_time,
            [*request.output_token_ids],
            cache_salt=request.cache_salt,
        )
        if request.params.grammar is None:
            self._scheduler.add(sequence)
        elif self._grammars is None:
            raise RequestError("this engine has no vocabulary for a grammar")
        else:
            compiled = self._grammars.compile(request.params.grammar)
            self._compiling[request_id] = sequence, compiled
            self._compiled[sequence] = compiled

    def _queue_compiled(self) -> None:
        """Queue the sequences whose grammar is ready. Others need not wait for a grammar."""
        if not self._compiling:
            return
        if not self._scheduler.num_running and not self._scheduler.num_waiting:
            wait([compiled for _, compiled in self._compiling.values()], _COMPILE_SECONDS, FIRST_COMPLETED)
        ready = [(sequence, compiled) for sequence, compiled in self._compiling.values() if compiled.done()]
        for sequence, compiled in ready:
            del self._compiling[sequence.request_id]
            try:
                compiled.result()
                self._scheduler.add(sequence)
            except FastDeployError as error:
                is_refused = isinstance(error, RequestError)
                self._refusals.append(_error(sequence.request_id, str(error), is_refused=is_refused))

    def _submit(self, batch: Batch, *, ahead: bool = False) -> _Step:
        sampler = self._sampler
        sequences = [row.sequence for row in batch.rows if row.samples]
        rows = [row for row in batch.rows if row.scored]
        try:
            draw = sampler.draw(sequences, ahead=ahead) if sequences else None
            scores = sampler.scores(rows) if rows else None
            return _Step(batch, draw, scores, self._runner.submit(batch, draw, scores))
        except (RankLost, DeviceBroken):
            raise
        except Exception as error:
            return _Step(batch, error=error)

    def _submit_ahead(self, step: _Step) -> _Step | None:
        """Submit the step after `step`, which is being computed; None if its results are needed for that."""
        if step.error is not None:
            return None
        if not all(self._sampler.draws_ahead(row.sequence) for row in step.batch.rows):
            return None
        batch = self._scheduler.schedule_ahead(step.batch)
        return self._submit(batch, ahead=True) if batch else None

    def _finish(self, step: _Step) -> list[TokenOutput]:
        """Wait for a step and commit it, without the rows of sequences that have ended since."""
        rows = step.batch.rows
        kept = [index for index, row in enumerate(rows) if self._scheduler.holds(row.sequence)]
        batch = step.batch if len(kept) == len(rows) else Batch(tuple(rows[index] for index in kept))
        try:
            if step.error is not None:
                raise step.error
            drawn, scored = self._runner.wait(step.ticket)
            draw = step.draw
            if batch is not step.batch and draw is not None and drawn is not None:
                # Each row of a step that was submitted ahead draws a token.
                draw, drawn = draw.select(kept), drawn.select(kept)
            sampled, prompt_logprobs = self._read(batch, (draw, drawn), (step.scores, scored))
        except (RankLost, DeviceBroken):
            raise
        except Exception as error:
            # If the step before has failed, it has no rows left.
            return self._fail(batch, error) if batch else []
        if batch:
            self._failed_steps = 0
        return self._commit(batch, sampled, prompt_logprobs)

    def _read(
        self,
        batch: Batch,
        sampling: tuple[Draw | None, Drawn | None],
        scoring: tuple[Draw | None, Drawn | None],
    ) -> tuple[list[Sampled], list[Logprobs]]:
        sampler = self._sampler
        sampled: list[Sampled] = []
        prompt_logprobs: list[Logprobs] = []
        draw, drawn = sampling
        if draw is not None and drawn is not None:
            sampled = sampler.sampled(draw, drawn, [row.sequence for row in batch.rows if row.samples])
        draw, drawn = scoring
        if draw is not None and drawn is not None:
            prompt_logprobs = sampler.scored(draw, drawn, [row for row in batch.rows if row.scored])
        return sampled, prompt_logprobs

    def _commit(
        self, batch: Batch, sampled: list[Sampled], prompt_logprobs: list[Logprobs]
    ) -> list[TokenOutput]:
        sequences = [row.sequence for row in batch.rows if row.samples]
        reasons = self._scheduler.commit(batch, [one.token_id for one in sampled], prompt_logprobs)
        outputs = []
        for sequence, one, reason in zip(sequences, sampled, reasons, strict=True):
            if one.error is None:
                outputs.append(_output(sequence, one, reason))
            else:
                self._scheduler.abort([sequence.request_id])
                outputs.append(_error(sequence.request_id, one.error, is_refused=True))
        return outputs

    def _fail(self, batch: Batch, error: Exception) -> list[TokenOutput]:
        self._failed_steps += 1
        request_ids = [row.sequence.request_id for row in batch.rows]
        _log.error(
            "step failed, %s tokens, requests %s", batch.num_tokens, " ".join(request_ids), exc_info=error
        )
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise EngineBroken(f"{self._failed_steps} consecutive steps have failed, the last with {error!r}")
        self._scheduler.abort(request_ids)
        return [
            _error(request_id, "the engine failed while computing this request") for request_id in request_ids
        ]

    def _stats(self, batch_tokens: int) -> Stats:
        scheduler = self._scheduler
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            preemptions_total=scheduler.preemptions_total,
            prefix_cache_hit_tokens_total=scheduler.prefix_cache_hit_tokens_total,
            prefix_cache_query_tokens_total=scheduler.prefix_cache_query_tokens_total,
            steps_total=self._steps_total,
            batch_tokens=batch_tokens,
            max_num_seqs=self._config.max_num_seqs,
            expert_parallel=None if self.read_group is None else self.read_group(),
        )


def _output(sequence: Sequence, sampled: Sampled, reason: FinishReason | None) -> TokenOutput:
    params = sequence.params
    is_first = len(sequence.output_token_ids) <= 1
    # With max_tokens 0 the prompt is only scored, and the drawn token is discarded.
    is_kept = params.max_tokens > 0
    return TokenOutput(
        request_id=sequence.request_id,
        token_ids=[sampled.token_id] if is_kept else [],
        finish_reason=reason,
        logprobs=[sampled.logprobs] if is_kept and sampled.logprobs is not None else None,
        num_cached=sequence.num_cached,
        prompt_logprobs=sequence.prompt_logprobs if is_first and params.prompt_logprobs is not None else None,
    )


def _error(request_id: str, message: str, *, is_refused: bool = False) -> TokenOutput:
    return TokenOutput(request_id, [], FinishReason.ERROR, message=message, is_refused=is_refused)
