"""`fdctl status` on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_COLOURS = {
    "READY": "green",
    "STARTING": "yellow",
    "WAITING": "yellow",
    "STOPPING": "yellow",
    "STOPPED": "dim",
}

_UNLIMITED = 1000


def show(status: dict[str, Any]) -> None:
    # Into a pipe or a file a line is as long as it is.
    console = Console() if sys.stdout.isatty() else Console(width=_UNLIMITED)
    console.print(_table(status))


def watch(ask: Callable[[], dict[str, Any]]) -> int:
    """Until the user has seen enough; the caller turns Ctrl-C into an exit code."""
    with Live(_table(ask()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(1.0)
            live.update(_table(ask()), refresh=True)


def _table(status: dict[str, Any]) -> Table:
    daemon = status["daemon"]
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="")
    table.title = (
        f"{daemon['url']}  {daemon['ready']}/{daemon['replicas']} replicas READY  fd-dp {daemon['state']}"
    )
    for name in ("replica", "state"):
        table.add_column(name)
    for name in ("pid", "uptime", "restarts", "port", "in flight"):
        table.add_column(name, justify="right")
    table.add_column("note", no_wrap=True, overflow="ellipsis")
    for entry in [status["router"], *status["replicas"]]:
        if entry is not None:
            table.add_row(*_row(entry))
    return table


def _row(entry: dict[str, Any]) -> list[Text]:
    state = entry["state"]
    progress = f" {100 * entry['progress']:.0f}%" if entry["progress"] is not None else ""
    note = entry["note"] or (f"last exit: {entry['last_exit']}" if entry["last_exit"] else "")
    words = [
        str(entry.get("replica", entry["name"])),
        "",
        _number(entry["pid"]),
        _duration(entry["uptime"]),
        str(entry["restarts"]),
        str(entry["port"]),
        _number(entry["in_flight"]),
        note,
    ]
    cells = [Text(word) for word in words]
    cells[1] = Text(state + progress, style=_COLOURS.get(state, "red"))
    return cells


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _duration(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    days, seconds = divmod(seconds, 86400)
    hours, minutes = divmod(seconds // 60, 60)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds % 60:02}s"
