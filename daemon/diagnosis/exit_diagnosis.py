"""What can be found out about the end of a program: from its output, its neighbours' and the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..config.programs import Program, flag_in
from ..process import output_tail
from ..process.supervisord_config import Layout
from . import exit_cause
from .exit_cause import End, Verdict
from .oom import OomWatcher


class ExitDiagnosis:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shortage = OomWatcher()

    def look(self, pids: Iterable[int], now: float) -> None:
        """To be called again and again while they live: afterwards it is too late for some of it."""
        self._shortage.look(pids, now)

    def hold(self, program: Program, how: str, since: float, others: Iterable[str]) -> tuple[Verdict, str]:
        """Why it has ended, and the last error that it has told.

        Args:
            how: in supervisord's words.
            since: Unix time at which it was started.
            others: programs that may have killed its worker because it hung.
        """
        told = output_tail.last_error(self._layout.output(program.name), since)
        worker = exit_cause.killed_worker(told)
        end = End(
            how,
            told,
            model=_model_of(program),
            out_of_memory=self._shortage.risen(),
            killed_by_rank=worker is not None and any(self._has_killed(name, worker) for name in others),
        )
        return exit_cause.explain(end), told

    def _has_killed(self, name: str, worker: int) -> bool:
        # In the words of `ExpertGroup._report_stall`.
        return output_tail.matches(
            self._layout.output(name), rf"\(pid {worker}\) has made no progress .*; it is killed$"
        )


def _model_of(program: Program) -> str:
    """Empty for a word that stands for a model, which may be part of any sentence."""
    model = flag_in(program.argv, "--model") or ""
    return model if os.path.isabs(model) else ""
