"""`fdctl status` and `fdctl ep`: what is, once or again and again."""

from __future__ import annotations

import argparse
from typing import Any

from .. import expert_groups
from ..control import NO_GROUP
from . import asking


def status(options: argparse.Namespace) -> int:
    def look() -> dict[str, Any]:
        return asking.status(options)

    if options.json:
        return asking.show_json(look, options.watch)
    # Slow to import, and only for people.
    from . import table

    return table.show(look, table.of_status, options.watch)


def ep(options: argparse.Namespace) -> int:
    """Needs no daemon: what it shows is wanted most when something hangs."""
    if options.group:
        names, user = [options.group], None
        nobody = f"nobody is in expert group {options.group}"
    else:
        run = asking.socket(options).parent
        names = expert_groups.names_of(run)
        # Also when root asks.
        user = run.stat().st_uid
        nobody = f"nobody is in an expert group of {run}: "
        if names:
            look_up = asking.command_line(options, "status")
            nobody += f"replicas are loading or down ({look_up}), or their model has no experts"
        else:
            nobody += "[parallel] expert_parallel is off"

    def look() -> dict[str, Any]:
        return expert_groups.groups(names, user)

    if not look()["groups"]:
        return asking.fail(nobody, NO_GROUP, as_json=options.json)
    if options.json:
        return asking.show_json(look, options.watch)
    from . import table

    return table.show(look, table.of_groups, options.watch)
