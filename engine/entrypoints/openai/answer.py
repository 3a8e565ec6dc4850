"""One client request on its way through the engine, in whatever shape its answer is going to have."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import msgspec

from ...common.errors import FastDeployError
from ...common.messages import AddRequest, Logprobs
from ...common.request import FinishReason, SamplingParams
from ...common.resumption import Delivered, Resumption, draft_lines, mark
from ..client_watch import watch
from .access_log import AccessRecord
from .errors import ApiError
from .output import ChoiceOutput, Contradiction, Delta
from .progress import Progress
from .protocol import GenerationRequest
from .replica import Replica

# Two requests at once may carry one client's id; the engine's ids must differ.
_serial = itertools.count()
#: In place of a delta: nothing has come, but it is time for a sign of life.
NOTHING = Delta("", (), ())
#: Tokens in one interim head, about: a router reads heads of 128 KiB. The rest is for the next one.
_MOST_DRAFTED = 8192
#: Between two times at which the router is told of an answer that comes whole.
_DRAFT_SECONDS = 1.0


class GenerationFailed(FastDeployError):
    """The engine gave up on a sequence, through no fault of the client."""


class Answer:
    """The choices of one request: n for each prompt, prompt by prompt. Leave it (``with``) in any case.

    Args:
        marked: a router wants to be told which tokens are behind each event, or of an answer that comes
            whole every second which ones there are.
        resumption: what another replica has drawn already. Its tokens are taken up as if they had been drawn
            here, but `deltas` does not give them out again.

    Raises:
        ApiError: a prompt is empty, has unknown token ids or is too long; or `resumption` does not fit.
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
        created: int,
        client: socket.socket | None,
        marked: bool,
        progress: Progress | None,
        resumption: Resumption | None,
    ) -> None:
        self.replica = replica
        self.request = request
        self.prompts = prompts
        self.created = created
        self.id = f"{request.id_prefix}-{record.request_id}" if resumption is None else resumption.id
        #: Of each choice that another replica has begun, what it has sent, or would have.
        self.sent: dict[int, Delta] = {}
        self._record = record
        self._is_marked = marked
        self._progress = progress
        self._num_cached: dict[int, int] = {}
        #: By choice; filled by its first output if the request asks for them.
        self._prompt_logprobs: dict[int, list[Logprobs]] = {}
        #: When each choice got its latest token, in seconds since the request's arrival.
        self._last_drawn: dict[int, float] = {}
        self._ended = False

        engine_id = f"{record.request_id}.{next(_serial):x}"
        additions = []
        self._outputs: list[ChoiceOutput] = []
        self._indexes: dict[str, int] = {}
        begun = {} if resumption is None else resumption.choices
        if begun and max(begun) >= len(prompts) * request.n:
            raise _not_resumable(f"it has no choice {max(begun)}")
        for index in range(len(prompts) * request.n):
            prompt = prompts[index // request.n]
            params = request.sampling_params(
                max_tokens=replica.tokens_left(prompt, request.max_tokens, request.prompt_field),
                seed=seed,
                choice=index,
                eos_token_ids=replica.tokenizer.eos_token_ids,
            )
            output = ChoiceOutput(
                replica.tokenizer.detokenizer(continues=request.continues_prompt),
                stop=request.stop,
                include_stop=request.include_stop_str_in_output,
                min_tokens=request.min_tokens,
                tells_stop_token=request.prompt_logprobs is not None,
            )
            self._outputs.append(output)
            addition = AddRequest(f"{engine_id}-{index}", prompt, params, time.time())
            if index in begun:
                self._take_up(index, begun[index], params)
                if begun[index].finished:
                    continue
                known = output.token_ids[: output.num_tokens - output.num_repeated]
                # The client already has the log probabilities of the prompt.
                params = msgspec.structs.replace(params, prompt_logprobs=None)
                addition = msgspec.structs.replace(addition, params=params, output_token_ids=known)
            additions.append(addition)
            self._indexes[addition.request_id] = index
        self._num_marked = [output.num_tokens for output in self._outputs]
        #: Tokens of choices that have finished, but for those of the last step.
        self._num_before_end: dict[int, int] = {}
        if marked and progress is not None and not request.stream:
            progress.hasten(_DRAFT_SECONDS)
        record.prompt_tokens = sum(map(len, prompts))
        record.resumed_tokens = sum(self._num_marked)
        with ExitStack() as stack:
            self._generation = stack.enter_context(
                replica.engine.generate(additions, None if progress is None else progress.patience)
            )
            if client is not None:
                stack.enter_context(watch(client, self._generation.cancel))
            self._resources = stack.pop_all()
        replica.metrics.requests.inc()
        replica.metrics.prompt_tokens.inc(record.prompt_tokens)
        replica.metrics.max_tokens.observe(params.max_tokens)

    def deltas(self) -> Iterator[tuple[int, Delta]]:
        """What may be shown, as it comes: (index of the choice, delta). The last one has a finish reason.

        In a stream that wants signs of life `NOTHING` means that one is due.
        """
        progress, is_stream = self._progress, self.request.stream
        has_begun = False
        for output in self._generation:
            if output is not None:
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise GenerationFailed(output.message or "the engine gave this request up")
                index = self._indexes[output.request_id]
                choice = self._outputs[index]
                if index not in self._num_cached:
                    self._num_cached[index] = output.num_cached
                if output.prompt_logprobs is not None:
                    self._prompt_logprobs[index] = output.prompt_logprobs
                before = choice.num_tokens
                delta = choice.push(output)
                if choice.num_tokens > before:
                    self._count(index, choice.num_tokens - before)
                if choice.finish_reason is not None:
                    self._num_before_end[index] = before
                    # A stop string ends a choice that the engine would go on with.
                    self._generation.stop(output.request_id)
                    self._record.finish_reasons.append(choice.finish_reason)
                if delta:
                    yield index, delta
                    if is_stream:
                        has_begun = True
                        if progress is not None:
                            progress.spoke()
                        continue
            if progress is not None and progress.is_due():
                if has_begun:
                    yield 0, NOTHING
                    progress.spoke()
                else:
                    progress.send_interim_head(b"" if is_stream else self._draft())

    def whole(self) -> list[list[Delta]]:
        """All that there is to show, of each choice."""
        parts = [[self.sent[index]] if index in self.sent else [] for index in range(len(self._outputs))]
        for index, delta in self.deltas():
            parts[index].append(delta)
        return parts

    def prompt_logprobs(self, index: int) -> list[Logprobs]:
        """Return the log probabilities of the prompt of a begun choice, from the second token on."""
        return self._prompt_logprobs[index]

    def mark(self, index: int, delta: Delta | None = None) -> bytes:
        """What stands behind the event of this delta, or behind one without text that opens a choice."""
        if not self._is_marked:
            return b""
        if delta is None:
            return mark(index)
        token_ids = self._outputs[index].token_ids
        start, self._num_marked[index] = self._num_marked[index], len(token_ids)
        return mark(index, token_ids[start:], finished=delta.finish_reason is not None)

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

    def usage_so_far(self, index: int, *, has_begun: bool = True) -> dict[str, Any]:
        """Return the field `usage` for an event of this choice; nothing unless the request asks for it.

        It has no counts of a replica's cache, so that a resumed stream continues with the same counts.

        Args:
            has_begun: False for an event without tokens that opens the choice.
        """
        if not self.request.continuous_usage:
            return {}
        prompt = len(self.prompts[index // self.request.n])
        completion = self._outputs[index].num_tokens if has_begun else 0
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        }

    def close(self) -> None:
        """Frees what the engine still holds, and accounts for the request."""
        if self._ended:
            return
        self._ended = True
        self._resources.close()
        record, metrics = self._record, self.replica.metrics
        record.output_tokens = sum(output.num_tokens for output in self._outputs) - record.resumed_tokens
        metrics.whole.observe(record.seconds)
        for prompt in self.prompts:
            metrics.prompt_length.observe(len(prompt))
        if len(record.finish_reasons) < len(self._indexes):
            if record.status == 200 and record.error is None:
                # It had been sent before the client went.
                record.status = 499
        else:
            metrics.successes.inc()
            for output in self._outputs:
                metrics.generation_length.observe(output.num_tokens)

    def _count(self, index: int, num_tokens: int) -> None:
        """What a step has drawn for this choice. At once: an answer may take minutes, and its load is now."""
        record, metrics = self._record, self.replica.metrics
        seconds = record.seconds
        if record.first_token_seconds is None:
            record.first_token_seconds = seconds
            metrics.first_token.observe(seconds)
        if index in self._last_drawn:
            metrics.per_token.observe(seconds - self._last_drawn[index])
        self._last_drawn[index] = seconds
        metrics.generation_tokens.inc(num_tokens)

    def _draft(self) -> bytes:
        """For an interim head: what has been drawn since the last one. Of a choice that has finished the last
        step is left out: whoever takes this up draws it again, and sees by that why it has finished."""
        if not self._is_marked:
            return b""
        new: dict[int, list[int]] = {}
        room = _MOST_DRAFTED
        for index, output in enumerate(self._outputs):
            start, end = self._num_marked[index], self._num_before_end.get(index, output.num_tokens)
            end = min(end, start + room)
            if end > start:
                room -= end - start
                self._num_marked[index] = end
                new[index] = output.token_ids[start:end]
        return draft_lines(self.created, self.id, new) if new else b""

    def _take_up(self, index: int, delivered: Delivered, params: SamplingParams) -> None:
        tokens, output = delivered.tokens, self._outputs[index]
        if delivered.finished and not self.request.stream:
            raise _not_resumable(f"choice {index} has finished, and how is known to nobody")
        if delivered.finished:
            output.token_ids = tokens
            self.sent[index] = NOTHING
            return
        if max(tokens, default=0) >= self.replica.model.vocab_size:
            raise _not_resumable(f"choice {index} has token {max(tokens)}, which this model does not have")
        # With max_tokens 0 a choice begins with its prompt and ends without a token.
        if len(tokens) >= max(1, params.max_tokens):
            raise _not_resumable(f"choice {index} has {len(tokens)} tokens, of {params.max_tokens} at most")
        try:
            self.sent[index] = output.replay(tokens, with_logprobs=params.logprobs is not None)
        except Contradiction as error:
            raise _not_resumable(f"choice {index}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _not_resumable(why: str) -> ApiError:
    return ApiError(409, f"this answer cannot be resumed here: {why}")
