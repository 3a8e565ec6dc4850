"""Argument parser and defaults shared by the command lines of router, replica and users."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .errors import ConfigError

#: Default of --max-body-bytes. A replica must accept every body that the router forwards.
MAX_BODY_BYTES = 10 << 20


class CommandLine(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    # argparse declares overloads for kinds of namespaces, of which only one is used here.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse the arguments. The error for an unknown flag has the nearest known one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hints = [
                nearest(word.partition("=")[0], self._option_string_actions)
                for word in unknown
                if word.startswith("--")
            ]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage of all flags and exiting."""
        raise ConfigError(f"{message} ({self.prog} --help)")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the known name that is most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
