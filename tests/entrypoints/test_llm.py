"""`LLM`: the texts of a server without one, and a worker that never outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdeploy import LLM, SamplingParams
from fastdeploy.common.errors import FastDeployError
from fastdeploy.entrypoints.llm import GuidedDecodingParams

from .conftest import CHAT_TEMPLATE, MAX_MODEL_LEN, TINY, ApiServer, wait_until

SETTINGS: dict[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "num_gpu_blocks_override": 32,
    "threads": 1,
    "chat_template": CHAT_TEMPLATE,
}
#: Reports its worker, then generates until it is killed.
SCRIPT = f"""
from fastdeploy import LLM, SamplingParams
llm = LLM({str(TINY)!r}, **{SETTINGS!r})
print("ready", flush=True)
while True:
    llm.generate(["the sea"] * 50, SamplingParams(max_tokens=400, ignore_eos=True))
"""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(TINY), **SETTINGS) as running:
        yield running


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"seed": 7, "temperature": 1.5, "top_p": 0.9},
        {"seed": 2**62, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"seed": 3, "n": 3, "stop": ["1", "a"], "frequency_penalty": 0.3, "logit_bias": {70: 2.0}},
        {"seed": 4, "guided_decoding": GuidedDecodingParams(regex="[a-z]{3,9}")},
    ],
)
def test_generate_returns_the_text_of_a_server(llm: LLM, server: ApiServer, fields: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=12, **fields)
    prompts: list[Any] = ["the sea", [5, 6, 7], {"prompt": "x y"}]
    outputs = llm.generate(prompts, params)
    expected = [
        choice
        for prompt in ("the sea", [5, 6, 7], "x y")
        for choice in server.post(
            "/v1/completions", {"prompt": prompt, "return_token_ids": True} | params.request_fields()
        )[1]["choices"]
    ]
    assert [each.outputs.text for each in outputs] == [choice["text"] for choice in expected]
    assert [each.outputs.token_ids for each in outputs] == [choice["token_ids"] for choice in expected]
    assert [each.outputs.finish_reason for each in outputs] == [each["finish_reason"] for each in expected]


def test_chat_returns_the_text_of_a_server(llm: LLM, server: ApiServer) -> None:
    conversations = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"sea {number}"}]
        for number in range(3)
    ]
    outputs = llm.chat(conversations, SamplingParams(seed=9, max_tokens=8))
    expected = [
        server.post("/v1/chat/completions", {"messages": messages, "seed": 9, "max_tokens": 8})[1]
        for messages in conversations
    ]
    assert [each.outputs.text for each in outputs] == [
        body["choices"][0]["message"]["content"] for body in expected
    ]
    assert outputs[0].prompt == "system: Be brief.\nuser: sea 0\nassistant:"
    assert len(outputs[0].prompt_token_ids) == expected[0]["usage"]["prompt_tokens"]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=length, ignore_eos=True) for length in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(each.outputs.token_ids) for each in outputs] == [1, 5, 3]
    assert [each.prompt for each in outputs] == ["a", "b", "c"]


def test_log_probabilities_and_times_are_reported(llm: LLM) -> None:
    [output] = llm.generate("the sea", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))
    assert output.outputs.logprobs is not None
    drawn = [
        entry[token] for token, entry in zip(output.outputs.token_ids, output.outputs.logprobs, strict=True)
    ]
    assert [each.rank for each in drawn] == [1, 1, 1]
    assert output.metrics.first_token_time is not None
    assert 0 < output.metrics.first_token_time <= output.metrics.model_execute_time


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["fits", "x" * 600], r"prompts\[1\]: prompt has 600 tokens"),
        ([[5], [10**6]], r"prompts\[1\]: prompt has token id 1000000"),
        (3, r"prompts\[0\] is a int"),
        ({"prompt": "x", "multimodal_data": {"image": [1]}}, "this engine reads text only"),
    ],
)
def test_a_wrong_prompt_is_named(llm: LLM, prompts: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        llm.generate(prompts)


def test_a_parameter_that_the_model_refuses_is_named(llm: LLM) -> None:
    params = [SamplingParams(), SamplingParams(logit_bias={10**6: 1.0})]
    with pytest.raises(ValueError, match=r"prompts\[1\]: logit_bias"):
        llm.generate(["a", "b"], params)


@pytest.mark.parametrize("fields", [{"temperature": -1.0}, {"n": 0}, {"top_p": 2.0}])
def test_a_wrong_parameter_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {next(iter(fields))} is"):
        SamplingParams(**fields)


def test_a_wrong_setting_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"--max-modl-len=9; did you mean --max-model-len\?"):
        LLM(str(TINY), max_modl_len=9)


def test_a_worker_outlives_the_thread_that_started_it_but_not_a_kill() -> None:
    started: list[LLM] = []
    thread = threading.Thread(target=lambda: started.append(LLM(str(TINY), **SETTINGS)))
    thread.start()
    thread.join()
    [own] = started
    assert own.generate("the sea", SamplingParams(max_tokens=1))[0].finished
    [worker] = [child for child in psutil.Process().children() if child.pid == own._engine.worker_pid]
    failures: list[str] = []

    def generate() -> None:
        try:
            while True:
                own.generate(["the sea"] * 4, SamplingParams(max_tokens=300, ignore_eos=True))
        except FastDeployError as error:
            failures.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    worker.kill()
    thread.join(60)
    own.close()
    assert failures == [f"worker pid={worker.pid} was killed by SIGKILL"]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_script_that_dies_inside_leaves_no_worker(tmp_path: Path, sent: int, status: int) -> None:
    script = tmp_path / "script.py"
    # Most scripts have no `if __name__ == "__main__"`.
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FD_LOG_DIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    [worker] = psutil.Process(process.pid).children()
    process.send_signal(sent)
    assert process.wait(20) == status
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
