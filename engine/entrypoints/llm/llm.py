"""`LLM`: generation in a script, by a worker like that of a server."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from ...common.errors import ConfigError, RequestError
from ..openai.chat import chat_prompts
from ..openai.completions import completion_prompts
from ..openai.errors import ApiError
from ..openai.flask_request import MAX_SEED
from ..openai.logprob_limits import check_logprobs
from ..openai.options import parse_arguments
from ..openai.protocol import ChatRequest, CompletionRequest
from ..progress import progress_bar
from .jobs import Job, JobRunner
from .offline_engine import OfflineEngine
from .outputs import RequestOutput
from .sampling_params import SamplingParams

Message = dict[str, Any]
#: A text, token ids, or an object with `prompt` or `prompt_token_ids`.
Prompt = str | list[int] | dict[str, Any]


class LLM:
    """A model in a worker process of this one.

    Leave it (``with``) or close it to stop the worker, which otherwise ends with this process. The methods
    may be called from several threads.

    Args:
        model: directory of a checkpoint, or "demo".
        settings: flags of `fastdeploy serve` with underscores, such as ``max_model_len=4096``.

    Raises:
        ValueError: a setting is unknown or has a wrong value.
        FastDeployError: the model cannot be loaded.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        try:
            config = parse_arguments(_flags({"model": model, **settings}), "fastdeploy serve")
        except ConfigError as error:
            raise ValueError(f"LLM: {error}") from None
        self._engine = OfflineEngine(config)
        try:
            self._engine.wait_ready()
        except BaseException:
            self._engine.close(0.0)
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Return the continuations of one or several prompts, in their order.

        Args:
            sampling_params: for all prompts, or one for each.
            use_tqdm: show the progress on standard error if that is a terminal.

        Raises:
            ValueError: a prompt or a parameter is wrong; the message names the prompt.
            FastDeployError: the worker has failed.
        """
        given = list(prompts) if _are_several(prompts) else [prompts]
        jobs = []
        for index, (prompt, params) in enumerate(_paired(given, sampling_params)):
            content = _content(prompt, f"prompts[{index}]")
            fields = {**params.request_fields(), "prompt": content}
            # Only chats have reasoning.
            fields.pop("reasoning_max_tokens", None)
            jobs.append(self._job(f"prompts[{index}]", CompletionRequest, fields))
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Return the next message of one or several conversations, in their order.

        Args:
            messages: a conversation, or a list of conversations.
            chat_template_kwargs: further variables of the chat template.
            chat_template: replaces the template of the model.

        The other arguments and the errors are those of `generate`.
        """
        given = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        template = {"chat_template_kwargs": chat_template_kwargs, "chat_template": chat_template}
        jobs = []
        for index, (conversation, params) in enumerate(_paired(given, sampling_params)):
            fields = {**params.request_fields(), **template, "messages": conversation}
            if params.logprobs is not None:
                fields |= {"logprobs": True, "top_logprobs": params.logprobs}
            jobs.append(self._job(f"messages[{index}]", ChatRequest, fields))
        return self._run(jobs, use_tqdm)

    def close(self) -> None:
        """Stop the worker. Calls in other threads end with an error."""
        self._engine.close()

    def _job(
        self, name: str, kind: type[CompletionRequest] | type[ChatRequest], fields: dict[str, Any]
    ) -> Job:
        """Check a request and tokenize its prompt, as the server does. Raises ValueError."""
        served = self._engine.served
        try:
            request = kind.parse(fields, served.defaults)
            prompt: str | list[int]
            if isinstance(request, ChatRequest):
                [token_ids] = chat_prompts(served, request, int(time.time()), None)
                prompt = served.tokenizer.decode(token_ids, skip_special_tokens=False)
            else:
                [prompt], [token_ids] = request.prompts, completion_prompts(served, request)
            served.tokens_left(token_ids, request.max_tokens, request.prompt_field)
            check_logprobs(served, request, [token_ids])
        except (RequestError, ApiError) as error:
            raise ValueError(f"{name}: {error}") from None
        seed = served.seeds.draw() if request.seed is None else request.seed
        return Job(name, request, prompt, token_ids, seed & MAX_SEED)

    def _run(self, jobs: list[Job], show_progress: bool) -> list[RequestOutput]:
        with progress_bar("Processed prompts", len(jobs), enabled=show_progress) as advance:
            return JobRunner(self._engine).run(jobs, advance)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, trace)


def _flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is False and name == "enable_prefix_caching":
            # The only flag that is on by default.
            words.append("--no-enable-prefix-caching")
        elif value is not None and value is not False:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            words.append(f"{flag}={text}")
    return words


def _are_several(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return True for a sequence of prompts; token ids are one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return False
    return not (prompts and isinstance(prompts[0], int))


def _content(prompt: Any, name: str) -> str | list[int]:
    """Return the text or the token ids of a prompt. Raises ValueError."""
    if isinstance(prompt, dict):
        if prompt.get("multimodal_data"):
            raise ValueError(f"{name}: this engine reads text only; leave out multimodal_data")
        found = prompt.get("prompt_token_ids") or prompt.get("prompt")
    else:
        found = prompt
    if isinstance(found, str):
        return found
    if isinstance(found, Sequence) and all(isinstance(token_id, int) for token_id in found):
        return list(found)
    raise ValueError(
        f"{name} is a {type(prompt).__name__}; it must be a text, a list of token ids, or an object with "
        "prompt or prompt_token_ids"
    )


def _paired(
    prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Any, SamplingParams]]:
    """Return each prompt with its parameters."""
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in prompts]
    if len(params) != len(prompts):
        raise ValueError(
            f"sampling_params has {len(params)} entries for {len(prompts)} prompts; "
            "give one for all, or one for each"
        )
    return list(zip(prompts, params, strict=True))
