"""`fastdeploy serve`: api_server, or multi_api_server for several replicas."""

from __future__ import annotations

from collections.abc import Sequence

from ..openai import api_server, multi_api_server

#: Flags of multi_api_server alone.
_SEVERAL = ("--num-servers", "--ports")


def main(words: Sequence[str]) -> int:
    """Serve until a signal. The model may be the first word, without --model."""
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    if any(word.partition("=")[0] in _SEVERAL for word in words):
        return multi_api_server.main(words)
    return api_server.main(words, "fastdeploy serve")
