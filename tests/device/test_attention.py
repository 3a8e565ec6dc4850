"""Attention against float64; decoding, prompts and prompts in chunks agree to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from . import library as fd

THETA, BLOCK = 500000.0, 64


class Heads(NamedTuple):
    queries: int
    keys: int
    columns: int

    @property
    def width(self) -> int:
        return (self.queries + 2 * self.keys) * self.columns


ERNIE, DEMO = Heads(20, 4, 128), Heads(9, 3, 64)


class Part(NamedTuple):
    """Positions [start, start + length) of a text in a step."""

    text: int
    start: int
    length: int


class Cache:
    """One layer's cache: blocks of the texts in random order; the other blocks hold large numbers."""

    def __init__(self, heads: Heads, texts: Sequence[int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.heads = heads
        self.width = max(-(-length // BLOCK) for length in texts)
        total = len(texts) * self.width + 3
        size = int(fd.library().fd_cache_bytes(None, total, heads.keys, heads.columns)) // 2
        self.keys, self.values = (torch.full((2, size), 1e4, dtype=torch.bfloat16, device="cuda")).unbind(0)
        self.tables = torch.randperm(total)[: len(texts) * self.width].view(len(texts), self.width)
        work = int(fd.library().fd_attention_work_bytes(total, heads.keys, heads.columns))
        self.work = torch.zeros(work, dtype=torch.uint8, device="cuda")

    def step(self, parts: Sequence[Part]) -> torch.Tensor:
        first = [0]
        for part in parts:
            first.append(first[-1] + part.length)
        tables = [int(b) for part in parts for b in self.tables[part.text]]
        header = [len(parts), first[-1], self.width, 0, *first, *(part.start for part in parts), *tables]
        return torch.tensor([*header, *[0] * first[-1]], dtype=torch.int32, device="cuda")

    def attend(self, parts: Sequence[Part], qkv: torch.Tensor, spare: int = 0) -> torch.Tensor:
        """Run one step without changing qkv [tokens, width]; return bfloat16 [tokens, queries * columns]."""
        heads, tokens, step, turned = self.heads, len(qkv), self.step(parts), qkv.clone()
        cos_sin = torch.full((tokens + spare, heads.columns), float("nan"), device="cuda")
        slots = torch.full((tokens + spare,), -1, dtype=torch.int32, device="cuda")
        columns = heads.queries * heads.columns
        blocks = fd.round_up(tokens + spare, 64) // 64, fd.round_up(columns, 64) // 64
        out = torch.full((*blocks, 64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
        fd.call(
            "fd_rotation",
            fd.fill(
                fd.RotationArgs, step=step, rotary_cos_sin=cos_sin, slot_mapping=slots, theta=THETA,
                head_dim=heads.columns,
                capacity=tokens + spare,
            ),
        )  # fmt: skip
        fd.call(
            "fd_attention",
            fd.fill(
                fd.AttentionArgs, step=step, rotary_cos_sin=cos_sin, slot_mapping=slots, qkv=turned,
                keys=self.keys,
                values=self.values, out=out, work=self.work, work_bytes=self.work.numel(),
                heads=heads.queries, kv_heads=heads.keys, head_dim=heads.columns, capacity=tokens + spare,
                has_prompts=any(part.length > 1 for part in parts),
            ),
        )  # fmt: skip
        rows = fd.rows_of(out, tokens + spare, columns)
        assert rows[tokens:].isnan().all()
        return rows[:tokens]


def text(heads: Heads, length: int, seed: int) -> torch.Tensor:
    return fd.drawn(length, heads.width, seed)


def whole(heads: Heads, qkv: torch.Tensor) -> torch.Tensor:
    return Cache(heads, [len(qkv)]).attend([Part(0, 0, len(qkv))], qkv)


def reference(heads: Heads, qkv: torch.Tensor) -> torch.Tensor:
    length, d = len(qkv), heads.columns
    position = torch.arange(length, device="cuda", dtype=torch.float64)
    angle = position[:, None] * THETA ** (-torch.arange(0, d, 2, device="cuda", dtype=torch.float64) / d)
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    x = qkv.double().view(length, -1, d)
    q, k, v = x.split([heads.queries, heads.keys, heads.keys], 1)

    def turn(y: torch.Tensor) -> torch.Tensor:
        a, b = y[..., ::2], y[..., 1::2]
        return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(2)

    group = heads.queries // heads.keys
    q, k, v = turn(q), turn(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
    hidden = torch.ones(length, length, device="cuda", dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(2)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


@pytest.mark.parametrize("heads", [ERNIE, DEMO])
@pytest.mark.parametrize("length", [2, 64, 65, 513, 1300])
def test_a_prompt_is_right(heads: Heads, length: int) -> None:
    qkv = text(heads, length, 1)
    assert fd.error(whole(heads, qkv), reference(heads, qkv)) < 6e-3


@pytest.mark.parametrize("heads", [ERNIE, DEMO])
@pytest.mark.parametrize("length", [2, 64, 65, 512, 513, 1100])
def test_decoding_has_the_bits_of_a_prompt(heads: Heads, length: int) -> None:
    qkv = text(heads, length, 2)
    expected, cache = whole(heads, qkv), Cache(heads, [length], 1)
    cache.attend([Part(0, 0, length - 1)], qkv[:-1])
    for _ in range(2):
        assert torch.equal(cache.attend([Part(0, length - 1, 1)], qkv[-1:])[0], expected[-1])


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_chunks_have_the_bits_of_the_whole(chunk: int) -> None:
    qkv = text(ERNIE, 600, 3)
    expected, cache = whole(ERNIE, qkv), Cache(ERNIE, [600], 2)
    got = [
        cache.attend([Part(0, at, min(chunk, 600 - at))], qkv[at : at + chunk]) for at in range(0, 600, chunk)
    ]
    assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("heads", [ERNIE, DEMO])
def test_a_batch_has_the_bits_of_each_text_alone(heads: Heads) -> None:
    lengths = [1, 70, 1100, 64, 2, 513, 700, 30]
    texts = [text(heads, length, 10 + i) for i, length in enumerate(lengths)]
    expected = [whole(heads, qkv) for qkv in texts]
    cache = Cache(heads, lengths, 3)
    # The first step computes most of each text, the second the rest of them in another order.
    before = {i: n - (1 if i % 2 else min(n - 1, 9)) for i, n in enumerate(lengths)}
    begin = [Part(i, 0, n) for i, n in before.items() if n]
    got = cache.attend(begin, torch.cat([texts[p.text][: p.length] for p in begin]))
    for part, rows in zip(begin, got.split([p.length for p in begin]), strict=True):
        assert torch.equal(rows, expected[part.text][: part.length])
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    end = [Part(i, before[i], lengths[i] - before[i]) for i in order if lengths[i] > before[i]]
    got = cache.attend(end, torch.cat([texts[p.text][p.start :] for p in end]), spare=5)
    for part, rows in zip(end, got.split([p.length for p in end]), strict=True):
        assert torch.equal(rows, expected[part.text][part.start :])
    assert (cache.work[: 1024 * heads.keys * 4] == 0).all()


@pytest.mark.parametrize("heads", [ERNIE, DEMO])
def test_many_texts_decode_with_the_bits_of_their_prompts(heads: Heads) -> None:
    """Blocks process several texts, and several blocks one text."""
    lengths = [2 + 37 * i % 600 for i in range(150)] + [5000]
    qkv = text(heads, sum(lengths), 4)
    texts = qkv.split(lengths)
    whole_prompts = [Part(i, 0, n) for i, n in enumerate(lengths)]
    last = torch.tensor(lengths, device="cuda").cumsum(0) - 1
    expected = Cache(heads, lengths, 5).attend(whole_prompts, qkv)[last]
    cache = Cache(heads, lengths, 6)
    cache.attend([Part(i, 0, n - 1) for i, n in enumerate(lengths)], torch.cat([x[:-1] for x in texts]))
    got = cache.attend([Part(i, n - 1, 1) for i, n in enumerate(lengths)], qkv[last])
    assert torch.equal(got, expected)
