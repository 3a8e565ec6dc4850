"""`fdctl check` and `fdctl render`: checks a dp.toml, and shows the programs that it describes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...common import masking
from ...common.errors import FastDeployError
from ..config import loader as dp_toml
from ..config.preflight import checked_programs_of, exposed_secrets
from ..config.programs import Program, programs_of
from ..control.protocol import OK
from ..process import supervisord_config
from . import client


def check(options: argparse.Namespace) -> int:
    config = dp_toml.load(options.file.absolute(), client.prefix(options))
    checked_programs_of(config)
    replicas = config.parallel.data_parallel_size
    warning = exposed_secrets(options.file, config)
    if options.json:
        found = {"file": str(options.file), "replicas": replicas, "warning": warning or None}
        print(json.dumps({**found, "deprecations": config.deprecations}))
        return OK
    print(f"{options.file}: valid; {replicas} replicas")
    for line in (*config.deprecations, *([warning] if warning else [])):
        print(f"fdctl: warning: {line}", file=sys.stderr)
    return OK


def render(options: argparse.Namespace) -> int:
    """Print the programs of a dp.toml, or write supervisord's files with --write."""
    if options.file:
        file, prefix = options.file, client.prefix(options)
    else:
        file, prefix = client.config_of_the_daemon(options)
    config = dp_toml.load(file.absolute(), prefix)
    programs = programs_of(config)
    layout = supervisord_config.Layout(config.paths.run, config.paths.logs)
    if options.write:
        try:
            supervisord_config.write_files(layout, programs)
        except OSError as error:
            raise FastDeployError(f"cannot write {error.filename or layout.run}: {error.strerror}") from None
        return OK
    if options.json:
        print(json.dumps([_shown(program, layout.run) for program in programs], indent=2))
        return OK
    print(f"; {layout.ini}")
    print(supervisord_config.render(layout, programs))
    for program in programs:
        print(f"; {layout.launch / program.launch_name}")
        print(json.dumps(_shown(program, layout.run), indent=1))
    return OK


def _shown(program: Program, run: Path) -> dict[str, Any]:
    """Return a launch file with secrets masked."""
    content = json.loads(program.launch_text(run))
    shown = {"argv": masking.argv(content["argv"]), "env": masking.env(content["env"])}
    if program.flags_file:
        shown["flags"] = masking.argv(program.flags)
    return content | shown
