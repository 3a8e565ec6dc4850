"""`fdctl status` and `fdctl ep` on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .control import OK

_COLOURS = {
    "READY": "green",
    "STARTING": "yellow",
    "WAITING": "yellow",
    "STOPPING": "yellow",
    "STOPPED": "dim",
}
_SEAT_COLOURS = {"active": "green", "joining": "yellow", "leaving": "yellow", "free": "dim"}

_UNLIMITED = 1000


def show(
    ask: Callable[[], dict[str, Any]], draw: Callable[[dict[str, Any]], RenderableType], watch: bool
) -> int:
    """Once, or until the user has seen enough; the caller turns Ctrl-C into an exit code."""
    if not watch:
        # Into a pipe or a file a line is as long as it is.
        console = Console() if sys.stdout.isatty() else Console(width=_UNLIMITED)
        console.print(draw(ask()))
        return OK
    with Live(draw(ask()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(1.0)
            live.update(draw(ask()), refresh=True)


def of_status(status: dict[str, Any]) -> Table:
    daemon = status["daemon"]
    table = _titled(
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


def of_groups(found: dict[str, Any]) -> Group:
    return Group(*(_group(group) for group in found["groups"]))


def _group(group: dict[str, Any]) -> Table:
    table = _titled(
        f"{group['name']}  epoch {group['epoch']}  active seats {_listed(group['active'])}  "
        f"joins {group['joins']}  leaves {group['leaves']}  losses {group['losses']}"
    )
    if awaited := group["awaited"]:
        table.caption = (
            f"most waited for: seat {awaited['seat']}, by {_listed(awaited['by'])}, "
            f"{_time(awaited['seconds'])} so far"
        )
    for name in ("seat", "pid"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for name in ("epoch", "steps"):
        table.add_column(name, justify="right")
    table.add_column("phase")
    for name in ("layer", "for", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("waits for")
    held = {seat["seat"]: seat for seat in group["seats"]}
    for number in range(group["num_seats"]):
        table.add_row(*_seat(number, held.get(number)))
    return table


def _seat(number: int, seat: dict[str, Any] | None) -> list[Text]:
    if seat is None:
        return [Text(str(number)), Text("-"), Text("free", style=_SEAT_COLOURS["free"])]
    return [
        Text(str(number)),
        Text(str(seat["pid"])),
        Text(seat["state"], style=_SEAT_COLOURS.get(seat["state"], "red")),
        Text(str(seat["epoch"])),
        Text(str(seat["steps"])),
        Text(seat["phase"] or "-"),
        Text(_number(seat["layer"])),
        Text(_time(seat["seconds"])),
        Text(_number(seat["tokens"])),
        Text(_listed(seat["waits_for"])),
    ]


def _titled(title: str) -> Table:
    return Table(
        title=title,
        box=None,
        pad_edge=False,
        title_justify="left",
        title_style="",
        caption_justify="left",
        caption_style="",
    )


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


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers)) or "-"


def _time(seconds: float | None) -> str:
    if seconds is None or seconds >= 60:
        return _duration(None if seconds is None else int(seconds))
    return f"{seconds:.1f}s" if seconds >= 1 else f"{1000 * seconds:.0f}ms"


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
