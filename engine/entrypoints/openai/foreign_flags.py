"""FastDeploy's flags that this server does not act on: accepted without effect, or refused with the reason.

Flags with an effect are in options.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RefusedFlag:
    """A flag that would change responses or needs a feature that is not implemented."""

    #: Why the server refuses it, as a main clause.
    why: str
    #: Values with the same effect as leaving it out.
    harmless: tuple[str, ...] = ()

    def check(self, flag: str, value: str) -> None:
        """Raise ConfigError unless the value is harmless."""
        if value not in self.harmless:
            instead = f" or give {self.harmless[0]}" if self.harmless else ""
            raise ConfigError(f"--{flag} is not supported: {self.why}; leave it out{instead}")


#: Flags that tune an implementation which this server does not have; responses are the same.
# fmt: off
WITHOUT_EFFECT = frozenset({
    # Processes and ports.
    "controller-port", "workers", "timeout", "ips", "skip-port-check", "use-warmup", "enable-logprob",
    # Where a model comes from; --model is a directory here, and its code is never executed.
    "revision", "trust-remote-code", "load-strategy",
    # Memory and the KV cache.
    "kv-cache-ratio", "swap-space", "prealloc-dec-block-slot-num-threshold", "static-decode-blocks",
    "cache-queue-port", "write-policy", "enable-output-caching", "no-enable-output-caching",
    "max-encoder-cache", "max-processor-cache",
    # Transfer between prefill and decode instances.
    "pd-comm-port", "rdma-comm-ports", "cache-transfer-protocol",
    # Steps.
    "enable-chunked-prefill", "max-num-partial-prefills", "max-long-partial-prefills",
    "long-prefill-token-threshold", "disable-chunked-mm-input", "enable-overlap-schedule",
    "graph-optimization-config", "use-cudagraph",
    # Scheduling by way of Redis.
    "scheduler-host", "scheduler-port", "scheduler-db", "scheduler-password", "scheduler-topic",
    "scheduler-ttl", "scheduler-max-size", "scheduler-min-load-score", "scheduler-load-shards-num",
    "scheduler-sync-period", "scheduler-expire-period", "scheduler-release-load-expire-period",
    "scheduler-reader-parallel", "scheduler-writer-parallel", "scheduler-reader-batch-size",
    "scheduler-writer-batch-size",
    # Exchange between GPUs.
    "disable-custom-all-reduce", "enable-flashinfer-allreduce-fusion", "use-internode-ll-two-stage",
    "disable-sequence-parallel-moe", "enable-chunked-moe", "chunked-moe-size", "eplb-config",
    "shutdown-comm-group-if-worker-idle", "no-shutdown-comm-group-if-worker-idle",
})
# fmt: on

_TEXT_ONLY = "this server reads and writes text only"
_GENERATES = "models here generate text"
_KEEPS_WEIGHTS = "a replica keeps its weights until it stops"
_NO_PLUGINS = "this server has no custom sampling code"
_NO_REPETITIONS = "this server does not look for repetitions"
_NO_STAGES = "this server both prefills and decodes"
_NO_RETURN = "this server does not return such data"
_OWN_TOKENIZER = "the tokenizer is that of the checkpoint"

REFUSED: Mapping[str, RefusedFlag] = {
    # The model.
    "tokenizer": RefusedFlag(_OWN_TOKENIZER),
    "tokenizer-base-url": RefusedFlag(_OWN_TOKENIZER),
    "model-config-name": RefusedFlag("the configuration is config.json", ("config.json",)),
    "model-impl": RefusedFlag("this server has its own implementation", ("auto", "fastdeploy")),
    "load-choices": RefusedFlag("weights come from the checkpoint", ("default", "default_v1")),
    "lm-head-fp32": RefusedFlag("all weights have the type of --dtype"),
    "dynamic-load-weight": RefusedFlag(_KEEPS_WEIGHTS),
    "rsync-config": RefusedFlag(_KEEPS_WEIGHTS),
    "task": RefusedFlag(_GENERATES, ("generate", "auto")),
    "runner": RefusedFlag(_GENERATES, ("auto", "generate")),
    "convert": RefusedFlag(_GENERATES, ("auto", "none")),
    "override-pooler-config": RefusedFlag(_GENERATES),
    "speculative-config": RefusedFlag("this server does not draft tokens", ("{}",)),
    "plas-attention-config": RefusedFlag("attention is exact here", ("{}",)),
    # Input that is not text.
    "enable-mm": RefusedFlag(_TEXT_ONLY),
    "enable-mm-output": RefusedFlag(_TEXT_ONLY),
    "limit-mm-per-prompt": RefusedFlag(_TEXT_ONLY, ("{}",)),
    "mm-processor-kwargs": RefusedFlag(_TEXT_ONLY, ("{}",)),
    # Sampling.
    "logits-processors": RefusedFlag(_NO_PLUGINS),
    "enable-early-stop": RefusedFlag(_NO_REPETITIONS),
    "early-stop-config": RefusedFlag(_NO_REPETITIONS, ("{}",)),
    "guided-decoding-disable-any-whitespace": RefusedFlag(
        "the grammar of a request decides about whitespace", ("False", "false", "0")
    ),
    # Further data in responses.
    "logprobs-mode": RefusedFlag(
        "log probabilities are those of the model, before temperature", ("raw_logprobs",)
    ),
    "enable-entropy": RefusedFlag(_NO_RETURN),
    "enable-keep-sampling-mask": RefusedFlag(_NO_RETURN),
    "routing-replay-config": RefusedFlag(_NO_RETURN, ("{}",)),
    # Placement of requests.
    "scheduler-name": RefusedFlag("the router distributes the requests", ("local", "dp")),
    "max-waiting-time": RefusedFlag("the router limits the time in the queue", ("-1",)),
    "splitwise-role": RefusedFlag(_NO_STAGES, ("mixed",)),
    "innode-prefill-ports": RefusedFlag(_NO_STAGES),
    "kvcache-storage-backend": RefusedFlag("the KV cache stays in the memory of its replica", ("",)),
    "config": RefusedFlag("dp.toml is the configuration file, and fd-dp starts the replicas from it"),
}
