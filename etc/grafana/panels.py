"""Panels of the dashboard by row; dashboard.py turns them into Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass

#: Selectors of the chosen replicas: for metrics of replicas and router, and for those of the daemon.
REPLICA = 'replica=~"$replica"'
PROGRAM = 'program=~"router|replica($replica)"'
#: The daemon's states and their colours, in the order of the state timeline.
STATES = {
    "STOPPED": "text",
    "WAITING": "light-blue",
    "STARTING": "blue",
    "READY": "green",
    "UNHEALTHY": "yellow",
    "STOPPING": "purple",
    "BACKOFF": "orange",
    "QUARANTINED": "red",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    #: Legend -> PromQL.
    queries: dict[str, str]
    #: Grafana unit: s, percentunit, bytes, reqps, ops, none.
    unit: str = "none"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    #: Description in the corner of the panel.
    help: str = ""


def rate(metric: str, selector: str = "") -> str:
    return f"rate({metric}{{{selector}}}[$__rate_interval])"


def total(expression: str, by: str = "") -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def percentiles(histogram: str, selector: str = "") -> dict[str, str]:
    buckets = total(rate(f"{histogram}_bucket", selector), "le")
    return {f"p{q * 100:g}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.95, 0.99)}


def mean(of: str, by: str, selector: str = "") -> str:
    """Return the mean over all observations of a histogram: rare events have no useful rate."""
    return f"{total(f'{of}_sum{{{selector}}}', by)} / {total(f'{of}_count{{{selector}}}', by)}"


FLEET = [
    Panel(
        title="Replicas ready",
        queries={
            "ready": 'sum(fd_dp_state{program=~"replica.*",state="READY"})',
            "of": 'count(fd_dp_state{program=~"replica.*",state="READY"})',
            "in quarantine": "fd_dp_quarantined",
        },
        kind="stat",
        width=6,
    ),
    Panel(
        title="States",
        queries={
            "{{program}}": total(
                " or ".join(
                    f'{code} * fd_dp_state{{{PROGRAM},state="{state}"}}' for code, state in enumerate(STATES)
                ),
                "program",
            )
        },
        kind="state-timeline",
        width=18,
        help="States by the daemon. READY: has generated a token and passes health checks.",
    ),
    Panel(
        title="Restarts by cause",
        queries={
            "{{cause}}": total(f"increase(fd_dp_restarts_total{{{PROGRAM}}}[$__rate_interval])", "cause")
        },
        stacked=True,
        help="Unplanned restarts. `fdctl why 3` explains the last one of replica 3.",
    ),
    Panel(
        title="Time to ready, mean",
        queries={"{{program}}": mean("fd_dp_ready_seconds", "program", PROGRAM)},
        unit="s",
        kind="bargauge",
        help="From a start to the first token, since the start of the daemon.",
    ),
    Panel(
        title="Next try",
        queries={"{{program}}": f"fd_dp_next_try_seconds{{{PROGRAM}}}"},
        unit="s",
        help="Time until a failed program is restarted; 0 if there is none.",
    ),
    Panel(
        title="Reloads",
        queries={"{{result}}": total("increase(fd_dp_reloads_total[$__range])", "result")},
        kind="stat",
    ),
    Panel(
        title="Time of a reload and of a drain, mean",
        queries={
            "reload": "fd_dp_reload_seconds_sum / fd_dp_reload_seconds_count",
            "drain of {{program}}": mean("fd_dp_drain_seconds", "program", PROGRAM),
        },
        unit="s",
        kind="bargauge",
    ),
    Panel(
        title="Age of the daemon's view",
        queries={"seconds": "time() - fd_dp_last_turn_timestamp_seconds"},
        unit="s",
        help="The daemon's loop runs at least once a second; a value of several seconds means that it hangs.",
    ),
]

LOAD = [
    Panel(
        title="Requests per second",
        queries={
            "{{endpoint}} {{status_code}}": total(
                rate("http_requests_total", 'endpoint=~"/v1/.*"'), "endpoint, status_code"
            )
        },
        unit="reqps",
        stacked=True,
        help="Responses of the router.",
    ),
    Panel(
        title="In flight, by replica",
        queries={"{{replica}}": f"fd_router_in_flight{{{REPLICA}}}"},
        stacked=True,
        help="The router's own counts, which it uses to choose a replica.",
    ),
    Panel(
        title="Tokens generated per second, by replica",
        queries={"{{replica}}": total(rate("fastdeploy:generation_tokens_total", REPLICA), "replica")},
        unit="ops",
        stacked=True,
    ),
    Panel(
        title="Prompt tokens per second, by replica",
        queries={"{{replica}}": total(rate("fastdeploy:prompt_tokens_total", REPLICA), "replica")},
        unit="ops",
        stacked=True,
    ),
    Panel(
        title="Sequences running and waiting",
        queries={
            "running": f"sum(fastdeploy:num_requests_running{{{REPLICA}}})",
            "waiting": f"sum(fastdeploy:num_requests_waiting{{{REPLICA}}})",
            "room": f"sum(fastdeploy:max_batch_size{{{REPLICA}}})",
        },
        help="In the replicas' batches, and waiting for a place there.",
    ),
    Panel(
        title="Waiting, by replica",
        queries={"{{replica}}": f"fastdeploy:num_requests_waiting{{{REPLICA}}}"},
        stacked=True,
    ),
]

LATENCY = [
    Panel(
        title="Time to first token",
        queries=percentiles("fastdeploy:time_to_first_token_seconds", REPLICA),
        unit="s",
        help="In the replicas, from a request's arrival there; without the time in the router's wait queue.",
    ),
    Panel(
        title="Time from token to token",
        queries=percentiles("fastdeploy:time_per_output_token_seconds", REPLICA),
        unit="s",
        help="Each token after the first of each choice.",
    ),
    Panel(
        title="Whole requests",
        queries=percentiles("fastdeploy:e2e_request_latency_seconds", REPLICA),
        unit="s",
    ),
    Panel(
        title="Time to first token, p95, by replica",
        queries={
            "{{replica}}": "histogram_quantile(0.95, "
            + total(rate("fastdeploy:time_to_first_token_seconds_bucket", REPLICA), "le, replica")
            + ")"
        },
        unit="s",
    ),
    Panel(
        title="Time in the router's wait queue",
        queries=percentiles("fd_router_queue_seconds"),
        unit="s",
        help="For requests that had to wait because every replica was full.",
    ),
    Panel(
        title="The router's own time",
        queries=percentiles("fd_router_relay_seconds"),
        unit="s",
        help="From receiving a request to sending it to a replica, including the wait queue.",
    ),
]

ROUTER = [
    Panel(
        title="Errors",
        queries={
            "{{status_code}}": total(rate("http_requests_total", 'status_code=~"[45].."'), "status_code")
        },
        unit="reqps",
        stacked=True,
    ),
    Panel(
        title="Retries, resumed streams, incomplete responses",
        queries={
            "retried on another replica": total(
                f"increase(fd_router_retries_total{{{REPLICA}}}[$__rate_interval])"
            ),
            "resumed on another replica": total(
                f"increase(fd_router_resumes_total{{{REPLICA}}}[$__rate_interval])"
            ),
            "not completed": total(f"increase(fd_router_broken_off_total{{{REPLICA}}}[$__rate_interval])"),
        },
        help="By lost replica. Clients notice only responses that are not completed.",
    ),
    Panel(
        title="Replicas that may be chosen",
        queries={
            "up": f"sum(fd_router_replica_up{{{REPLICA}}})",
            "draining": f"sum(fd_router_replica_draining{{{REPLICA}}})",
        },
    ),
]

CACHE = [
    Panel(
        title="KV cache in use",
        queries={"{{replica}}": f"fastdeploy:gpu_cache_usage_perc{{{REPLICA}}}"},
        unit="percentunit",
    ),
    Panel(
        title="Prompt tokens found in the prefix cache",
        queries={
            "{{replica}}": total(rate("fastdeploy:prefix_cache_token_num_total", REPLICA), "replica")
            + " / "
            + total(rate("fastdeploy:prefix_cache_query_token_num_total", REPLICA), "replica")
        },
        unit="percentunit",
    ),
    Panel(
        title="Preemptions per second",
        queries={"{{replica}}": total(rate("fastdeploy:request_preempted_total", REPLICA), "replica")},
        unit="ops",
        stacked=True,
        help="Sequences evicted because the KV cache was full, and computed again later.",
    ),
]

EXPERTS = [
    Panel(
        title="Time of a step, mean",
        queries={
            "{{replica}}": total(rate("fastdeploy:ep_step_seconds_total", REPLICA), "replica")
            + " / "
            + total(rate("fastdeploy:ep_steps_total", REPLICA), "replica")
        },
        unit="s",
    ),
    Panel(
        title="Waiting for a rank, fraction of the time",
        queries={"rank {{seat}}": total(rate("fastdeploy:ep_waited_seconds_total", REPLICA), "seat")},
        unit="percentunit",
        stacked=True,
        help="Sum over the waiting ranks, by the rank that they wait for: the largest is the slow one.",
    ),
    Panel(
        title="Bytes between ranks per second",
        queries={
            "tokens sent": total(rate("fastdeploy:ep_dispatched_bytes_total", REPLICA)),
            "results taken": total(rate("fastdeploy:ep_combined_bytes_total", REPLICA)),
        },
        unit="Bps",
    ),
    Panel(
        title="Tokens by expert, per second",
        queries={
            "{{expert}}": f"sort_desc({total(rate('fastdeploy:ep_expert_tokens_total', REPLICA), 'expert')})"
        },
        unit="ops",
        kind="bargauge",
        help="Distribution of the load; the most used experts come first.",
    ),
    Panel(
        title="Ranks in the group",
        queries={"{{replica}} sees": f"fastdeploy:ep_active_seats{{{REPLICA}}}"},
    ),
    Panel(
        title="Lost ranks and repeated steps",
        queries={
            "ranks lost": f"max(increase(fastdeploy:ep_losses_total{{{REPLICA}}}[$__rate_interval]))",
            "repeated steps": total(
                f"increase(fastdeploy:ep_restarted_steps_total{{{REPLICA}}}[$__rate_interval])"
            ),
        },
    ),
]

MACHINE = [
    Panel(
        title="Private memory, by program",
        queries={
            "{{program}}": f'fd_dp_memory_bytes{{{PROGRAM},kind="private"}}',
            "fd-dp": 'process_resident_memory_bytes{job="fd-dp-daemon"}',
        },
        unit="bytes",
        stacked=True,
    ),
    Panel(
        title="Shared memory and files, by program",
        queries={"{{program}}": f'fd_dp_memory_bytes{{{PROGRAM},kind="shared"}}'},
        unit="bytes",
        help="The weights are in memory once, but count for each replica that uses them.",
    ),
    Panel(
        title="Cores in use, by program",
        queries={
            "{{program}}": rate("fd_dp_cpu_seconds_total", PROGRAM),
            "fd-dp": rate("process_cpu_seconds_total", 'job="fd-dp-daemon"'),
        },
        stacked=True,
    ),
]

GPUS = [
    Panel(
        title="GPU use",
        # Replicas on one GPU report the same figures.
        queries={"{{gpu}}": f"max by (gpu) (fastdeploy:gpu_utilization_perc{{{REPLICA}}})"},
        unit="percentunit",
        width=12,
        help="Fraction of the time in which the GPU computed, for any process.",
    ),
    Panel(
        title="GPU memory",
        queries={
            "{{gpu}} used": f"max by (gpu) (fastdeploy:gpu_memory_used_bytes{{{REPLICA}}})",
            "{{gpu}} in all": f"max by (gpu) (fastdeploy:gpu_memory_total_bytes{{{REPLICA}}})",
        },
        unit="bytes",
        width=12,
        help="Used by all processes. A replica takes its share of the memory when it starts.",
    ),
]

ROWS = {
    "Fleet": FLEET,
    "Load": LOAD,
    "Latency": LATENCY,
    "Router": ROUTER,
    "KV cache": CACHE,
    "Expert parallelism": EXPERTS,
    "Machine": MACHINE,
    "GPUs": GPUS,
}
