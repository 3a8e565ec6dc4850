"""One client request on its way through the engine, in whatever shape its answer is going to have."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from ...errors import FastDeployError
from ...messages import AddRequest
from ...request import FinishReason
from ..client_watch import watch
from .access_log import AccessRecord
from .output import ChoiceOutput, Delta
from .protocol import GenerationRequest
from .replica import Replica

# Two requests at once may carry one client's id; the engine's ids must differ.
_serial = itertools.count()


class GenerationFailed(FastDeployError):
    """The engine gave up on a sequence, through no fault of the client."""


class Answer:
    """The choices of one request: n for each prompt, prompt by prompt. Leave it (``with``) in any case.

    Raises:
        ApiError: a prompt is empty, has unknown token ids or is too long.
        ReplicaUnavailable: the engine is not ready.
    """

    def __init__(
        self,
        replica: Replica,
        request: GenerationRequest,
        prompts: list[list[int]],
        *,
        record: AccessRecord,
        seed: int,
        client: socket.socket | None,
    ) -> None:
        self.replica = replica
        self.request = request
        self.prompts = prompts
        self.created = int(time.time())
        self._record = record
        self._num_cached: dict[int, int] = {}
        self._ended = False

        engine_id = f"{record.request_id}.{next(_serial):x}"
        additions = []
        self._outputs: list[ChoiceOutput] = []
        for index in range(len(prompts) * request.n):
            prompt = prompts[index // request.n]
            params = request.sampling_params(
                max_tokens=replica.tokens_left(prompt, request.max_tokens, request.prompt_field),
                seed=seed,
                choice=index,
                eos_token_ids=replica.tokenizer.eos_token_ids,
            )
            additions.append(AddRequest(f"{engine_id}-{index}", prompt, params, time.time()))
            self._outputs.append(
                ChoiceOutput(
                    replica.tokenizer.detokenizer(continues=request.continues_prompt),
                    stop=request.stop,
                    include_stop=request.include_stop_str_in_output,
                    min_tokens=request.min_tokens,
                )
            )
        self._indexes = {addition.request_id: index for index, addition in enumerate(additions)}
        record.prompt_tokens = sum(map(len, prompts))
        with ExitStack() as stack:
            self._generation = stack.enter_context(replica.engine.generate(additions))
            if client is not None:
                stack.enter_context(watch(client, self._generation.cancel))
            self._resources = stack.pop_all()
        replica.metrics.requests.inc()
        replica.metrics.prompt_tokens.inc(record.prompt_tokens)
        replica.metrics.max_tokens.observe(additions[0].params.max_tokens)

    @property
    def id(self) -> str:
        return self._record.request_id

    def deltas(self) -> Iterator[tuple[int, Delta]]:
        """What may be shown, as it comes: (index of the choice, delta). The last one has a finish reason."""
        for output in self._generation:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise GenerationFailed(output.message or "the engine gave this request up")
            index = self._indexes[output.request_id]
            choice = self._outputs[index]
            if not choice.num_tokens:
                self._num_cached[index] = output.num_cached
            delta = choice.push(output)
            self._record.token_drawn()
            if choice.finish_reason is not None:
                # A stop string ends a choice that the engine would go on with.
                self._generation.stop(output.request_id)
                self._record.finish_reasons.append(choice.finish_reason)
            if delta:
                yield index, delta

    def usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.prompts))
        completion = sum(output.num_tokens for output in self._outputs)
        # The choices of one prompt share it: it was sent, and is counted, once.
        cached = sum(self._num_cached.get(i * self.request.n, 0) for i in range(len(self.prompts)))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def close(self) -> None:
        """Frees what the engine still holds, and accounts for the request."""
        if self._ended:
            return
        self._ended = True
        self._resources.close()
        record, metrics = self._record, self.replica.metrics
        record.output_tokens = sum(output.num_tokens for output in self._outputs)
        metrics.generation_tokens.inc(record.output_tokens)
        metrics.whole.observe(record.seconds)
        for prompt in self.prompts:
            metrics.prompt_length.observe(len(prompt))
        if record.first_token_seconds is not None:
            metrics.first_token.observe(record.first_token_seconds)
        if len(record.finish_reasons) < len(self._outputs):
            if record.status == 200 and record.error is None:
                # It had been sent before the client went.
                record.status = 499
        else:
            metrics.successes.inc()
            for output in self._outputs:
                metrics.generation_length.observe(output.num_tokens)
            if (pace := record.seconds_per_token(len(self._outputs))) is not None:
                metrics.per_token.observe(pace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
