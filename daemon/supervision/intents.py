"""What the operator wants of each program, kept in a file: it outlives daemons and reboots."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ...common.foreign_text import parse_json, printable

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
    """The wishes that differ from `Wish()`, by the programs' names.

    They take effect at once. What cannot be written is kept in memory, and `save` tries again.
    """

    def __init__(self, state: Path) -> None:
        self._file = state / "intents.json"
        self._wishes = self._read()
        self._written = True

    def of(self, name: str) -> Wish:
        return self._wishes.get(name, Wish())

    def set(self, name: str, wish: Wish) -> str:
        """Return why it could not be written, or ""."""
        if wish == self.of(name):
            return self.save()
        return self._change({**self._wishes, name: wish})

    def keep_only(self, names: Collection[str]) -> str:
        """Forget programs that are no more. Return why that could not be written, or ""."""
        if self._wishes.keys() <= set(names):
            return ""
        return self._change({name: wish for name, wish in self._wishes.items() if name in names})

    def save(self) -> str:
        """Write the file if it is out of date or not there to be read. Return why that failed, or ""."""
        if self._written and (not self._wishes or os.access(self._file, os.R_OK)):
            return ""
        try:
            self._write()
        except OSError as error:
            reason = error.strerror or error
            return f"cannot write {self._file}: {reason}; its content is kept in memory and written later"
        self._written = True
        return ""

    def _change(self, wishes: dict[str, Wish]) -> str:
        self._wishes = {name: wish for name, wish in sorted(wishes.items()) if wish != Wish()}
        self._written = False
        return self.save()

    def _read(self) -> dict[str, Wish]:
        try:
            entries = parse_json(self._file.read_text(encoding="utf-8-sig"))
            return {
                name: Wish(Intent(entry["intent"]), entry["draining"] is True)
                for name, entry in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.error(
                "%s: cannot be read (%s); every program is wanted and none is drained",
                self._file,
                printable(error),
            )
            return {}

    def _write(self) -> None:
        """Aside, to the disk, then renamed: after a power failure there is the old file or the new one."""
        entries = {
            name: {"intent": wish.intent, "draining": wish.draining} for name, wish in self._wishes.items()
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        aside = self._file.with_suffix(".new")
        try:
            with aside.open("w", encoding="utf-8") as stream:
                stream.write(json.dumps(entries, indent=1) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            aside.rename(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
