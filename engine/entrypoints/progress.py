"""Progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    title: str, total: int, done: int = 0, *, enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs, if standard error is a terminal.

    Args:
        done: number of those that are done already.

    Returns:
        A function that advances the bar by a number.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda number: None
        return
    # Imported here, because it takes as long as the rest of a command.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda number: bar.advance(task, number)
