"""A worker that draws one token for each of its sequences at a steady pace, without a model.

Usage: paced_worker.py STEPS_PER_SECOND TOKENS_FILE. Zero steps per second: without a pause.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import msgspec
import zmq

from fastdeploy.common.messages import (
    AbortRequests,
    AddRequest,
    FromWorker,
    Hello,
    Ready,
    Shutdown,
    Stats,
    StepOutputs,
    TokenOutput,
    ToWorker,
)
from fastdeploy.common.request import FinishReason

_BLOCKS, _BLOCK_SIZE, _SEQUENCES = 4096, 64, 512


def main() -> None:
    pace, tokens = float(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(os.environ["FD_WORKER_ENDPOINT"])

    def send(message: FromWorker) -> None:
        socket.send(msgspec.msgpack.encode(message))

    send(Hello(os.environ["FD_WORKER_TOKEN"], os.getpid()))
    send(Ready(_BLOCKS, _BLOCK_SIZE, max_model_len=8192))
    #: Number of tokens drawn for each sequence.
    drawn: dict[str, int] = {}
    limits: dict[str, int] = {}
    due, steps = time.monotonic(), 0
    while True:
        wait = max(0.0, due - time.monotonic()) if drawn else 60.0
        while socket.poll(round(1000 * wait)):
            match msgspec.msgpack.decode(socket.recv(), type=ToWorker):
                case AddRequest(request_id=name, params=params):
                    drawn[name], limits[name] = 0, params.max_tokens
                case AbortRequests(request_ids=names):
                    for name in names:
                        drawn.pop(name, None)
                case Shutdown():
                    return
            wait = max(0.0, due - time.monotonic())
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
        send(StepOutputs(outputs, stats))


main()
