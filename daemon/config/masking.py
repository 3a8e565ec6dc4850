"""Command lines and environments without the values that may be secrets, for terminals and logs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = "***"
#: Neither a file's path (--api-keys-file) nor a number of tokens (--max-num-batched-tokens) is a secret.
_SECRET = re.compile(
    r"key|secret|passw|passphrase|authorization|bearer|cookie|token(?!s\b|s_|iz)", re.IGNORECASE
)
_PATH = re.compile(r"file$", re.IGNORECASE)
#: scheme://USER:PASSWORD@host
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_API_KEY = "--api-key"


def is_secret(name: str) -> bool:
    """Whether the value of this flag (also as "--flag=value") or environment variable is to be hidden."""
    name = name.partition("=")[0]
    return bool(_SECRET.search(name)) and not _PATH.search(name)


def value(text: str) -> str:
    """Without what a URL in it says of users and passwords."""
    return _USER_IN_URL.sub(MASK, text)


def word(flag: str) -> str:
    """One word of a command line: "--api-key=abc" hides its value by itself."""
    name, equals, _ = flag.partition("=")
    return f"{name}={MASK}" if equals and flag.startswith("-") and is_secret(name) else value(flag)


def argv(words: Iterable[str]) -> list[str]:
    shown, hide = [], False
    for each in words:
        if each.startswith("-"):
            shown.append(word(each))
            hide = "=" not in each and is_secret(each)
        else:
            shown.append(MASK if hide else value(each))
    return shown


def env(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: MASK if is_secret(name) else value(text) for name, text in variables.items()}


def secret_in(words: Iterable[str]) -> str | None:
    """What among these words of a command line stands for a secret, without the secret; None if nothing does.

    "--flag VALUE", written as one word by mistake, is seen through, and so are abbreviations of --api-key.
    """
    for part in (part for each in words for part in each.split()):
        name, equals, _ = part.partition("=")
        dashed = f"--{name.lstrip('-').replace('_', '-').lower()}"
        is_flag = name.startswith("-")
        if is_flag and len(dashed) > 2 and (is_secret(dashed) or _API_KEY.startswith(dashed)):
            return name
        if equals and name.isidentifier() and is_secret(name):
            return name
        if value(part) != part:
            return f"the password of a URL{f' ({name})' if is_flag else ''}"
    return None
