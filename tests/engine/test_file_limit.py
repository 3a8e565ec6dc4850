"""The limit of open files is raised for this process where allowed, and else refused in one line."""

import resource
import subprocess
import sys

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.common.file_limit import allow_open_files


def test_the_soft_limit_is_raised_as_far_as_needed_and_never_lowered() -> None:
    """Uses a separate process, whose limits can be changed."""
    program = """
import resource
from fastdeploy.common.file_limit import allow_open_files

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
for needed in (50, 120, 110):
    allow_open_files(needed, "--threads 1")
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["(100, 200)", "(120, 200)", "(120, 200)"]


def test_hard_limit_too_low_is_refused_naming_the_flag_that_needs_more() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ConfigError, match=rf"^--threads 9 needs {hard + 1} .* the limit is {hard};"):
        allow_open_files(hard + 1, "--threads 9")
