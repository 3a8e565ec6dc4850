"""A worker that follows the script named by its first argument, to cause what rarely happens."""

import itertools
import os
import signal
import sys
import time

import msgspec
import zmq

from fastdeploy.common.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    ExpertParallelStats,
    Failed,
    FromWorker,
    Hello,
    LoadProgress,
    Ready,
    Shutdown,
    Stats,
    StepOutputs,
    TokenOutput,
    ToWorker,
)
from fastdeploy.common.request import FinishReason

#: A token of the tiny checkpoint's vocabulary that has a text.
WORD = 40
END_OF_TEXT = 2
STATS = Stats(1, 0, 8, 7, 0, 0, 0, 1, 1, 8)
GROUP = ExpertParallelStats(
    epoch=5,
    active_ranks=[0, 2],
    joins_total=3,
    leaves_total=1,
    losses_total=2,
    restarted_steps_total=4,
    steps_total=6,
    step_seconds_total=0.5,
    bytes_dispatched_total=1024,
    bytes_combined_total=2048,
    waited_seconds_total=[0.0, 0.0, 0.25],
    expert_tokens_total=[7, 9],
)

context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.linger = 2000
socket.connect(os.environ["FD_WORKER_ENDPOINT"])


def send(message: FromWorker) -> None:
    socket.send(msgspec.msgpack.encode(message))


def receive() -> ToWorker:
    return msgspec.msgpack.decode(socket.recv(), type=ToWorker)


steps = itertools.count(1)


def step(*outputs: TokenOutput, stats: Stats = STATS) -> None:
    send(StepOutputs(list(outputs), msgspec.structs.replace(stats, steps_total=next(steps))))


def serve(script: str) -> None:
    """Answer each request with two tokens and its end, unless the script says otherwise."""
    while True:
        match receive():
            case AddRequest(request_id=name, output_token_ids=begun):
                match script:
                    case _ if script.startswith("writes "):
                        for token_id in list(map(int, script.split()[1:]))[len(begun) :]:
                            step(TokenOutput(name, [token_id]))
                        step(TokenOutput(name, [END_OF_TEXT], FinishReason.STOP))
                    case "dies with a request":
                        step(TokenOutput(name, [1]))
                        socket.close()
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "sends nonsense":
                        socket.send(b"\xc1 nonsense")
                    case "goes on until told":
                        step(TokenOutput(name, [1]))
                        message = receive()
                        assert message == AbortRequests([name]), message
                        step(TokenOutput("aborted-and-acknowledged", [9]), TokenOutput(name, [2]))
                    case "is silent until told" | "says a word and is silent until told":
                        if script.startswith("says"):
                            step(TokenOutput(name, [WORD]))
                        message = receive()
                        assert message == AbortRequests([name]), message
                        script = "behaves"
                    case "works for others until told":
                        step(TokenOutput(name, [WORD]))
                        while not socket.poll(20):
                            step()
                        assert receive() == AbortRequests([name])
                        step()
                    case _:
                        step(TokenOutput(name, [1]))
                        step(TokenOutput("nobody's", [5]), TokenOutput(name, [2], FinishReason.LENGTH))
            case Shutdown():
                if script == "ignores the end":
                    time.sleep(600)
                return


def main(script: str) -> None:
    if script == "dies at once":
        sys.exit(7)
    if script == "never says hello":
        time.sleep(600)
    token = "wrong" if script == "is a stranger" else os.environ["FD_WORKER_TOKEN"]
    version = 999 if script == "is of another version" else PROTOCOL_VERSION
    send(Hello(token, os.getpid(), version))
    send(LoadProgress(0.5, "reading weights"))
    if script == "cannot load":
        send(Failed("config.json: no such file"))
        return
    if script == "loads for ever":
        time.sleep(600)
    if script.startswith("writes "):
        send(Ready(num_blocks=64, block_size=64, max_model_len=4096))
    else:
        send(Ready(num_blocks=8, block_size=64, max_model_len=512))
    if script == "is a rank":
        step(stats=msgspec.structs.replace(STATS, expert_parallel=GROUP))
    serve(script)


main(sys.argv[1])
socket.close()
# The end of the process alone would not wait for the last messages to be sent.
context.term()
