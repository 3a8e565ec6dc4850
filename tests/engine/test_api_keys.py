"""API keys: one rule for router, replica and probe, and files of any editor."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy.common.api_keys import ApiKeys, keys_in, keys_in_variable
from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.supervision import probes
from fastdeploy.entrypoints.openai.options import parse_arguments

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny"
FLAG, VARIABLE = "--api-keys-file", "FD_API_KEY"


def write(directory: Path, content: bytes) -> Path:
    (directory / "keys").write_bytes(content)
    return directory / "keys"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfsecret-one\r\nsecret-two\r\n",
        b"\xef\xbb\xbf# a comment\r\n\r\nsecret-one\r\n  secret-two",
        b"# caf\xc3\xa9\nsecret-one\nsecret-two\n",
    ],
)
def test_keys_are_read_from_files_of_any_editor(tmp_path: Path, content: bytes) -> None:
    assert keys_in(FLAG, write(tmp_path, content)) == ["secret-one", "secret-two"]
    assert ApiKeys.read(FLAG, tmp_path / "keys", VARIABLE).allow("Bearer secret-one")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("good\ncaf\u00e9\n".encode(), "the key in line 2 has a character that is not printable ASCII"),
        ("good\ncaf\u00e9\n".encode("latin-1"), r"byte 8 \(line 2\) is not UTF-8"),
        ("one\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"one\x0btwo\n", "the key in line 1 has a character"),
        (b"one\0", "line 1 contains the character NUL"),
        (b"\xef\xbb\xbf", "has no key in it"),
    ],
)
def test_invalid_key_file_is_reported_without_its_content(tmp_path: Path, content: bytes, place: str) -> None:
    with pytest.raises(ConfigError, match=place) as refused:
        keys_in(FLAG, write(tmp_path, content))
    assert str(refused.value).startswith(f"{FLAG} {tmp_path / 'keys'}")
    assert "caf" not in str(refused.value)


@pytest.mark.parametrize("text", ["caf\u00e9", "a,\u043a\u043b\u044e\u0447", "a\tb", "a\x7f", " , "])
def test_router_replica_and_probe_refuse_the_same_keys(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    replica = Program("replica0", ("api_server",), {}, (1,))
    for read in (
        lambda: ApiKeys.read(FLAG, None, VARIABLE),
        lambda: parse_arguments(["--model", str(TINY)]),
        lambda: parse_arguments(["--model", str(TINY), "--api-key", text]),
        lambda: probes._api_key(replica),
    ):
        with pytest.raises((ConfigError, ValueError), match=r"ASCII|no key|empty") as refused:
            read()
        assert "caf" not in str(refused.value)


def test_router_replica_and_probe_read_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, " , one two,three ")
    keys = keys_in_variable(VARIABLE, {VARIABLE: " , one two,three "})
    assert keys == ["one two", "three"]
    assert parse_arguments(["--model", str(TINY)]).api_keys == ApiKeys(["one two", "three"])
    assert probes._api_key(Program("replica0", ("api_server",), {}, (1,))) == "one two"
    router = ApiKeys.read(FLAG, None, VARIABLE)
    assert all(router.allow(f"Bearer {key}") for key in keys)


def test_a_variable_that_is_not_set_or_empty_has_no_keys() -> None:
    assert keys_in_variable(VARIABLE, {}) == keys_in_variable(VARIABLE, {VARIABLE: ""}) == []
