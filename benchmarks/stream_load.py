"""Concurrent streams of a completion server, with the times of their tokens.

    python -m benchmarks.stream_load PORT STREAMS --prompt 2000 --new 128 --vocabulary 103424

Prompts are random token ids, so that no two share a beginning. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in seconds."""

    first_p50: float
    first_max: float
    between_p50: float
    between_p99: float
    tokens_per_second: float


@dataclass(slots=True)
class Stream:
    asked: float
    #: Arrivals of the events.
    times: list[float] = field(default_factory=list)
    tokens: int = 0


async def stream(port: int, prompt: list[int], new: int) -> Stream:
    body = {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    asked = Stream(time.perf_counter())
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"stream_load: {status!r} {(await reader.read(2000))!r}")
    while True:
        line = await reader.readline()
        if not line:
            raise SystemExit("stream_load: a stream ended before [DONE]")
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        if event["choices"]:
            asked.times.append(time.perf_counter())
        if usage := event.get("usage"):
            asked.tokens = usage["completion_tokens"]
    writer.close()
    return asked


async def load(port: int, streams: int, prompt: int, new: int, vocabulary: int) -> Figures:
    chance = random.Random(time.time_ns())
    prompts = [[chance.randrange(300, vocabulary) for _ in range(prompt)] for _ in range(streams)]
    began = time.perf_counter()
    found = await asyncio.gather(*(stream(port, each, new) for each in prompts))
    taken = time.perf_counter() - began
    first = [each.times[0] - each.asked for each in found]
    between = sorted(b - a for each in found for a, b in zip(each.times, each.times[1:], strict=False)) or [
        0.0
    ]
    return Figures(
        first_p50=statistics.median(first),
        first_max=max(first),
        between_p50=statistics.median(between),
        between_p99=between[int(0.99 * len(between))],
        tokens_per_second=sum(each.tokens for each in found) / taken,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("streams", type=int)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--vocabulary", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(asdict(asyncio.run(load(**vars(arguments))))))


if __name__ == "__main__":
    main()
