"""What the operator wants of each program, kept in a file: it outlives daemons and reboots."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

log = logging.getLogger("fd-dp")


class Intent(StrEnum):
    #: It runs, and is started again when it ends.
    RUN = "run"
    #: It is down until it is started by name.
    STOPPED = "stopped"
    #: Nobody touches it: it is not killed for hanging, not replaced, and not started again if it ends.
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of one program."""

    intent: Intent = Intent.RUN
    #: The router gives it nothing new.
    draining: bool = False


class Intents:
    """The wishes that differ from `Wish()`, by the programs' names. Changed only together with the file."""

    def __init__(self, state: Path) -> None:
        self._file = state / "intents.json"
        self._wishes = self._read()

    def of(self, name: str) -> Wish:
        return self._wishes.get(name, Wish())

    def set(self, name: str, wish: Wish) -> None:
        """Raises OSError if it cannot be kept; then nothing is changed."""
        if wish != self.of(name):
            self._write({**self._wishes, name: wish})

    def keep_only(self, names: Collection[str]) -> None:
        """Programs that are no more have no wishes. Raises OSError, and then nothing is changed."""
        if not self._wishes.keys() <= set(names):
            self._write({name: wish for name, wish in self._wishes.items() if name in names})

    def _read(self) -> dict[str, Wish]:
        try:
            entries = json.loads(self._file.read_text(encoding="utf-8-sig"))
            return {
                name: Wish(Intent(entry["intent"]), entry["draining"] is True)
                for name, entry in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.error(
                "%s: cannot be read (%s); every program is wanted and none is drained", self._file, error
            )
            return {}

    def _write(self, wishes: dict[str, Wish]) -> None:
        """Aside, to the disk, then renamed: after a power failure there is the old file or the new one."""
        wishes = {name: wish for name, wish in sorted(wishes.items()) if wish != Wish()}
        entries = {name: {"intent": wish.intent, "draining": wish.draining} for name, wish in wishes.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        aside = self._file.with_suffix(".new")
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(entries, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(self._file)
        directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._wishes = wishes
