"""`fdctl generate`: a chat completion through the router."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator

from ...common.addresses import authority
from ...common.api_client import ApiClient
from ...common.api_keys import keys_in_variable
from ..control import protocol
from . import client


def generate(options: argparse.Namespace) -> int:
    """Print the output as it is generated; with --json when it is complete."""
    router = client.status(options)["router"]
    text, finish_reason = [], None
    for piece, reason in _pieces(router["host"], router["port"], options.prompt, options.max_tokens):
        text.append(piece)
        finish_reason = reason or finish_reason
        if not options.json:
            print(text[-1], end="", flush=True)
    print(json.dumps({"text": "".join(text), "finish_reason": finish_reason}) if options.json else "")
    return protocol.OK


def _pieces(host: str, port: int, prompt: str, max_tokens: int) -> Iterator[tuple[str, str | None]]:
    """Yield pieces of the output, the last one with the finish reason."""
    keys = keys_in_variable("FD_API_KEY", os.environ)
    router = ApiClient(f"http://{authority(host, port)}", keys[0] if keys else "", "router")
    fields = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
    for event in router.stream("/chat/completions", fields):
        for choice in event.choices:
            yield choice.delta.content or "", choice.finish_reason
