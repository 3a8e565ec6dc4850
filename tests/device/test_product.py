"""Products against float64; their bits do not depend on the tile or the position in the batch."""

from __future__ import annotations

import pytest
import torch

from . import library as fd
from .library import counts, drawn

TILES = range(5)
#: Shapes whose K has one, two and four parts, and shapes with partial panels and blocks.
SHAPES = [(2560, 2560), (6144, 1536), (8320, 192), (200, 1088), (130, 72), (2, 64)]


def dense(weights: torch.Tensor, x: torch.Tensor, tile: int, output: int = fd.FLOAT) -> torch.Tensor:
    """Return the product; elements of `out` that the operation does not write stay NaN."""
    dtype = torch.bfloat16 if output == fd.BFLOAT16 else torch.float32
    out = torch.full((x.shape[0] + 3, weights.shape[0]), float("nan"), device="cuda", dtype=dtype)
    tokens = max(x.shape[0], 1)
    fd.product(
        fd.tiled_matrix(weights),
        fd.activations(x),
        counts(x.shape[0]),
        out,
        weights.shape[0],
        weights.shape[1],
        output,
        tokens,
        tile,
    )
    assert out[x.shape[0] :].isnan().all()
    return out[: x.shape[0]]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 64, 65, 200])
def test_a_product_is_right_and_has_the_same_bits_in_every_tile(outputs: int, inputs: int, rows: int) -> None:
    weights, x = drawn(outputs, inputs, 1), drawn(rows, inputs, 2)
    reference = x.double() @ weights.double().T
    first = dense(weights, x, 0)
    assert fd.error(first, reference) < 2e-5
    for tile in TILES:
        assert torch.equal(dense(weights, x, tile), first)
    assert torch.equal(dense(weights, x, 0, fd.BFLOAT16), first.bfloat16())
    assert torch.equal(dense(weights, x, 4, fd.BFLOAT16), first.bfloat16())


@pytest.mark.parametrize("outputs", [2560, 8320])
def test_a_row_has_the_same_bits_at_every_place(outputs: int) -> None:
    weights, x = drawn(outputs, 2560, 3), drawn(130, 2560, 4)
    everywhere = dense(weights, x, 4)
    for row in (0, 1, 77, 129):
        assert torch.equal(dense(weights, x[row : row + 1], 0), everywhere[row : row + 1])
    order = torch.randperm(130, device="cuda")
    assert torch.equal(dense(weights, x[order], 3), everywhere[order])


def test_neighbours_that_are_not_numbers_change_nothing() -> None:
    weights, x = drawn(2560, 2560, 5), drawn(24, 2560, 6)
    alone = dense(weights, x[5:6], 0)
    x[:5], x[6:] = float("nan"), float("inf")
    for tile in TILES:
        assert torch.equal(dense(weights, x, tile)[5:6], alone)


def test_no_rows_write_nothing() -> None:
    for tile in TILES:
        for outputs in (2560, 8320):
            assert dense(drawn(outputs, 2560, 7), drawn(0, 2560, 8), tile).numel() == 0
    torch.cuda.synchronize()


