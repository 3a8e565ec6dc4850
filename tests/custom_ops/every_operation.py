"""The results of every operation of the network on fixed inputs, for `test_instruction_sets`.

    python -m tests.custom_ops.every_operation FILE.npz

Each operation runs on all rows at once, and, under the same name with "alone" appended, on one row at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from fastdeploy import custom_ops

from .draws import FORMATS, Packed, PackedMlp, PagedCache, Span, draw, integers, step, tensor

#: Several tiles of the highest kernel, plus a partial one.
ROWS = 41
HIDDEN, EXPERTS, K = 104, 6, 3


def main(file: str) -> None:
    random = np.random.default_rng(17)
    found: dict[str, Any] = {"instruction set": np.array(custom_ops.instruction_set())}
    for part in (rows_of_plain, rows_of_matrices, rows_of_attention):
        for name, operation, count in part(random):
            found[name] = operation(np.arange(count))
            found[f"{name} alone"] = np.concatenate([operation(np.array([row])) for row in range(count)])
    np.savez(file, **found)


#: Name, function that computes the given rows of the operation, and number of rows.
Operations = Iterator[tuple[str, Callable[[np.ndarray], np.ndarray], int]]


def rows_of_plain(random: np.random.Generator) -> Operations:
    x, weight = draw(random, ROWS, HIDDEN), tensor(draw(random, HIDDEN))
    yield "rms_norm", lambda rows: custom_ops.rms_norm(tensor(x[rows]), weight, 1e-5)[0].numpy(), ROWS
    scores, bias = 3 * draw(random, ROWS, 37), tensor(0.1 * draw(random, 37))

    def select(rows: np.ndarray) -> np.ndarray:
        topk_ids, weights = custom_ops.moe_topk_select(tensor(scores[rows]), bias, K, 1e-12)
        return np.concatenate([topk_ids.numpy().astype(np.float32), weights.numpy()], axis=1)

    yield "moe_topk_select", select, ROWS


def rows_of_matrices(random: np.random.Generator) -> Operations:
    x, topk_ids = draw(random, ROWS, HIDDEN), random.integers(0, EXPERTS - 1, (ROWS, K))
    weights = np.abs(draw(random, ROWS, K))
    for name in FORMATS:
        matrix = Packed.draw(random, name, 179, HIDDEN).blob

        def product(rows: np.ndarray, matrix: paddle.Tensor = matrix) -> np.ndarray:
            return custom_ops.linear(tensor(x[rows]), matrix).numpy()

        yield f"linear {name}", product, ROWS
        experts = PackedMlp.draw(random, name, HIDDEN, 45, EXPERTS)

        def fused(rows: np.ndarray, mlps: PackedMlp = experts) -> np.ndarray:
            routed = integers(topk_ids[rows]), tensor(weights[rows])
            return custom_ops.fused_moe(tensor(x[rows]), *routed, mlps.gate_up, mlps.down).numpy()

        yield f"fused_moe {name}", fused, ROWS


def rows_of_attention(random: np.random.Generator) -> Operations:
    """Yield attention over a chunk that crosses a segment border; its rows one by one are decodes."""
    start, queries, keys, head_dim, block_size = 480, 5, 1, 40, 16
    blocks = random.permutation(40)
    qkv = draw(random, start + ROWS, (queries + 2 * keys) * head_dim)
    for wide in (True, False):
        cache = PagedCache(40, block_size, keys, head_dim, wide)

        def attend(rows: np.ndarray, cache: PagedCache = cache) -> np.ndarray:
            span = Span(start + int(rows[0]), len(rows), blocks)
            return run(span, qkv[span.positions], cache)

        run(Span(0, start, blocks), qkv[:start], cache)
        yield f"paged_attention {'float32' if wide else 'bfloat16'}", attend, ROWS


def run(span: Span, qkv: np.ndarray, cache: PagedCache) -> np.ndarray:
    plan, turned = step([span]), tensor(qkv)
    rotary_cos_sin = custom_ops.rotary_embedding(plan, 10000.0, cache.head_dim)
    custom_ops.rope_and_cache(turned, plan, rotary_cos_sin, cache.keys, cache.values)
    return custom_ops.paged_attention(turned, plan, cache.keys, cache.values).numpy()


if __name__ == "__main__":
    paddle.set_device("cpu")
    main(sys.argv[1])
