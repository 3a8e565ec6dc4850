"""Reads dp.toml into a frozen `Config`. Errors are one line with file, line, key and remedy.

``python -m fastdeploy.daemon.config.loader`` prints docs/configuration.md.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from ...common.api_keys import CREDENTIAL
from ...common.errors import ConfigError
from ...common.text_files import decode
from .options import PORT_STEPS, SECTIONS, Config, PathsSection

#: Bytes of sun_path in sockaddr_un, without the 0 at its end.
MAX_SOCKET_PATH = 107
#: Longest name in the run directory: supervisord binds a name with its pid (at most 2**22), then renames it.
_LONGEST_SOCKET = "supervisor.sock.4194304"
#: Characters that supervisord misreads in a path: comments, quotes, escapes, `%` and trailing space.
UNFIT_IN_INI = re.compile(r"[\x00-\x1f\x7f;#'\"\\%]|\s$")
_SYSTEM_PATHS = {"state": Path("/var/lib/fd"), "run": Path("/run/fd"), "logs": Path("/var/log/fd")}
_KINDS: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    Path: "path",
    tuple[int, ...]: "port or list of ports",
    tuple[str, ...]: "list of texts",
    Mapping[str, str]: "table of texts",
}


def load(file: Path, prefix: Path | None = None) -> Config:
    """Read dp.toml.

    Args:
        prefix: base of relative paths, and parent of the default directories. None: relative paths start at
            the file's directory, and the default directories are the system's.

    Raises:
        ConfigError: ``FILE:LINE: key: what is wrong; remedy``.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); set the path with --config") from None
    return parse(
        decode(content, str(file)), str(file), prefix, base=prefix if prefix is not None else file.parent
    )


