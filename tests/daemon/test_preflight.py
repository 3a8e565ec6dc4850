"""Configurations that are refused before any process is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config import loader as dp_toml
from fastdeploy.daemon.config.preflight import checked_programs_of

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


def write(directory: Path, model: object = TINY, engine: str = "", router: str = "") -> Path:
    file = directory / "dp.toml"
    file.write_text(f'[model]\npath = "{model}"\n[engine]\n{engine}\n[router]\n{router}\n')
    return file


def test_a_good_configuration_gives_its_programs(tmp_path: Path) -> None:
    programs = checked_programs_of(dp_toml.load(write(tmp_path), tmp_path))
    assert [program.name for program in programs[:2]] == ["router", "replica0"]


def test_replicas_get_the_weight_format_as_flags(tmp_path: Path) -> None:
    def words(engine: str) -> str:
        programs = checked_programs_of(dp_toml.load(write(tmp_path, engine=engine), tmp_path))
        return " ".join(programs[1].argv)

    assert "--quantization wint4" in words('quantization = "wint4"')
    assert "--dtype float32" in words('dtype = "float32"')


def test_router_and_replicas_get_the_collector(tmp_path: Path) -> None:
    file = write(tmp_path, router='[tracing]\nendpoint = "http://x:4318"\nsample_ratio = 0.5')
    for program in checked_programs_of(dp_toml.load(file, tmp_path)):
        assert "--otlp-traces-endpoint http://x:4318 --trace-sample-ratio 0.5" in " ".join(program.words)


def test_collector_without_the_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, router='[tracing]\nendpoint = "http://x:4318"')
    monkeypatch.setattr("fastdeploy.common.tracing_config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fd-dp\[otel\]'"):
        checked_programs_of(dp_toml.load(file, tmp_path))


def test_password_in_the_url_of_a_collector_is_not_shown(tmp_path: Path) -> None:
    file = write(tmp_path, router='[tracing]\nendpoint = "http://me:hunter2@x"')
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as error:
        dp_toml.load(file, tmp_path)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": "/nonexistent"}, "/nonexistent"),
        ({"model": Path(__file__).parent}, "config.json"),
        ({"engine": 'extra_args = ["--bogus"]'}, "--bogus"),
        ({"engine": 'dtype = "float32"\nquantization = "wint8"'}, "--quantization"),
        ({"engine": 'host = "no.such.host.invalid"'}, "[engine] host"),
        ({"router": 'host = "no.such.host.invalid"'}, "[router] host"),
        ({"router": 'extra_args = ["--bogus"]'}, "[router] extra_args: unrecognized arguments: --bogus"),
        ({"router": 'extra_args = ["--max-body-bytes", "20000000"]'}, "and 20000000 for the router"),
        ({"engine": 'extra_args = ["--max-body-bytes", "1000"]'}, "is 1000 for the replicas"),
        ({"engine": 'env = {FD_API_KEY = "caf\u00e9"}'}, "[engine] env: FD_API_KEY: key 1 has a character"),
        ({"router": 'env = {FD_ROUTER_ADMIN_KEY = " , "}'}, "[router] env: FD_ROUTER_ADMIN_KEY is set"),
        ({"router": 'extra_args = ["--queue-size", "-1"]'}, "the router could not start: --queue-size is -1"),
    ],
)
def test_error_of_every_replica_is_one_line(tmp_path: Path, content: dict, said: str) -> None:
    config = dp_toml.load(write(tmp_path, **content), tmp_path)
    with pytest.raises(ConfigError) as caught:
        checked_programs_of(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
