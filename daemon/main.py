"""fd-dp: the daemon. One loop keeps the programs of dp.toml running."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .. import __version__
from ..common.errors import ConfigError, FastDeployError
from ..common.log import configure
from .config import loader as dp_toml
from .config.loader import Config
from .config.preflight import checked_programs_of, exposed_secrets
from .config.programs import Program, address
from .control import protocol, status
from .control.server import ControlServer
from .metrics_port import MetricsPort
from .notify import Notifier
from .operations.commands import Commands
from .process import proc, supervisord_config
from .process.supervisor_client import Supervisor, SupervisorError, SupervisorLost
from .process.supervisord import Supervisord
from .process.supervisord_config import Layout
from .supervision.fleet import Fleet
from .supervision.probes import Probes
from .supervision.program_state import ProgramState
from .troubles import Troubles
from .upkeep import Lock, Upkeep
from .wakeups import Wakeups

log = logging.getLogger("fd-dp")

#: Seconds that programs get to end at shutdown; then they are killed. Longer than a replica's own grace
#: period (programs.py). A shutdown takes at most 15 s; the rest is for supervisord, which polls every second.
_SHUTDOWN_GRACE = 11.0
_PROGRESS_INTERVAL = 3.0
_BUSY_INTERVAL = 0.05
#: Seconds by which systemd extends its timeout while programs load for the first time or an operation is in
#: progress.
_TIMEOUT_EXTENSION = 30.0
#: EX_CONFIG of sysexits.h.
_BAD_CONFIG = 78

ProgramsFor = Callable[[Config], list[Program]]


class Daemon:
    """The daemon's loop.

    Args:
        file: dp.toml.
        external: systemd runs supervisord; it and its programs keep running when the daemon stops.
        programs_for: returns the programs of a configuration, or raises ConfigError.
    """

    def __init__(
        self, config: Config, file: Path, prefix: Path | None, external: bool, programs_for: ProgramsFor
    ) -> None:
        self._file = file
        self._prefix = prefix
        self._external = external
        self._wakeups = Wakeups(_signals(external))
        client = Supervisor(Layout(config.paths.run, config.paths.logs))
        self._fleet = Fleet(
            config,
            programs_for(config),
            client,
            Probes(self._wakeups.wake),
            watch=lambda pid: self._wakeups.watch(pid, self._fleet.on_process_exit),
        )
        self._supervisord = Supervisord(
            client,
            config.supervise,
            external=external,
            write=self._fleet.write_files,
            interrupted=lambda: any(self._is_stop(number) for number in self._wakeups.signals),
        )
        self._commands = Commands(self._fleet, file, prefix, programs_for, self._describe)
        self._notify = Notifier(dict(os.environ))
        self._metrics_port = MetricsPort(self._fleet.metrics.exposition)
        #: Called before the next step, and again until it succeeds.
        self._before_step: Callable[[], None] | None = self._take_over
        self._troubles = Troubles()
        self._was_ready = False
        self._shown, self._show_next = "", 0.0
        self._watchdog_next = self._extension_next = 0.0

    def run(self) -> int:
        layout = self._fleet.layout
        lock = Lock(layout.run)
        try:
            self._notify.status("waiting for supervisord")
            try:
                self._supervisord.connect()
                self._wakeups.watch(self._supervisord.pid, self._fleet.on_process_exit)
                server = ControlServer(
                    protocol.socket_path(layout.run), self._wakeups.selector, self._commands.handle
                )
                self._upkeep = Upkeep(self._fleet, server, lock, self._troubles)
                try:
                    while not self._handle_signals():
                        self._turn()
                finally:
                    self._notify.stopping()
                    if not self._external:
                        self._stop_programs()
                    server.close()
            finally:
                # A supervisord that never answered may belong to another daemon.
                if not self._external and (self._supervisord.pid or self._supervisord.child):
                    self._supervisord.end()
                proc.reap()
        finally:
            lock.release()
        log.info("stopped")
        return 0

    def _turn(self) -> None:
        try:
            if self._before_step is not None:
                self._before_step()
                self._before_step = None
            self._fleet.step()
            self._supervisord.answered()
            self._troubles.report("supervisord", "")
            self._troubles.report("step", "")
        except SupervisorLost as error:
            pid, alive = self._supervisord.pid, self._supervisord.is_alive
            outlook = (
                f"pid {pid} is alive and its programs keep running"
                if alive
                else "it has ended and is being replaced"
            )
            self._troubles.report("supervisord", f"{error}; {outlook}")
            if self._supervisord.recover(error):
                self._before_step = self._before_step or self._fleet.on_supervisord_restarted
                self._wakeups.watch(self._supervisord.pid, self._fleet.on_process_exit)
        except (SupervisorError, OSError) as error:
            # Usually a full disk. Programs keep running.
            self._troubles.report("step", f"{error}; trying again")
        except Exception as fault:
            self._failed("step", fault)
        # A part that fails does not affect the others.
        for name, part in (
            ("upkeep", self._upkeep.step),
            ("operation", self._commands.advance),
            ("metrics", lambda: self._fleet.metrics.publish(self._fleet.programs.values())),
            ("metrics port", lambda: self._metrics_port.follow(self._fleet.config.metrics)),
            ("status", self._publish_status),
        ):
            try:
                part()
            except Exception as fault:
                self._failed(name, fault)
            else:
                self._troubles.report(name, "")
        proc.reap(keep=self._supervisord.child)
        # No event announces that an operation can continue.
        interval = _BUSY_INTERVAL if self._commands.busy else self._fleet.interval()
        self._wakeups.wait(min(interval, self._notify.watchdog or interval))

    def _failed(self, part: str, fault: Exception) -> None:
        self._troubles.report(part, f"internal error in fd-dp, {part}: {fault!r}; trying again", fault)

    def _take_over(self) -> None:
        outdated = self._fleet.adopt()
        running = [program.spec for program in self._fleet.programs.values()]
        supervisord_config.remove_stale_launch_files(self._fleet.layout, [*self._fleet.wanted, *running])
        if outdated:
            log.info("started with an older configuration than dp.toml: %s", ", ".join(outdated))
            self._commands.catch_up()

    def _handle_signals(self) -> bool:
        """Begin a reload if there was a SIGHUP. Return whether the daemon has to stop."""
        while self._wakeups.signals:
            number = self._wakeups.signals.pop(0)
            if self._is_stop(number):
                log.info("%s: stopping%s", number.name, "; programs keep running" if self._external else "")
                return True
            self._commands.reload(None)
        return False

    def _is_stop(self, number: signal.Signals) -> bool:
        """Return whether a signal stops the daemon. For a service, SIGHUP means reload."""
        return number is not signal.SIGHUP or not self._external

    def _publish_status(self) -> None:
        """Report the status to systemd and to the terminal."""
        now = time.monotonic()
        if self._notify.watchdog and now >= self._watchdog_next:
            self._notify.alive()
            self._watchdog_next = now + self._notify.watchdog
        if now >= self._extension_next and (self._commands.busy or status.is_first_start(self._fleet)):
            self._notify.extend(_TIMEOUT_EXTENSION)
            self._extension_next = now + _TIMEOUT_EXTENSION / 3
        line = status.one_line(self._fleet)
        self._notify.status(line)
        if self._was_ready:
            return
        if status.is_usable(self._fleet):
            self._notify.ready()
        if status.all_ready(self._fleet):
            self._was_ready = True
            if not self._external:
                _say(_welcome(self._fleet, self._prefix), sys.stdout)
        elif now >= self._show_next and line != self._shown:
            self._shown, self._show_next = line, now + _PROGRESS_INTERVAL
            if sys.stderr.isatty():
                _say(f"fd-dp: {line}", sys.stderr)

    def _stop_programs(self) -> None:
        """Stop all programs at the same time. `Supervisord.end` kills those that remain.

        A second signal ends the grace period, except SIGHUP, which kernel and shell both send when a terminal
        closes.
        """
        fleet = self._fleet
        fleet.stopping = True
        deadline = time.monotonic() + _SHUTDOWN_GRACE
        for program in fleet.programs.values():
            fleet.stop(program, "fd-dp is stopping")
        try:
            while any(program.state is ProgramState.STOPPING for program in fleet.programs.values()):
                try:
                    fleet.step()
                except SupervisorLost as error:
                    # supervisord binds a removed socket again within a second. If it hangs, it is killed.
                    if error.hangs or not self._supervisord.is_alive:
                        raise
                fleet.metrics.publish(fleet.programs.values())
                if time.monotonic() > deadline or {*self._wakeups.signals} - {signal.SIGHUP}:
                    log.warning("killing programs that have not ended: %s", status.one_line(fleet))
                    return
                self._wakeups.wait(0.1)
        except (SupervisorError, OSError) as error:
            log.error("%s", error)

    def _describe(self) -> dict[str, Any]:
        if self._fleet.stopping:
            state = "STOPPING"
        elif self._commands.busy:
            state = "BUSY"
        else:
            state = "READY" if self._was_ready else "STARTING"
        return status.status(
            self._fleet,
            state=state,
            config=str(self._file),
            prefix=str(self._prefix) if self._prefix else None,
            supervisord=self._supervisord.pid,
            problems=self._troubles.lines(),
        )


def run(
    file: Path, prefix: Path | None, external: bool = False, programs_for: ProgramsFor = checked_programs_of
) -> int:
    """Run the daemon until a signal stops it. Raises FastDeployError."""
    config = dp_toml.load(file, prefix)
    os.environ["FD_LOG_DIR"] = str(config.paths.logs)
    configure(file_name="fd-dp.log")
    # Orphans of a killed supervisord become children of this process, which can wait for their end.
    proc.become_subreaper()
    for notice in config.deprecations:
        log.warning("%s", notice)
    if warning := exposed_secrets(file, config):
        log.warning("%s", warning)
    return Daemon(config, file, prefix, external, programs_for).run()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fd-dp",
        description="Runs the replicas and the router of dp.toml and keeps them running.",
        epilog="Ctrl-C, SIGTERM and SIGHUP stop everything within 15 s; under nohup, SIGHUP is ignored. "
        "With --supervisord external, SIGHUP reloads dp.toml, and programs keep running after a stop.",
    )
    parser.add_argument(
        "--config", type=Path, default=Path("/etc/fd/dp.toml"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--prefix", type=Path, metavar="DIRECTORY", help="keep state, run and logs below this directory"
    )
    parser.add_argument(
        "--supervisord",
        choices=("own", "external"),
        default="own",
        help="external: systemd runs it, and programs keep running without the daemon (default: own)",
    )
    parser.add_argument("--version", action="version", version=f"fd-dp {__version__}")
    options = parser.parse_args()
    prefix = options.prefix.absolute() if options.prefix else None
    try:
        return run(options.config.absolute(), prefix, options.supervisord == "external")
    except (FastDeployError, OSError) as error:
        # OSError: a full disk, for example.
        print(f"fd-dp: ERROR ({error})", file=sys.stderr)
        return _BAD_CONFIG if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130  # before the loop handled signals: nothing had been started


def _signals(external: bool) -> tuple[signal.Signals, ...]:
    """Return the signals that the loop handles. SIGHUP stays ignored under nohup."""
    if not external and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGTERM, signal.SIGINT
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def _say(text: str, stream: TextIO) -> None:
    """Print a text. The terminal or the reader of the pipe may be gone."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def _welcome(fleet: Fleet, prefix: Path | None) -> str:
    router = fleet.config.router
    url = f"http://{address(router.host, router.port)}"
    question = '{"messages":[{"role":"user","content":"What is the capital of France?"}]}'
    curl = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if router.api_keys_file or "FD_API_KEY" in os.environ:
        curl += ["-H", "Authorization: Bearer KEY"]
    fdctl = [str(Path(sys.executable).with_name("fdctl")), *(["--prefix", str(prefix)] if prefix else [])]
    page = " (open it in a browser)" if router.page else ""
    return f"""
fd-dp: {status.one_line(fleet)}, behind {url}{page}

  {shlex.join([*curl, "-d", question])}

  {shlex.join([*fdctl, "status"])}

Ctrl-C stops everything.
"""


if __name__ == "__main__":
    sys.exit(main())
