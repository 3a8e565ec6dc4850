"""An argument parser that reports errors in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage of all flags and exiting."""
        raise ConfigError(f"{message} ({self.prog} --help)")
