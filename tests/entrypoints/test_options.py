"""The command line of api_server."""

import re
from pathlib import Path

import pytest

from fastdeploy.common.api_keys import ApiKeys
from fastdeploy.common.errors import ConfigError
from fastdeploy.core.worker import _decode_config as decode_config
from fastdeploy.entrypoints.openai.foreign_flags import REFUSED, WITHOUT_EFFECT
from fastdeploy.entrypoints.openai.options import ServeConfig, _parser, parse_arguments
from fastdeploy.entrypoints.openai.worker_process import encode_config

from .conftest import TINY

#: The flags of FastDeploy's api_server.
FASTDEPLOY = """
    model served-model-name revision model-config-name tokenizer tokenizer-base-url max-model-len
    block-size task runner convert override-pooler-config use-warmup limit-mm-per-prompt
    mm-processor-kwargs max-encoder-cache max-processor-cache enable-mm reasoning-parser chat-template
    tool-call-parser tool-parser-plugin speculative-config dynamic-load-weight load-strategy
    rsync-config engine-worker-queue-port quantization graph-optimization-config plas-attention-config
    guided-decoding-backend guided-decoding-disable-any-whitespace enable-logprob
    enable-keep-sampling-mask max-logprobs logprobs-mode seed enable-early-stop early-stop-config
    lm-head-fp32 logits-processors enable-entropy model-impl tensor-parallel-size
    disable-custom-all-reduce enable-flashinfer-allreduce-fusion use-internode-ll-two-stage
    disable-sequence-parallel-moe max-num-seqs num-gpu-blocks-override max-num-batched-tokens
    gpu-memory-utilization data-parallel-size local-data-parallel-id enable-expert-parallel enable-eplb
    eplb-config routing-replay-config enable-chunked-moe chunked-moe-size
    shutdown-comm-group-if-worker-idle no-shutdown-comm-group-if-worker-idle load-choices kv-cache-ratio
    swap-space prealloc-dec-block-slot-num-threshold cache-queue-port static-decode-blocks
    kvcache-storage-backend write-policy ips enable-prefix-caching no-enable-prefix-caching
    enable-output-caching no-enable-output-caching enable-chunked-prefill max-num-partial-prefills
    max-long-partial-prefills long-prefill-token-threshold splitwise-role innode-prefill-ports
    cache-transfer-protocol pd-comm-port rdma-comm-ports disable-chunked-mm-input router scheduler-name
    scheduler-max-size scheduler-ttl scheduler-host scheduler-port scheduler-db scheduler-password
    scheduler-topic scheduler-min-load-score scheduler-load-shards-num scheduler-sync-period
    scheduler-expire-period scheduler-release-load-expire-period scheduler-reader-parallel
    scheduler-writer-parallel scheduler-reader-batch-size scheduler-writer-batch-size
    enable-overlap-schedule port host workers metrics-port controller-port max-waiting-time
    max-concurrency enable-mm-output timeout-graceful-shutdown timeout api-key config
"""


def parse(*flags: str) -> ServeConfig:
    return parse_arguments(["--model", str(TINY), *flags])


def test_defaults_are_closed() -> None:
    config = parse()
    assert (config.host, config.port, config.metrics_port) == ("127.0.0.1", 8000, None)
    assert (config.served_model_name, config.checks_model_name) == ("tiny", False)
    assert config.api_keys == ApiKeys()


def test_fastdeploys_documented_command_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    config = parse(
        *("--port", "1822", "--metrics-port", "3201", "--engine-worker-queue-port", "25611,25621,25631"),
        *("--local-data-parallel-id", "1", "--tensor-parallel-size", "1", "--data-parallel-size", "8"),
        *("--max-model-len", "12288", "--max-num-seqs", "64", "--num-gpu-blocks-override", "256"),
        *("--enable-expert-parallel", "--router", "0.0.0.0:30000", "--gpu-memory-utilization", "0.9"),
        *("--enable-chunked-prefill", "--scheduler-name", "dp", "--splitwise-role", "mixed"),
    )
    assert config.engine_worker_queue_port == 25621
    assert config.router == "http://127.0.0.1:30000"
    assert (config.engine.data_parallel_rank, config.engine.max_num_seqs) == (1, 64)
    assert config.engine.gpu_memory_utilization == 0.9
    [warning] = [record.getMessage() for record in caplog.records]
    for flag in ("--enable-chunked-prefill", "--scheduler-name"):
        assert flag in warning


