"""A real Prometheus with the shipped files beside a real fd-dp: every panel of the dashboard has data."""

from __future__ import annotations

import concurrent.futures
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from ..ports import free_ports
from ..system_packages import needs
from .conftest import ROOT, System, wait_until

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    needs("prometheus"),
]

DASHBOARD = json.loads((ROOT / "etc/grafana/fd-dp.json").read_text())
RULES = ROOT / "etc/prometheus-rules.yml"
REPLICAS = 2
#: Grafana's variables for two replicas. The intervals are long, as a busy machine misses many a scrape.
VARIABLES = {"$replica": "(0|1)", "$__rate_interval": "60s", "$__range": "60s"}


class Prometheus:
    """Scrapes one system every second; apart from that and the ports, with the shipped etc/prometheus.yml."""

    def __init__(self, directory: Path, system: System) -> None:
        self.began = time.time()
        (directory / "prometheus.yml").write_text(configuration(system))
        shutil.copy(RULES, directory)
        port = free_ports(1)[0]
        self._url = f"http://127.0.0.1:{port}"
        with (directory / "prometheus.out").open("w") as output:
            self._process = subprocess.Popen(
                [
                    *(str(PROMETHEUS), f"--config.file={directory / 'prometheus.yml'}"),
                    *(f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
                ],
                stdout=output,
                stderr=output,
            )

    def ask(self, path: str, **parameters: str | float) -> Any:
        answer = requests.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def series(self, query: str) -> list[dict[str, Any]]:
        """Return the series since the beginning that have had a finite value at some time."""
        # End one step after now; otherwise the newest samples may be missing.
        end = time.time() + 1
        found = self.ask("query_range", query=query, start=self.began, end=end, step=1)["result"]
        return [one for one in found if any(math.isfinite(float(value)) for _, value in one["values"])]

    def now(self, query: str) -> dict[str, float]:
        """Return the current value by instance."""
        found = self.ask("query", query=query)["result"]
        return {one["metric"]["instance"]: float(one["value"][1]) for one in found}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def configuration(system: System) -> str:
    """Return etc/prometheus.yml with this system's ports, and without replicas that it lacks."""
    text = (ROOT / "etc/prometheus.yml").read_text()
    ports = {30001: system.metrics_port, 30000: system.router_port}
    ports |= {3101 + 100 * index: port for index, port in enumerate(system.metrics_ports)}
    for index in range(len(system.metrics_ports), 8):
        target = (
            f'      - targets: ["127.0.0.1:{3101 + 100 * index}"]\n        labels: {{replica: "{index}"}}\n'
        )
        assert target in text
        text = text.replace(target, "")
    for default, port in ports.items():
        assert text.count(f'"127.0.0.1:{default}"') == 1
        text = text.replace(f'"127.0.0.1:{default}"', f'"127.0.0.1:{port}"')
    return text.replace("_interval: 15s", "_interval: 1s")


@pytest.fixture(scope="module")
def prometheus(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen a start, traffic, a kill, and a reload of all replicas."""
    system = System(
        tmp_path_factory.mktemp("fd"),
        REPLICAS,
        parallel="expert_parallel = true",
        engine='extra_args = ["--max-concurrency", "4"]',
    )
    watching = Prometheus(tmp_path_factory.mktemp("prometheus"), system)
    try:
        system.wait_ready()
        # Prometheus takes seconds to start, and a counter whose rise from 0 it missed has no rate.
        wait_until(lambda: [*watching.now("up").values()] == [1.0] * (2 + REPLICAS), "everybody is scraped")
        live(system)
        ended = time.time()
        wait_until(lambda: min(watching.now("timestamp(up)").values()) > ended, "all of it is scraped")
        yield watching
    finally:
        watching.stop()
        system.stop()


def live(system: System) -> None:
    """Cause traffic, a refused request, a kill under load, and a reload."""
    assert set(complete(system, tokens=24)) == {200}
    assert requests.post(f"{system.url}/v1/completions", json={"prompt": 1}, timeout=60).status_code == 400

    worker = system.worker_process(1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = pool.submit(complete, system, tokens=200)
        wait_until(lambda: in_flight(system, 1) > 0, "replica 1 has requests")
        worker.kill()
        assert set(answers.result()) == {200}
    wait_until(
        lambda: (status := system.status()) and status["replicas"][1]["restarts"], "replica 1 is restarted"
    )
    system.wait_ready()

    text = system.config.read_text()
    system.config.write_text(text.replace("max_num_seqs = 16", "max_num_seqs = 15"))
    reloaded = system.fdctl("reload", "--wait")
    assert reloaded.returncode == 0, reloaded.stderr
    system.wait_ready()


def complete(system: System, *, tokens: int) -> list[int]:
    """Send more requests than the replicas take at a time; return the statuses."""

    def one(number: int) -> int:
        body = {"prompt": "the sea " * 80, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        answer = requests.post(f"{system.url}/v1/completions", json=body, timeout=120)
        assert answer.text.endswith("data: [DONE]\n\n")
        return answer.status_code

    with concurrent.futures.ThreadPoolExecutor(6 * REPLICAS) as pool:
        return list(pool.map(one, range(6 * REPLICAS)))


def in_flight(system: System, replica: int) -> float:
    lines = requests.get(f"{system.url}/metrics", timeout=10).text.splitlines()
    of_it = (line for line in lines if line.startswith(f'fd_router_in_flight{{replica="{replica}"'))
    return sum(float(line.rpartition(" ")[2]) for line in of_it)


def queries() -> Iterator[tuple[str, str, str]]:
    """Yield panel, legend and PromQL of each query of the dashboard."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            assert "$" not in expression, f"{panel['title']}: {expression} has a variable that is not known"
            yield panel["title"], target["legendFormat"], expression


def test_dashboard_queries_all_have_series_with_their_legend_labels(
    prometheus: Prometheus,
) -> None:
    empty = []
    for panel, legend, expression in queries():
        # These replicas compute on CPUs.
        if panel.startswith("GPU "):
            continue
        series = prometheus.series(expression)
        labels = re.findall(r"\{\{(\w+)\}\}", legend)
        if not [one for one in series if all(one["metric"].get(label) for label in labels)]:
            empty.append((panel, legend, expression))
    assert empty == []


def test_every_target_is_up_and_replicas_have_their_numbers(prometheus: Prometheus) -> None:
    assert list(prometheus.now("up").values()) == [1.0] * (2 + REPLICAS)
    [variable] = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
    assert found
    assert prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]}) == ["0", "1"]


def test_rules_are_loaded_and_find_their_metrics(prometheus: Prometheus) -> None:
    [group] = prometheus.ask("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    for rule in group["rules"]:
        for name in set(re.findall(r"\b(?:fd_dp_|fastdeploy:)\w+", rule["query"])):
            assert prometheus.series(name), f"{rule['name']}: nothing is called {name}"


def test_the_kill_and_the_reload_are_counted_once(prometheus: Prometheus) -> None:
    def value(query: str) -> float:
        [one] = prometheus.ask("query", query=query)["result"]
        return float(one["value"][1])

    assert value("sum(fd_dp_restarts_total)") == 1
    assert value('fd_dp_restarts_total{program="replica1",cause="killed"}') == 1
    assert value('fd_dp_reloads_total{result="done"}') == 1
    assert value("sum(fd_router_broken_off_total)") == 0
    increase = "sum(increase(fd_dp_restarts_total[60s]))"
    assert max(float(at[1]) for at in prometheus.series(increase)[0]["values"]) > 0, "the first one, too"
