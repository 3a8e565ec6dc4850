"""The process supervisord: started or adopted, found dead and replaced, ended.

When supervisord dies its children live on, out of anybody's control, and a new supervisord would start a
second set beside them. So whatever carries our mark is ended before a new one starts.

supervisord is dead when its process is. While it is alive but its socket was removed, the daemon waits, and
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

_START_PATIENCE = 20.0
#: For one that systemd starts again. Meanwhile nobody is answered, systemd's watchdog included.
_UNIT_PATIENCE = 5.0
#: One that accepts connections but answers none for so long is killed.
_HANGS = 30.0
_KILL_PATIENCE = 3.0
_LAST_WORDS = 1 << 16


class Supervisord:
    """Owner of that process.

    Args:
        external: systemd starts it and restarts it; here it is only waited for.
        write: puts its configuration in place.
        interrupted: true when the daemon has been told to stop; waiting is given up then.
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
        #: 0 until it has answered once.
        self.pid = 0
        self._client = client
        self._external = external
        self._write = write
        self._interrupted = interrupted
        self._child: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts(policy, lambda: 1.0)
        #: Readable when the process that answered last has ended.
        self._pidfd: int | None = None
        #: Its stdout and stderr, in memory: a full disk must not end it.
        self._output = os.memfd_create("supervisord.out")
        self._hangs_since: float | None = None
        self._next_try = 0.0

    @property
    def child(self) -> int | None:
        """Its pid if it is our child."""
        return self._child.pid if self._child else None

    def connect(self, patience: float = _START_PATIENCE) -> None:
        """Returns when it answers. Raises FastDeployError if it cannot be brought to that."""
        self.pid = 0
        deadline = time.monotonic() + patience
        alive: int | None = None
        while True:
            try:
                self.pid = self._client.pid()
                break
            except SupervisorLost as error:
                if self._child is not None and self._child.poll() is not None:
                    raise FastDeployError(f"supervisord ended: {self._last_words()}") from None
                if self._child is None and not error.hangs:
                    before, alive = alive, proc.supervisord_of(self._client.layout.ini)
                    if alive is not None and alive != before:
                        log.warning("%s; waiting for pid %d, which is alive", error, alive)
                    if alive is None:
                        self._sweep()
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
        """The process that answered last still runs, whether it answers now or not."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def recover(self, error: SupervisorLost) -> bool:
        """After a call that failed: True if it was dead, and another one answers now and runs nothing yet.

        False: it is alive and may answer again, or the new one has failed as well; call again when a call
        fails. Raises FastDeployError when that has happened too often.
        """
        now = time.monotonic()
        if not error.hangs:
            self._hangs_since = None
        elif self._hangs_since is None:
            self._hangs_since = now
        if self.is_alive and (self._hangs_since is None or now - self._hangs_since < _HANGS):
            return False
        if now < self._next_try:
            return False
        try:
            self._kill()
            self._sweep()
            if not self._external:
                self._write()
        except (FastDeployError, OSError) as failure:
            # Not a failure of supervisord, so it does not count as one.
            self._wait_and_try_again(failure, self._restarts.policy.backoff_first)
            return False
        decision = self._restarts.failed(now)
        if decision.quarantined:
            raise FastDeployError(f"supervisord keeps ending; see {self._client.layout.log}")
        try:
            self.connect(_UNIT_PATIENCE if self._external else _START_PATIENCE)
        except (FastDeployError, OSError) as failure:
            self._wait_and_try_again(failure, decision.delay)
            return False
        return True

    def answered(self) -> None:
        self._hangs_since = None
        failures, policy = self._restarts.failures, self._restarts.policy
        if failures and time.monotonic() - failures[-1] > policy.stable_after:
            self._restarts.stable()

    def end(self) -> None:
        """Ends it and everything that it has started and that still runs."""
        left = proc.end_marked(self._client.layout.run, time.monotonic() + _KILL_PATIENCE)
        try:
            self._client.shutdown()
        except SupervisorError as error:
            log.error("%s; killing it", error)
        if not _wait_for_end(self.pid or self.child or 0, _KILL_PATIENCE):
            self._kill()
        if self._child is not None:
            self._child.wait()
        left = proc.end_marked(self._client.layout.run, time.monotonic() + _KILL_PATIENCE)
        for process in left:
            log.error("pid %d (%s) cannot be killed", process.pid, process.program)

    def _start(self) -> None:
        self._write()
        layout = self._client.layout
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fastdeploy.daemon.process.fd_supervisord", "-n", "-c", str(layout.ini)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            # Ctrl-C in the terminal is for the daemon, which stops things in order.
            start_new_session=True,
        )
        log.info("started supervisord, pid %d", self._child.pid)

    def _watch_process(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        # One that has died since it answered is found dead by `is_alive`.
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def _wait_and_try_again(self, failure: Exception, delay: float) -> None:
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
            select.select([self._pidfd], [], [], _KILL_PATIENCE)

    def _sweep(self) -> None:
        run = self._client.layout.run
        orphans = proc.marked(run)
        if orphans:
            log.warning("ending %d processes that no supervisord looks after", len(orphans))
        if left := proc.end_marked(run, time.monotonic() + _KILL_PATIENCE):
            raise FastDeployError(f"pid {left[0].pid} ({left[0].program}) cannot be killed; end it by hand")

    def _last_words(self) -> str:
        text = os.pread(self._output, _LAST_WORDS, 0).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"see {self._client.layout.log}"


def _wait_for_end(pid: int, patience: float) -> bool:
    """True when no such process lives, at the latest after `patience` seconds."""
    try:
        descriptor = os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        descriptor = None
    if descriptor is None:
        return True
    try:
        return bool(select.select([descriptor], [], [], patience)[0])
    finally:
        os.close(descriptor)