def test_the_flags_of_expert_parallelism_reach_the_engine() -> None:
    engine = parse().engine
    assert not engine.enable_expert_parallel
    assert (engine.expert_parallel_group, engine.redundant_experts, engine.enable_eplb) == (
        "default",
        0,
        False,
    )
    assert engine.expert_parallel_stall_kill == 60.0
    engine = parse(
        *("--enable-expert-parallel", "--expert-parallel-group", "mine", "--redundant-experts", "2"),
        *("--enable-eplb", "--expert-parallel-stall-kill", "2.5"),
    ).engine
    assert engine.enable_expert_parallel
    assert (engine.expert_parallel_group, engine.redundant_experts, engine.enable_eplb) == ("mine", 2, True)
    assert engine.expert_parallel_stall_kill == 2.5


@pytest.mark.parametrize(
    ("flags", "on_cpu", "on_gpu"),
    [
        ((), (512, 32), (4096, 1024)),
        (("--max-num-batched-tokens", "512"), (512, 32), (512, 1024)),
        (("--max-prefill-beside-decode=32",), (512, 32), (4096, 32)),
        (("--max_num_batched_tokens=9", "--max-prefill-beside-decode", "7"), (9, 7), (9, 7)),
    ],
)
def test_a_gpu_has_own_defaults_of_what_is_not_given(
    flags: tuple[str, ...], on_cpu: tuple[int, int], on_gpu: tuple[int, int]
) -> None:
    # As the worker gets it.
    config = decode_config(encode_config(parse(*flags).engine))
    assert (config.max_num_batched_tokens, config.max_prefill_beside_decode) == on_cpu
    config = config.on_gpu()
    assert (config.max_num_batched_tokens, config.max_prefill_beside_decode) == on_gpu
    assert config.on_gpu() == config


def test_a_wrong_limit_of_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens is 0; it must be at least 1"):
        parse("--max-num-batched-tokens", "0")


@pytest.mark.parametrize("name", [None, "", "default", "tiny", "null", "gpt-9"])
def test_a_name_of_the_model_counts_only_if_it_is_given(name: str | None) -> None:
    assert parse().accepts_model(name)
    assert parse("--served-model-name", "tiny").accepts_model(name) == (name not in ("null", "gpt-9"))


def test_underscores_are_dashes_in_flags_only() -> None:
    config = parse("--max_model_len=100", "--served_model_name", "my_model")
    assert (config.engine.max_model_len, config.served_model_name) == (100, "my_model")


