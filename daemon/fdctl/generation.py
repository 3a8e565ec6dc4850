"""`fdctl generate`: a chat completion through the router.

The response is printed as it arrives and may take any time, so this does not use `common/http_client.py`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
from collections.abc import Iterator

import msgspec

from ...common.api_keys import keys_in_variable
from ...common.errors import FastDeployError
from ...common.foreign_text import parse_json, printable
from ..control import protocol
from . import client

_MAX_ERROR = 1 << 16


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


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
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
    }
    connection = http.client.HTTPConnection(host, port)
    try:
        headers = {"Content-Type": "application/json"}
        if keys := keys_in_variable("FD_API_KEY", os.environ):
            headers["Authorization"] = f"Bearer {keys[0]}"
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            what = f"the router answered {response.status}: {_message(response.read(_MAX_ERROR))}"
            if response.status == http.HTTPStatus.UNAUTHORIZED:
                what += "; set FD_API_KEY"
            raise FastDeployError(what)
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            try:
                event = msgspec.json.decode(line[6:], type=_Event)
            except RecursionError:
                raise ValueError("an event is nested too deeply") from None
            if event.error is not msgspec.UNSET:
                raise FastDeployError(f"generation failed: {_message(line[6:])}")
            for choice in event.choices:
                yield choice.delta.content or "", choice.finish_reason
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FastDeployError(f"the router at {host}:{port} does not answer ({printable(error)})") from None
    finally:
        connection.close()


def _message(body: bytes) -> str:
    try:
        message = parse_json(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")
    return printable(message, 300)
