"""Argument parser and defaults shared by the command lines of router and replica."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import ConfigError

#: Default of --max-body-bytes. A replica must accept every body that the router forwards.
MAX_BODY_BYTES = 10 << 20


class CommandLine(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage of all flags and exiting."""
        raise ConfigError(f"{message} ({self.prog} --help)")
