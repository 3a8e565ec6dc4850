"""Registration, health and figures of a running fd-router, in FastDeploy's wire format."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from .conftest import RouterProcess
from .fake_engine import Behaviour, FakeEngine, Received, answers, answers_status, closes, wait_until
from .raw_client import RawClient


def register(router: RouterProcess, **fields: object) -> requests.Response:
    return requests.post(f"{router.url}/register", json=fields, timeout=10)


def test_an_empty_router_is_alive_but_cannot_generate(router: RouterProcess) -> None:
    assert router.get("/health").status_code == 200
    assert router.get("/registered").json() == {
        "code": 200,
        "msg": "success",
        "mixed": [],
        "prefill": [],
        "decode": [],
        "down": [],
    }
    assert router.get("/registered_number").json() == {"mixed": 0, "prefill": 0, "decode": 0}
    models = router.get("/v1/models")
    assert models.status_code == 503
    assert models.json()["error"]["code"] == "no_replica"


def test_a_healthy_instance_is_admitted(router: RouterProcess, new_engine: Callable[..., FakeEngine]) -> None:
    engine = new_engine(replica=3)
    answer = engine.register_with(router.url, metrics_port=3101, engine_worker_queue_port="25611")
    assert (answer.status_code, answer.json()) == (200, {"code": 200, "msg": "Register success"})
    assert engine.health_checks >= 1
    [entry] = router.get("/registered").json()["mixed"]
    assert entry["url"] == engine.url
    assert entry["worker_type"] == "mixed"
    assert (entry["metrics_port"], entry["engine_worker_queue_port"]) == ("3101", "25611")
    assert entry["replica"] == 3
    assert router.get("/registered_number").json()["mixed"] == 1


@pytest.mark.parametrize(
    "health", [answers_status("503 Service Unavailable"), answers_status("404 Not Found"), closes]
)
def test_an_instance_that_is_not_healthy_is_refused(
    router: RouterProcess, new_engine: Callable[..., FakeEngine], health: Behaviour
) -> None:
    engine = new_engine()
    engine.health = health
    answer = engine.register_with(router.url)
    assert answer.status_code == 503
    assert answer.json() == {"code": 503, "msg": f"{engine.url} service is not healthy"}
    assert router.urls() == set()


def test_errors_have_fastdeploys_texts(router: RouterProcess) -> None:
    answer = requests.post(f"{router.url}/register", data=b"{", timeout=10)
    assert answer.status_code == 400
    assert answer.json()["msg"].startswith("Invalid InstanceInfo JSON format: ")
    answer = register(router, role="mixed", host_ip="localhost", port=1)
    assert answer.json() == {"code": 400, "msg": "invalid InstanceInfo format: invalid host_ip: localhost"}
    answer = register(router, role="prefill", host_ip="127.0.0.1", port=1)
    assert answer.json() == {"code": 400, "msg": "only MIXED instances are allowed"}
    assert requests.post(f"{router.url}/register", data=b" " * 100_000, timeout=10).status_code == 413


def test_addresses_elsewhere_are_refused_unless_allowed(
    router: RouterProcess, start_router: Callable[..., RouterProcess]
) -> None:
    answer = register(router, role="mixed", host_ip="169.254.169.254", port=80)
    assert answer.status_code == 403
    assert "--allow-host 169.254.169.254" in answer.json()["msg"]
    # 192.0.2.0/24 is reserved for documentation: the check is sent, and gets no answer.
    open_router = start_router("--allow-host", "192.0.2.0/24")
    answer = register(open_router, role="mixed", host_ip="192.0.2.1", port=80)
    assert answer.status_code == 503


def test_a_heartbeat_of_a_replica_that_is_up_does_not_wait_for_its_health(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    gate = threading.Event()

    def hangs(received: Received) -> bool:
        gate.wait(30)
        return answers(received)

    engine.health = hangs
    # The timeout is longer than a health check may take, if one were made.
    assert requests.post(f"{router.url}/register", json=engine.instance_info(), timeout=3).status_code == 200
    gate.set()


def test_d6_one_failed_check_does_not_remove_a_replica_but_two_do(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine]
) -> None:
    """Upstream removed an instance at its first failed probe until its next heartbeat."""
    router = start_router("--health-check-interval-secs", "0.2")
    engine = new_engine()
    router.add(engine)
    failures: list[int] = []

    def fails_once(received: Received) -> bool:
        if not failures:
            failures.append(1)
            return answers_status("503 Service Unavailable")(received)
        return answers(received)

    engine.health = fails_once
    checks = engine.health_checks
    wait_until(lambda: failures and engine.health_checks > checks + 1, "one failed and one good check")
    assert router.urls() == {engine.url}
    engine.health = answers_status("503 Service Unavailable")
    wait_until(lambda: router.urls("down") == {engine.url}, "two failed checks take it out")
    engine.health = answers
    wait_until(lambda: router.urls() == {engine.url}, "a good check brings it back without a heartbeat")


def test_a_heartbeat_brings_a_replica_back(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine()
    router.add(engine)
    engine.stop()
    wait_until(lambda: router.complete().status_code == 503, "the replica is down")
    engine.restart()

    def beats() -> bool:
        assert engine.register_with(router.url).status_code == 200
        return router.urls() == {engine.url}

    wait_until(beats, "the replica is back")
    assert router.complete().status_code == 200


def test_d8_health_generate_is_200_only_if_a_replica_is_up(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    """Upstream ignored mixed instances and always said OK."""
    assert router.get("/health_generate").status_code == 503
    engine = new_engine()
    router.add(engine)
    answer = router.get("/health_generate")
    assert (answer.status_code, answer.json()) == (200, {"code": 200, "msg": "Health check complete"})
    engine.stop()
    router.complete()
    assert router.get("/health_generate").status_code == 503


def test_the_registry_survives_a_restart(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    file = tmp_path / "state" / "registry.json"
    first = start_router("--registry-file", str(file))
    engine, gone = new_engine(replica=0), new_engine(replica=1)
    first.add(engine, gone)
    first.stop()
    assert [entry["replica"] for entry in json.loads(file.read_text())["instances"]] == [0, 1]
    gone.stop()
    second = start_router("--registry-file", str(file))
    wait_until(lambda: second.urls() == {engine.url}, "the replica is back without a heartbeat")
    assert second.complete().headers["X-FD-Replica"] == "0"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"instances": [{"role": "mixed"}]}', '{"instances": 5}'])
def test_a_broken_registry_file_is_named_and_ignored(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    text: str,
) -> None:
    file = tmp_path / "registry.json"
    file.write_text(text)
    router = start_router("--registry-file", str(file))
    assert f"registry file {file} ignored" in router.log.read_text()
    router.add(new_engine(replica=5))
    assert json.loads(file.read_text())["instances"][0]["replica"] == 5


def test_metrics_have_fastdeploys_names_and_the_boards_counts(
    router: RouterProcess, new_engine: Callable[..., FakeEngine]
) -> None:
    engine = new_engine(replica=2)
    router.add(engine)
    router.complete()
    requests.get(f"{router.url}/some/path/nobody/knows", timeout=10)
    wait_until(lambda: router.metric("inference_requests_total"), "the request is counted")
    url = engine.url
    labels = f'decode_worker="",mixed_worker="{url}",prefill_worker="",status_code="200"'
    assert router.metric("inference_requests_total") == [f"inference_requests_total{{{labels}}} 1.0"]
    counted = router.metric("http_requests_total")
    assert 'http_requests_total{endpoint="/v1/completions",method="POST",status_code="200"} 1.0' in counted
    assert 'http_requests_total{endpoint="other",method="GET",status_code="404"} 1.0' in counted
    assert router.metric("http_request_duration_seconds_count")
    assert router.metric("fd_router_in_flight") == [f'fd_router_in_flight{{replica="2",url="{url}"}} 0.0']
    assert router.metric("fd_router_replica_up") == [f'fd_router_replica_up{{replica="2",url="{url}"}} 1.0']
    assert router.metric("fd_router_picks_total") == [f'fd_router_picks_total{{replica="2",url="{url}"}} 1.0']
    for never in ("retries", "resumes", "broken_off"):
        name = f"fd_router_{never}_total"
        assert router.metric(name) == [f'{name}{{replica="2"}} 0.0'], "its first time must be an increase"


def test_unknown_paths_and_methods_get_an_openai_error(router: RouterProcess) -> None:
    answer = router.get("/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = requests.delete(f"{router.url}/register", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.headers["Allow"]


@pytest.mark.parametrize("path", ["/nothing//here", "//nothing", "/no%20thing%0A", "/a/./b"])
def test_unknown_path_is_quoted_as_it_was_sent(shared_router: RouterProcess, path: str) -> None:
    with RawClient(shared_router.port) as client:
        client.send(f"GET {path}?x=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = client.answer()
    assert answer.status == 404
    assert json.loads(answer.body)["error"]["message"] == f"GET {path}: not found"
