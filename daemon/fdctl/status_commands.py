"""`fdctl status` and `fdctl ep`: what is, once or again and again."""

from __future__ import annotations

import argparse
from typing import Any

from ..control.protocol import NO_GROUP
from . import client, expert_groups


def status(options: argparse.Namespace) -> int:
    def look() -> dict[str, Any]:
        return client.status(options)

    if options.json:
        return client.show_json(look, options.watch)
    # Slow to import, and only for people.
    from . import table

    return table.show(look, table.of_status, options.watch)


def ep(options: argparse.Namespace) -> int:
    """Needs no daemon: what it shows is wanted most when something hangs."""
    if options.group:
        names, user = [options.group], None
        nobody = f"nobody is in expert group {options.group}"
    else:
        run = client.socket(options).parent
        names = expert_groups.names_of(run)
        # Also when root asks.
        user = run.stat().st_uid
        nobody = f"nobody is in an expert group of {run}: "
        if names:
            look_up = client.command_line(options, "status")
            nobody += f"replicas are loading or down ({look_up}), or their model has no experts"
        else:
            nobody += "[parallel] expert_parallel is off"

    def look() -> dict[str, Any]:
        return expert_groups.groups(names, user)

    if not look()["groups"]:
        return client.fail(nobody, NO_GROUP, as_json=options.json)
    if options.json:
        return client.show_json(look, options.watch)
    from . import table

    return table.show(look, table.of_groups, options.watch)
