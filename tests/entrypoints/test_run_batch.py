"""`fastdeploy run-batch` as a process: killed, interrupted, and with a server that comes and goes."""

from __future__ import annotations

import json
import signal
import subprocess
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil

from fastdeploy.entrypoints.openai.seeds import Seeds

from .commands import ScriptedServer, run, send_json, start
from .conftest import CHAT_TEMPLATE, MAX_MODEL_LEN, TINY, ApiServer, wait_until

OFFLINE = (
    *("--model", str(TINY), "--max-model-len", str(MAX_MODEL_LEN), "--num-gpu-blocks-override", "32"),
    *("--threads", "1", "--seed", "5", "--chat-template", CHAT_TEMPLATE),
)


def test_a_batch_killed_five_times_answers_each_line_once(server: ApiServer, tmp_path: Path) -> None:
    source, target = write_requests(tmp_path, 1000), tmp_path / "out"
    for kill in range(1, 6):
        process = start("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
        kill_after(process, target, 100 * kill)
    done = run("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
    assert done.returncode == 0, done.stderr
    results = read_results(target)
    assert [result["custom_id"] for result in results] == [f"r{i}" for i in range(1000)]
    assert all(usage(result)["completion_tokens"] == 2 for result in results)


def test_a_killed_batch_leaves_no_worker_and_continues_with_its_seeds(
    server: ApiServer, tmp_path: Path
) -> None:
    source, target = write_requests(tmp_path, 150), tmp_path / "out"
    process = start("run-batch", "-i", str(source), "-o", str(target), *OFFLINE, stderr=subprocess.DEVNULL)
    wait_until(lambda: psutil.Process(process.pid).children() or process.poll() is not None, "a worker")
    [worker] = psutil.Process(process.pid).children()
    kill_after(process, target, 5)
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
    assert num_lines(target) < 150
    done = run("run-batch", "-i", str(source), "-o", str(target), *OFFLINE)
    assert done.returncode == 0, done.stderr
    seeds = Seeds(5)
    requests = [json.loads(line) for line in source.read_text().splitlines()]
    expected = [
        server.post(request["url"], request["body"] | {"seed": seeds.at(number)})[1]["choices"][0]
        for number, request in enumerate(requests)
    ]
    found = [result["response"]["body"]["choices"][0] for result in read_results(target)]
    assert list(map(text, found)) == list(map(text, expected))


def test_a_bad_line_becomes_an_error_line_and_not_an_end(server: ApiServer, tmp_path: Path) -> None:
    source, target = write_requests(tmp_path, 2), tmp_path / "out"
    refused = {"custom_id": "r3", "method": "POST", "url": "/v1/completions", "body": {"prompt": 1.5}}
    response = {"custom_id": "r4", "method": "POST", "url": "/v1/responses", "body": {"input": "hi"}}
    with source.open("a") as file:
        file.write(f"{{broken\n{json.dumps(refused)}\n{json.dumps(response)}")
    done = run("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
    assert done.returncode == 0, done.stderr
    results = read_results(target)
    assert [result["custom_id"] for result in results] == ["r0", "r1", None, "r3", "r4"]
    assert results[2]["error"]["code"] == "invalid_json_line"
    assert results[3]["response"]["status_code"] == 400
    assert results[3]["response"]["body"]["error"]["param"] == "prompt"
    assert results[4]["response"]["body"]["object"] == "response"


def test_a_server_that_is_away_for_a_moment_costs_no_line(tmp_path: Path) -> None:
    source, target = write_requests(tmp_path, 3), tmp_path / "out"
    refused: set[str] = set()

    def refuse_once(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        key = json.dumps(body)
        is_first = key not in refused
        refused.add(key)
        send_json(handler, 503 if is_first else 200, {"body": body})

    with ScriptedServer(refuse_once) as server:
        done = run("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert [result["response"]["status_code"] for result in read_results(target)] == [200, 200, 200]


def test_ctrl_c_keeps_the_results_and_says_how_to_continue(tmp_path: Path) -> None:
    source, target = write_requests(tmp_path, 3), tmp_path / "out"

    def stall_at_last(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if "sea 2" in json.dumps(body):
            server.released.wait()
        send_json(handler, 200, {"body": body})

    with ScriptedServer(stall_at_last) as server:
        process = start("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
        wait_until(lambda: num_lines(target) == 2, "two results")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "2 of 3 requests have results; run this again to continue\n"


def test_a_refused_key_ends_the_batch(tmp_path: Path) -> None:
    source, target = write_requests(tmp_path, 3), tmp_path / "out"
    with ScriptedServer(lambda handler, body: send_json(handler, 401, {})) as server:
        done = run("run-batch", "-i", str(source), "-o", str(target), "--url", server.url)
    assert done.returncode == 1
    assert "refuses the API key; set FD_API_KEY; 0 of 3 requests have results" in done.stderr
    assert target.read_bytes() == b""


def write_requests(directory: Path, count: int) -> Path:
    file = directory / "in"
    with file.open("w") as lines:
        for number in range(count):
            text = f"the sea {number}"
            chat = {"messages": [{"role": "user", "content": text}]}
            url, body = (
                ("/v1/chat/completions", chat) if number % 2 else ("/v1/completions", {"prompt": text})
            )
            parameters = {"max_tokens": 2, "ignore_eos": True}
            request = {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": url,
                "body": {**body, **parameters},
            }
            lines.write(json.dumps(request) + "\n")
    return file


def kill_after(process: subprocess.Popen[str], file: Path, results: int) -> None:
    wait_until(lambda: num_lines(file) >= results or process.poll() is not None, "results")
    assert process.poll() is None
    process.kill()
    process.communicate()


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def usage(result: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = result["response"]["body"]["usage"]
    return found


def text(choice: dict[str, Any]) -> str:
    found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return found
