"""The unit files that `make install` installs: systemd must accept them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..system_packages import needs

ROOT = Path(__file__).parents[2]
UNITS = ("fd-dp.service", "fd-dp-engines.service")


def run(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env}
    )


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """An installation that uses this environment's commands, as systemd checks that they exist."""
    done = run(ROOT / "etc/install.sh", DESTDIR=str(tmp_path), PREFIX_DIR=sys.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    return tmp_path / "etc"


@pytest.fixture
def share(staged: Path) -> Path:
    return staged.parent / "usr/local/share"


@needs("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(staged: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", *(staged / "systemd/system" / unit for unit in UNITS))
    ours = [line for line in done.stderr.splitlines() if "fd-dp" in line]
    assert (done.returncode, ours) == (0, [])


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_hardened(unit: str, staged: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=true", staged / "systemd/system" / unit)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 2.0


def test_commands_in_the_units_exist_and_accept_their_arguments(staged: Path) -> None:
    for unit in UNITS:
        text = (staged / "systemd/system" / unit).read_text()
        for line in re.findall(r"^Exec\w+=-?(.*)$", text, re.MULTILINE):
            command, *words = line.split()
            assert Path(command).parent == Path(sys.prefix) / "bin"
            if not Path(command).name.startswith("supervisor"):
                told = run(command, *(word for word in words if word != "--write"), "--help")
                assert told.returncode == 0, line


def test_existing_dp_toml_is_kept_and_the_shipped_one_is_valid(staged: Path, user_model_cache: None) -> None:
    fdctl = Path(sys.executable).with_name("fdctl")
    assert run(fdctl, "check", staged / "fd/dp.toml").returncode == 0
    (staged / "fd/dp.toml").write_text("# mine\n")
    run(ROOT / "etc/install.sh", DESTDIR=str(staged.parent), PREFIX_DIR=sys.prefix)
    assert (staged / "fd/dp.toml").read_text() == "# mine\n"


@needs("mandoc")
def test_manual_pages_are_valid_and_name_all_commands_and_flags(staged: Path, share: Path) -> None:
    pages = share / "man/man8/fd-dp.8", share / "man/man1/fdctl.1"
    assert run("mandoc", "-Tlint", "-Wstyle", *pages).stdout == ""
    assert "Documentation=man:fd-dp(8)" in (staged / "systemd/system/fd-dp.service").read_text()
    fd_dp, fdctl = (run("mandoc", "-Tascii", page).stdout for page in pages)
    fd_dp, fdctl = (re.sub(".\b", "", text) for text in (fd_dp, fdctl))
    bin_ = Path(sys.prefix) / "bin"
    for flag in set(re.findall(r"--[a-z]+", run(bin_ / "fd-dp", "--help").stdout)) - {"--help"}:
        assert flag in fd_dp
    commands = re.findall(r"^    ([a-z]+)", run(bin_ / "fdctl", "--help").stdout, re.MULTILINE)
    assert "status" in commands
    for command in commands:
        assert re.search(rf"^ +{command}\b", fdctl, re.MULTILINE), command


def test_bash_completes_fdctl(share: Path) -> None:
    script = share / "bash-completion/completions/fdctl"
    assert "fdctl" in run("bash", "-c", f"source {script} && complete -p fdctl").stdout


def test_uninstall_removes_staged_files_except_dp_toml(staged: Path) -> None:
    done = run(ROOT / "etc/install.sh", "--uninstall", DESTDIR=str(staged.parent), PREFIX_DIR=sys.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert [file for file in staged.parent.rglob("*") if not file.is_dir()] == [staged / "fd/dp.toml"]
    assert Path(sys.executable).exists()


def test_an_unknown_option_changes_nothing(tmp_path: Path) -> None:
    done = run(ROOT / "etc/install.sh", "--unistall", DESTDIR=str(tmp_path))
    assert done.returncode == 1
    assert (
        done.stderr
        == "install: ERROR (unknown option --unistall; options are --no-environment and --uninstall)\n"
    )
    assert [*tmp_path.iterdir()] == []


def test_without_a_stage_it_needs_root(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = run(ROOT / "etc/install.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.startswith("install: ERROR (")
    assert done.stderr.count("\n") == 1
