"""Places where secrets must not appear, and the ways of passing them."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from fastdeploy.common import masking
from fastdeploy.common.api_keys import ApiKeys, keys_in
from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config.loader import parse
from fastdeploy.daemon.config.preflight import exposed_secrets
from fastdeploy.daemon.config.programs import programs_of
from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.supervision.probes import token_probe
from fastdeploy.entrypoints.openai.options import parse_arguments

from .conftest import Running, wait_until

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
SECRETS = {name: f"5ecret-{name}" for name in ("env", "token", "file", "router", "url")}


def test_secrets_stay_out_of_command_lines_logs_and_fdctl_output(running: Running) -> None:
    keys = running.prefix / "keys"
    keys.write_text(SECRETS["file"] + "\n")
    running.write(
        env={
            "SOME_API_KEY": SECRETS["env"],
            "HF_TOKEN": SECRETS["token"],
            "PROXY": f"http://user:{SECRETS['url']}@proxy:3128",
        }
    )
    text = running.config.read_text().replace("[engine]", f'[engine]\napi_keys_file = "{keys}"', 1)
    router = f'[router]\napi_keys_file = "{keys}"\nenv = {{ FD_ROUTER_ADMIN_KEY = "{SECRETS["router"]}" }}'
    running.config.write_text(text.replace("[router]", router, 1))
    running.start_and_wait()
    cmdlines = "".join(
        Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ") for process in running.left_over()
    )
    assert str(keys) in cmdlines
    os.kill(running.pids()["replica1"], signal.SIGKILL)
    wait_until(lambda: running.programs()["replica1"]["restarts"], "replica 1 started again")
    # Change every secret, then write a configuration that is refused: both cause messages.
    changed = running.config.read_text()
    for secret in SECRETS.values():
        changed = changed.replace(secret, secret + "-new")
    running.config.write_text(changed)
    said = [running.fdctl("reload")]
    assert said[0].returncode == protocol.OK
    assert "environment HF_TOKEN: changed" in said[0].stdout
    running.config.write_text(changed.replace("extra_args = []", 'extra_args = ["--api-key", "5ecret-x"]'))
    commands = (
        *("reload", "render", "render --json", "status --json", "why", "why --json", "why 0", "why 1 --json"),
        *("why router", "logs 0", "logs router", "top --json", "reload --dry-run --json"),
        f"check {running.config}",
    )
    said += [running.fdctl(*command.split()) for command in commands]
    printed = "".join(done.stdout + done.stderr for done in said)
    assert "must not contain --api-key" in printed
    logs = "".join(
        file.read_text(errors="replace") for file in running.prefix.glob("logs/**/*") if file.is_file()
    )
    assert "replica 1: ERROR" in logs
    for where in (cmdlines, printed, logs):
        assert "5ecret" not in where
    for file in (running.prefix / "run" / "launch").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SECRETS["env"] in "".join(
        file.read_text() for file in (running.prefix / "run" / "launch").iterdir()
    )


@pytest.mark.parametrize(
    "words",
    [
        *(["--api-key", "5ecret"], ["--api-key=5ecret"], ["--api_key", "5ecret"], ["--api_key=5ecret"]),
        *(
            ["--api-k=5ecret"],
            ["--api-", "5ecret"],
            ["--api", "5ecret"],
            ["--ap=5ecret"],
            ["--API-KEY=5ecret"],
        ),
        *(["--api-key 5ecret"], ["--x", "1 --api-key 5ecret"], ["-api-key", "5ecret"], ["FD_API_KEY=5ecret"]),
        *(["--hf-token", "5ecret"], ["--scheduler-password=5ecret"]),
        ["--board", "redis://u:5ecret@h/0"],
        ["--board=redis://:5ecret@h/0"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("section", ["engine", "router"])
def test_no_spelling_of_a_key_option_enters_a_command_line(section: str, words: list[str]) -> None:
    text = f'[model]\npath = "demo"\n[{section}]\nextra_args = {json.dumps(words)}\n'
    with pytest.raises(ConfigError) as caught:
        parse(text, "dp.toml", Path("/p"), Path("/p"))
    assert str(caught.value).startswith(f"dp.toml:4: {section}.extra_args: it must not contain ")
    assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--register-keys-file", "/etc/fd/keys"],
        ["--certfile", "/c", "--keyfile", "/k"],
        ["--keep-alive-secs", "3", "--queue-size", "5"],
        ["--board", "redis://h:6379/0"],
        ["--allow-host", "10.0.0.0/8"],
    ],
    ids=" ".join,
)
def test_file_names_and_harmless_values_are_accepted(words: list[str]) -> None:
    assert masking.secret_in(words) is None
    text = f'[model]\npath = "demo"\n[router]\nextra_args = {json.dumps(words)}\n'
    assert parse(text, "dp.toml", Path("/p"), Path("/p")).router.extra_args == tuple(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "env = { FD_API_KEY = [ '5ecret' ] }",
        "env = 'FD_API_KEY=5ecret'",
        "env = { FD_API_KEY = '5ecret\\u0000' }".replace("'", '"'),
        "extra_args = '--api-key 5ecret'",
        "extra_args = ['--x', ['5ecret']]",
        "extra_args = { a = '5ecret' }",
    ],
)
def test_an_error_about_arguments_or_environment_does_not_repeat_them(wrong: str) -> None:
    for section in ("engine", "router"):
        with pytest.raises(ConfigError) as caught:
            parse(f'[model]\npath = "demo"\n[{section}]\n{wrong}\n', "dp.toml", Path("/p"), Path("/p"))
        assert "5ecret" not in str(caught.value)


def test_world_readable_dp_toml_with_secrets_causes_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "dp.toml"
    file.write_text('[model]\npath = "demo"\n[engine.env]\nHF_TOKEN = "5ecret"\nOTHER = "x"\n')
    config = parse(file.read_text(), "dp.toml", tmp_path, tmp_path)
    file.chmod(0o644)
    assert (
        exposed_secrets(file, config) == f"{file}: every user of this machine can read it (mode 0644), "
        "and it contains HF_TOKEN; chmod 640 it"
    )
    file.chmod(0o640)
    assert exposed_secrets(file, config) == ""


def test_replicas_read_api_keys_from_a_file_and_daemon_presents_one(running: Running) -> None:
    (running.prefix / "keys").write_text("sesame\n")
    text = running.config.read_text()
    running.config.write_text(text.replace("[engine]", '[engine]\napi_keys_file = "keys"', 1))
    running.start_and_wait()


def test_systemd_credential_works_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("sesame\n")
    text = '[model]\npath = "demo"\n[engine]\napi_keys_file = "credential:keys"\n'
    replica = programs_of(parse(text, "dp.toml", tmp_path, tmp_path))[1]
    words = ["--model", str(TINY), *replica.argv[replica.argv.index("--api-keys-file") :]]
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="set LoadCredential=keys:FILE in the unit"):
        parse_arguments(words)
    reading = token_probe(replica, 1)
    assert not reading.ok
    assert "LoadCredential=keys:FILE" in reading.problem
    # The directory that systemd creates for the credentials of a unit.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert parse_arguments(words).api_keys == ApiKeys(["sesame"])


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff5ecret"])
def test_key_file_without_keys_is_refused_without_quoting_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        keys_in("--api-keys-file", tmp_path / "keys")
    assert str(caught.value).startswith(f"--api-keys-file {tmp_path}/keys: ")
    assert "5ecret" not in str(caught.value)
