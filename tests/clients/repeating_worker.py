"""A worker whose text is the prompt, so that a test can choose what the model says.

A padding token in the prompt ends it. The seed of a request decides how many tokens come in each step; with
seed 0 it is one.
"""

import itertools
import os
import random

from fastdeploy.common.messages import AddRequest, Hello, Logprobs, Ready, Stats, StepOutputs, TokenOutput
from fastdeploy.common.request import FinishReason
from fastdeploy.core.worker import ApiLink

_STATS = Stats(1, 0, 64, 63, 0, 0, 0, 1, 1, 8)
#: Tokens of the tiny checkpoint.
_PADDING, _END = 0, 2


def main() -> None:
    with ApiLink(os.environ["FD_WORKER_ENDPOINT"]) as api:
        api.send(Hello(os.environ["FD_WORKER_TOKEN"], os.getpid()))
        api.send(Ready(num_blocks=512, block_size=64, max_model_len=1 << 15))
        while not api.stopping:
            for message in api.receive(wait=True):
                if isinstance(message, AddRequest):
                    for output in _steps(message):
                        api.send(StepOutputs([output], _STATS))


def _steps(request: AddRequest) -> list[TokenOutput]:
    params = request.params
    text = itertools.takewhile(lambda token: token != _PADDING, request.prompt_token_ids)
    tokens = [*text, _END][len(request.output_token_ids) : params.max_tokens]
    chance = random.Random(params.seed)
    outputs = []
    at = 0
    while at < len(tokens):
        group = tokens[at : at + (chance.randint(1, 5) if params.seed else 1)]
        at += len(group)
        logprobs = None if params.logprobs is None else [Logprobs(token, -0.5, []) for token in group]
        end = FinishReason.STOP if group[-1] == _END else FinishReason.LENGTH
        outputs.append(TokenOutput(request.request_id, group, end if at == len(tokens) else None, logprobs))
    return outputs


main()
