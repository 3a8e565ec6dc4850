"""Comparison of our router with others: `make bench-router`.

fd-router, sglang-router, vllm-router and nginx run in front of eight mock engines. One at a time is put under
load: requests by wrk, event streams by our own reader. They take turns, so that disturbances affect all
equally. A router that does not start, or fails a single request, has no result. A single number in twenty
seconds:

    python -m benchmarks.router --quick --only unary_c64 --contenders ours,vllm
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .mock_engines import MockEngines
from .router_cases import CASES, IDLE_INTERVAL_MS, Case, HeldCase, StreamCase, cases_named
from .router_contenders import COMMANDS, DIRECT, ContenderError, RunningRouter, default_fd_router
from .router_load import LoadError, require_wrk, unary
from .router_report import Findings, print_table, print_targets, rows_of
from .rows import report

_QUICK = ("unary_c64", "sse_c256")


def main() -> None:
    arguments = _parser().parse_args()
    try:
        only = arguments.only or (list(_QUICK) if arguments.quick else [""])
        cases = [_with(case, arguments.contenders) for case in cases_named(only)]
    except ValueError as error:
        raise SystemExit(f"benchmarks.router: {error}") from None
    require_wrk()
    repetitions = 1 if arguments.quick else arguments.repetitions
    seconds = 1.0 if arguments.quick else 2.0

    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        bench = _Bench(findings, Path(directory), arguments.fd_router, seconds)
        bench.take_turns([case for case in cases if not isinstance(case, HeldCase)], repetitions)
        for case in cases:
            if isinstance(case, HeldCase):
                bench.hold(case)
    print_table(cases, findings)
    rows = list(rows_of(cases, findings))
    ours_failed = any(contender == "ours" for _, contender in findings.failures)
    if rows:
        part = len(cases) < len(CASES) or arguments.contenders or arguments.quick or ours_failed
        report(rows, "router_part" if part else "router")
        print_targets(rows)
    if ours_failed:
        sys.exit(1)


class _Bench:
    def __init__(self, findings: Findings, directory: Path, fd_router: Path, seconds: float) -> None:
        self._findings = findings
        self._directory = directory
        self._fd_router = fd_router
        self._seconds = seconds

    def take_turns(self, cases: Sequence[Case], repetitions: int) -> None:
        names = list(dict.fromkeys(name for case in cases for name in case.contenders))
        if not names:
            return
        routers: dict[str, RunningRouter] = {}
        with MockEngines() as engines:
            try:
                for name in names:
                    if router := self._start(name, engines, [c for c in cases if name in c.contenders]):
                        routers[name] = router
                for repetition in range(repetitions):
                    for case in cases:
                        taking_part = [name for name in case.contenders if name in routers]
                        # Vary the order, so that none always follows the same other.
                        shift = repetition % max(1, len(taking_part))
                        for name in taking_part[shift:] + taking_part[:shift]:
                            self._measure(case, routers[name], engines)
            finally:
                for router in routers.values():
                    router.stop()

    def hold(self, case: HeldCase) -> None:
        """Measure each router freshly started and alone, without memory left by an earlier load."""
        for name in case.contenders:
            with MockEngines(IDLE_INTERVAL_MS) as engines:
                if router := self._start(name, engines, [case], warm_up=False):
                    try:
                        self._measure(case, router, engines)
                    finally:
                        router.stop()

    def _start(
        self, name: str, engines: MockEngines, cases: Sequence[Case], warm_up: bool = True
    ) -> RunningRouter | None:
        router = None
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._directory))
            router = RunningRouter(name, engines, place, self._fd_router)
            if warm_up:
                unary(router.port, router.pid, connections=64, seconds=1, directory=place)
            return router
        except (ContenderError, LoadError) as error:
            print(f"{name}: {error}", flush=True)
            if router is not None:
                router.stop()
            for case in cases:
                self._findings.fail(case, name, str(error))
            return None

    def _measure(self, case: Case, router: RunningRouter, engines: MockEngines) -> None:
        if (case.name, router.name) in self._findings.failures:
            return
        marked = engines.stats()["marked_streams"]
        try:
            router.require_alive()
            figures = case.measure(router, self._seconds, self._directory)
        except (ContenderError, LoadError) as error:
            self._findings.fail(case, router.name, str(error))
            print(f"{case.name:<12} {router.name:<13} failed: {error}", flush=True)
            return
        self._findings.add(case, router.name, figures)
        values = ", ".join(f"{metric} {value:.2f}" for metric, value in figures.items())
        print(f"{case.name:<12} {router.name:<13} {values}", flush=True)
        streams = router.name == "ours" and isinstance(case, StreamCase | HeldCase)
        if streams and engines.stats()["marked_streams"] == marked:
            print("note: it has not asked for marks; this is what it costs without resume", flush=True)


def _with(case: Case, contenders: Sequence[str]) -> Case:
    """Restrict the contenders to these and `direct`, the reference."""
    if not contenders:
        return case
    taking_part = tuple(name for name in case.contenders if name in (DIRECT, *contenders))
    return type(case)(case.size, taking_part, case.kind)


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in (*COMMANDS, DIRECT):
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join((DIRECT, *COMMANDS))}")
    return names


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(case.name for case in CASES)
    parser.add_argument(
        "--only", action="append", metavar="CASE", help=f"only cases with this prefix; one of {names}"
    )
    parser.add_argument(
        "--contenders", type=_contenders, default=[], metavar="A,B", help=f"any of {', '.join(COMMANDS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one short repetition; without --only, {' and '.join(_QUICK)}"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="repetitions (default %(default)s)")
    parser.add_argument(
        "--fd-router", type=Path, default=default_fd_router(), metavar="PROGRAM", help="fd-router to measure"
    )
    return parser


if __name__ == "__main__":
    main()
