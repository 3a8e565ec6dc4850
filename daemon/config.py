"""dp.toml: every option declared once, in one row; the text on disk becomes a frozen `Config` or one clear line.

The rows below are the whole truth: the reader, its error messages and docs/configuration.md (printed by
``python -m fastdeploy.daemon.config``) come from them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from ..errors import ConfigError
from .router.policies import POLICIES

#: What a validator gets is a value of the right type; what it returns is the complaint, or None.
Check = Callable[[Any], str | None]

#: Port i of a list that is given as one base number is base + i * step, as in FastDeploy's documentation.
PORT_STEPS = {"ports": 11, "metrics_ports": 100, "engine_worker_queue_ports": 10}
#: A unix socket's path may have 107 bytes; supervisord binds "supervisor.sock.<its pid>" before it renames.
_LONGEST_RUN_DIRECTORY = 107 - len("/supervisor.sock.4194304")
#: Set for every program by the daemon itself.
RESERVED_ENVIRONMENT = ("FD_LOG_DIR", "FD_DP_PROGRAM", "FD_DP_HASH")


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"it must be at least {low}"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"it must be between {low} and {high}"


def one_of(*words: str) -> Check:
    return lambda value: None if value in words else "it must be one of " + ", ".join(map(repr, words))


def not_empty(value: str) -> str | None:
    return None if value else "it must not be empty"


def environment_names(value: Mapping[str, str]) -> str | None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"{name!r} cannot be the name of an environment variable"
        if name in RESERVED_ENVIRONMENT:
            return f"{name} is set by the daemon itself; remove it"
    return None


def row(default: Any, help: str, check: Check | None = None, unit: str = "") -> Any:
    """One option: its default (`MISSING`: it must be given), one sentence of help, its validator and unit."""
    metadata = {"help": help, "check": check, "unit": unit}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: MappingProxyType(dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which model is served."""

    path: str = row(MISSING, "Directory of the checkpoint, or the word `demo` for the demo model.", not_empty)
    served_name: str = row("", "Name under which clients ask for it; empty: the directory's name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    """How many replicas there are, and what they share."""

    data_parallel_size: int = row(8, "Number of replicas.", between(1, 64))
    tensor_parallel_size: int = row(
        1, "Processes per replica's network; only 1 is implemented.", between(1, 1)
    )
    expert_parallel: bool = row(True, "One expert-parallel group; for now each replica holds all experts.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """What each replica runs with. A port option is a list with one port per replica, or one base number."""

    device: str = row(
        "auto", "Where the network runs; `auto`: a GPU if there is one.", one_of("auto", "cpu", "gpu")
    )
    host: str = row(
        "127.0.0.1", "Address the replicas listen on; `0.0.0.0` opens them to the network.", not_empty
    )
    ports: tuple[int, ...] = row(1811, "OpenAI API; a base b means b, b+11, b+22, ...")
    metrics_ports: tuple[int, ...] = row(3101, "Prometheus metrics; a base b means b, b+100, b+200, ...")
    engine_worker_queue_ports: tuple[int, ...] = row(
        25611, "Between a replica's API process and its worker; a base b means b, b+10, b+20, ..."
    )
    max_model_len: int = row(2048, "Longest sequence, prompt and answer together.", at_least(1), "tokens")
    max_num_seqs: int = row(8, "Sequences that a replica computes at the same time.", at_least(1))
    num_gpu_blocks_override: int = row(
        0, "Size of the KV cache; 0: from memory.", at_least(0), "blocks of 64 tokens"
    )
    threads: int = row(0, "CPU threads of a replica; 0: the cores divided by the replicas.", at_least(0))
    extra_args: tuple[str, ...] = row((), "Further words for the replica's command line.")
    env: Mapping[str, str] = row({}, "Further environment variables of the replicas.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The one address that clients talk to."""

    host: str = row("127.0.0.1", "Address it listens on; `0.0.0.0` opens it to the network.", not_empty)
    port: int = row(30000, "Port it listens on.", between(1, 65535))
    policy: str = row("request_num", "Which replica takes a request.", one_of(*POLICIES))
    request_timeout: float = row(1800.0, "Silence after which an answer is given up.", at_least(1), "s")
    api_keys_file: str = row("", "File with the keys that clients must show, one a line; empty: none.")
    extra_args: tuple[str, ...] = row((), "Further words for the router's command line.")
    env: Mapping[str, str] = row({}, "Further environment variables of the router.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperviseSection:
    """When a program counts as failed, and when it is tried again."""

    startup_timeout: float = row(
        600.0, "From start to the first token; longer counts as failed.", at_least(1), "s"
    )
    parallel_starts: int = row(
        0, "Replicas that load at the same time; 0: as many as there are cores.", at_least(0)
    )
    start_slot: float = row(
        60.0, "A replica that loads longer no longer holds back the next.", at_least(0), "s"
    )
    probe_interval: float = row(5.0, "Between two health checks of a READY replica.", between(0.1, 3600), "s")
    stall_after: float = row(30.0, "Without a good health check for so long: UNHEALTHY.", at_least(1), "s")
    stall_kill: float = row(
        180.0, "Without a good health check for so long: killed, restarted.", at_least(1), "s"
    )
    stop_timeout: float = row(30.0, "From being told to stop to being killed.", between(1, 3600), "s")
    backoff_first: float = row(
        1.0, "Before the first restart; doubles with each failure in a row.", at_least(0), "s"
    )
    backoff_max: float = row(60.0, "Longest time before a restart.", at_least(0), "s")
    stable_after: float = row(120.0, "READY for so long: earlier failures are forgotten.", at_least(1), "s")
    budget: int = row(
        10, "Failures within `budget_window` after which a replica is QUARANTINED.", at_least(1)
    )
    budget_window: float = row(600.0, "The time in which failures are counted.", at_least(1), "s")
    quarantine: float = row(600.0, "Between two tries of a replica in quarantine.", at_least(1), "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsSection:
    """Where things are kept. Relative to `--prefix`; empty: `state`, `run`, `logs` below it, or the system's."""

    state: Path = row(Path(""), "What must survive a restart; without a prefix /var/lib/fd.")
    run: Path = row(Path(""), "Sockets, supervisord's configuration, launch files; without a prefix /run/fd.")
    logs: Path = row(Path(""), "One directory per program; without a prefix /var/log/fd.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of dp.toml, with every default filled in and every path absolute."""

    model: ModelSection
    parallel: ParallelSection
    engine: EngineSection
    router: RouterSection
    supervise: SuperviseSection
    paths: PathsSection


SECTIONS: dict[str, type] = dict(get_type_hints(Config))
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
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a dp.toml with --config"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; TOML files are UTF-8") from None
    return parse(text, str(file), prefix, base=prefix if prefix is not None else file.parent)


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
    sections = {
        section: _read_section(where, section, document.get(section, {}), size) for section in SECTIONS
    }
    sections["paths"] = _absolute_paths(sections["paths"], prefix, base)
    model = sections["model"]
    if model.path != "demo":
        sections["model"] = ModelSection(
            path=os.path.abspath(base / model.path), served_name=model.served_name
        )
    config = Config(**sections)
    _check_ports(where, config)
    _check_paths(where, config.paths)
    return config


def document() -> str:
    """docs/configuration.md."""
    lines = [
        "# dp.toml",
        "",
        "Generated from the declarations in `daemon/config.py` by `make docs`.",
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
    """Finds the line of a key again: tomllib forgets it. A text, not a syntax tree, so only ever for messages."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines: dict[str, int] = {}
        section = ""
        for number, line in enumerate(text.splitlines(), start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                section = header[1].replace('"', "").replace("'", "")
                self._lines.setdefault(section, number)
            elif key := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                word = re.sub(r"[\"' ]", "", key[1])
                self._lines.setdefault(f"{section}.{word}" if section else word, number)

    def __call__(self, section: str, key: str = "") -> str:
        """``FILE:LINE: key``; a default has no line of its own, then it is the section's, then the file's first."""
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
        return option.default
    value = _typed(place, kind, value)
    check = option.metadata["check"]
    complaint = check(value) if check else None
    if complaint:
        shown = "" if isinstance(value, Mapping) else f"is {value!r}; "
        raise ConfigError(f"{place}: {shown}{complaint}")
    return value


def _typed(place: str, kind: Any, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
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
                raise ConfigError(f'{place}: {name} is {word!r}; it must be a text, {name} = "{word}"')
            _no_nul(place, word)
        return MappingProxyType(dict(value))
    if kind in (str, int, float, bool, Path) and type(value) is kind:
        if kind is str:
            _no_nul(place, value)
        return value
    raise ConfigError(
        f"{place}: is {value!r}; it must be a {_KINDS[kind]}".replace("be a integer", "be an integer")
    )


def _no_nul(place: str, value: str) -> None:
    """execve() cannot carry it."""
    if "\0" in value:
        raise ConfigError(f"{place}: is {value!r}; a text must not contain the character NUL")


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
            f"{place}: has {len(ports)} ports; parallel.data_parallel_size is {count}, so it must have {count}"
        )
    for port in ports:
        if not 1 <= port <= 65535:
            raise ConfigError(f"{place}: contains {port}; a port is between 1 and 65535")
    return tuple(ports)


def _check_ports(where: _Where, config: Config) -> None:
    """Loopback and 0.0.0.0 overlap, so one number may be used once, whatever the addresses are."""
    owner: dict[int, str] = {config.router.port: "router.port"}
    for key in PORT_STEPS:
        for index, port in enumerate(getattr(config.engine, key)):
            name = f"engine.{key}[{index}]"
            if port in owner:
                raise ConfigError(
                    f"{where('engine', key)}: port {port} is both {owner[port]} and {name}; use each port once"
                )
            owner[port] = name


def _absolute_paths(paths: PathsSection, prefix: Path | None, base: Path) -> PathsSection:
    absolute = {}
    for name, system in _SYSTEM_PATHS.items():
        given = getattr(paths, name)
        if given == Path(""):
            given = prefix / name if prefix is not None else system
        absolute[name] = Path(os.path.abspath(base / given))
    return PathsSection(**absolute)


def _check_paths(where: _Where, paths: PathsSection) -> None:
    for name in _SYSTEM_PATHS:
        path = str(getattr(paths, name))
        if found := re.search(r"[\x00-\x1f\x7f;#'\"\\]", path):
            raise ConfigError(
                f"{where('paths', name)}: is {path!r}; supervisord's configuration cannot carry {found[0]!r} in a path"
            )
    length = len(os.fsencode(paths.run))
    if length > _LONGEST_RUN_DIRECTORY:
        raise ConfigError(
            f"{where('paths', 'run')}: {paths.run} has {length} bytes; sockets lie there, so it may have at most "
            f"{_LONGEST_RUN_DIRECTORY}: use a shorter --prefix or [paths] run"
        )


def _nearest(word: str, known: Any) -> str:
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
    if isinstance(value, Path):
        return '`""`'
    return "`{}`" if isinstance(value, Mapping) else "`[]`" if value == () else f"`{value:g}`"


if __name__ == "__main__":
    print(document(), end="")
