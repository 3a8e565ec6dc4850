"""etc/prometheus.yml, its alerts and the dashboard, without running programs. tests/e2e has the rest."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdeploy.daemon.config.loader import load

from ..system_packages import needs

ETC = Path(__file__).parents[2] / "etc"
PROMTOOL = shutil.which("promtool")
needs_promtool = needs("promtool")


def promtool(*words: str | Path) -> None:
    done = subprocess.run([str(PROMTOOL), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_the_generated_one() -> None:
    made = subprocess.run(
        [sys.executable, "-B", str(ETC / "grafana/dashboard.py")], capture_output=True, text=True, check=True
    )
    assert (ETC / "grafana/fd-dp.json").read_text() == made.stdout, "run `make docs`"


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((ETC / "grafana/fd-dp.json").read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_scrapes_the_ports_of_the_shipped_dp_toml(tmp_path: Path) -> None:
    config = load(ETC / "dp.toml", tmp_path)
    text = (ETC / "prometheus.yml").read_text()
    targets = re.findall(r'targets: \["127\.0\.0\.1:(\d+)"\](?:\n\s+labels: \{replica: "(\d+)"\})?', text)
    ports = {int(port): replica for port, replica in targets}
    assert ports == {
        config.metrics.port: "",
        config.router.port: "",
        **{port: str(index) for index, port in enumerate(config.engine.metrics_ports)},
    }


@needs_promtool
def test_prometheus_takes_both_files() -> None:
    promtool("check", "config", ETC / "prometheus.yml")


@dataclass(frozen=True)
class Case:
    alert: str
    #: Series -> promtool's notation of its values, one a minute.
    series: Mapping[str, str]
    minutes: int
    labels: Mapping[str, str]
    summary: str


CASES = [
    Case(
        "FdDpDaemonDown",
        {'up{job="fd-dp-daemon"}': "1 1 0x10"},
        4,
        {"job": "fd-dp-daemon", "severity": "critical"},
        "fd-dp does not answer, or its loop hangs",
    ),
    Case(
        "FdDpDaemonDown",
        {'fd_dp_last_turn_timestamp_seconds{job="fd-dp-daemon"}': "0x20"},
        4,
        {"job": "fd-dp-daemon", "severity": "critical"},
        "fd-dp does not answer, or its loop hangs",
    ),
    Case(
        "FdDpNoReplicaReady",
        {
            'fd_dp_state{program="replica0",state="READY"}': "0x9",
            'fd_dp_state{program="router",state="READY"}': "1x9",
        },
        2,
        {"severity": "critical"},
        "no replica is READY, so every request fails",
    ),
    Case(
        "FdDpReplicaDown",
        {
            'fd_dp_state{program="replica3",state="READY"}': "0x30",
            'fd_dp_state{program="replica3",state="STOPPED"}': "0x30",
            # The operator has stopped it.
            'fd_dp_state{program="replica4",state="READY"}': "0x30",
            'fd_dp_state{program="replica4",state="STOPPED"}': "1x30",
            # It has recovered in time.
            'fd_dp_state{program="replica5",state="READY"}': "0x10 1x20",
            'fd_dp_state{program="replica5",state="STOPPED"}': "0x30",
        },
        20,
        {"program": "replica3", "severity": "warning"},
        "replica3 has not been READY for 15 minutes; fdctl why replica3",
    ),
    Case(
        "FdDpQuarantined",
        {
            'fd_dp_state{program="replica3",state="QUARANTINED"}': "1",
            'fd_dp_state{program="router",state="QUARANTINED"}': "0",
        },
        0,
        {"program": "replica3", "state": "QUARANTINED", "severity": "warning"},
        "replica3 has failed too often and is in quarantine; fdctl why replica3",
    ),
    Case(
        "FdDpQueueGrows",
        {
            'fastdeploy:num_requests_waiting{replica="0"}': "40x9",
            'fastdeploy:num_requests_waiting{replica="1"}': "25x9",
            'fastdeploy:max_batch_size{replica="0"}': "32x9",
            'fastdeploy:max_batch_size{replica="1"}': "32x9",
        },
        6,
        {"severity": "warning"},
        "65 sequences wait for a place in the replicas' batches",
    ),
    Case(
        "FdDpFirstTokenSlow",
        {
            'fastdeploy:time_to_first_token_seconds_bucket{replica="0",le="10"}': "0+90x20",
            'fastdeploy:time_to_first_token_seconds_bucket{replica="0",le="20"}': "0+99x20",
            'fastdeploy:time_to_first_token_seconds_bucket{replica="0",le="+Inf"}': "0+100x20",
        },
        12,
        {"severity": "warning"},
        "1 % of requests wait 20s or longer for their first token",
    ),
]


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=[case.alert for case in CASES])
def test_each_alert_fires_for_its_condition_only(case: Case, tmp_path: Path) -> None:
    raised = {"exp_labels": case.labels, "exp_annotations": {"summary": case.summary}}
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"alertname": case.alert, "eval_time": f"{case.minutes}m", "exp_alerts": [raised]},
            # No condition has lasted long enough at minute 0; the quarantine alert needs no duration.
            {"alertname": case.alert, "eval_time": "0m", "exp_alerts": [] if case.minutes else [raised]},
        ],
    }
    file = tmp_path / "test.yml"
    # JSON is YAML, too.
    file.write_text(json.dumps({"rule_files": [str(ETC / "prometheus-rules.yml")], "tests": [test]}))
    promtool("test", "rules", file)
