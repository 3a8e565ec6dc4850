"""Command lines whose mistakes are told in one line, like all others."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage of every flag there is and exiting."""
        raise ConfigError(f"{message} ({self.prog} --help)")
