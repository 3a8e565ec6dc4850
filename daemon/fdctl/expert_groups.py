"""`fdctl ep`: the expert-parallel groups of a deployment.

Reads the groups' shared memory. It works without the daemon, and when ranks hang.
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
    """Return the names of the groups in the launch files. During a reload there are old and new groups.

    Raises:
        DaemonUnreachable: no daemon has used this run directory.
        FastDeployError: the launch files cannot be read.
    """
    launch = run / "launch"
    try:
        files = [file for file in launch.iterdir() if file.suffix == ".json"]
    except FileNotFoundError:
        raise DaemonUnreachable(f"no fd-dp has used {run}; start it, or pass its --prefix") from None
    except OSError as error:
        raise FastDeployError(f"{launch} cannot be read ({error.strerror})") from None
    names = set()
    for file in files:
        # Removed meanwhile, or written by another version.
        with contextlib.suppress(FileNotFoundError, ValueError):
            names.add(expert_group_in(Program.from_launch_text(file.read_text(encoding="ascii")).argv))
    return sorted(name for name in names if name)


def groups(names: list[str], user: int | None) -> dict[str, Any]:
    """Return the groups with live members, in the stable schema of `fdctl ep --json`.

    Raises FastDeployError if the memory of a group cannot be read.
    """
    try:
        found = [read_snapshot(name, user) for name in names]
    except (ConfigError, OSError) as error:
        raise FastDeployError(str(error)) from None
    return {"groups": [asdict(group) for group in found if group is not None]}
