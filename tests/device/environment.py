"""An environment with fd-dp's commands for machines where fd-dp is not installed."""

from __future__ import annotations

import configparser
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def make_environment(directory: Path) -> Path:
    """Make a virtual environment with the packages of this process and return the folder of its commands."""
    venv.create(directory, symlinks=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(directory), "platbase": str(directory)})
    # As a site directory, because some packages are there only by .pth files.
    lines = [f"import site; site.addsitedir({str(Path(each).absolute())!r})\n" for each in sys.path if each]
    Path(paths["purelib"], "packages.pth").write_text("".join(lines))
    scripts = Path(paths["scripts"])
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].strip().split("\n"):
        name, place = line.split(" = ")
        module, function = place.split(":")
        script = scripts / name
        script.write_text(SCRIPT.format(python=scripts / "python", module=module, function=function))
        script.chmod(0o755)
    return scripts
