"""Diagnosis of an exit from the output of the program, that of the other ranks, and the kernel's counters."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..config.programs import Program, flag_in
from ..process import output_tail
from ..process.supervisord_config import Layout
from . import exit_cause
from .exit_cause import Exit, Verdict
from .oom import OomWatcher


class ExitDiagnosis:
    """Collects evidence while programs run, and diagnoses their exits."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._oom = OomWatcher()

    def poll(self, pids: Iterable[int], now: float) -> None:
        """Collect evidence about living processes. Call it at every step."""
        self._oom.poll(pids, now)

    def diagnose(
        self, program: Program, how: str, since: float, others: Iterable[str]
    ) -> tuple[Verdict, str]:
        """Return why a program exited, and its last error line.

        Args:
            how: exit as reported by supervisord.
            since: start of the program, Unix time.
            others: names of the programs that may have killed its worker because it hung.
        """
        error = output_tail.last_error(self._layout.output(program.name), since)
        worker = exit_cause.killed_worker(error)
        end = Exit(
            how,
            error,
            model=_model_of(program),
            out_of_memory=self._oom.recent_kill(),
            killed_by_rank=worker is not None and any(self._has_killed(name, worker) for name in others),
        )
        return exit_cause.explain(end), error

    def _has_killed(self, name: str, worker: int) -> bool:
        # `_report_stall` in expert_parallel/member.py writes this line.
        return output_tail.matches(
            self._layout.output(name), rf"\(pid {worker}\) has made no progress\b.*\bkill"
        )


def _model_of(program: Program) -> str:
    """Return the model's directory; "" for a plain name, which may be part of any sentence."""
    model = flag_in(program.argv, "--model") or ""
    return model if os.path.isabs(model) else ""
