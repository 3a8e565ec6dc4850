"""Our engine as a contender (contender.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

from .contender import answer_requests
from .driver import WEIGHT_FORMATS, Driver, engine_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--format", choices=WEIGHT_FORMATS, default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-rank", type=int, default=0)
    arguments = parser.parse_args()
    config = engine_config(
        arguments.model,
        arguments.format,
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        data_parallel_size=arguments.data_parallel_size,
        data_parallel_rank=arguments.data_parallel_rank,
    )
    answer_requests(lambda: Driver(config))


if __name__ == "__main__":
    main()
