"""Replicas without a model that answer what the page asks: metrics, models and chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..router.fake_engine import EVENT_HEAD, Behaviour, Received, answers

_METRICS_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n"


def chats(reply: Behaviour, metrics: str = "") -> Behaviour:
    """Answer chats by `reply`, and /metrics by this text."""

    def behave(received: Received) -> bool:
        if received.target == "/metrics":
            received.send(_METRICS_HEAD.format(len(metrics)).encode() + metrics.encode())
            return True
        return reply(received) if received.target == "/v1/chat/completions" else answers(received)

    return behave


def says(*pieces: str) -> Behaviour:
    def behave(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for piece in pieces:
            received.send_chunk(delta(piece))
        finish(received, len(pieces))
        return True

    return behave


def repeats_the_prompt(received: Received) -> bool:
    return says(*prompt_of(received))(received)


def speaks_until_it_is_stopped(received: Received) -> bool:
    received.send(EVENT_HEAD)
    received.send_chunk(delta("once upon "))
    received.engine.cancelled.append(received.wait_until_cancelled())
    return False


def delta(text: str) -> bytes:
    return _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def finish(received: Received, count: int) -> None:
    received.send_chunk(_event({"choices": [], "usage": {"completion_tokens": count}}))
    received.send_chunk(b"data: [DONE]\n\n")
    received.send(b"0\r\n\r\n")


def prompt_of(received: Received) -> str:
    text: str = json.loads(received.body)["messages"][-1]["content"]
    return text


def exposition(
    running: int = 0,
    waiting: int = 0,
    kv_use: float = 0.0,
    tokens: float = 0.0,
    epoch: int | None = None,
    waited: Sequence[float] = (),
    steps: int = 0,
) -> str:
    """Return metrics as a replica exports them. A step of the expert group takes 10 ms."""
    lines = {
        "num_requests_running": running,
        "num_requests_waiting": waiting,
        "gpu_cache_usage_perc": kv_use,
        "generation_tokens_total": tokens,
    }
    if epoch is not None:
        lines |= {"ep_epoch": epoch, "ep_active_seats": len(waited), "ep_joins_total": len(waited)}
        lines |= {"ep_leaves_total": 0, "ep_losses_total": 0}
        lines |= {"ep_steps_total": steps, "ep_step_seconds_total": steps / 100}
        lines |= {f'ep_waited_seconds_total{{seat="{seat}"}}': each for seat, each in enumerate(waited)}
    return "".join(f"fastdeploy:{name} {float(value)}\n" for name, value in lines.items())


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()