def test_api_keys_come_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_API_KEY", "a, b,")
    assert parse().api_keys == ApiKeys(["a", "b"])
    assert parse("--api-key", "c,d", "--api-key", "e").api_keys == ApiKeys(["c", "d", "e"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "0"), "--port is 0"),
        (("--port", "70000"), "--port is 70000"),
        (("--metrics-port", "-5"), "--metrics-port is -5"),
        (("--engine-worker-queue-port", "a,b"), "--engine-worker-queue-port"),
        (("--engine-worker-queue-port", "1,2", "--local-data-parallel-id", "2"), "--local-data-parallel-id"),
        (("--max-concurrency", "0"), "--max-concurrency"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--api-key", " ,"), "--api-key"),
        (("--quantization", "wint2"), "--quantization is 'wint2'; it must be 'wint8' or 'wint4'"),
        (("--dtype", "float16"), "--dtype is 'float16'; it must be 'bfloat16' or 'float32'"),
        (("--dtype", "float32", "--quantization", "wint4"), "--dtype float32 contradicts --quantization"),
        (("--redundant-experts", "-1"), "--redundant-experts is -1; it must be 0 or more"),
        (("--redundant-experts", "many"), "--redundant-experts"),
        (("--expert-parallel-stall-kill", "0"), "--expert-parallel-stall-kill is 0; it must be more than 0"),
        (("--expert-parallel-group",), "--expert-parallel-group"),
        (("--enable-expert-parallel", "--data-parallel-size", "65"), "--data-parallel-size is 65"),
        (
            ("--logprobs-mode", "processed_logits"),
            "--logprobs-mode is not supported: log probabilities are those of the model, before temperature; "
            "leave it out or give raw_logprobs",
        ),
        (("--enable-early-stop",), "--enable-early-stop is not supported: this server does not look for rep"),
        (("--logits-processors", "a.B", "c.D"), "--logits-processors is not supported"),
        (("--lm_head-fp32",), "--lm-head-fp32 is not supported"),
        (("--tokenizer", "other"), "--tokenizer is not supported: the tokenizer is that of the checkpoint"),
        (("--guided-decoding-backend", "outlines"), "--guided-decoding-backend: invalid choice: 'outlines'"),
        (("-tp", "2"), "--tensor-parallel-size is 2"),
        (("--max-logprobs", "-2"), "--max-logprobs is -2; it must be at least -1"),
        (("--seed", "one"), "--seed"),
        (("--config", "fd.yaml"), "--config is not supported: dp.toml is the configuration file"),
        (("--chat-template", "/no/such/file"), "--chat-template"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_flag(
    flags: tuple[str, str, str, str] | tuple[str, str, str] | tuple[str, str] | tuple[str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*(("--data-parallel-size", "4") if "--local-data-parallel-id" in flags else ()), *flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flag_of_fastdeploy_is_known() -> None:
    known = {flag for action in _parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in FASTDEPLOY.split()} - known == set()
    assert "-tp" in known


def test_other_flags_of_fastdeploy_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    flags = [word for flag in sorted(WITHOUT_EFFECT) for word in (f"--{flag}", "1")]
    harmless = [
        (f"--{name}", each.harmless[-1])
        for name, each in REFUSED.items()
        if each.harmless and name != "tokenizer"
    ]
    parse(*flags, *(word for pair in harmless for word in pair), "--tokenizer", str(TINY))
    [warning] = [record.getMessage() for record in caplog.records]
    named = {word.removeprefix("--") for word in warning.split() if word.startswith("--")}
    assert named == {*WITHOUT_EFFECT, "tokenizer", *(name for name, each in REFUSED.items() if each.harmless)}


def test_flags_with_an_effect_have_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = parse(
        *("-tp", "1", "--seed", "3", "--max-logprobs", "-1", "--served-model-name", "m"),
        *("--guided-decoding-backend", "off"),
    )
    assert (config.seed, config.max_logprobs, config.checks_model_name) == (3, -1, True)
    assert config.guided_decoding_backend == "off"
    assert not caplog.records


def test_documentation_lists_the_flags_that_are_not_supported() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fastdeploy.md").read_text()
    rows = re.findall(r"^\| `--([\w-]+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    listed = {flag: (why, values) for flag, why, values in rows}
    assert listed == {
        flag: (each.why, ", ".join(f"`{value}`" for value in each.harmless if value))
        for flag, each in REFUSED.items()
    }


def test_parsers_have_names() -> None:
    config = parse("--tool-call-parser", "ernie-x1", "--reasoning-parser", "ernie-x1")
    assert (config.tool_call_parser, config.reasoning_parser) == ("ernie-x1", "ernie-x1")
    with pytest.raises(ConfigError, match=r"--tool-call-parser is 'nope'; it must be one of .*hermes"):
        parse("--tool-call-parser", "nope")
    with pytest.raises(ConfigError, match=r"--reasoning-parser is 'nope'; it must be one of .*qwen3"):
        parse("--reasoning-parser", "nope")


def test_a_plugin_may_add_the_name_of_a_parser(tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    with pytest.raises(ConfigError, match=r"--tool-parser-plugin is .*plugin.py'; there is no such file"):
        parse("--tool-parser-plugin", str(file))
    file.touch()
    assert parse("--tool-parser-plugin", str(file), "--tool-call-parser", "nope").tool_call_parser == "nope"