def test_the_sum_with_the_stream_and_a_bias() -> None:
    weights, x = drawn(2560, 1536, 9), drawn(33, 1536, 10)
    bias = torch.randn(2560, device="cuda")
    product = dense(weights, x, 0)
    stream = torch.randn(33, 2560, device="cuda")
    expected = stream + (product + bias)
    fd.product(
        fd.tiled_matrix(weights), fd.activations(x), counts(33), stream, 2560, 1536, fd.ADD, 33, bias=bias
    )
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_groups_of_rows_each_have_their_matrix(tile: int, is_early: bool) -> None:
    outputs, inputs, sizes = 384, 320, [0, 1, 9, 70, 0, 128, 3]
    slots = counts(4, 0, 7, 2, 1, 3, 5)
    matrices = [drawn(outputs, inputs, 20 + i) for i in range(8)]
    weights = torch.stack([fd.tiled_matrix(m) for m in matrices])
    align = 64
    row_blocks = [fd.activations(drawn(size, inputs, 40 + i)) for i, size in enumerate(sizes) if size]
    tokens = torch.cat(row_blocks)
    places = torch.full((tokens.shape[0] * 64,), -1, dtype=torch.int32, device="cuda")
    order = torch.randperm(sum(sizes), device="cuda").int()
    begin, taken, expected = 0, 0, torch.zeros(sum(sizes), outputs, device="cuda", dtype=torch.float64)
    for i, size in enumerate(sizes):
        places[begin : begin + size] = order[taken : taken + size]
        rows = drawn(size, inputs, 40 + i).double() @ matrices[int(slots[i])].double().T
        expected[order[taken : taken + size].long()] = rows
        begin, taken = begin + fd.round_up(size, align), taken + size
    out = torch.full((sum(sizes) + 1, outputs), float("nan"), device="cuda", dtype=torch.bfloat16)
    fd.product(
        weights, tokens, counts(*sizes), out, outputs, inputs, fd.BFLOAT16, sum(sizes), tile,
        alignment=align, slots=slots, rows=places, is_early=is_early,
    )  # fmt: skip
    assert out[-1].isnan().all()
    assert fd.error(out[:-1], expected) < 3e-3


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("width", "inputs"), [(1536, 2560), (96, 64)])
def test_swiglu_writes_activations(tile: int, width: int, inputs: int) -> None:
    gate, up, x = drawn(width, inputs, 11), drawn(width, inputs, 12), drawn(70, inputs, 13)
    both = fd.interleaved(gate, up)
    out = torch.full(
        (2, fd.round_up(width, 64) // 64, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16
    )
    fd.product(
        fd.tiled_matrix(both), fd.activations(x), counts(70), out, 2 * width, inputs, fd.SWIGLU, 70, tile
    )
    rows = fd.rows_of(out, 128, fd.round_up(width, 64))
    assert rows[70:].isnan().all()
    assert (rows[:70, width:] == 0).all()
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    assert fd.error(rows[:70, :width], torch.nn.functional.silu(g) * u) < 3e-3
    if tile:
        first = torch.empty_like(out)
        fd.product(
            fd.tiled_matrix(both), fd.activations(x), counts(70), first, 2 * width, inputs, fd.SWIGLU, 70, 0
        )
        assert torch.equal(fd.rows_of(first, 70, width), rows[:70, :width])


@pytest.mark.parametrize("tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("output", [(fd.SWIGLU, fd.SWIGLU), (fd.FLOAT, fd.BFLOAT16)])
def test_a_pair_of_products_has_the_bits_of_each_alone(tokens: int, output: tuple[int, int]) -> None:
    experts, outputs, inputs, align = 5, (2560, 384), (1088, 2560), 8
    weights = fd.tiled_matrix(drawn(outputs[0], inputs[0], 50))
    matrices = torch.stack([fd.tiled_matrix(drawn(outputs[1], inputs[1], 60 + i)) for i in range(experts)])
    x, rows = fd.activations(drawn(tokens, inputs[0], 51)), fd.activations(drawn(64, inputs[1], 52))
    sizes = counts(0, tokens, 0, tokens // 2, tokens)
    most = max(tokens, 1)
    calls = []
    for _ in range(2):
        outs = [
            torch.full(
                (64, n),
                float("nan"),
                device="cuda",
                dtype=torch.float32 if kind == fd.FLOAT else torch.bfloat16,
            )
            for n, kind in zip(outputs, output, strict=True)
        ]
        dense = fd.product_args(
            weights, x, counts(tokens), outs[0], outputs[0], inputs[0], output[0], most, is_early=1
        )
        grouped = fd.product_args(
            matrices, rows, sizes, outs[1], outputs[1], inputs[1], output[1], 3 * most, 0, alignment=align
        )
        calls.append((outs, dense, grouped))
    torch.cuda.synchronize()
    (together, dense, grouped), (alone, other_dense, other_grouped) = calls
    fd.product_pair(dense, grouped)
    fd.call("fd_product", other_dense)
    fd.call("fd_product", other_grouped)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert (tokens == 0) == bool(one.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(256, 128), (130, 72), (48, 200)])
def test_matrices_are_retiled(dtype: torch.dtype, transposed: bool, outputs: int, inputs: int) -> None:
    weights = torch.randn(outputs, inputs, device="cuda").to(dtype)
    source = weights.T.contiguous().T if transposed else weights
    expected = fd.tiled_matrix(weights.bfloat16())
    out = torch.full_like(expected, float("nan"))
    for first, last in ((0, outputs // 2), (outputs // 2, outputs)):
        part = source[first:last]
        fd.call(
            "fd_retile",
            fd.fill(
                fd.RetileArgs, source=part, source_type=fd.SOURCE_TYPES[dtype], turn=fd.PLAIN,
                row_stride=part.stride(0), column_stride=part.stride(1), rows=last - first, inputs=inputs,
                outputs=outputs, first_row=first, matrix=out,
            ),
        )  # fmt: skip
    assert torch.equal(out, expected)


def test_gate_and_up_take_turns() -> None:
    gate, up = drawn(72, 128, 14), drawn(72, 128, 15)
    expected = fd.tiled_matrix(fd.interleaved(gate, up))
    out = torch.full_like(expected, float("nan"))
    for turn, part in ((fd.GATE, gate), (fd.UP, up)):
        fd.call(
            "fd_retile",
            fd.fill(
                fd.RetileArgs, source=part, source_type=fd.SOURCE_TYPES[torch.bfloat16], turn=turn,
                row_stride=128, column_stride=1, rows=72, inputs=128, outputs=144, first_row=0, matrix=out,
            ),
        )  # fmt: skip
    assert torch.equal(out, expected)


def test_bad_arguments_are_refused_in_one_line() -> None:
    weights, x = drawn(128, 64, 16), drawn(1, 64, 17)
    out = torch.empty(1, 128, device="cuda")
    with pytest.raises(RuntimeError, match=r"^product: unknown tile$"):
        fd.product(fd.tiled_matrix(weights), fd.activations(x), counts(1), out, 128, 64, fd.FLOAT, 1, 99)
