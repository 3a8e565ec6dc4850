"""fd-dp on the test machine, installed by copying what etc/install.sh would build.

The virtual environment is as pip would make it, except that third-party packages come from this environment.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

from .booted import Machine

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "/opt/fd-dp"
_SOURCE = "/srv/fd-dp"
_OTHERS = "/srv/site-packages"
_PACKAGE = f"{PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/fastdeploy"
_MODELS = "/srv/models"

_SCRIPT = """\
#!{prefix}/bin/python
import sys
from {module} import {function}
sys.exit({function}())
"""

#: A dp.toml: one replica of a model that is small enough to load at once.
SMALL = f"""\
[model]
path = "{_SOURCE}/tests/fixtures/tiny"
[parallel]
data_parallel_size = 1
expert_parallel = false
[engine]
max_model_len = 512
num_gpu_blocks_override = 64
"""


def interpreter() -> str | None:
    """Return a Python of this environment's version outside of all homes, which user fd may execute."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = Path(sys.base_prefix, "bin", version)
    if any(own.is_relative_to(home) for home in ("/root", "/home", "/run/user")):
        return shutil.which(version, path="/usr/bin:/usr/local/bin")
    return str(own)


def shares(models: Path) -> dict[Path, str]:
    """Return the host's directories that the machine must see; `models` is a model cache."""
    models.mkdir(parents=True, exist_ok=True)
    return {ROOT: _SOURCE, Path(sysconfig.get_path("purelib")): _OTHERS, models: _MODELS}


def install_environment(machine: Machine) -> None:
    """Create the virtual environment, after removing any earlier installation."""
    for directory in (PREFIX, "/etc/fd", "/var/lib/fd", "/var/log/fd"):
        machine.run("rm", "-rf", directory)
    python = interpreter()
    assert python is not None
    machine.run(python, "-m", "venv", "--without-pip", PREFIX)
    # Keep the times, so that compiled files remain valid.
    machine.run("cp", "-a", "--no-preserve=ownership", f"{_SOURCE}/engine", _PACKAGE)
    for room in ("daemon", "custom_ops"):
        machine.run("cp", "-a", "--no-preserve=ownership", f"{_SOURCE}/{room}", f"{_PACKAGE}/{room}")
    machine.write(str(Path(_PACKAGE).with_name("others.pth")), _OTHERS)
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = setup["options.entry_points"]["console_scripts"].split("\n")
    commands += ["supervisord = supervisor.supervisord:main", "supervisorctl = supervisor.supervisorctl:main"]
    for command in filter(None, commands):
        name, target = command.split(" = ")
        module, function = target.split(":")
        text = _SCRIPT.format(prefix=PREFIX, module=module, function=function)
        machine.write(f"{PREFIX}/bin/{name}", text, 0o755)
    machine.run("chmod", "-R", "a+rX", PREFIX)


def install(machine: Machine, option: str = "--no-environment", timeout: float = 60.0) -> str:
    """Run install.sh; return its output."""
    return machine.run(f"{_SOURCE}/etc/install.sh", option, timeout=timeout).stdout


@contextmanager
def lent_models(machine: Machine) -> Iterator[None]:
    """Lend the machine the host's models: any user may write to them, and the changes are discarded."""
    here = "/var/lib/fd/models"
    aside = "/run/models"
    machine.run("mkdir", "-p", here, f"{aside}/upper", f"{aside}/scratch")
    layers = f"lowerdir={_MODELS},upperdir={aside}/upper,workdir={aside}/scratch"
    machine.run("mount", "-t", "overlay", "overlay", "-o", layers, here)
    # Only directories and locks: chmod of a model file would copy it.
    machine.run(
        "find", here, "(", "-type", "d", "-o", "-name", "*.lock", ")", "-exec", "chmod", "a+w", "{}", "+"
    )
    try:
        yield
    finally:
        # Lazily, as a process may still read a model.
        machine.run("umount", "--lazy", here)


def install_fakes(machine: Machine) -> None:
    """Replace replicas and router by fakes, which start at once."""
    replica = (ROOT / "tests/daemon/fake_replica.py").read_text()
    machine.write(f"{_PACKAGE}/entrypoints/openai/api_server.py", replica)
    router = (ROOT / "tests/daemon/fake_fd_router.py").read_text()
    machine.write(f"{PREFIX}/bin/fd-router", f"#!{PREFIX}/bin/python\n{router}", 0o755)
