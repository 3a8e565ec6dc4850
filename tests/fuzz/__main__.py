"""`make fuzz`: fuzz every reader of untrusted bytes for FD_FUZZ_MINUTES (5), half of it in compiled code.

Prints the targets and their numbers of inputs. Findings in compiled code are stored in .cache/fuzz; a
property test prints the smallest failing input.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

from . import native

_MODULES = ("test_parsers", "test_files", "test_group_memory", "test_answers")
#: Examples of a property per turn.
_EXAMPLES = 100


def main() -> int:
    try:
        minutes = float(os.environ.get("FD_FUZZ_MINUTES", "5"))
    except ValueError:
        print("fuzz: FD_FUZZ_MINUTES must be a number of minutes", file=sys.stderr)
        return 2
    seconds, failed = minutes * 60, 0
    if native.is_possible():
        for target in native.TARGETS:
            native.build(target)
            outcome = native.run(target, max(1, round(seconds / 2 / len(native.TARGETS))))
            failed += _tell(target.source.name, outcome.inputs, outcome.finding)
        seconds /= 2
    else:
        print(f"fuzz: the compiled code is left out: {native.MISSING}", flush=True)
    settings.register_profile(
        "fuzz",
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("fuzz")
    failed += _run_properties(time.monotonic() + seconds)
    print(f"fuzz: {failed} failed" if failed else "fuzz: nothing found")
    return 1 if failed else 0


def _run_properties(end: float) -> int:
    """Run the properties in turns, each at least once; a failed one is not run again."""
    counts, findings = dict[str, int](), dict[str, str]()
    # Code under test logs a line for each input that it refuses.
    logging.disable(logging.CRITICAL)
    properties = {
        f"{module}.{name}": function
        for module in _MODULES
        # Imported only now: tests take the hypothesis settings in force at their definition.
        for name, function in vars(importlib.import_module(f".{module}", __package__)).items()
        if name.startswith("test_")
    }
    for name, function in properties.items():
        _count(function, counts, name)
    while len(findings) < len(properties):
        for name, function in properties.items():
            if name in findings or (counts.get(name) and time.monotonic() > end):
                continue
            try:
                function()
            except Exception:
                findings[name] = traceback.format_exc()
        if time.monotonic() > end:
            break
    return sum(_tell(name, counts.get(name, 0), findings.get(name, "")) for name in properties)


def _count(function: Callable[..., Any], counts: dict[str, int], name: str) -> None:
    inner = function.hypothesis.inner_test  # type: ignore[attr-defined]

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return inner(*args, **kwargs)

    function.hypothesis.inner_test = counted  # type: ignore[attr-defined]


def _tell(name: str, inputs: int, finding: str) -> bool:
    print(f"fuzz: {name}: {inputs} inputs, {'FAILED' if finding else 'nothing found'}", flush=True)
    if finding:
        print(finding, flush=True)
    return bool(finding)


if __name__ == "__main__":
    sys.exit(main())
