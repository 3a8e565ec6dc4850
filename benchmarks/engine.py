"""The CPU engine against transformers and the hardware limits: `make bench-engine`.

A random ERNIE-4.5 MoE of 250M parameters (random_model.py) on all cores: prefill of 512 tokens, and decode of
1, 8 and 32 texts (prompt 32, 64 new tokens), with weights in bfloat16, wint8 and wint4. The peer is
transformers in float32 or bfloat16, whichever is faster. Contenders take turns within one run; the best of
several rounds counts. The limit of a step is the longer of two times, measured between the rounds: its memory
reads at full bandwidth, and its multiply-adds at peak fp32 rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fastdeploy.config import ModelConfig

from .contender import ContenderProcess
from .limits import Machine, decode_work, prefill_work
from .random_model import random_model
from .rows import CORES, ROOT, Row, report

FORMATS = {"bf16": "bfloat16", "wint8": "wint8", "wint4": "wint4"}
PEERS = {"transformers fp32": "float32", "transformers bf16": "bfloat16"}
PEER_PYTHON = ROOT / ".cache" / "parity-venv" / "bin" / "python"
PROMPT, NEW = 32, 64
#: Target share of the limit in bfloat16.
TARGETS = {"prefill_512": 0.65, "decode_b1": 0.75, "decode_b8": 0.6, "decode_b32": 0.5}
#: tokens/s of wint8 over those of bfloat16, at batch 1.
WINT8_TARGET = 1.7


@dataclass(frozen=True, slots=True)
class Case:
    what: str
    #: Work of the prompt, or of one step.
    tokens: int

    @property
    def name(self) -> str:
        return f"prefill_{self.tokens}" if self.what == "prefill" else f"decode_b{self.tokens}"

    def run(self, contender: ContenderProcess) -> float:
        if self.what == "prefill":
            return contender.run("prefill", tokens=self.tokens).tokens_per_second
        return contender.run("decode", batch=self.tokens, prompt=PROMPT, new=NEW).tokens_per_second


CASES = (Case("prefill", 512), Case("decode", 1), Case("decode", 8), Case("decode", 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test this script")
    arguments = parser.parse_args()
    if not PEER_PYTHON.exists():
        raise SystemExit(f"{PEER_PYTHON} is missing; `make bench-engine` installs transformers there")
    model = random_model(tiny=arguments.tiny)
    with ExitStack() as processes:
        ours = {
            name: processes.enter_context(_start_ours(name, weight_format, model))
            for name, weight_format in FORMATS.items()
        }
        peers = {
            name: processes.enter_context(_start_peer(name, dtype, model)) for name, dtype in PEERS.items()
        }
        best, machine = measure([*ours.values(), *peers.values()], arguments.rounds)
        experts = {
            case: peers["transformers fp32"].call(
                "distinct_experts", batch=case.tokens, prompt=PROMPT, new=NEW
            )
            for case in CASES
            if case.what == "decode"
        }
    rows = make_rows(best, machine, ModelConfig.from_directory(model), experts)
    print(
        f"{CORES} threads; memory read {machine.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"fp32 FMA {machine.fma_flops_per_second / 1e9:.0f} Gflop/s"
    )
    report(rows, "engine")
    print_targets(rows)


def measure(
    contenders: Sequence[ContenderProcess], rounds: int
) -> tuple[dict[tuple[Case, str], float], Machine]:
    """Best tokens/s by case and contender, and the best limits of the machine in the same period."""
    best: dict[tuple[Case, str], float] = {}
    machine = Machine.measure()
    for case in CASES:
        for _ in range(rounds):
            for contender in contenders:
                rate = case.run(contender)
                best[case, contender.name] = max(rate, best.get((case, contender.name), 0.0))
        machine = machine.better(Machine.measure())
        print(f"{case.name} measured", file=sys.stderr, flush=True)
    return best, machine


def make_rows(
    best: Mapping[tuple[Case, str], float],
    machine: Machine,
    config: ModelConfig,
    experts: Mapping[Case, float],
) -> list[Row]:
    rows = []
    for case in CASES:
        peer = max(PEERS, key=lambda name: best[case, name])
        for name, weight_format in FORMATS.items():
            if case.what == "prefill":
                work = prefill_work(config, weight_format, case.tokens)
            else:
                # The middle of the measured tokens.
                context = PROMPT + NEW / 2
                work = decode_work(config, weight_format, case.tokens, context, experts[case])
            limit = case.tokens / machine.seconds(work)
            row = Row(f"{case.name}_{name}", "tokens/s", best[case, name], best[case, peer], peer, limit)
            rows.append(row)
    return rows


def print_targets(rows: Sequence[Row]) -> None:
    by_case = {row.case: row for row in rows}
    reached = {case: by_case[f"{case}_bf16"].ours / (by_case[f"{case}_bf16"].limit or 1) for case in TARGETS}
    goals = {f"{case}_bf16 of its limit": (reached[case], target) for case, target in TARGETS.items()}
    ratio = by_case["decode_b1_wint8"].ours / by_case["decode_b1_bf16"].ours
    goals["decode_b1, wint8 over bf16"] = (ratio, WINT8_TARGET)
    print()
    for what, (value, target) in goals.items():
        print(f"{what:<30} {value:5.2f}, target {target:4.2f}: {'met' if value >= target else 'MISSED'}")


def _start_ours(name: str, weight_format: str, model: Path) -> ContenderProcess:
    command = [
        sys.executable,
        "-m",
        "benchmarks.our_engine",
        "--model",
        str(model),
        "--format",
        weight_format,
    ]
    return ContenderProcess(name, command, ROOT)


def _start_peer(name: str, dtype: str, model: Path) -> ContenderProcess:
    command = [str(PEER_PYTHON), "-m", "benchmarks.transformers_peer", "--model", str(model)]
    return ContenderProcess(name, [*command, "--dtype", dtype, "--threads", str(CORES)], ROOT)


if __name__ == "__main__":
    main()
