"""A wrong argument raises a one-line error; it neither ends the process nor touches other memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy import custom_ops
from fastdeploy.custom_ops import packed_matrix
from fastdeploy.expert_parallel.group import ExpertGroup
from fastdeploy.expert_parallel.join import join
from fastdeploy.expert_parallel.layout import GroupLayout
from fastdeploy.expert_parallel.options import GroupOptions

from .draws import Packed, PackedMlp, PagedCache, Span, draw, integers, step, tensor
from .ranks import group_of_its_own

HIDDEN, EPSILON = 32, 1e-5
RANDOM = np.random.default_rng(1)
MATRIX = Packed.draw(RANDOM, "wint8", 32, HIDDEN).blob
ROUTER = Packed.draw(RANDOM, "float32", 3, HIDDEN).blob
QKV = Packed.draw(RANDOM, "wint8", 64, HIDDEN).blob
MLP = PackedMlp.draw(RANDOM, "bfloat16", HIDDEN, 20, 1)
OTHER_MLP = PackedMlp.draw(RANDOM, "bfloat16", HIDDEN + 1, 20, 1)
EXPERTS = PackedMlp.draw(RANDOM, "bfloat16", HIDDEN, 20, 3)
# Two query heads, one key head.
CACHE = PagedCache(2, 16, 1, 16, wide=True)
PLAN = step([Span(0, 4, [0], [1, 2, 3, 4])], logit_tokens=[3])
COS_SIN = custom_ops.rotary_embedding(PLAN, 10000.0, 16)


def ones(*shape: int) -> paddle.Tensor:
    return paddle.ones(shape)


def changed(blob: paddle.Tensor, place: int, value: int) -> paddle.Tensor:
    """Return a copy with another 32-bit number in the header."""
    array = blob.numpy().copy()
    array[place : place + 4] = np.array([value], np.uint32).view(np.uint8)
    return paddle.to_tensor(array)


def plan_of(*numbers: int) -> paddle.Tensor:
    return integers(np.array(numbers))


def attend(plan: paddle.Tensor, qkv: paddle.Tensor | None = None, cache: PagedCache = CACHE) -> Any:
    return custom_ops.paged_attention(ones(4, 64) if qkv is None else qkv, plan, cache.keys, cache.values)


def rotate(
    plan: paddle.Tensor, qkv: paddle.Tensor | None = None, rotary_cos_sin: paddle.Tensor = COS_SIN
) -> None:
    qkv = ones(4, 64) if qkv is None else qkv
    custom_ops.rope_and_cache(qkv, plan, rotary_cos_sin, CACHE.keys, CACHE.values)


def attention_block(
    hidden_states: paddle.Tensor | None = None, qkv: paddle.Tensor = QKV, plan: paddle.Tensor = PLAN
) -> None:
    hidden_states, norm = ones(4, HIDDEN) if hidden_states is None else hidden_states, ones(HIDDEN)
    custom_ops.attention_block(
        hidden_states, plan, norm, qkv, MATRIX, COS_SIN, CACHE.keys, CACHE.values, EPSILON
    )


def moe_block(
    *,
    hidden_states: paddle.Tensor | None = None,
    k: int = 2,
    bias: paddle.Tensor | None = None,
    experts: PackedMlp = EXPERTS,
    shared: tuple[paddle.Tensor | None, paddle.Tensor | None] = (None, None),
) -> None:
    hidden_states, bias = (
        ones(4, HIDDEN) if hidden_states is None else hidden_states,
        ones(3) if bias is None else bias,
    )
    blobs = (ROUTER, bias, experts.gate_up, experts.down, *shared)
    custom_ops.moe_block(hidden_states, ones(HIDDEN), *blobs, EPSILON, k, 1e-12)


#: A group of one rank, for up to four tokens that pick two of the three experts each.
GROUPS: list[ExpertGroup] = []


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    layout = GroupLayout(num_ranks=1, num_layers=1, num_experts=3, max_tokens=4, k=2, hidden=HIDDEN)
    with group_of_its_own() as name:
        GROUPS.append(join(GroupOptions(name, 0), layout, {}, lambda mine, taken: None))
        GROUPS[0].run_step(4, lambda: None)
        yield
        GROUPS.pop().close()


def dispatch_send(
    *,
    x: paddle.Tensor | None = None,
    topk_ids: paddle.Tensor | None = None,
    handle: int | None = None,
    layer: int = 0,
) -> None:
    x, topk_ids = (
        ones(4, HIDDEN) if x is None else x,
        plan_of(0, 1, 2, -1, 0, 0, 1, 1) if topk_ids is None else topk_ids,
    )
    custom_ops.ep_dispatch_send(x, topk_ids, GROUPS[0].handle if handle is None else handle, layer)


def dispatch_receive(
    *, like: paddle.Tensor | None = None, handle: int | None = None, layer: int = 0
) -> paddle.Tensor:
    dispatch_send()
    like = ones(1, HIDDEN) if like is None else like
    return custom_ops.ep_dispatch_receive(like, GROUPS[0].handle if handle is None else handle, layer)[0]


def combine_send(*, rows: paddle.Tensor | None = None, handle: int | None = None) -> None:
    received = dispatch_receive()
    rows = received if rows is None else rows
    custom_ops.ep_combine_send(rows, GROUPS[0].handle if handle is None else handle)


def combine_receive(
    *,
    topk_weights: paddle.Tensor | None = None,
    like: paddle.Tensor | None = None,
    handle: int | None = None,
) -> paddle.Tensor:
    combine_send()
    topk_weights = ones(4, 2) if topk_weights is None else topk_weights
    like = ones(1, HIDDEN) if like is None else like
    return custom_ops.ep_combine_receive(topk_weights, like, GROUPS[0].handle if handle is None else handle)


def ep_moe_block(
    *,
    hidden_states: paddle.Tensor | None = None,
    k: int = 2,
    experts: PackedMlp = EXPERTS,
    shared: tuple[paddle.Tensor | None, paddle.Tensor | None] = (None, None),
    handle: int | None = None,
    layer: int = 0,
) -> None:
    hidden_states, handle = (
        ones(4, HIDDEN) if hidden_states is None else hidden_states,
        GROUPS[0].handle if handle is None else handle,
    )
    blobs = (ROUTER, ones(3), experts.gate_up, experts.down, *shared)
    custom_ops.ep_moe_block(hidden_states, ones(HIDDEN), *blobs, EPSILON, k, 1e-12, handle, layer)


def sequence(start: int, count: int, *blocks: int) -> paddle.Tensor:
    return step([Span(start, count, blocks, [0] * count)])


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "linear: a truncated blob": (
        lambda: custom_ops.linear(ones(1, 32), MATRIX[:-64]),
        "shorter than its header",
    ),
    "linear: no header": (lambda: custom_ops.linear(ones(1, 32), MATRIX[:63]), "shorter than its header"),
    "linear: not a blob": (
        lambda: custom_ops.linear(ones(1, 32), MATRIX[64:]),
        "not a blob of layout version 2",
    ),
    "linear: another layout": (
        lambda: custom_ops.linear(ones(1, 32), changed(MATRIX, 8, 1)),
        "not a blob of layout version 2",
    ),
    "linear: a format that is none": (
        lambda: custom_ops.linear(ones(1, 32), changed(MATRIX, 12, 4)),
        "unknown format 4",
    ),
    "linear: more outputs than the blob has": (
        lambda: custom_ops.linear(ones(1, 32), changed(MATRIX, 16, 33)),
        "shorter than its header",
    ),
    "linear: more outputs than can be": (
        lambda: custom_ops.linear(ones(1, 32), changed(MATRIX, 16, 2**32 - 1)),
        "packed matrix: outputs",
    ),
    "linear: no matrices": (
        lambda: custom_ops.linear(ones(1, 32), changed(MATRIX, 24, 0)),
        "packed matrix: ",
    ),
    "linear: weights as they were": (
        lambda: custom_ops.linear(ones(1, 32), ones(32, 32)),
        "must be a uint8 tensor",
    ),
    "linear: too narrow": (
        lambda: custom_ops.linear(ones(2, 31), MATRIX),
        "linear: x must hold 64 float32, has 62",
    ),
    "linear: one dimension": (
        lambda: custom_ops.linear(ones(32), MATRIX),
        "linear: x must have 2 dimensions",
    ),
    "linear: other numbers": (
        lambda: custom_ops.linear(ones(1, 32).astype("float64"), MATRIX),
        "linear: x must hold 32 float32",
    ),
    "rms_norm: weight": (
        lambda: custom_ops.rms_norm(ones(2, 8), ones(7), EPSILON),
        "weight must hold 8 float32",
    ),
    "rms_norm: residual": (
        lambda: custom_ops.rms_norm(ones(2, 8), ones(8), EPSILON, residual=ones(3, 8)),
        "residual must hold 16 float32",
    ),
    "rms_norm: one dimension": (lambda: custom_ops.rms_norm(ones(8), ones(8), EPSILON), "2 dimensions"),
    "embedding: beyond the vocabulary": (
        lambda: custom_ops.embedding(ones(4, 8), PLAN),
        "a token id outside of the vocabulary",
    ),
    "embedding: a negative id": (
        lambda: custom_ops.embedding(ones(4, 8), step([Span(0, 1, [0], [-1])])),
        "a token id outside of the vocabulary",
    ),
    "embedding: integers": (
        lambda: custom_ops.embedding(integers(np.ones((9, 8))), PLAN),
        "must be float32 or bfloat16",
    ),
    "embedding: one dimension": (lambda: custom_ops.embedding(ones(9), PLAN), "2 dimensions"),
    "logits: a row that is not there": (
        lambda: custom_ops.logits(ones(3, 32), PLAN, ones(32), MATRIX, EPSILON),
        "a row outside of hidden_states",
    ),
    "logits: another width": (
        lambda: custom_ops.logits(ones(4, 31), PLAN, ones(31), MATRIX, EPSILON),
        "lm_head does not fit hidden_states",
    ),
    "step: empty": (
        lambda: custom_ops.rotary_embedding(plan_of(1, 1, 1), 1e4, 16),
        "shorter than its header",
    ),
    "step: cut off": (
        lambda: custom_ops.rotary_embedding(PLAN[:-1], 1e4, 16),
        "shorter than its header says",
    ),
    "step: negative": (lambda: custom_ops.rotary_embedding(plan_of(-1, 4, 1, 0, 0, 4), 1e4, 16), "step: "),
    "step: floats": (lambda: custom_ops.rotary_embedding(ones(20), 1e4, 16), "must be an int32 tensor"),
    "step: sequences that overlap": (
        lambda: custom_ops.rotary_embedding(plan_of(2, 2, 1, 0, 0, 3, 2, 0, 0, 0, 0, 5, 5), 1e4, 16),
        "step: tokens of the sequences",
    ),
    "step: fewer tokens than the sequences have": (
        lambda: custom_ops.rotary_embedding(plan_of(1, 1, 1, 0, 0, 9, 0, 0, 5), 1e4, 16),
        "step: tokens of the sequences",
    ),
    "step: before the first position": (
        lambda: custom_ops.rotary_embedding(plan_of(1, 1, 1, 0, 0, 1, -1, 0, 5), 1e4, 16),
        "step: tokens of the sequences",
    ),
    "rotary_embedding: an odd head": (
        lambda: custom_ops.rotary_embedding(PLAN, 1e4, 15),
        "rotary_embedding: head_dim",
    ),
    "rotary_embedding: no head": (
        lambda: custom_ops.rotary_embedding(PLAN, 1e4, 0),
        "rotary_embedding: head_dim",
    ),
    "rope_and_cache: a block that is not there": (
        lambda: rotate(sequence(0, 4, 2)),
        "a block outside of the cache",
    ),
    "rope_and_cache: a negative block": (lambda: rotate(sequence(0, 4, -1)), "a block outside of the cache"),
    "rope_and_cache: too few blocks": (lambda: rotate(sequence(14, 4, 0)), "a block outside of the cache"),
    "rope_and_cache: cos and sin of another step": (
        lambda: rotate(PLAN, rotary_cos_sin=ones(3, 16)),
        "rotary_cos_sin must hold 64 float32, has 48",
    ),
    "rope_and_cache: no queries": (lambda: rotate(PLAN, ones(4, 32)), "the query heads must be"),
    "rope_and_cache: half a head": (lambda: rotate(PLAN, ones(4, 56)), "the query heads must be"),
    "rope_and_cache: one dimension": (lambda: rotate(PLAN, ones(4 * 64)), "2 dimensions"),
    "paged_attention: a block that is not there": (
        lambda: attend(sequence(20, 4, 0, 7)),
        "a block outside of the cache",
    ),
    "paged_attention: too few blocks": (lambda: attend(sequence(20, 4, 0)), "a block outside of the cache"),
    "paged_attention: too few rows": (lambda: attend(PLAN, ones(3, 64)), "qkv must hold 256 float32"),
    "paged_attention: no queries": (lambda: attend(PLAN, ones(4, 32)), "the query heads must be"),
    "paged_attention: heads that cannot be shared": (
        lambda: attend(PLAN, ones(4, 7 * 16), PagedCache(2, 16, 2, 16, wide=True)),
        "the query heads must be",
    ),
    "paged_attention: caches of two shapes": (
        lambda: custom_ops.paged_attention(ones(4, 64), PLAN, CACHE.keys, CACHE.values[:1]),
        "different shapes",
    ),
    "paged_attention: caches of two types": (
        lambda: custom_ops.paged_attention(ones(4, 64), PLAN, CACHE.keys, CACHE.values.astype("bfloat16")),
        "one type",
    ),
    "moe_topk_select: no experts": (
        lambda: custom_ops.moe_topk_select(ones(2, 4), ones(4), 0, 1e-12),
        "k must be 1..64",
    ),
    "moe_topk_select: more than there are": (
        lambda: custom_ops.moe_topk_select(ones(2, 4), ones(4), 5, 1e-12),
        "k must be 1..64",
    ),
    "moe_topk_select: bias": (
        lambda: custom_ops.moe_topk_select(ones(2, 4), ones(3), 2, 1e-12),
        "bias must hold 4 float32",
    ),
    "moe_permute: an expert that does not exist": (
        lambda: custom_ops.moe_permute(ones(2, 8), integers(np.array([[0, 1], [2, 3]])), 3),
        "an expert that does not exist",
    ),
    "moe_permute: a negative id": (
        lambda: custom_ops.moe_permute(ones(2, 8), integers(np.array([[0, 1], [2, -1]])), 3),
        "an expert that does not exist",
    ),
    "moe_permute: ids of other tokens": (
        lambda: custom_ops.moe_permute(ones(3, 8), integers(np.zeros((2, 2))), 3),
        "x must hold 16 float32, has 24",
    ),
    "moe_permute: one dimension": (
        lambda: custom_ops.moe_permute(ones(2, 8), integers(np.zeros(2)), 3),
        "2 dimensions",
    ),
    "moe_grouped_gemm: offsets that descend": (
        lambda: custom_ops.moe_grouped_gemm(
            ones(4, HIDDEN), integers(np.array([0, 3, 2, 4])), EXPERTS.gate_up, EXPERTS.down
        ),
        "offsets must ascend",
    ),
    "moe_grouped_gemm: offsets of fewer experts": (
        lambda: custom_ops.moe_grouped_gemm(
            ones(4, HIDDEN), integers(np.array([0, 4])), EXPERTS.gate_up, EXPERTS.down
        ),
        "offsets must hold experts + 1",
    ),
    "moe_grouped_gemm: two MLPs": (
        lambda: custom_ops.moe_grouped_gemm(
            ones(4, HIDDEN), integers(np.array([0, 4])), MLP.gate_up, OTHER_MLP.down
        ),
        "not of one gated MLP",
    ),
    "moe_unpermute: an assignment twice": (
        lambda: custom_ops.moe_unpermute(ones(4, 8), integers(np.array([0, 1, 1, 3])), ones(2, 2)),
        "order is not a permutation",
    ),
    "moe_unpermute: an assignment that is not there": (
        lambda: custom_ops.moe_unpermute(ones(4, 8), integers(np.array([0, 1, 2, 4])), ones(2, 2)),
        "order is not a permutation",
    ),
    "moe_unpermute: rows": (
        lambda: custom_ops.moe_unpermute(ones(3, 8), integers(np.arange(4)), ones(2, 2)),
        "rows must hold 32 float32",
    ),
    "fused_moe: an expert that does not exist": (
        lambda: custom_ops.fused_moe(
            ones(2, HIDDEN), integers(np.full((2, 1), 3)), ones(2, 1), EXPERTS.gate_up, EXPERTS.down
        ),
        "an expert that does not exist",
    ),
    "fused_moe: another width": (
        lambda: custom_ops.fused_moe(
            ones(2, HIDDEN + 1), integers(np.zeros((2, 1))), ones(2, 1), EXPERTS.gate_up, EXPERTS.down
        ),
        "x must hold 64 float32, has 66",
    ),
    "attention_block: tokens": (
        lambda: attention_block(ones(3, HIDDEN)),
        "hidden_states must hold 128 float32",
    ),
    "attention_block: half a head": (
        lambda: attention_block(qkv=Packed.draw(RANDOM, "wint8", 72, HIDDEN).blob),
        "the query heads must be",
    ),
    "attention_block: a block that is not there": (
        lambda: attention_block(plan=sequence(0, 4, 2)),
        "a block outside of the cache",
    ),
    "mlp_block: another width": (
        lambda: custom_ops.mlp_block(ones(4, 32), ones(32), OTHER_MLP.gate_up, OTHER_MLP.down, EPSILON),
        "the matrices do not fit hidden_states",
    ),
    "mlp_block: one dimension": (
        lambda: custom_ops.mlp_block(ones(32), ones(32), MLP.gate_up, MLP.down, EPSILON),
        "2 dimensions",
    ),
    "moe_block: bias": (lambda: moe_block(bias=ones(4)), "bias must hold 3 float32"),
    "moe_block: experts": (lambda: moe_block(k=4), "k must be 1..64"),
    "moe_block: experts of another router": (lambda: moe_block(experts=MLP), "do not fit each other"),
    "moe_block: half of the shared experts": (
        lambda: moe_block(shared=(MLP.gate_up, None)),
        "shared experts",
    ),
    "moe_block: the other half": (lambda: moe_block(shared=(None, MLP.down)), "shared experts"),
    "moe_block: shared experts of another width": (
        lambda: moe_block(shared=(OTHER_MLP.gate_up, OTHER_MLP.down)),
        "do not fit each other",
    ),
    "ep_dispatch_send: no group": (lambda: dispatch_send(handle=99), "not open in this process"),
    "ep_dispatch_send: a layer that is not there": (lambda: dispatch_send(layer=1), "no such layer"),
    "ep_dispatch_send: a negative layer": (lambda: dispatch_send(layer=-1), "no such layer"),
    "ep_dispatch_send: another width": (
        lambda: dispatch_send(x=ones(4, HIDDEN + 1)),
        "x has another width than the group",
    ),
    "ep_dispatch_send: one dimension": (
        lambda: dispatch_send(x=ones(4 * HIDDEN)),
        "x must have 2 dimensions",
    ),
    "ep_dispatch_send: other numbers": (
        lambda: dispatch_send(x=ones(4, HIDDEN).astype("float64")),
        "must be float32 or bfloat16",
    ),
    "ep_dispatch_send: more tokens than there is room for": (
        lambda: dispatch_send(x=ones(5, HIDDEN), topk_ids=plan_of(*[0] * 10)),
        "more tokens than it was made for",
    ),
    "ep_dispatch_send: ids of fewer tokens": (
        lambda: dispatch_send(topk_ids=plan_of(*[0] * 6)),
        "topk_ids must be int32 [tokens, k]",
    ),
    "ep_dispatch_send: more ids": (
        lambda: dispatch_send(topk_ids=plan_of(*[0] * 12)),
        "topk_ids must be int32 [tokens, k]",
    ),
    "ep_dispatch_send: ids that are no integers": (
        lambda: dispatch_send(topk_ids=ones(4, 2)),
        "topk_ids must be int32 [tokens, k]",
    ),
    "ep_dispatch_send: an expert that does not exist": (
        lambda: dispatch_send(topk_ids=plan_of(0, 1, 2, 3, 0, 0, 0, 0)),
        "an expert that does not exist",
    ),
    "ep_dispatch_send: less than none": (
        lambda: dispatch_send(topk_ids=plan_of(0, 1, 2, -2, 0, 0, 0, 0)),
        "an expert that does not exist",
    ),
    "ep_dispatch_receive: no group": (lambda: dispatch_receive(handle=99), "not open in this process"),
    "ep_dispatch_receive: a layer that is not there": (
        lambda: dispatch_receive(layer=1),
        "no such layer",
    ),
    "ep_dispatch_receive: other numbers than were sent": (
        lambda: dispatch_receive(like=ones(1, HIDDEN).astype("bfloat16")),
        "elements of another size than were sent",
    ),
    "ep_dispatch_receive: integers": (
        lambda: dispatch_receive(like=integers(np.ones((1, HIDDEN)))),
        "must be float32 or bfloat16",
    ),
    "ep_combine_send: no group": (lambda: combine_send(handle=99), "not open in this process"),
    "ep_combine_send: another width": (
        lambda: combine_send(rows=ones(7, HIDDEN + 1)),
        "rows have another width than the group",
    ),
    "ep_combine_send: one dimension": (
        lambda: combine_send(rows=ones(7 * HIDDEN)),
        "rows must have 2 dimensions",
    ),
    "ep_combine_send: integers": (
        lambda: combine_send(rows=integers(np.ones((7, HIDDEN)))),
        "must be float32 or bfloat16",
    ),
    "ep_combine_send: fewer rows than were received": (
        lambda: combine_send(rows=ones(6, HIDDEN)),
        "rows must be as many as were received",
    ),
    "ep_combine_send: more rows": (
        lambda: combine_send(rows=ones(8, HIDDEN)),
        "rows must be as many as were received",
    ),
    "ep_combine_receive: no group": (lambda: combine_receive(handle=99), "not open in this process"),
    "ep_combine_receive: weights of other tokens": (
        lambda: combine_receive(topk_weights=ones(3, 2)),
        "topk_weights must be [tokens, k] of what was sent",
    ),
    "ep_combine_receive: weights of another k": (
        lambda: combine_receive(topk_weights=ones(4, 3)),
        "topk_weights must be [tokens, k] of what was sent",
    ),
    "ep_combine_receive: integers": (
        lambda: combine_receive(topk_weights=integers(np.ones((4, 2)))),
        "topk_weights must hold 8 float32",
    ),
    "ep_combine_receive: rows of integers": (
        lambda: combine_receive(like=integers(np.ones((1, HIDDEN)))),
        "must be float32 or bfloat16",
    ),
    "ep_moe_block: no group": (lambda: ep_moe_block(handle=99), "not open in this process"),
    "ep_moe_block: a layer that is not there": (lambda: ep_moe_block(layer=1), "no such layer"),
    "ep_moe_block: another width": (
        lambda: ep_moe_block(hidden_states=ones(4, HIDDEN + 1)),
        "norm must hold 33 float32",
    ),
    "ep_moe_block: another k than the group's": (
        lambda: ep_moe_block(k=1),
        "the group was made for another network",
    ),
    "ep_moe_block: more tokens than the step was begun with": (
        lambda: ep_moe_block(hidden_states=ones(5, HIDDEN)),
        "the step was begun with fewer tokens",
    ),
    "ep_moe_block: experts of another router": (
        lambda: ep_moe_block(experts=MLP),
        "do not fit each other",
    ),
    "ep_moe_block: half of the shared experts": (
        lambda: ep_moe_block(shared=(MLP.gate_up, None)),
        "shared experts",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_argument_is_a_one_line_error(name: str) -> None:
    call, said = CALLS[name]
    with pytest.raises(ValueError, match=r".") as raised:
        call()
    assert said in str(raised.value)


def test_the_same_calls_with_correct_arguments_succeed() -> None:
    assert custom_ops.linear(tensor(draw(RANDOM, 1, 32)), MATRIX).shape == [1, 32]
    assert custom_ops.embedding(ones(5, 8), PLAN).shape == [4, 8]
    assert custom_ops.logits(ones(4, 32), PLAN, ones(32), MATRIX, EPSILON).shape == [1, 32]
    rotate(PLAN)
    assert attend(PLAN).shape == [4, 32]
    attention_block()
    custom_ops.mlp_block(ones(4, HIDDEN), ones(HIDDEN), MLP.gate_up, MLP.down, EPSILON)
    moe_block(shared=(MLP.gate_up, MLP.down))
    assert combine_receive().shape == [4, HIDDEN]
    ep_moe_block(shared=(MLP.gate_up, MLP.down))
    assert packed_matrix.PackedShape.of(MATRIX.numpy()).outputs == 32
