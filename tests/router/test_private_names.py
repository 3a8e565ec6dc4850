"""Internals of other packages that this project uses: a new version that lacks one fails here."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.values import MutexValue

from ..stored_attributes import stored

#: Module:class -> attributes and methods, inherited ones included. setup.cfg bounds the versions.
ATTRIBUTES = {
    # server/arbiter.py, entrypoints/openai/serve.py
    "gunicorn.arbiter:Arbiter": (
        *("LISTENERS", "WORKERS", "app", "cfg", "log", "master_pid", "num_workers", "reexec_pid", "timeout"),
        *("kill_worker", "manage_workers", "reap_workers", "reload", "setup", "spawn_worker", "stop"),
        "wait_for_signals",
    ),
    "gunicorn.app.base:BaseApplication": ("cfg", "do_load_config", "load", "load_config", "run"),
    "gunicorn.glogging:Logger": ("error_log", "exception", "reopen_files", "setup"),
    "gunicorn.sock:UnixSocket": ("close", "sock"),
    # server/worker.py
    "gunicorn.workers.base:Worker": (
        *("SIGNALS", "age", "app", "init_signals", "log", "notify", "pid", "ppid", "run", "sockets", "tmp"),
        "wsgi",
    ),
    # common/worker_heartbeat.py
    "gunicorn.workers.workertmp:WorkerTmp": ("_tmp", "close", "last_update", "notify"),
    # entrypoints/http_worker.py
    "gunicorn.workers.gthread:ThreadWorker": (
        *("alive", "enqueue_req", "handle", "handle_error", "keepalived_conns", "murder_keepalived"),
        *("murder_pending", "nr_conns", "on_pending_socket_readable", "pending_conns", "poller"),
        *("set_accept_enabled", "wait_for_and_dispatch_events", "worker_connections"),
    ),
    "gunicorn.workers.gthread:TConn": ("data_ready", "initialized", "set_timeout", "sock", "timeout"),
}
#: Module -> names in it.
MODULE_NAMES = {
    "gunicorn.errors": ("HaltServer",),
    "gunicorn.util": ("close_graceful", "write_nonblock"),
    "gunicorn.workers.base": ("WorkerTmp",),
    "gunicorn.workers.gthread": ("STOP_KEEPALIVE_LINGER",),
    "prometheus_client.values": ("MutexValue", "ValueClass"),
}


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_the_attributes_of_gunicorns_classes_exist(place: str) -> None:
    module, name = place.split(":")
    kind = getattr(import_module(module), name)
    assert [each for each in ATTRIBUTES[place] if not hasattr(kind, each) and each not in stored(kind)] == []


@pytest.mark.parametrize("module", MODULE_NAMES)
def test_the_names_in_a_module_exist(module: str) -> None:
    assert [name for name in MODULE_NAMES[module] if not hasattr(import_module(module), name)] == []


def test_gunicorn_has_the_setting_that_disables_its_control_socket() -> None:
    assert "control_socket_disable" in import_module("gunicorn.config").Config().settings


def test_a_histogram_has_a_sum_and_buckets_to_add_to() -> None:
    histogram = Histogram("seconds", "Help.", buckets=(1.0, 2.0), registry=CollectorRegistry())
    histogram._sum.inc(3.5)
    for bucket, count in zip(histogram._buckets, (1, 2, 3), strict=True):
        bucket.inc(count)
    samples = {
        (s.name, s.labels.get("le")): s.value for family in histogram.collect() for s in family.samples
    }
    assert samples["seconds_sum", None] == 3.5
    assert samples["seconds_bucket", "2.0"] == 3.0
    assert samples["seconds_count", None] == 6.0


def test_prometheus_client_makes_values_with_the_class_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []

    class Value(MutexValue):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            made.append(arguments)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(prometheus_client.values, "ValueClass", Value)
    Counter("requests", "Help.", ("replica",), registry=CollectorRegistry()).labels("3").inc()
    assert made == [("counter", "requests", "requests_total", ("replica",), ("3",), "Help.")]


def test_paddle_runs_a_custom_operation_by_its_name() -> None:
    """Runs in its own process, because the router's tests do without Paddle."""
    code = (
        "from fastdeploy.common.paddle_import import import_paddle; import_paddle(); import paddle; "
        "assert callable(paddle._C_ops._run_custom_op); "
        "assert callable(paddle.base.core.load_op_meta_info_and_register_op)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
