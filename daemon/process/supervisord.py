"""The supervisord process: start, adopt, replace and stop it.

When supervisord dies, its children survive without control, and a new supervisord would start the programs a
second time. So all marked processes are killed before a new one starts.

supervisord counts as dead only when its process has ended. If its socket was removed, the daemon waits, and
the programs keep running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from ...common.errors import FastDeployError
from ..config.options import SuperviseSection
from . import proc
from .restart_policy import Restarts
from .supervisor_client import Supervisor, SupervisorError, SupervisorLost

log = logging.getLogger("fd-dp")

#: Seconds for a supervisord of our own to answer after its start.
_START_TIMEOUT = 20.0
#: Seconds that systemd gets to restart it. The daemon blocks meanwhile, and does not reset its watchdog.
_UNIT_TIMEOUT = 5.0
#: Seconds after which a supervisord that accepts connections but does not answer is killed.
_HANG_TIMEOUT = 30.0
_KILL_TIMEOUT = 3.0
_MAX_OUTPUT = 1 << 16


class Supervisord:
    """Owner of the supervisord process.

    Args:
        external: systemd starts and restarts it; the daemon only waits for it.
        write: writes its configuration. Raises OSError.
        interrupted: returns whether the daemon has to stop, which ends all waiting.
    """

    def __init__(
        self,
        client: Supervisor,
        policy: SuperviseSection,
        *,
        external: bool,
        write: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> None:
        #: 0 until supervisord has answered.
        self.pid = 0
        self._client = client
        self._external = external
        self._write = write
        self._interrupted = interrupted
        self._child: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts(policy, lambda: 1.0)
        #: Pidfd of the process that answered last.
        self._pidfd: int | None = None
        #: Its stdout and stderr. In memory, so that a full disk does not end it.
        self._output = os.memfd_create("supervisord.out")
        self._hangs_since: float | None = None
        self._next_try = 0.0

    @property
    def child(self) -> int | None:
        """Pid of a supervisord that is a child of this process."""
        return self._child.pid if self._child else None

    def connect(self, timeout: float = _START_TIMEOUT) -> None:
        """Wait until supervisord answers; start it if necessary. Raises FastDeployError at the timeout."""
        self.pid = 0
        deadline = time.monotonic() + timeout
        alive: int | None = None
        while True:
            try:
                self.pid = self._client.pid()
                break
            except SupervisorLost as error:
                if self._child is not None and self._child.poll() is not None:
                    raise FastDeployError(f"supervisord ended: {self._last_output_line()}") from None
                if self._child is None and not error.hangs:
                    before, alive = alive, proc.supervisord_of(self._client.layout.ini)
                    if alive is not None and alive != before:
                        log.warning("%s; waiting for pid %d, which is alive", error, alive)
                    if alive is None:
                        self._kill_orphans()
                        if not self._external:
                            self._start()
                if time.monotonic() > deadline or self._interrupted():
                    if alive is not None:
                        raise SupervisorLost(f"{error}, but pid {alive} is alive", error.hangs) from None
                    raise
            time.sleep(0.05)
        self._watch_process()
        self._hangs_since = None
        if self._child is None:
            log.info("adopted supervisord, pid %d", self.pid)

    @property
    def is_alive(self) -> bool:
        """True if the process that answered last still runs."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def recover(self, error: SupervisorLost) -> bool:
        """Handle a failed call: replace supervisord if it is dead or hangs. Call it after every failed call.

        Returns:
            True if a new supervisord answers; it runs no program yet. False if the old one is alive, or
            there is no new one yet.

        Raises FastDeployError after too many failures.
        """
        now = time.monotonic()
        if not error.hangs:
            self._hangs_since = None
        elif self._hangs_since is None:
            self._hangs_since = now
        if self.is_alive and (self._hangs_since is None or now - self._hangs_since < _HANG_TIMEOUT):
            return False
        if now < self._next_try:
            return False
        try:
            self._kill()
            self._kill_orphans()
            if not self._external:
                self._write()
        except (FastDeployError, OSError) as failure:
            # Not a failure of supervisord itself.
            self._schedule_retry(failure, self._restarts.policy.backoff_first)
            return False
        decision = self._restarts.failed(now)
        if decision.quarantined:
            raise FastDeployError(f"supervisord keeps ending; see {self._client.layout.log}")
        try:
            self.connect(_UNIT_TIMEOUT if self._external else _START_TIMEOUT)
        except (FastDeployError, OSError) as failure:
            self._schedule_retry(failure, decision.delay)
            return False
        return True

    def answered(self) -> None:
        """Record a successful call."""
        self._hangs_since = None
        failures, policy = self._restarts.failures, self._restarts.policy
        if failures and time.monotonic() - failures[-1] > policy.stable_after:
            self._restarts.stable()

    def end(self) -> None:
        """Stop supervisord, and kill the programs that still run."""
        left = proc.end_marked(self._client.layout.run, time.monotonic() + _KILL_TIMEOUT)
        try:
            self._client.shutdown()
        except SupervisorError as error:
            log.error("%s; killing it", error)
        if not _wait_for_end(self.pid or self.child or 0, _KILL_TIMEOUT):
            self._kill()
        if self._child is not None:
            self._child.wait()
        left = proc.end_marked(self._client.layout.run, time.monotonic() + _KILL_TIMEOUT)
        for process in left:
            log.error("pid %d (%s) cannot be killed", process.pid, process.program)

    def _start(self) -> None:
        self._write()
        layout = self._client.layout
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fastdeploy.daemon.fd_supervisord", "-n", "-c", str(layout.ini)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            # Ctrl-C in the terminal must reach only the daemon, which stops everything in order.
            start_new_session=True,
        )
        log.info("started supervisord, pid %d", self._child.pid)

    def _watch_process(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        # If it has died since it answered, `is_alive` is False.
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def _schedule_retry(self, failure: Exception, delay: float) -> None:
        log.error("%s; next try in %.1f s", failure, delay)
        self._next_try = time.monotonic() + delay

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
        elif self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            select.select([self._pidfd], [], [], _KILL_TIMEOUT)

    def _kill_orphans(self) -> None:
        run = self._client.layout.run
        orphans = proc.marked(run)
        if orphans:
            log.warning("killing %d processes that have lost their supervisord", len(orphans))
        if left := proc.end_marked(run, time.monotonic() + _KILL_TIMEOUT):
            raise FastDeployError(f"pid {left[0].pid} ({left[0].program}) cannot be killed; kill it manually")

    def _last_output_line(self) -> str:
        text = os.pread(self._output, _MAX_OUTPUT, 0).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"see {self._client.layout.log}"


def _wait_for_end(pid: int, timeout: float) -> bool:
    """Wait for the end of a process. Return whether it has ended."""
    try:
        descriptor = os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        descriptor = None
    if descriptor is None:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)
