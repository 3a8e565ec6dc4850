"""Progress of an operation on a terminal: one line for each program that it changes, and a bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .table import duration

_REFRESH_PER_SECOND = 8
_BAR_WIDTH = 40
#: Stages in words.
_DOING = {
    "drain": "draining",
    "stop": "stopping",
    "start": "loading",
    "reload": "reloading",
    "rollback": "restoring the old configuration",
    "ready": "READY",
    "failed": "failed",
}
_ENDED = {"ready": ("✓", "green"), "failed": ("✗", "red")}


@dataclass(slots=True)
class Row:
    """Program in the plan. Times are from the monotonic clock."""

    label: str
    verb: str = ""
    #: Last reported stage; empty: not begun.
    stage: str = ""
    in_flight: int = 0
    note: str = ""
    began: float = 0.0
    ended: float = 0.0


class Progress:
    """Progress of an operation, as its events report it. No I/O."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows: dict[str, Row] = {}
        self._clock = clock
        self._began = clock()
        #: Name of the program in progress.
        self._current = ""

    @property
    def done(self) -> int:
        return sum(bool(row.ended) for row in self.rows.values())

    def event(self, event: dict[str, Any]) -> None:
        """Update from an event. Unknown kinds and stages, of a newer daemon, are tolerated."""
        if event.get("kind") == "plan":
            self.rows |= {step["program"]: Row(step["label"], step["verb"]) for step in event["steps"]}
        elif event.get("kind") == "stage":
            self._stage(event)

    def end(self, code: int) -> None:
        """End all programs in progress, because the operation has ended."""
        for row in self.rows.values():
            if row.stage and not row.ended:
                row.ended = self._clock()
                row.stage = "failed" if code else row.stage

    def render(self) -> RenderableType:
        if not self.rows:
            return Group()
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column()
        table.add_column(justify="right")
        for row in self.rows.values():
            table.add_row(*self._cells(row))
        of = len(self.rows)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=of, completed=self.done, width=_BAR_WIDTH),
            Text(f"{self.done}/{of}"),
            Text(duration(int(self._clock() - self._began))),
        )
        return Group(table, bar)

    def _stage(self, event: dict[str, Any]) -> None:
        now = self._clock()
        name = event["program"]
        row = self.rows.setdefault(name, Row(event["label"]))
        before = self.rows.get(self._current)
        if name != self._current and before is not None and not before.ended and before.stage == "stop":
            # "stop" is the last stage of a program that is stopped or removed.
            before.ended = now
        self._current = name
        row.began = row.began or now
        row.stage, row.in_flight, row.note = event["stage"], event.get("in_flight", 0), event.get("note", "")
        row.ended = now if row.stage in _ENDED else 0.0

    def _cells(self, row: Row) -> list[RenderableType]:
        seconds = (row.ended or self._clock()) - row.began if row.began else None
        if row.ended:
            mark, style = _ENDED.get(row.stage, ("✓", "green"))
            doing = "stopped" if row.stage == "stop" else _DOING.get(row.stage, row.stage)
        elif row.stage:
            mark, style = "", "yellow"
            doing = _DOING.get(row.stage, row.stage)
        else:
            mark, style, doing = "·", "dim", ""
        in_flight = f", {row.in_flight} in flight" if row.in_flight and row.stage == "drain" else ""
        return [
            Spinner("dots", style=style) if not mark else Text(mark, style=style),
            Text(row.label),
            Text(row.verb, style="dim"),
            Text(doing + in_flight + (f" ({row.note})" if row.note else ""), style=style),
            Text("" if seconds is None else duration(int(seconds))),
        ]


class Display:
    """Prints lines for people, with the progress below them."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._live = Live(
            get_renderable=self._progress.render,
            console=Console(),
            refresh_per_second=_REFRESH_PER_SECOND,
            vertical_overflow="ellipsis",
        )

    def take(self, message: dict[str, Any]) -> None:
        """Show a message of the daemon."""
        if "line" in message:
            self._live.console.print(message["line"], markup=False, highlight=False)
        elif "event" in message:
            self._progress.event(message["event"])
        elif "code" in message:
            self._progress.end(message["code"])

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
