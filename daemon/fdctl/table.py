"""`fdctl status`, `fdctl ep` and `fdctl top` on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..control.protocol import OK

_COLOURS = {
    "READY": "green",
    "STARTING": "yellow",
    "WAITING": "yellow",
    "STOPPING": "yellow",
    "STOPPED": "dim",
}
_RANK_COLOURS = {"active": "green", "joining": "yellow", "leaving": "yellow", "free": "dim"}

#: Width of lines in a pipe or a file, so that rich does not fold them.
_PIPE_WIDTH = 1000
#: Maximum length of a note in a pipe or a file. `fdctl why` and --json show whole notes.
_MAX_PIPE_NOTE = 100


def show(
    poll: Callable[[], dict[str, Any]], draw: Callable[[dict[str, Any]], RenderableType], watch: bool
) -> int:
    """Print a table once, or refresh it each second until Ctrl-C, which the caller handles."""
    if not watch:
        console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
        with console.capture() as captured:
            console.print(draw(poll()))
        # rich pads the last column with spaces.
        for line in captured.get().splitlines():
            print(line.rstrip())
        return OK
    with Live(draw(poll()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(1.0)
            live.update(draw(poll()), refresh=True)


def of_status(status: dict[str, Any]) -> Group:
    """Draw the result of `status`. On a terminal the note takes the rest of the width."""
    daemon = status["daemon"]
    table = _titled(
        f"{daemon['url']}  {daemon['ready']}/{daemon['replicas']} replicas READY  fd-dp {daemon['state']}"
    )
    table.expand = sys.stdout.isatty()
    for name in ("replica", "state"):
        table.add_column(name)
    for name in ("pid", "uptime", "restarts", "port", "in flight"):
        table.add_column(name, justify="right")
    table.add_column("note", no_wrap=True, overflow="ellipsis", ratio=1)
    for entry in [status["router"], *status["replicas"]]:
        if entry is not None:
            table.add_row(*_row(entry))
    return Group(table, *(Text(problem, style="red") for problem in daemon["problems"]))


def of_top(frame: dict[str, Any]) -> Group:
    """Draw a frame of top.py."""
    daemon, router, machine = frame["daemon"], frame["router"], frame["box"]
    lines = [
        f"{daemon['url']}  {daemon['ready']}/{daemon['replicas']} replicas READY  fd-dp {daemon['state']}",
        f"router   {router['state']}  {_rate(router['requests_per_second'])} requests/s  "
        f"{_number(router['retries'])} retries  {_number(router['resumes'])} resumes  "
        f"{_number(router['in_flight'])} in flight",
        f"machine  CPU {_percent(machine['cpu'])} of {machine['cores']} cores  "
        f"memory {_bytes(machine['memory_used'])} of {_bytes(machine['memory_total'])}",
    ]
    table = _titled("")
    for name in ("replica", "state"):
        table.add_column(name)
    for name in ("in flight", "running", "queue", "tokens/s", "prompt/s", "KV use", "TTFT", "ITL", "EP step"):
        table.add_column(name, justify="right")
    has_gpus = any(entry["gpu_memory_total"] for entry in frame["replicas"])
    for name in ("GPU use", "GPU memory") if has_gpus else ():
        table.add_column(name, justify="right")
    table.add_column("restarts", justify="right")
    for entry in frame["replicas"]:
        table.add_row(
            Text(str(entry["replica"])),
            _state(entry),
            Text(_number(entry["in_flight"])),
            Text(_number(entry["running"])),
            Text(_number(entry["queue"])),
            Text(_rate(entry["tokens_per_second"])),
            Text(_rate(entry["prompt_tokens_per_second"])),
            Text(_percent(entry["kv_use"])),
            Text(_time(entry["ttft"])),
            Text(_time(entry["itl"])),
            Text(_time(entry["ep_step"])),
            *(_gpu_cells(entry) if has_gpus else ()),
            Text(str(entry["restarts"])),
        )
    problem = [Text(frame["problem"], style="red")] if frame["problem"] else []
    return Group(*(Text(line) for line in lines), *problem, table)


def _gpu_cells(entry: dict[str, Any]) -> tuple[Text, Text]:
    used, total = entry["gpu_memory_used"], entry["gpu_memory_total"]
    memory = f"{_bytes(used)} of {_bytes(total)}" if total else "-"
    return Text(_percent(entry["gpu_use"])), Text(memory)


def of_groups(found: dict[str, Any]) -> Group:
    return Group(*(_group(group) for group in found["groups"]))


def duration(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    days, seconds = divmod(seconds, 86400)
    hours, minutes = divmod(seconds // 60, 60)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds % 60:02}s"


def _group(group: dict[str, Any]) -> Table:
    table = _titled(
        f"{group['name']}  epoch {group['epoch']}  active ranks {_listed(group['active'])}  "
        f"joins {group['joins']}  leaves {group['leaves']}  losses {group['losses']}"
    )
    if awaited := group["awaited"]:
        table.caption = (
            f"most waited for: rank {awaited['seat']}, by {_listed(awaited['by'])}, "
            f"{_time(awaited['seconds'])} so far"
        )
    for name in ("rank", "pid"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for name in ("epoch", "steps"):
        table.add_column(name, justify="right")
    table.add_column("phase")
    for name in ("layer", "for", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("waits for")
    ranks = {rank["seat"]: rank for rank in group["seats"]}
    for number in range(group["num_seats"]):
        table.add_row(*_rank_cells(number, ranks.get(number)))
    return table


def _rank_cells(number: int, rank: dict[str, Any] | None) -> list[Text]:
    if rank is None:
        return [Text(str(number)), Text("-"), Text("free", style=_RANK_COLOURS["free"])]
    return [
        Text(str(number)),
        Text(str(rank["pid"])),
        Text(rank["state"], style=_RANK_COLOURS.get(rank["state"], "red")),
        Text(str(rank["epoch"])),
        Text(str(rank["steps"])),
        Text(rank["phase"] or "-"),
        Text(_number(rank["layer"])),
        Text(_time(rank["seconds"])),
        Text(_number(rank["tokens"])),
        Text(_listed(rank["waits_for"])),
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
    note = entry["note"] or (f"last exit: {entry['last_exit']}" if entry["last_exit"] else "")
    if len(note) > _MAX_PIPE_NOTE and not sys.stdout.isatty():
        note = note[: _MAX_PIPE_NOTE - 3] + "..."
    words = [
        str(entry.get("replica", entry["name"])),
        "",
        _number(entry["pid"]),
        duration(entry["uptime"]),
        str(entry["restarts"]),
        str(entry["port"]),
        _number(entry["in_flight"]),
        note,
    ]
    cells = [Text(word) for word in words]
    cells[1] = _state(entry)
    return cells


def _state(entry: dict[str, Any]) -> Text:
    """Return a cell such as "STARTING 62%", "READY draining" or "STOPPED by operator"."""
    words = entry["state"]
    if entry["progress"] is not None:
        words += f" {100 * entry['progress']:.0f}%"
    if entry["intent"] == "stopped" and entry["state"] == "STOPPED":
        words += " by operator"
    elif entry["intent"] == "held":
        words += " held"
    if entry["draining"]:
        words += " draining" if entry["drain_confirmed"] else " to be drained"
    return Text(words, style=_COLOURS.get(entry["state"], "red"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _bytes(number: float | None) -> str:
    return "-" if number is None else f"{number / 1e9:.1f} GB"


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers)) or "-"


def _time(seconds: float | None) -> str:
    if seconds is None or seconds >= 60:
        return duration(None if seconds is None else int(seconds))
    return f"{seconds:.1f}s" if seconds >= 1 else f"{1000 * seconds:.0f}ms"