def parse(text: str, name: str, prefix: Path | None, base: Path) -> Config:
    """Parse the text of a dp.toml.

    Args:
        name: name of the file in error messages.
        prefix: as in `load`.
        base: directory that relative paths start at.

    Raises ConfigError.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*?) \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        message, line = (found[1], found[2] or len(text.splitlines())) if found else (str(error), 1)
        raise ConfigError(f"{name}:{line}: not TOML: {message[:1].lower()}{message[1:]}") from None

    where = _Where(name, text)
    for key, value in document.items():
        if key not in SECTIONS:
            what = "section" if isinstance(value, dict) else "key outside of a section"
            raise ConfigError(f"{where(key)}: unknown {what}; {_nearest(key, SECTIONS)}")
        if not isinstance(value, dict):
            raise ConfigError(f"{where(key)}: is {value!r}; it must be a section, [{key}]")

    deprecations = [notice for name in SECTIONS for notice in _rename(where, name, document.get(name, {}))]
    size = _read_value(where, "parallel", "data_parallel_size", document.get("parallel", {}), count=1)
    sections = {name: _read_section(where, name, document.get(name, {}), size) for name in SECTIONS}
    config = _absolute(Config(**sections, deprecations=tuple(deprecations)), prefix, base)
    _check_ports(where, config)
    _check_gpus(where, config)
    _check_paths(where, config.paths)
    return config


def document() -> str:
    """Return docs/configuration.md."""
    lines = [
        "# dp.toml",
        "",
        "Generated from the declarations in `daemon/config/options.py` by `make docs`.",
        "Every option except `[model] path` has a default. Unknown sections and keys are errors.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (cls.__doc__ or "").strip(), ""]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in fields(cls):
            kind = _KINDS[get_type_hints(cls)[option.name]]
            unit = f" ({option.metadata['unit']})" if option.metadata["unit"] else ""
            lines.append(f"| `{option.name}` | {kind}{unit} | {_shown(option)} | {option.metadata['help']} |")
    lines += ["", "## Old names", "", "These names are still accepted; fd-dp and `fdctl check` report them."]
    lines += ["", "| section | old name | new name |", "|---|---|---|"]
    for section in SECTIONS:
        lines += [f"| `[{section}]` | `{old}` | `{new}` |" for old, new in _old_names(section).items()]
    return "\n".join(lines) + "\n"


class _Where:
    """Finds the lines of keys, which tomllib does not report. Approximate: only for messages."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines: dict[str, int] = {}
        self._written: dict[str, str] = {}
        section = ""
        # splitlines() also splits at characters that are no line ends in TOML.
        for number, line in enumerate(text.split("\n"), start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                section = header[1].replace('"', "").replace("'", "")
                self._lines.setdefault(section, number)
            elif key := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                word = re.sub(r"[\"' ]", "", key[1])
                self._lines.setdefault(f"{section}.{word}" if section else word, number)

    def __call__(self, section: str, key: str = "") -> str:
        """Return ``FILE:LINE: key``. The line of a key that is not given is its section's, or else 1."""
        full = f"{section}.{key}" if key else section
        full = self._written.get(full, full)
        return f"{self._name}:{self.line(section, full)}: {full}"

    def line(self, section: str, full: str) -> int:
        return self._lines.get(full) or self._lines.get(section) or 1

    def rename(self, old: str, new: str) -> None:
        """Report `new` at the line and by the name of `old`. Both are ``section.key``."""
        self._written[new] = old


def _old_names(section: str) -> dict[str, str]:
    """Map the old names of a section's options to the current ones."""
    options = fields(SECTIONS[section])
    return {option.metadata["old_name"]: option.name for option in options if option.metadata["old_name"]}


def _rename(where: _Where, section: str, table: dict[str, Any]) -> Iterable[str]:
    """Replace old names in `table`. Yield a message for each."""
    for old, new in _old_names(section).items():
        if old not in table:
            continue
        place = where(section, old)
        if new in table:
            line = where.line(section, f"{section}.{new}")
            raise ConfigError(f"{place}: is the old name of {new}, which line {line} sets, too; remove {old}")
        table[new] = table.pop(old)
        where.rename(f"{section}.{old}", f"{section}.{new}")
        yield f"{place}: is the old name of {new}; rename it"


def _read_section(where: _Where, section: str, table: dict[str, Any], size: int) -> Any:
    cls = SECTIONS[section]
    known = {option.name for option in fields(cls)}
    for key in table:
        if key not in known:
            raise ConfigError(f"{where(section, key)}: unknown key; {_nearest(key, known)}")
    return cls(**{name: _read_value(where, section, name, table, size) for name in known})


def _read_value(where: _Where, section: str, key: str, table: dict[str, Any], count: int) -> Any:
    cls = SECTIONS[section]
    option = next(option for option in fields(cls) if option.name == key)
    kind = get_type_hints(cls)[key]
    place = where(section, key)
    value = table.get(key, option.default)
    if kind == tuple[int, ...]:
        return _ports(place, key, value, count)
    if key not in table:
        if option.default_factory is not MISSING:
            return option.default_factory()
        if option.default is MISSING:
            raise ConfigError(f"{place}: is missing; {option.metadata['help']}")
        return Path(option.default) if kind is Path else option.default
    value = _typed(place, kind, value)
    check = option.metadata["check"]
    complaint = check(value) if check else None
    if complaint:
        # A table or a list may contain secrets.
        shown = "" if isinstance(value, Mapping | tuple) else f"is {value!r}; "
        raise ConfigError(f"{place}: {shown}{complaint}")
    return value


def _typed(place: str, kind: Any, value: Any) -> Any:
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ConfigError(f"{place}: is {value!r}; it must be a finite number")
        return float(value)
    if kind is Path and isinstance(value, str):
        _no_nul(place, value)
        return Path(value)
    if kind == tuple[str, ...] and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        for word in value:
            _no_nul(place, word)
        return tuple(value)
    if kind == Mapping[str, str] and isinstance(value, dict):
        for name, word in value.items():
            if not isinstance(word, str):
                raise ConfigError(f'{place}: {name} is {_kind(word)}; it must be a text, {name} = "..."')
            _no_nul(place, word)
        return MappingProxyType(dict(value))
    if kind in (str, int, float, bool, Path) and type(value) is kind:
        if kind is str:
            _no_nul(place, value)
        return value
    # A wrong value of arguments or environment may be a secret.
    shown = _kind(value) if kind in (tuple[str, ...], Mapping[str, str]) else repr(value)
    raise ConfigError(
        f"{place}: is {shown}; it must be a {_KINDS[kind]}".replace("be a integer", "be an integer")
    )


def _kind(value: Any) -> str:
    """Return the type of a value, with an article."""
    if isinstance(value, list):
        return "a list that does not only contain texts"
    kind = _KINDS.get(type(value), "table" if isinstance(value, dict) else type(value).__name__)
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _no_nul(place: str, value: str) -> None:
    """Reject NUL, which execve() cannot pass."""
    if "\0" in value:
        raise ConfigError(f"{place}: must not contain the character NUL")


def _ports(place: str, key: str, value: Any, count: int) -> tuple[int, ...]:
    if type(value) is int:
        ports = [value + index * PORT_STEPS[key] for index in range(count)]
    elif isinstance(value, list) and all(type(port) is int for port in value):
        ports = value
    else:
        raise ConfigError(
            f"{place}: is {value!r}; it must be one port (the base) or a list with one per replica"
        )
    if len(ports) != count:
        raise ConfigError(
            f"{place}: has {len(ports)} ports; it must have one per replica, "
            f"and parallel.data_parallel_size is {count}"
        )
    for port in ports:
        if not 1 <= port <= 65535:
            raise ConfigError(f"{place}: contains {port}; a port is between 1 and 65535")
    return tuple(ports)


def _check_ports(where: _Where, config: Config) -> None:
    """Require every port number to be used once, whatever the addresses: 0.0.0.0 includes loopback."""
    used = [("router", "port", "router.port", config.router.port)]
    for key in PORT_STEPS:
        ports = enumerate(getattr(config.engine, key))
        used += [("engine", key, f"engine.{key}[{index}]", port) for index, port in ports]
    if config.metrics.port:
        used.append(("metrics", "port", "metrics.port", config.metrics.port))
    owner: dict[int, str] = {}
    for section, key, name, port in used:
        if port in owner:
            raise ConfigError(
                f"{where(section, key)}: port {port} is both {owner[port]} and {name}; use each port once"
            )
        owner[port] = name


def _check_gpus(where: _Where, config: Config) -> None:
    engine, parallel = config.engine, config.parallel
    if engine.gpus and len(engine.gpus) != parallel.data_parallel_size:
        raise ConfigError(
            f"{where('engine', 'gpus')}: has {len(engine.gpus)} GPUs; it must have one per replica, and "
            f"parallel.data_parallel_size is {parallel.data_parallel_size}"
        )
    if engine.gpus and engine.device == "cpu":
        raise ConfigError(
            f"{where('engine', 'gpus')}: names GPUs, and engine.device is 'cpu'; remove one of them"
        )
    if engine.device == "gpu" and parallel.expert_parallel:
        raise ConfigError(
            f"{where('engine', 'device')}: is 'gpu', and parallel.expert_parallel is true; on a GPU each "
            "replica holds all experts: set expert_parallel to false"
        )


def _absolute(config: Config, prefix: Path | None, base: Path) -> Config:
    """Make every path absolute."""
    paths = {}
    for name, system in _SYSTEM_PATHS.items():
        default = prefix / name if prefix is not None else system
        given = getattr(config.paths, name)
        paths[name] = Path(os.path.abspath(base / (default if given == Path("") else given)))
    model, engine, router = config.model, config.engine, config.router
    if model.path != "demo":
        model = replace(model, path=os.path.abspath(base / model.path))
    engine = replace(engine, api_keys_file=_absolute_keys_file(engine.api_keys_file, base))
    router = replace(router, api_keys_file=_absolute_keys_file(router.api_keys_file, base))
    return replace(config, paths=PathsSection(**paths), model=model, engine=engine, router=router)


def _absolute_keys_file(name: str, base: Path) -> str:
    return name if not name or name.startswith(CREDENTIAL) else os.path.abspath(base / name)


def _check_paths(where: _Where, paths: PathsSection) -> None:
    for name in _SYSTEM_PATHS:
        path = str(getattr(paths, name))
        if found := re.search(UNFIT_IN_INI, path):
            raise ConfigError(
                f"{where('paths', name)}: is {path!r}; supervisord does not support {found[0]!r} in paths"
            )
    length, longest = len(os.fsencode(paths.run)), MAX_SOCKET_PATH - len(f"/{_LONGEST_SOCKET}")
    if length > longest:
        raise ConfigError(
            f"{where('paths', 'run')}: {paths.run} has {length} bytes; the limit is {longest}, because the "
            f"paths of the sockets in it may have {MAX_SOCKET_PATH}; use a shorter --prefix or [paths] run"
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(sorted(known))


def _shown(option: Any) -> str:
    if option.default is MISSING and option.default_factory is MISSING:
        return "**required**"
    value = option.default_factory() if option.default is MISSING else option.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    return "`{}`" if isinstance(value, Mapping) else f"`{value:g}`"


if __name__ == "__main__":
    print(document(), end="")
