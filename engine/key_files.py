"""Files with API keys: secrets come from them, as everybody on a machine can read command lines."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

#: In place of a file's path: what follows is the name of a credential, as systemd's LoadCredential= gives it.
CREDENTIAL = "credential:"


def keys_in(flag: str, file: Path) -> list[str]:
    """The keys in the file of that flag, one a line; # begins a comment. `file` may be "credential:NAME".

    Raises:
        ConfigError: it cannot be read or holds no key. An empty file must not open the door.
    """
    try:
        lines = _path(flag, file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be read ({error})") from None
    except UnicodeDecodeError:
        # The error's own words would show some of it.
        raise ConfigError(f"{flag} {file}: cannot be read (it is not UTF-8)") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{flag} {file}: has no key in it; write one key a line")
    return keys


def _path(flag: str, file: Path) -> Path:
    name = str(file)
    if not name.startswith(CREDENTIAL):
        return file
    name = name.removeprefix(CREDENTIAL)
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None or not (Path(directory) / name).is_file():
        raise ConfigError(
            f"{flag} {file}: systemd has given no such credential; set LoadCredential={name}:FILE in the unit"
        )
    return Path(directory) / name
