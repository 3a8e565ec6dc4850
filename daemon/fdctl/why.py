"""`fdctl why`: explains a program's state, its last exit and its last output."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common.errors import ConfigError, FastDeployError
from ...expert_parallel.snapshot import RankSnapshot, Snapshot, read_snapshot
from ..config.programs import expert_group_in
from ..control import protocol
from ..diagnosis.exit_cause import Cause
from ..diagnosis.xid import lost_gpu
from ..process.output_tail import tail
from . import client, kernel_log
from .program_output import last_lines, stacks_in

_LINES = 50
_INTENTS = {"run": "running", "stopped": "down (stopped by the operator)", "held": "held by the operator"}


def why(options: argparse.Namespace) -> int:
    if options.replica == "all":
        return _all(options)
    found = _explained(options, options.replica)
    # The output may be unreadable for this user.
    lines, problem = [], ""
    try:
        lines = last_lines(Path(found["output"]), _LINES)
    except FastDeployError as error:
        problem = str(error)
    if options.json:
        print(json.dumps({**found, "lines": lines}, indent=2))
        return protocol.OK
    for line in (*_describe(options, found), *(f"  {trouble}" for trouble in found["problems"])):
        print(line)
    print(problem or f"last {len(lines)} lines of {found['output']}:")
    for line in lines:
        print(f"  {line}")
    return protocol.OK


def _all(options: argparse.Namespace) -> int:
    """Explain every program that is not READY, and list the daemon's problems."""
    status = client.status(options)
    entries = [entry for entry in (status["router"], *status["replicas"]) if entry]
    found = [_explained(options, entry["name"]) for entry in entries]
    if options.json:
        print(json.dumps({"programs": found}, indent=2))
        return protocol.OK
    notable = [program for program in found if program["state"] != "READY" or program["waits_for"]]
    for program in notable:
        for line in _describe(options, program):
            print(line)
    for problem in status["daemon"]["problems"]:
        print(problem)
    if not notable:
        print(f"all {len(found)} programs are READY")
    return protocol.OK


def _explained(options: argparse.Namespace, name: str) -> dict[str, Any]:
    found = client.explain(options, name)
    stacks = None
    with contextlib.suppress(FastDeployError):
        stacks = stacks_in(Path(found["output"]))
    group = _group(found, client.socket(options).parent) if "replica" in found else None
    stacks_found = asdict(stacks) if stacks else None
    return {**found, "stacks": stacks_found, "expert_group": group, "xid": _xid(found)}


def _describe(options: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    now = time.time()
    lines = [f"{client.label(found)}: {found['state']} for {_duration(found['for'])}"]
    if found["note"]:
        lines[0] += f": {found['note']}"
    wanted = _INTENTS[found["intent"]] + ("; drained" if found["draining"] else "")
    lines.append(f"  wanted: {wanted}")
    if found["waits_for"]:
        lines.append(f"  waits for: {found['waits_for']}")
    if found["in_flight"]:
        lines.append(f"  in flight: {found['in_flight']}")
    if found["last_exit"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["last_exit_time"]))
        ago = _duration(now - found["last_exit_time"])
        cause = f" (cause: {found['cause']})" if found.get("cause") else ""
        lines.append(f"  last exit: {found['last_exit']}{cause}, {when}, {ago} ago")
    lines += _xid_lines(found["xid"]) if found["xid"] else []
    lines.append(f"  restarts: {found['restarts']}")
    if group := found["expert_group"]:
        lines.append(f"  expert group {group['name']}: {group['told']}")
    if stacks := found["stacks"]:
        word = found.get("replica", found["name"])
        logs = client.command_line(options, "logs", str(word), "-n", str(stacks["lines_ago"]))
        lines.append(f"  stacks of {stacks['threads']} threads are in its output: {logs}")
    return lines


def _xid(found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the kernel reports about a GPU that failed; None if the last exit had another cause."""
    if found.get("cause") != Cause.GPU or not found["last_exit_time"]:
        return None
    gpu = lost_gpu(tail(Path(found["output"])))
    messages, problem = kernel_log.xids(found["last_exit_time"], gpu)
    return {"gpu": gpu or None, "messages": [asdict(xid) for xid in messages], "problem": problem or None}


def _xid_lines(xid: dict[str, Any]) -> list[str]:
    if xid["problem"]:
        return [f"  kernel log: cannot be read ({xid['problem']}); as root, fdctl why shows the Xid"]
    if not xid["messages"]:
        gpu = f"GPU {xid['gpu']}" if xid["gpu"] else "a GPU"
        return [f"  kernel log: no Xid of {gpu} at that time"]
    return [
        f"  kernel log: {time.strftime('%H:%M:%S', time.localtime(one['at']))} {one['text']}"
        for one in xid["messages"]
    ]


def _group(found: dict[str, Any], run: Path) -> dict[str, Any] | None:
    """Return the replica's part in its expert group, or None."""
    name = expert_group_in(found["argv"])
    if name is None:
        return None
    try:
        group = read_snapshot(name, run.stat().st_uid)
    except (ConfigError, OSError):
        return None
    rank = next((rank for rank in group.seats if rank.seat == found["replica"]), None) if group else None
    if group is None or rank is None:
        return None
    waited_for_by = [other.seat for other in group.seats if rank.seat in other.waits_for]
    return {
        "name": name,
        "state": rank.state,
        "waits_for": list(rank.waits_for),
        "waited_for_by": waited_for_by,
        "told": _summary(rank, group, waited_for_by),
    }


def _summary(rank: RankSnapshot, group: Snapshot, waited_for_by: list[int]) -> str:
    words = [f"{rank.state}, one of {len(group.active)}"]
    if rank.waits_for:
        words.append(f"waits for {_ranks(rank.waits_for)}")
    if waited_for_by:
        words.append(f"{_ranks(waited_for_by)} {'wait' if len(waited_for_by) > 1 else 'waits'} for it")
    return "; ".join(words)


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
