"""fd-dp with fake replicas in place of real ones: launcher.py CONFIG PREFIX [external]."""

import sys
from dataclasses import replace
from pathlib import Path

from fastdeploy.common.errors import FastDeployError
from fastdeploy.daemon import main as daemon
from fastdeploy.daemon.config.loader import Config
from fastdeploy.daemon.config.programs import Program, programs_of

FAKE_REPLICA = str(Path(__file__).with_name("fake_replica.py"))
FAKE_ROUTER = str(Path(__file__).with_name("fake_fd_router.py"))


def fake_programs(config: Config) -> list[Program]:
    """Return the same names, ports and arguments with fake programs to execute."""
    programs = []
    for program in programs_of(config):
        if program.replica is None:
            argv = (sys.executable, FAKE_ROUTER, *program.argv[1:])
        else:
            argv = (sys.executable, FAKE_REPLICA, *program.argv[3:])
        programs.append(replace(program, argv=argv))
    return programs


if __name__ == "__main__":
    try:
        sys.exit(
            daemon.run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["external"], fake_programs)
        )
    except FastDeployError as error:
        sys.exit(f"fd-dp: ERROR ({error})")
