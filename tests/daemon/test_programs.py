"""Expert parallelism in dp.toml: the replicas' command line, and the group in which they meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy.common.cors import CorsPolicy
from fastdeploy.daemon.config.loader import Config, parse
from fastdeploy.daemon.config.programs import expert_group_in, expert_group_of, programs_of
from fastdeploy.daemon.router.config.flags import file_parser
from fastdeploy.entrypoints.openai.options import parse_arguments
from fastdeploy.expert_parallel.memory_file import group_directory

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"


def read(parallel: str = "", engine: str = "", prefix: Path = Path("/tmp/fd"), model: Path = TINY) -> Config:
    text = f'[model]\npath = "{model}"\n[parallel]\n{parallel}\n[engine]\n{engine}\n'
    return parse(text, "dp.toml", prefix, prefix)


def test_all_replicas_join_one_group_but_not_the_router() -> None:
    config = read()
    router, *replicas = programs_of(config)
    assert expert_group_in(router.argv) is None
    assert {expert_group_in(replica.argv) for replica in replicas} == {expert_group_of(config)}


def test_expert_options_of_dp_toml_reach_the_engine() -> None:
    config = read("redundant_experts = 3\nbalance_experts = true\ncollective_timeout = 7.5")
    engine = parse_arguments(programs_of(config)[1].argv[3:]).engine
    assert engine.enable_expert_parallel
    assert engine.expert_parallel_group == expert_group_of(config)
    assert (engine.redundant_experts, engine.enable_eplb, engine.expert_parallel_stall_kill) == (3, True, 7.5)


def test_without_expert_parallelism_there_are_no_expert_flags() -> None:
    config = read(
        "expert_parallel = false\nredundant_experts = 3\nbalance_experts = true\ncollective_timeout = 7"
    )
    argv = " ".join(programs_of(config)[1].argv)
    assert not any(word in argv for word in ("expert", "eplb"))


def test_the_name_of_a_group_is_fit_for_a_directory_and_always_the_same() -> None:
    name = expert_group_of(read())
    assert group_directory(name).name.startswith("fd-ep-")
    assert name == expert_group_of(read())


@pytest.mark.parametrize(
    "other",
    [
        {"prefix": Path("/tmp/fd2")},
        {"model": TINY.parent},
        {"parallel": "data_parallel_size = 4"},
        {"parallel": "redundant_experts = 1"},
        {"engine": 'dtype = "float32"'},
        {"engine": 'quantization = "wint8"'},
        {"engine": 'extra_args = ["--max-num-batched-tokens", "1024"]'},
        {"engine": 'env = { FD_ISA = "avx2" }'},
    ],
)
def test_ranks_that_might_disagree_or_are_of_two_deployments_never_meet(other: dict[str, object]) -> None:
    assert expert_group_of(read(**other)) != expert_group_of(read())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        {"parallel": "balance_experts = true"},
        {"parallel": "collective_timeout = 5"},
        {"engine": "ports = 2000"},
        {"engine": "max_num_seqs = 3"},
        {"engine": "num_gpu_blocks_override = 100"},
    ],
)
def test_options_that_ranks_need_not_share_keep_the_group(other: dict[str, str]) -> None:
    assert expert_group_of(read(**other)) == expert_group_of(read())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        '["--expert-parallel-group", "mine"]',
        '["--expert-parallel-group=mine"]',
        '["--expert_parallel_group=mine"]',
    ],
)
def test_extra_args_may_name_another_group(words: str) -> None:
    argv = programs_of(read(engine=f"extra_args = {words}"))[1].argv
    assert expert_group_in(argv) == "mine"
    assert parse_arguments(argv[3:]).engine.expert_parallel_group == "mine"


@pytest.mark.parametrize(
    ("line", "origins"),
    [
        ("", {"loopback"}),
        ("cors_origins = []", set()),
        ('cors_origins = ["*"]', {"*"}),
        ('cors_origins = ["loopback", "https://app.example"]', {"loopback", "https://app.example"}),
    ],
)
def test_the_router_allows_the_web_pages_of_dp_toml(line: str, origins: set[str]) -> None:
    config = parse(f'[model]\npath = "demo"\n[router]\n{line}\n', "dp.toml", Path("/tmp"), Path("/tmp"))
    router = programs_of(config)[0]
    flags = file_parser().parse_args(router.flags)
    assert CorsPolicy.parse("--cors-origins", flags.cors_origins).origins == origins


@pytest.mark.parametrize(("line", "is_served"), [("", True), ("page = true", True), ("page = false", False)])
def test_dp_toml_decides_whether_the_page_is_served(line: str, is_served: bool) -> None:
    config = parse(f'[model]\npath = "demo"\n[router]\n{line}\n', "dp.toml", Path("/tmp"), Path("/tmp"))
    assert file_parser().parse_args(programs_of(config)[0].flags).page is is_served
