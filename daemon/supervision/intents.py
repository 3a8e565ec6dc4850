"""Desired state of each program as set by the operator, stored in a file across restarts and reboots."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ...common.atomic_file import write_atomically
from ...common.foreign_text import parse_json, printable


class Intent(StrEnum):
    #: Runs, and is restarted when it ends.
    RUN = "run"
    #: Stays down until it is started by name.
    STOPPED = "stopped"
    #: Left alone: not killed for hanging, not replaced by a reload, not restarted if it ends.
    HELD = "held"


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Desired state of one program."""

    intent: Intent = Intent.RUN
    #: The router sends it no new requests.
    draining: bool = False


class Intents:
    """Desired states that differ from `DesiredState()`, by program name.

    Changes take effect at once. If the file cannot be written, they stay in memory and `save` tries again.
    """

    def __init__(self, state: Path) -> None:
        self._file = state / "intents.json"
        #: Why the file could not be read; "" if it was read, or has been written since.
        self._unread = ""
        self._states = self._read()
        self._saved = True

    def of(self, name: str) -> DesiredState:
        return self._states.get(name, DesiredState())

    def set(self, name: str, desired: DesiredState) -> str:
        """Set the desired state of a program. Return why it could not be written, or ""."""
        if desired == self.of(name) and not self._unread:
            return self.save()
        return self._change({**self._states, name: desired})

    def keep_only(self, names: Collection[str]) -> str:
        """Forget all other programs. Return why that could not be written, or ""."""
        if self._states.keys() <= set(names):
            return ""
        return self._change({name: state for name, state in self._states.items() if name in names})

    def save(self) -> str:
        """Write the file if it is out of date or has become unreadable. Return a problem for people, or "".

        A file that could not be read at the start is a problem until the next `set`, which replaces it.
        """
        if self._saved and (not self._states or os.access(self._file, os.R_OK)):
            return self._unread
        try:
            self._write()
        except OSError as error:
            reason = error.strerror or error
            return f"cannot write {self._file}: {reason}; its content is kept in memory and written later"
        self._saved, self._unread = True, ""
        return ""

    def _change(self, states: dict[str, DesiredState]) -> str:
        self._states = {name: state for name, state in sorted(states.items()) if state != DesiredState()}
        self._saved = False
        return self.save()

    def _read(self) -> dict[str, DesiredState]:
        try:
            entries = parse_json(self._file.read_text(encoding="utf-8-sig"))
            return {
                name: DesiredState(Intent(entry["intent"]), entry["draining"] is True)
                for name, entry in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._unread = (
                f"{self._file}: cannot be read ({printable(error)}); all programs are to run and none is "
                "drained; repeat fdctl stop, hold or drain where it is wanted"
            )
            return {}

    def _write(self) -> None:
        entries = {
            name: {"intent": state.intent, "draining": state.draining} for name, state in self._states.items()
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(entries, indent=1) + "\n"
        write_atomically(self._file, content.encode(), mode=0o666, fsync=True)
