"""dp.toml -> a frozen `Config`, or one line that says where the mistake is and what would be right.

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

#: A unix socket's path may have 107 bytes; supervisord binds "supervisor.sock.<its pid>" before it renames.
_LONGEST_RUN_DIRECTORY = 107 - len("/supervisor.sock.4194304")
#: What supervisord cuts, expands or refuses in a path: comments, quotes, escapes, `%` (it expands twice), and
#: space at its end.
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
    """Reads dp.toml.

    Args:
        prefix: everything that is kept lies below it, and relative paths start there. None means the
            system's directories, and relative paths start at the file's own.

    Raises:
        ConfigError: ``FILE:LINE: key: what is wrong; what would be right``.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a dp.toml with --config"
        ) from None
    return parse(
        decode(content, str(file)), str(file), prefix, base=prefix if prefix is not None else file.parent
    )


def parse(text: str, name: str, prefix: Path | None, base: Path) -> Config:
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

    size = _read_value(where, "parallel", "data_parallel_size", document.get("parallel", {}), count=1)
    sections = {name: _read_section(where, name, document.get(name, {}), size) for name in SECTIONS}
    config = _absolute(Config(**sections), prefix, base)
    _check_ports(where, config)
    _check_paths(where, config.paths)
    return config


def document() -> str:
    """docs/configuration.md."""
    lines = [
        "# dp.toml",
        "",
        "Generated from the declarations in `daemon/config/options.py` by `make docs`.",
        "Every option has a default but `[model] path`. Unknown sections and keys are errors.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (cls.__doc__ or "").strip(), ""]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in fields(cls):
            kind = _KINDS[get_type_hints(cls)[option.name]]
            unit = f" ({option.metadata['unit']})" if option.metadata["unit"] else ""
            lines.append(f"| `{option.name}` | {kind}{unit} | {_shown(option)} | {option.metadata['help']} |")
    return "\n".join(lines) + "\n"


class _Where:
    """Finds the line of a key again, which tomllib forgets. Good enough for messages, and only for them."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines: dict[str, int] = {}
        section = ""
        # Not splitlines(), which counts further characters as ends of lines.
        for number, line in enumerate(text.split("\n"), start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                section = header[1].replace('"', "").replace("'", "")
                self._lines.setdefault(section, number)
            elif key := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                word = re.sub(r"[\"' ]", "", key[1])
                self._lines.setdefault(f"{section}.{word}" if section else word, number)

    def __call__(self, section: str, key: str = "") -> str:
        """``FILE:LINE: key``. A default has no line of its own: then its section's, else the first."""
        full = f"{section}.{key}" if key else section
        line = self._lines.get(full) or self._lines.get(section) or 1
        return f"{self._name}:{line}: {full}"


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
        # What is in a table or a list may be a secret.
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
    # What was to be a list of arguments or an environment may be a secret.
    shown = _kind(value) if kind in (tuple[str, ...], Mapping[str, str]) else repr(value)
    raise ConfigError(
        f"{place}: is {shown}; it must be a {_KINDS[kind]}".replace("be a integer", "be an integer")
    )


def _kind(value: Any) -> str:
    """Of which type it is, for people."""
    if isinstance(value, list):
        return "a list with something other than texts in it"
    kind = _KINDS.get(type(value), "table" if isinstance(value, dict) else type(value).__name__)
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _no_nul(place: str, value: str) -> None:
    """execve() cannot carry it."""
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
            f"{place}: has {len(ports)} ports; parallel.data_parallel_size is {count}: it must have as many"
        )
    for port in ports:
        if not 1 <= port <= 65535:
            raise ConfigError(f"{place}: contains {port}; a port is between 1 and 65535")
    return tuple(ports)


def _check_ports(where: _Where, config: Config) -> None:
    """Loopback and 0.0.0.0 overlap, so one number may be used once, whatever the addresses are."""
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
                f"{where(section, key)}: port {port} is {owner[port]} and {name}; use each port once"
            )
        owner[port] = name


def _absolute(config: Config, prefix: Path | None, base: Path) -> Config:
    """Every path as the programs will see it, wherever they run."""
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
                f"{where('paths', name)}: is {path!r}; "
                f"supervisord's configuration cannot carry {found[0]!r} there"
            )
    length = len(os.fsencode(paths.run))
    if length > _LONGEST_RUN_DIRECTORY:
        raise ConfigError(
            f"{where('paths', 'run')}: {paths.run} has {length} bytes; sockets lie there, so it may have "
            f"at most {_LONGEST_RUN_DIRECTORY}: use a shorter --prefix or [paths] run"
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
