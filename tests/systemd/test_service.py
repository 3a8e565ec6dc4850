"""systemctl start, stop, reload, restart and status fd-dp, as a real systemd carries them out."""

from __future__ import annotations

import re
import stat

import pytest

from .conftest import Service, wait_until


def test_status_shows_progress_and_start_ends_when_all_are_ready(stopped: Service) -> None:
    stopped.configure(8, "--load-seconds", "2")
    stopped.run("systemctl", "start", "--no-block", "fd-dp")
    pattern = r"\d/8 ready, (replica \d loading \d+%(, )?)+"
    wait_until(lambda: re.fullmatch(pattern, stopped.show("StatusText")), "the progress in the status")
    assert stopped.show("ActiveState") == "activating"
    wait_until(lambda: stopped.show("ActiveState") == "active", "started")
    assert stopped.ready()
    assert 'Status: "8/8 ready"' in stopped.run("systemctl", "status", "--no-pager", "fd-dp").stdout


@pytest.mark.slow
def test_progressing_start_and_reload_may_exceed_the_unit_timeout(stopped: Service) -> None:
    stopped.configure(2, "--load-seconds", "30")
    stopped.override("fd-dp", "TimeoutStartSec=20s")
    stopped.run("systemctl", "start", "fd-dp", timeout=200)
    assert stopped.show("NRestarts") == "0"
    stopped.configure(2, "--load-seconds", "15")
    stopped.run("systemctl", "reload", "fd-dp", timeout=200)
    assert stopped.ready(3)


def test_everything_runs_as_user_fd_and_the_daemon_alone_in_its_unit(serving: Service) -> None:
    engines = serving.cgroup("fd-dp-engines")
    assert set(serving.pids().values()) < engines
    assert serving.cgroup("fd-dp") == {int(serving.show("MainPID"))}
    assert serving.processes().keys() == engines | serving.cgroup("fd-dp")


def test_stop_leaves_nothing(serving: Service) -> None:
    serving.run("systemctl", "stop", "fd-dp")
    wait_until(lambda: serving.show("ActiveState", "fd-dp-engines") == "inactive", "the engines stop, too")
    assert serving.processes() == {}
    assert serving.cgroup("fd-dp") == serving.cgroup("fd-dp-engines") == set()
    # The fake router leaves its socket behind.
    assert serving.sockets() - {"router.sock"} == set()


def test_stop_kills_processes_that_ignore_sigterm_or_left_their_session(stopped: Service) -> None:
    stopped.configure(2, "--ignore-term", "--grandchild")
    stopped.override("fd-dp-engines", "TimeoutStopSec=1s")
    stopped.run("systemctl", "start", "fd-dp")
    assert len(stopped.processes()) == 1 + 1 + 1 + 4
    stopped.stop()
    assert stopped.processes() == {}


def test_reload_returns_when_a_good_dp_toml_is_in_use(serving: Service) -> None:
    before = serving.pids()
    serving.configure(router='policy = "round_robin"')
    serving.run("systemctl", "reload", "fd-dp")
    assert "round_robin" in serving.run("fdctl", "render").stdout
    serving.configure()
    serving.run("systemctl", "reload", "fd-dp")
    assert serving.pids() == before


def test_a_bad_dp_toml_fails_the_reload_and_changes_nothing(serving: Service) -> None:
    before = serving.pids()
    serving.machine.write("/etc/fd/dp.toml", "[engine]\nmax_modle_len = 1\n[model]\npath = 'demo'\n", 0o640)
    assert serving.run("systemctl", "reload", "fd-dp", code=None).returncode != 0
    assert serving.pids() == before
    assert serving.ready()
    assert serving.show("ActiveState") == "active"
    assert "dp.toml:2: engine.max_modle_len: unknown key" in serving.journal()
    serving.configure()


def test_reload_fails_and_rolls_back_if_replicas_cannot_start(
    serving: Service,
) -> None:
    before = serving.pids()
    serving.configure(8, "--die-while-loading")
    assert serving.run("systemctl", "reload", "fd-dp", code=None).returncode != 0
    after = serving.wait_ready()
    assert after.pop("replica0") != before.pop("replica0")
    assert after == before
    assert not any("--die-while-loading" in line for line in serving.processes().values())
    assert "cannot load: no such checkpoint" in serving.journal()
    serving.configure()


