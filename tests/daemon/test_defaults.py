"""Defaults: dp.toml, the engine and the router agree wherever they have the same option."""

from __future__ import annotations

from dataclasses import fields

import pytest

from fastdeploy.config import EngineConfig
from fastdeploy.daemon.config.declaration import options_of
from fastdeploy.daemon.config.options import EngineSection, ParallelSection, RouterSection, SuperviseSection
from fastdeploy.daemon.router.config.flags import file_parser
from fastdeploy.entrypoints.openai.options import ServeConfig

#: Field of the engine -> name in dp.toml, where they differ.
RENAMED = {"enable_eplb": "balance_experts"}
#: Defaults that differ on purpose, each with its values in dp.toml and in the engine or the router.
DIFFERENT = {
    # A value of dp.toml is never absent: 0 and "" leave the flag out.
    "num_gpu_blocks_override": (0, None),
    "quantization": ("", None),
    # fd-dp runs a machine, an engine alone is one replica.
    "data_parallel_size": (8, 1),
    # See the comment in options.py.
    "policy": ("cache_aware", "request_num"),
    # fd-dp compares lists, the flag is one word.
    "cors_origins": (("loopback",), "loopback"),
}


def dp_toml(*sections: type) -> dict[str, object]:
    return {name: option.default for section in sections for name, option in options_of(section).items()}


def engine() -> dict[str, object]:
    declared = [field for config in (EngineConfig, ServeConfig) for field in fields(config)]
    return {RENAMED.get(field.name, field.name): field.default for field in declared}


def router() -> dict[str, object]:
    return {name.removesuffix("_secs"): value for name, value in vars(file_parser().parse_args([])).items()}


@pytest.mark.parametrize(
    ("sections", "program", "least"),
    [((EngineSection, ParallelSection), engine(), 12), ((RouterSection,), router(), 7)],
)
def test_dp_toml_has_the_defaults_of_the_programs(
    sections: tuple[type, ...], program: dict[str, object], least: int
) -> None:
    options = dp_toml(*sections)
    both = {name: (options[name], program[name]) for name in options.keys() & program.keys()}
    # Files of keys are set by the user, and an absent one has several forms.
    both.pop("api_keys_file", None)
    assert len(both) >= least
    different = {name: values for name, values in both.items() if values[0] != values[1]}
    assert different == {name: DIFFERENT[name] for name in both.keys() & DIFFERENT.keys()}


def test_the_daemon_kills_a_hung_rank_before_other_ranks_do() -> None:
    options = dp_toml(ParallelSection, SuperviseSection)
    assert options["no_progress_timeout"] < options["collective_timeout"]  # type: ignore[operator]
