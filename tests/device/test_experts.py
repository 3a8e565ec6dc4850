"""Norm, router, picks and the return path against float64; a row's bits do not depend on its batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from . import library as fd
from .library import counts, drawn

EPSILON = 1e-5


class Normed(NamedTuple):
    rows: torch.Tensor
    logits: torch.Tensor


def norm(
    stream: torch.Tensor, weight: torch.Tensor, router: torch.Tensor | None, capacity: int | None = None
) -> Normed:
    tokens, width = stream.shape
    experts = 0 if router is None else len(router)
    capacity = capacity or max(tokens, 1)
    blocks = fd.round_up(capacity, 64) // 64, fd.round_up(width, 64) // 64
    out = torch.full((*blocks, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    logits = torch.full((capacity, max(experts, 1)), float("nan"), device="cuda")
    expert_rows = torch.full((max(experts, 1),), 77, device="cuda", dtype=torch.int32)
    fd.call(
        "fd_norm",
        fd.fill(
            fd.NormArgs, hidden_states=stream, weight=weight, count=counts(tokens), out=out, router=router,
            router_logits=logits, expert_rows=expert_rows, epsilon=EPSILON, width=width, experts=experts,
            capacity=capacity,
        ),
    )  # fmt: skip
    rows = fd.rows_of(out, capacity, fd.round_up(width, 64))
    assert rows[tokens:].isnan().all()
    assert (rows[:tokens, width:] == 0).all()
    if router is not None:
        assert (expert_rows == 0).all()
        assert logits[tokens:].isnan().all()
    return Normed(rows[:tokens, :width], logits[:tokens])


@pytest.mark.parametrize("width", [2560, 8192, 72])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_norm_and_router(width: int, tokens: int) -> None:
    stream, weight = torch.randn(tokens, width, device="cuda") * 3, torch.rand(width, device="cuda") + 0.5
    router = torch.randn(61, width, device="cuda")
    x = stream.double()
    reference = x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight.double()
    normed = norm(stream, weight, router)
    assert fd.error(normed.rows, reference) < 2.5e-3
    assert fd.error(normed.logits, normed.rows.double() @ router.double().T) < 1e-6
    assert torch.equal(norm(stream, weight, None).rows, normed.rows)
    for row in {0, tokens // 2, tokens - 1}:
        alone = norm(stream[row : row + 1], weight, router)
        assert torch.equal(alone.rows[0], normed.rows[row])
        assert torch.equal(alone.logits[0], normed.logits[row])


def test_a_capacity_may_exceed_the_tokens() -> None:
    stream, weight = torch.randn(5, 256, device="cuda"), torch.ones(256, device="cuda")
    router = torch.randn(16, 256, device="cuda")
    for capacity in (5, 64, 256):
        assert torch.equal(norm(stream, weight, router, capacity).logits, norm(stream, weight, router).logits)
    assert norm(stream[:0], weight, router, 8).rows.numel() == 0


class Routed(NamedTuple):
    topk_ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    assignments: torch.Tensor


def route(logits: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, k: int, alignment: int) -> Routed:
    tokens, experts = logits.shape
    most = int(fd.library().fd_expert_rows(tokens, k, experts, alignment))
    blocks = fd.round_up(most, 64) // 64, x.shape[1] // 64
    rows = torch.full((*blocks, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    topk_ids = torch.full((tokens, k), -1, device="cuda", dtype=torch.int32)
    weights = torch.full((tokens, k), float("nan"), device="cuda")
    held = torch.zeros(experts, device="cuda", dtype=torch.int32)
    assignments = torch.full((most,), -1, device="cuda", dtype=torch.int32)
    fd.call(
        "fd_route",
        fd.fill(
            fd.RouteArgs, logits=logits, bias=bias, count=counts(tokens), x=fd.activations(x),
            topk_ids=topk_ids,
            topk_weights=weights, counts=held, rows_in_expert=torch.empty_like(topk_ids), rows=rows,
            assignments=assignments,
            norm_min=1e-12, experts=experts, k=k, width=x.shape[1], alignment=alignment, capacity=tokens,
        ),
    )  # fmt: skip
    return Routed(topk_ids, weights, held, fd.rows_of(rows, most, x.shape[1]), assignments)


@pytest.mark.parametrize("alignment", [8, 64])
@pytest.mark.parametrize(("experts", "k"), [(64, 6), (256, 8), (5, 5), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 33, 500])
def test_picks_and_the_order_of_experts(experts: int, k: int, tokens: int, alignment: int) -> None:
    logits, bias = torch.randn(tokens, experts, device="cuda"), torch.randn(experts, device="cuda") * 0.01
    x = drawn(tokens, 128, 1)
    routed = route(logits, bias, x, k, alignment)
    probabilities = logits.double().softmax(1)
    expected = (probabilities + bias.double()).topk(k).indices
    # Float and double may order near ties differently; they are rare.
    assert (routed.topk_ids.sort(1).values == expected.int().sort(1).values).float().mean() > 0.999
    picked = probabilities.gather(1, routed.topk_ids.long())
    assert fd.error(routed.weights, picked / picked.sum(1, keepdim=True)) < 1e-5
    assert torch.equal(routed.counts, torch.bincount(routed.topk_ids.flatten(), minlength=experts).int())
    begin = 0
    for expert in range(experts):
        size = int(routed.counts[expert])
        chosen = routed.assignments[begin : begin + size].long()
        assert torch.equal(chosen.sort().values, (routed.topk_ids.flatten() == expert).nonzero().flatten())
        assert torch.equal(routed.rows[begin : begin + size], x[chosen // k])
        begin += fd.round_up(size, alignment)


def test_the_lower_expert_comes_first_among_equals() -> None:
    logits = torch.zeros(3, 64, device="cuda")
    logits[1, [40, 7]] = 1.0
    routed = route(logits, torch.zeros(64, device="cuda"), drawn(3, 64, 2), 4, 8)
    assert routed.topk_ids.tolist() == [[0, 1, 2, 3], [7, 40, 0, 1], [0, 1, 2, 3]]


def test_a_row_that_is_not_a_number_spoils_only_itself() -> None:
    logits, bias = torch.randn(9, 64, device="cuda"), torch.zeros(64, device="cuda")
    sound = route(logits, bias, drawn(9, 64, 3), 6, 8)
    logits[4] = float("nan")
    routed = route(logits, bias, drawn(9, 64, 3), 6, 8)
    assert ((routed.topk_ids >= 0) & (routed.topk_ids < 64)).all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(routed.topk_ids[others], sound.topk_ids[others])
    assert torch.equal(routed.weights[others], sound.weights[others])


@pytest.mark.parametrize("has_shared", [False, True])
def test_results_are_added_in_the_order_of_picks(has_shared: bool) -> None:
    tokens, k, width = 37, 6, 2560
    results, weights = drawn(tokens * k, width, 4), torch.rand(tokens, k, device="cuda")
    shared = torch.randn(tokens, width, device="cuda") if has_shared else None
    stream = torch.randn(tokens + 1, width, device="cuda")
    before = stream.clone()
    fd.call(
        "fd_combine",
        fd.fill(
            fd.CombineArgs, results=results, topk_weights=weights, shared=shared, count=counts(tokens),
            hidden_states=stream, k=k, width=width, capacity=tokens + 1,
        ),
    )  # fmt: skip
    expected = before[:tokens].double()
    expected += (results.view(tokens, k, width).double() * weights.double()[..., None]).sum(1)
    expected += 0 if shared is None else shared.double()
    assert fd.error(stream[:tokens], expected) < 1e-6
    assert torch.equal(stream[tokens], before[tokens])


@pytest.mark.parametrize("width", [72, 2560, 4096, 8192])
def test_a_combination_with_a_norm_has_the_bits_of_both(width: int) -> None:
    tokens, k = 9, 6
    results, weights = drawn(tokens * k, width, 8), torch.rand(tokens, k, device="cuda")
    shared, weight = torch.randn(tokens, width, device="cuda"), torch.rand(width, device="cuda") + 0.5
    stream = torch.randn(tokens + 1, width, device="cuda")
    blocks = fd.round_up(width, 64) // 64
    normed = torch.full((1, blocks, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)

    def combine(hidden_states: torch.Tensor, **fields: object) -> None:
        args = fd.fill(
            fd.CombineArgs, results=results, topk_weights=weights, shared=shared, count=counts(tokens),
            hidden_states=hidden_states, k=k, width=width, capacity=tokens + 1, **fields,
        )  # fmt: skip
        fd.call("fd_combine", args)

    expected = stream.clone()
    combine(expected)
    combine(stream, norm=weight, normed=normed, epsilon=EPSILON)
    assert torch.equal(stream, expected)
    rows = fd.rows_of(normed, 64, blocks * 64)
    assert torch.equal(rows[:tokens, :width], norm(expected[:tokens], weight, None).rows)
    assert (rows[:tokens, width:] == 0).all()
    assert rows[tokens:].isnan().all()


def test_a_block_of_experts_is_the_same_in_every_batch() -> None:
    tokens, experts, k, hidden, width = 100, 16, 4, 256, 192
    stream, weight = torch.randn(tokens, hidden, device="cuda"), torch.ones(hidden, device="cuda")
    router, bias = torch.randn(experts, hidden, device="cuda"), torch.zeros(experts, device="cuda")
    gate, up = drawn(experts * width, hidden, 5) * 0.1, drawn(experts * width, hidden, 6) * 0.1
    down = drawn(experts * hidden, width, 7) * 0.1
    split = [m.view(experts, -1, m.shape[1]) for m in (gate, up, down)]
    gate_up = torch.stack(
        [fd.tiled_matrix(fd.interleaved(g, u)) for g, u in zip(split[0], split[1], strict=True)]
    )
    downs = torch.stack([fd.tiled_matrix(d) for d in split[2]])

    def block(x: torch.Tensor) -> torch.Tensor:
        rows, out = len(x), x.clone()
        tile = fd.library().fd_tile(rows * k, experts)
        alignment = min(fd.library().fd_tile_tokens(tile), 64)
        normed = norm(x, weight, router)
        routed = route(normed.logits, bias, normed.rows, k, alignment)
        most = len(routed.assignments)
        permuted = fd.activations(routed.rows)
        blocks = fd.round_up(most, 64) // 64, width // 64
        activated = torch.full((*blocks, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
        results = torch.full((rows * k, hidden), float("nan"), device="cuda", dtype=torch.bfloat16)
        common = {"tile": tile, "alignment": alignment}
        fd.product(
            gate_up, permuted, routed.counts, activated, 2 * width, hidden, fd.SWIGLU, rows * k, **common
        )
        fd.product(
            downs, activated, routed.counts, results, hidden, width, fd.BFLOAT16, rows * k,
            rows=routed.assignments, **common,
        )  # fmt: skip
        fd.call(
            "fd_combine",
            fd.fill(
                fd.CombineArgs, results=results, topk_weights=routed.weights, count=counts(rows),
                hidden_states=out, k=k,
                width=hidden, capacity=rows,
            ),
        )  # fmt: skip
        return out

    together = block(stream)
    normed = norm(stream, weight, router)
    x, (probabilities, topk_ids) = normed.rows.double(), normed.logits.double().softmax(1).topk(k)
    g, u, d = (m.double() for m in split)
    hidden_rows = torch.nn.functional.silu(torch.einsum("th,ewh->tew", x, g)) * torch.einsum(
        "th,ewh->tew", x, u
    )
    each = torch.einsum("tew,ehw->teh", hidden_rows, d).gather(1, topk_ids[..., None].expand(-1, -1, hidden))
    expected = stream + (each * (probabilities / probabilities.sum(1, keepdim=True))[..., None]).sum(1)
    assert fd.error(together, expected) < 3e-3
    for row in (0, 41, 99):
        assert torch.equal(block(stream[row : row + 1])[0], together[row])
    order = torch.randperm(tokens, device="cuda")
    assert torch.equal(block(stream[order]), together[order])
