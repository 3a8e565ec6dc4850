"""A machine for tests: a systemd of its own as PID 1, on an overlay of the host's files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..waiting import wait_until

_BOOT = Path(__file__).with_name("boot.sh")
_TOOLS = ("bash", "unshare", "nsenter", "setpriv", "systemctl", "journalctl")

#: Tries the kernel features and permissions that boot.sh needs; $0 is a cgroup.
_TRIAL = """
echo $$ >"$0/cgroup.procs" &&
exec unshare --pid --fork --mount --uts --ipc --net --cgroup --propagation private sh -ec '
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/upper /mnt/scratch /mnt/root
    mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/scratch /mnt/root
    mount -t proc proc /mnt/root/proc
    mount -t sysfs -o ro sysfs /mnt/root/sys
    mount -t cgroup2 cgroup2 /mnt/root/sys/fs/cgroup'
"""


def why_not() -> str:
    """Return the reason why no machine can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can boot a systemd in namespaces"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if not Path("/lib/systemd/systemd").exists():
        return "not installed: systemd"
    try:
        cgroup = _new_cgroup()
    except OSError as error:
        return f"no cgroup can be made ({error})"
    try:
        tried = subprocess.run(["sh", "-c", _TRIAL, cgroup], capture_output=True, text=True, check=False)
    finally:
        wait_until(lambda: _removed(cgroup), "the cgroup of the trial is empty", deadline=30.0)
    return "" if tried.returncode == 0 else f"no namespaces or no overlay ({tried.stderr.strip()})"


class Machine:
    """A machine, booted on construction.

    Args:
        directory: an empty one for the console's output and the mounted files of the machine.
        shares: directories of the host, with the read-only mount points on the machine.
    """

    def __init__(self, directory: Path, shares: Mapping[Path, str]) -> None:
        self._cgroup = _new_cgroup()
        work = directory / "work"
        work.mkdir()
        self._console = directory / "console"
        # The machine dies with this process, however that ends.
        words = ["setpriv", "--pdeathsig", "KILL", _BOOT, "prepare", self._cgroup, work]
        words += [f"{here}={there}" for here, there in shares.items()]
        self._namespaces = subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=self._console.open("wb"),
            stderr=subprocess.STDOUT,
        )
        #: Pid of its systemd, as seen from the host.
        self.pid = 0
        try:
            wait_until(self._has_booted, "systemd has booted", deadline=60.0)
        except BaseException:
            self.close()
            raise
        #: Its root directory, as seen from the host.
        self.root = Path(f"/proc/{self.pid}/root")

    def run(
        self,
        *words: str | Path,
        user: str = "",
        stdin: str = "",
        code: int | None = 0,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine.

        Args:
            user: the user that runs it, with all groups; root if empty.
            code: the required exit code; None accepts any.
        """
        whom = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        inside = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C"]
        clean = ["env", "-i", "-C", "/", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        done = subprocess.run(
            [*inside, *whom, *clean, *map(str, words)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if code not in (None, done.returncode):
            journal = self.run("journalctl", "--no-pager", "-n", "30", code=None).stdout
            raise AssertionError(f"{words}: {done.returncode}, {done.stdout}{done.stderr}{journal}")
        return done

    def command_lines(self, user: str = "") -> dict[int, str]:
        """Return the command lines by pid, of all processes or of one user's."""
        uid = int(self.run("id", "-u", user).stdout) if user else None
        found = {}
        for directory in (self.root / "proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if directory.name.isdigit() and uid in (None, directory.stat().st_uid):
                    found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        return found

    def kill(self, pid: int | str, name: str) -> None:
        """Send a signal, by its name, to a process of the machine."""
        self.run("bash", "-c", f"kill -s {name} {pid}")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def close(self) -> None:
        # The end of PID 1 ends every process in its namespace.
        self._namespaces.send_signal(signal.SIGKILL)
        self._namespaces.wait()
        wait_until(lambda: _removed(self._cgroup), "the machine's cgroups are empty", deadline=30.0)

    def console(self) -> str:
        return self._console.read_text(errors="replace")

    def _has_booted(self) -> bool:
        assert self._namespaces.poll() is None, f"the machine did not boot: {self.console()}"
        parent = self._namespaces.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if not children:
            return False
        self.pid = int(children[0])
        if not Path(f"/proc/{self.pid}/cmdline").read_bytes().startswith(b"/lib/systemd/systemd\0"):
            return False
        # Degraded: a unit of another package failed. The tests need none of those.
        return self.run("systemctl", "is-system-running", code=None).stdout.strip() in ("running", "degraded")


def _new_cgroup() -> Path:
    """Create an empty cgroup of version 2. Raises OSError."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    places = [fields[1] for fields in mounts if fields[2] == "cgroup2"]
    if not places:
        raise OSError("cgroup2 is not mounted")
    return Path(tempfile.mkdtemp(prefix="fd-dp-test-", dir=places[0]))


def _removed(cgroup: Path) -> bool:
    try:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)
    except OSError:
        return False
    return True