def test_killed_daemon_restarts_and_adopts_the_programs(serving: Service) -> None:
    before, daemon = serving.wait_ready(), serving.show("MainPID")
    serving.machine.kill(daemon, "KILL")
    wait_until(lambda: serving.show("MainPID") not in (daemon, "0"), "another daemon")
    assert serving.wait_ready() == before
    assert serving.show("MainPID", "fd-dp-engines") in map(str, serving.cgroup("fd-dp-engines"))


def test_daemon_restart_as_after_an_upgrade_leaves_replicas_running(serving: Service) -> None:
    before, daemon = serving.wait_ready(), serving.show("MainPID")
    serving.run("systemctl", "restart", "fd-dp")
    assert serving.show("MainPID") != daemon
    assert serving.wait_ready() == before
    journal = serving.journal()
    assert "SIGTERM: stopping; programs keep running" in journal
    assert "replica 7: adopted pid" in journal
    assert "Traceback" not in journal


def test_stopped_replicas_stay_down_and_do_not_delay_a_unit_restart(serving: Service) -> None:
    serving.run("fdctl", "stop", "all")
    serving.run("systemctl", "restart", "fd-dp")
    assert serving.show("StatusText").startswith("0/8 ready")
    serving.run("fdctl", "start", "all")
    assert serving.ready()


def test_watchdog_replaces_a_hanging_daemon_and_replicas_keep_running(serving: Service) -> None:
    before = serving.wait_ready()
    serving.override("fd-dp", "WatchdogSec=3s\nTimeoutAbortSec=1s")
    serving.run("systemctl", "restart", "fd-dp")
    fed = serving.show("WatchdogTimestampMonotonic")
    wait_until(lambda: serving.show("WatchdogTimestampMonotonic") != fed, "a loop at work feeds it")
    daemon = serving.show("MainPID")
    serving.machine.kill(daemon, "STOP")
    wait_until(lambda: serving.show("MainPID") not in (daemon, "0"), "another daemon")
    assert serving.wait_ready() == before
    assert "fd-dp.service: Watchdog timeout" in serving.journal()


def test_killed_supervisord_leaves_no_orphans_and_all_programs_return(serving: Service) -> None:
    before, daemon = serving.wait_ready(), serving.show("MainPID")
    serving.machine.kill(serving.show("MainPID", "fd-dp-engines"), "KILL")
    wait_until(lambda: not set(serving.pids().values()) & {*before.values(), None}, "everything is new")
    after = serving.wait_ready()
    assert set(after.values()) < serving.cgroup("fd-dp-engines")
    assert len(serving.cgroup("fd-dp-engines")) == 1 + len(after)
    assert not set(before.values()) & serving.processes().keys()
    assert serving.show("MainPID") == daemon


def test_start_with_a_bad_dp_toml_says_why_and_succeeds_once_corrected(
    stopped: Service,
) -> None:
    stopped.machine.write("/etc/fd/dp.toml", "[model]\npath = 3\n", 0o640)
    assert stopped.run("systemctl", "start", "fd-dp", code=None).returncode != 0
    assert "dp.toml:2: model.path: is 3; it must be a string" in stopped.journal()
    stopped.configure()
    stopped.wait_ready()


def test_group_fd_may_operate_and_others_have_no_access(serving: Service) -> None:
    for user, groups in (("olga", ["-G", "fd"]), ("eve", [])):
        serving.run("useradd", *groups, user, code=None)
    told = serving.run("fdctl", "status", user="olga")
    assert "8/8" in told.stdout
    assert serving.run("fdctl", "logs", "3", user="olga").stdout.startswith("fake replica")
    told = serving.run("fdctl", "status", user="eve", code=None)
    assert told.returncode != 0
    assert told.stdout == ""
    assert told.stderr.count("\n") == 1


def test_config_is_writable_by_root_only_and_launch_files_private_to_fd(
    serving: Service,
) -> None:
    root = serving.machine.root
    config = (root / "etc/fd/dp.toml").stat()
    fd = (root / "run/fd").stat()
    assert (config.st_uid, config.st_gid, stat.S_IMODE(config.st_mode)) == (0, fd.st_gid, 0o640)
    for path, mode in (
        ("run/fd", 0o750),
        ("run/fd/launch", 0o700),
        ("run/fd/supervisord.conf", 0o600),
        ("run/fd/supervisor.sock", 0o600),
        ("run/fd/fd-dp.sock", 0o660),
        ("var/lib/fd", 0o750),
        ("var/log/fd", 0o750),
    ):
        found = (root / path).stat()
        assert (path, found.st_uid, oct(stat.S_IMODE(found.st_mode))) == (path, fd.st_uid, oct(mode))
    launch = [*(root / "run/fd/launch").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in launch} == {0o600}
