"""Masks secrets in command lines and environments for terminals and logs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = "***"
#: Names of flags and variables with secret values. Paths of files (--api-keys-file) and numbers of tokens
#: (--max-num-batched-tokens) are not secret.
_SECRET = re.compile(
    r"key|secret|passw|passphrase|authorization|bearer|cookie|token(?!s\b|s_|iz)|otlp_(\w+_)?headers",
    re.IGNORECASE,
)
_PATH = re.compile(r"file$", re.IGNORECASE)
#: scheme://USER:PASSWORD@host
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_API_KEY = "--api-key"


def is_secret(name: str) -> bool:
    """Return whether a flag ("--flag" or "--flag=value") or environment variable has a secret value."""
    name = name.partition("=")[0]
    return bool(_SECRET.search(name)) and not _PATH.search(name)


def value(text: str) -> str:
    """Mask users and passwords of URLs."""
    return _USER_IN_URL.sub(MASK, text)


def word(flag: str) -> str:
    """Mask one word of a command line, for example the value in "--api-key=abc"."""
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
    """Return the name of the first secret in a command line, or None.

    "--flag VALUE" in one word and abbreviations of --api-key are recognized.
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
