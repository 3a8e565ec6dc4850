"""A worker that draws one token for each of its sequences at a steady pace, without a model.

Usage: paced_worker.py STEPS_PER_SECOND TOKENS_FILE. Zero steps per second: without a pause.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from fastdeploy.common.messages import AddRequest, Hello, Ready, Stats, StepOutputs, TokenOutput
from fastdeploy.common.request import FinishReason
from fastdeploy.core.worker import ApiLink

_BLOCKS, _BLOCK_SIZE, _SEQUENCES = 4096, 64, 512


def main() -> None:
    pace, tokens = float(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with ApiLink(os.environ["FD_WORKER_ENDPOINT"]) as api:
        api.send(Hello(os.environ["FD_WORKER_TOKEN"], os.getpid()))
        api.send(Ready(_BLOCKS, _BLOCK_SIZE, max_model_len=8192))
        _draw(api, pace, tokens)


def _draw(api: ApiLink, pace: float, tokens: list[int]) -> None:
    #: Number of tokens drawn for each sequence.
    drawn: dict[str, int] = {}
    limits: dict[str, int] = {}
    due, steps = time.monotonic(), 0
    while True:
        if drawn:
            time.sleep(max(0.0, due - time.monotonic()))
        for message in api.receive(wait=not drawn):
            if isinstance(message, AddRequest):
                drawn[message.request_id], limits[message.request_id] = 0, message.params.max_tokens
            else:
                for name in message.request_ids:
                    drawn.pop(name, None)
        if api.stopping:
            return
        if not drawn:
            continue
        due = max(due + 1 / pace, time.monotonic()) if pace else 0.0
        steps += 1
        outputs = []
        for name, count in list(drawn.items()):
            is_last = count + 1 == limits[name]
            reason = FinishReason.LENGTH if is_last else None
            outputs.append(TokenOutput(name, [tokens[count % len(tokens)]], reason))
            drawn[name] += 1
            if is_last:
                del drawn[name]
        stats = Stats(len(drawn), 0, _BLOCKS, _BLOCKS, 0, 0, 0, steps, len(outputs), _SEQUENCES)
        api.send(StepOutputs(outputs, stats))


main()
