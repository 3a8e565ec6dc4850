"""`fdctl ep`: the expert-parallel groups of a deployment, seen from beside them.

Neither the daemon nor a rank is asked, so it tells about those that hang, too.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common.errors import ConfigError, FastDeployError
from ...expert_parallel.snapshot import read_snapshot
from ..config.programs import Program, expert_group_in
from ..control.protocol import DaemonUnreachable


def names_of(run: Path) -> list[str]:
    """Where the replicas meet, by the files that they are started from: in a reload the old ones and the new.

    Raises:
        DaemonUnreachable: no daemon has been there.
        FastDeployError: they cannot be read.
    """
    launch = run / "launch"
    try:
        files = [file for file in launch.iterdir() if file.suffix == ".json"]
    except FileNotFoundError:
        raise DaemonUnreachable(f"no fd-dp has been in {run}; start it, or give its --prefix") from None
    except OSError as error:
        raise FastDeployError(f"{launch} cannot be read ({error.strerror})") from None
    names = set()
    for file in files:
        # Removed meanwhile, or of another version.
        with contextlib.suppress(FileNotFoundError, ValueError):
            names.add(expert_group_in(Program.from_launch_text(file.read_text(encoding="ascii")).argv))
    return sorted(name for name in names if name)


def groups(names: list[str], user: int | None) -> dict[str, Any]:
    """The stable schema of `fdctl ep --json`: those that somebody alive is in.

    Raises:
        FastDeployError: one cannot be looked at.
    """
    try:
        found = [read_snapshot(name, user) for name in names]
    except (ConfigError, OSError) as error:
        raise FastDeployError(str(error)) from None
    return {"groups": [asdict(group) for group in found if group is not None]}
