"""Command lines and environments without the values that may be secrets, for terminals and logs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = "***"
#: Neither a file's path (--api-keys-file) nor a number of tokens (--max-num-batched-tokens) is a secret.
_SECRET = re.compile(r"key|secret|password|token(?!s\b|s_|iz)", re.IGNORECASE)
_PATH = re.compile(r"[-_]file$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether the value of this flag (also as "--flag=value") or environment variable is to be hidden."""
    name = name.partition("=")[0]
    return bool(_SECRET.search(name)) and not _PATH.search(name)


def word(flag: str) -> str:
    """One word of a command line: "--api-key=abc" hides its value by itself."""
    name, equals, _ = flag.partition("=")
    return f"{name}={MASK}" if equals and flag.startswith("-") and is_secret(name) else flag


def argv(words: Iterable[str]) -> list[str]:
    shown, hide = [], False
    for each in words:
        if each.startswith("-"):
            shown.append(word(each))
            hide = "=" not in each and is_secret(each)
        else:
            shown.append(MASK if hide else each)
    return shown


def env(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: MASK if is_secret(name) else value for name, value in variables.items()}
