"""Start queue: which program starts next, and when a failed one is tried again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from ...common.errors import FastDeployError
from ...common.ports import require_free
from ..config.options import SuperviseSection
from ..config.programs import ROUTER
from ..diagnosis import exit_cause
from ..diagnosis.exit_cause import Cause
from ..process import proc, supervisor_client, supervisord_config
from ..process.restart_policy import HostFailureBudget, Restarts
from ..process.supervisor_client import Process, Supervisor, SupervisorLost
from .program_state import ProgramState, Retry, SupervisedProgram

#: Seconds that replicas wait for the router's first response, which takes a second or two.
_ROUTER_HEAD_START = 10.0


class StartFailed(FastDeployError):
    """A program could not be started, for example because its port is taken."""


class StartQueue:
    """Owner of the restart budgets.

    Args:
        write_files: writes the files that programs start from. Raises OSError.
        rng: returns random numbers from [0, 1) for the backoff.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        policy: SuperviseSection,
        write_files: Callable[[], None],
        rng: Callable[[], float],
    ) -> None:
        self._supervisor = supervisor
        self._policy = policy
        self._write_files = write_files
        self._rng = rng
        self._restarts: dict[str, Restarts] = {}
        self._host_budget = HostFailureBudget(policy)

    def configure(self, policy: SuperviseSection) -> None:
        self._policy = self._host_budget.policy = policy
        for restarts in self._restarts.values():
            restarts.policy = policy

    def add(self, name: str) -> None:
        """Give a program a fresh restart budget."""
        self._restarts[name] = Restarts(self._policy, self._rng)

    def remove(self, name: str) -> None:
        self._restarts.pop(name, None)

    def stable(self, name: str) -> None:
        """Forget the failures of a program that has been READY for `stable_after`."""
        self._restarts[name].stable()

    def next_replicas(self, programs: Mapping[str, SupervisedProgram], now: float) -> list[SupervisedProgram]:
        """Return the replicas to start now. The router starts first, with a head start of some seconds."""
        router = programs.get(ROUTER)
        if (
            router is not None
            and router.state is ProgramState.STARTING
            and now - router.since < _ROUTER_HEAD_START
        ):
            return []
        replicas = [program for program in programs.values() if not program.is_router]
        loading = sum(
            replica.state is ProgramState.STARTING and now - replica.since < self._policy.start_slot
            for replica in replicas
        )
        free = (self._policy.parallel_starts or os.cpu_count() or 1) - loading
        waiting = [replica for replica in replicas if replica.state is ProgramState.WAITING]
        # Longest wait first: a replica that fails again and again must not keep the others from starting.
        waiting.sort(key=lambda replica: replica.since)
        return waiting[: max(0, free)]

    def start(self, program: SupervisedProgram, process: Process | None, now: float) -> None:
        """Start a program, or leave it in the queue with a note that says what it waits for.

        Args:
            process: supervisord's entry of the program.

        Raises:
            StartFailed: the program cannot be started.
            SupervisorLost: supervisord does not answer.
        """
        layout, spec = self._supervisor.layout, program.spec
        # A worker may outlive its API process for a moment, and holds ports and memory.
        if left := proc.kill_marked(layout.run, program.name):
            program.set_note(f"waits for pid {left[0].pid} of its last run to end")
            return
        if process is not None and process.state not in supervisor_client.DOWN:
            return
        supervisord_config.make_log_directories(layout, [spec])
        if not supervisord_config.files_exist(layout, [spec]):
            try:
                self._write_files()
            except OSError as error:
                # Not a failure of the program, which starts as soon as its files can be written.
                program.set_note(f"waits for its files: {error}")
                return
        try:
            for port in spec.ports:
                require_free(spec.host, port, "dp.toml")
            self._supervisor.start(program.name)
        except SupervisorLost:
            raise
        except FastDeployError as error:
            raise StartFailed(str(error)) from None
        program.starting(now)

    def after_failure(
        self, program: SupervisedProgram, cause: Cause, others: Iterable[SupervisedProgram], now: float
    ) -> Retry:
        """Record a failure and decide when the program is tried again.

        Args:
            others: the other replicas.
        """
        restarts = self._restarts[program.name]
        if cause in exit_cause.FROM_OUTSIDE:
            decision = restarts.interrupted()
        elif program.is_router:
            # Everything depends on it, and it starts quickly and needs little. So neither the cause nor the
            # machine's budget delays its next try.
            decision = restarts.failed(now)
        else:
            exhausted = self._host_budget.failed(now)
            decision = restarts.failed(now, exit_cause.NO_QUICK_RETRY.get(cause, ""))
            if exhausted and not decision.quarantined and _any_in_use(others):
                return Retry(self._host_budget.calm_at, quarantined=True, paused=True, why=exhausted)
        return Retry(now + decision.delay, decision.quarantined, why=decision.why)

    def may_resume(
        self, program: SupervisedProgram, replicas: Iterable[SupervisedProgram], now: float
    ) -> bool:
        """Return whether a paused replica may start: the machine is calm and no other replica starts."""
        program.postpone_retry(self._host_budget.calm_at)
        return now >= program.next_try and not any(
            other.state in (ProgramState.WAITING, ProgramState.STARTING) for other in replicas
        )


def _any_in_use(replicas: Iterable[SupervisedProgram]) -> bool:
    """Return whether one of the replicas serves or will soon. The last one is never paused."""
    return any(
        (replica.alive and replica.state is not ProgramState.STOPPING)
        or replica.state in (ProgramState.WAITING, ProgramState.BACKOFF)
        for replica in replicas
    )
