"""The prompts of one call of `LLM`, from their tokens to their outputs."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ...common.errors import ReplicaUnavailable, RequestError
from ...tokenizer.tokenizer import Tokenizer
from ..openai.access_log import AccessRecord
from ..openai.chat_parts import ParsedChoice, parsed_choices
from ..openai.errors import ApiError
from ..openai.generation import Generation
from ..openai.output import Delta
from ..openai.protocol import GenerationRequest
from .offline_engine import OfflineEngine, WorkerLost
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

#: Prompts in the engine at a time, for each sequence of a step: the next ones are ready when some end.
_PROMPTS_PER_SEQUENCE = 2
_MAX_THREADS = 512
#: Interval at which requests that begin during an abort are aborted too.
_ABORT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """A request with one prompt."""

    #: In errors.
    name: str
    request: GenerationRequest
    prompt: str | list[int]
    token_ids: list[int]
    seed: int


class JobRunner:
    """Computes jobs side by side."""

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._open: set[Generation] = set()

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> list[RequestOutput]:
        """Return the outputs of all jobs in their order.

        After an error or Ctrl-C, jobs in progress end early.

        Args:
            advance: called with the number of jobs that have ended.

        Raises:
            ValueError: the engine refuses a job.
            FastDeployError: the worker has failed, or gave up on a job.
        """
        limit = _PROMPTS_PER_SEQUENCE * self._engine.served.config.engine.max_num_seqs
        with ThreadPoolExecutor(max(1, min(len(jobs), limit, _MAX_THREADS)), "llm") as pool:
            futures = [pool.submit(self._compute, job) for job in jobs]
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    advance(len(done))
                    for future in done:
                        future.result()
            except BaseException:
                self._abort(futures)
                raise
        return [output for future in futures for output in future.result()]

    def _compute(self, job: Job) -> list[RequestOutput]:
        record = AccessRecord(uuid.uuid4().hex, "LLM", "")
        arrival_time = time.time()
        try:
            with Generation(
                self._engine.served,
                job.request,
                [job.token_ids],
                record=record,
                seed=job.seed,
                created=int(arrival_time),
                client=None,
                marked=False,
                keep_alive=None,
                resumption=None,
            ) as generation:
                with self._lock:
                    self._open.add(generation)
                try:
                    parsed = parsed_choices(generation)
                    deltas = generation.all_deltas()
                finally:
                    with self._lock:
                        self._open.discard(generation)
        except (RequestError, ApiError) as error:
            raise ValueError(f"{job.name}: {error}") from None
        except ReplicaUnavailable as error:
            self._engine.require_alive()
            raise WorkerLost(str(error)) from None
        metrics = RequestMetrics(arrival_time, record.first_token_seconds, record.seconds)
        cached: int = generation.usage()["prompt_tokens_details"]["cached_tokens"]
        tokenizer = self._engine.served.tokenizer
        return [
            RequestOutput(
                generation.id,
                job.prompt,
                job.token_ids,
                _output(
                    job.request, tokenizer, index, Delta.joined(parts), parsed[index] if parsed else None
                ),
                metrics,
                cached,
            )
            for index, parts in enumerate(deltas)
        ]

    def _abort(self, futures: Sequence[Future[list[RequestOutput]]]) -> None:
        """End the jobs in progress and drop the others."""
        running = {future for future in futures if not future.cancel()}
        while running:
            with self._lock:
                for generation in self._open:
                    generation.abort()
            running = wait(running, _ABORT_SECONDS).not_done


def _output(
    request: GenerationRequest,
    tokenizer: Tokenizer,
    index: int,
    whole: Delta,
    parsed: ParsedChoice | None,
) -> CompletionOutput:
    text, reasoning = whole.text, None
    if parsed is not None:
        message = parsed.message(parsed.push(text, whole.finish_reason))
        text, reasoning = message["content"] or "", message.get("reasoning_content")
    assert whole.finish_reason is not None, "the choice has ended"
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=list(whole.token_ids),
        finish_reason=str(whole.finish_reason),
        stop_reason=whole.stop_reason,
        reasoning_content=reasoning,
        logprobs=None if request.logprobs is None else _logprobs(tokenizer, whole),
    )


def _logprobs(tokenizer: Tokenizer, whole: Delta) -> list[dict[int, Logprob]]:
    positions = []
    for entry in whole.logprobs:
        position = {entry.token_id: Logprob(entry.logprob, None, tokenizer.token_text(entry.token_id))}
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            position[token_id] = Logprob(logprob, rank, tokenizer.token_text(token_id))
        positions.append(position)
    return positions
