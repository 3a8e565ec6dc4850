"""`fdctl status` and `fdctl ep`, once or repeatedly."""

from __future__ import annotations

import argparse
from typing import Any

from ..control.protocol import NO_GROUP
from . import client, expert_groups


def status(options: argparse.Namespace) -> int:
    def poll() -> dict[str, Any]:
        return client.status(options)

    if options.json:
        return client.show_json(poll, options.watch)
    # Imported here because it is slow.
    from . import table

    return table.show(poll, table.of_status, options.watch)


def ep(options: argparse.Namespace) -> int:
    """Show the expert-parallel groups. Works without the daemon."""
    if options.group:
        names, user = [options.group], None
        problem = f"no replica is in expert group {options.group}"
    else:
        run = client.socket(options).parent
        names = expert_groups.names_of(run)
        # The groups belong to the daemon's user, even if root runs fdctl.
        user = run.stat().st_uid
        problem = f"no replica is in an expert group of {run}: "
        if names:
            status_command = client.command_line(options, "status")
            problem += f"replicas are loading or down ({status_command}), or their model has no experts"
        else:
            problem += "[parallel] expert_parallel is off"

    def poll() -> dict[str, Any]:
        return expert_groups.groups(names, user)

    if not poll()["groups"]:
        return client.fail(problem, NO_GROUP, as_json=options.json)
    if options.json:
        return client.show_json(poll, options.watch)
    from . import table

    return table.show(poll, table.of_groups, options.watch)
