"""Draws against the numpy reference that also tests the CPU operations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import library as fd
from .library import counts

ROW = np.dtype(
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.float64) for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")),
        ("seed", np.uint64),
        *((name, np.uint32) for name in ("choice", "position")),
        *(
            (name, np.int32)
            for name in ("top_k", "logprobs", "first_token", "num_seen", "num_masked", "given")
        ),
        *((name, np.int32) for name in ("num_biased", "num_mask_entries")),
    ]
)


def _reference() -> Any:
    # Load it by its path: importing its package would need Paddle, which may be missing here.
    path = Path(__file__).parents[2] / "custom_ops/reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference()


def drawn_from(logits: np.ndarray, one: np.void, *entries: Any) -> int:
    """Return the reference's draw; `entries` as in `sampling_weights`."""
    return int(reference.sample(reference.sampling_weights(logits, one, *entries), one))


def row(**fields: Any) -> np.ndarray:
    values = np.zeros(1, ROW)
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "logprobs": -1, "seed": 1}
    for name, value in {**defaults, **fields}.items():
        values[name] = value
    return values


def draw(
    logits: torch.Tensor, rows: np.ndarray | None, tokens: list[tuple[int, int]] | None = None, width: int = 1
) -> tuple[list[int], np.ndarray, np.ndarray]:
    batch, vocabulary = logits.shape
    drawn = torch.full((batch,), -7, dtype=torch.int32, device="cuda")
    top_tokens = torch.full((batch, width), -7, dtype=torch.int32, device="cuda")
    logprobs = torch.full((batch, width), float("nan"), dtype=torch.float64, device="cuda")
    work = torch.full(
        (batch * int(fd.library().fd_draw_work_bytes(vocabulary)),), 255, dtype=torch.uint8
    ).cuda()
    pairs = torch.tensor(tokens or [(0, 0)], dtype=torch.int32, device="cuda")
    params = None if rows is None else torch.from_numpy(rows.view(np.uint8).copy()).cuda()
    fd.call(
        "fd_draw",
        fd.fill(
            fd.DrawArgs, logits=logits, count=counts(batch), rows=params, tokens=pairs, drawn=drawn,
            top_tokens=top_tokens, logprobs=logprobs, work=work, vocabulary=vocabulary, width=width,
            capacity=batch,
        ),
    )  # fmt: skip
    return drawn.tolist(), top_tokens.cpu().numpy(), logprobs.cpu().numpy()


@pytest.mark.parametrize("vocabulary", [103424, 1000, 1])
def test_the_most_likely_token_and_the_lowest_of_equals(vocabulary: int) -> None:
    logits = torch.randn(5, vocabulary, device="cuda")
    logits[1] = 2.0
    expected = [int(each.argmax()) for each in logits.cpu()]
    expected[1] = 0
    assert draw(logits, None)[0] == expected
    assert draw(logits, np.concatenate([row(temperature=0.0)] * 5))[0] == expected


def test_broken_rows_draw_nothing() -> None:
    logits = torch.randn(4, 5000, device="cuda")
    logits[0, 4321], logits[1], logits[2, 17] = float("nan"), float("-inf"), float("inf")
    assert draw(logits, None)[0][:3] == [-1, -1, -1]
    assert draw(logits, np.concatenate([row()] * 4))[0][:3] == [-1, -1, -1]
    assert draw(logits, None)[0][3] >= 0


FILTERS: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"top_k": 500, "top_p": 0.5, "min_p": 0.001},
    {"temperature": 0.3, "top_p": 0.95},
    {"temperature": 1e-300},
    {"temperature": 5.0},
]


@pytest.mark.parametrize("fields", FILTERS)
@pytest.mark.parametrize("vocabulary", [103424, 1500])
def test_draws_are_those_of_the_reference(fields: dict[str, float], vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(12, vocabulary, generator=generator) * 3).cuda()
    rows = np.concatenate([row(seed=i * 77 + 2**40, position=i, choice=i % 3, **fields) for i in range(12)])
    drawn, _, _ = draw(logits, rows)
    expected = [drawn_from(logits[i].cpu().numpy(), rows[i], [], []) for i in range(12)]
    assert drawn == expected


def test_equals_of_the_last_one_leave_in_the_order_of_ids() -> None:
    logits = torch.zeros(64, 3000, device="cuda")
    rows = np.concatenate([row(seed=i, top_p=0.01) for i in range(64)])
    drawn, _, _ = draw(logits, rows)
    assert set(drawn) <= set(range(30))
    assert drawn == [drawn_from(np.zeros(3000), each, [], []) for each in rows]


def test_penalties_and_masks() -> None:
    logits = torch.randn(8, 4000, generator=torch.Generator().manual_seed(5)) * 4
    seen = [(3, 0), (77, 2), (999999, 4), (3999, 1)]
    masked = [int(logits[i].argmax()) for i in range(8)]
    tokens = seen + [(token, 0) for token in masked]
    rows = np.concatenate(
        [
            row(
                seed=i, temperature=0.0 if i % 2 else 0.7, repetition_penalty=1.3, frequency_penalty=0.5,
                presence_penalty=0.2, num_seen=4, num_masked=8,
            )
            for i in range(8)
        ]
    )  # fmt: skip
    kept = [pair for pair in seen if pair[0] < 4000]
    expected = [drawn_from(logits[i].numpy(), rows[i], kept, masked) for i in range(8)]
    assert draw(logits.cuda(), rows, tokens)[0] == expected


@pytest.mark.parametrize("vocabulary", [4001, 64, 70])
def test_biases_and_a_mask_of_allowed_tokens(vocabulary: int) -> None:
    logits = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(7)) * 4
    biased = [(3, 2.5), (60, -100.0)]
    # Tokens behind the end of the mask are forbidden.
    allowed = [token for token in range(min(vocabulary, 3000)) if token % 3 != 1]
    words = np.zeros(2 * (allowed[-1] // 64 + 1), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    tokens = [(token, int(np.float32(bias).view(np.int32))) for token, bias in biased]
    tokens += [(int(low), int(high)) for low, high in words.view(np.int32).reshape(-1, 2)]
    rows = np.concatenate(
        [
            row(
                seed=i, temperature=0.0 if i % 2 else 0.7, top_p=0.9 if i % 3 else 1.0, num_biased=2,
                num_mask_entries=len(words) // 2,
            )
            for i in range(8)
        ]
    )  # fmt: skip
    expected = [drawn_from(logits[i].numpy(), rows[i], [], [], biased, allowed) for i in range(8)]
    assert draw(logits.cuda(), rows, tokens)[0] == expected


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = torch.randn(3, 20000, generator=torch.Generator().manual_seed(6))
    logits[0, [5, 9]] = 9.0
    rows = np.concatenate([row(seed=1, logprobs=4), row(seed=2, logprobs=0, temperature=0.0), row(seed=3)])
    drawn, top_tokens, logprobs = draw(logits.cuda(), rows, width=5)
    expected = reference.log_softmax(logits.double().numpy()[0])
    order = sorted(range(20000), key=lambda i: (-expected[i], i))[:4]
    assert top_tokens[0].tolist() == [drawn[0], *order]
    np.testing.assert_allclose(logprobs[0], expected[[drawn[0], *order]], atol=1e-12)
    assert top_tokens[1].tolist() == [drawn[1], -7, -7, -7, -7]
    assert (top_tokens[2] == -7).all()


def test_a_given_token_is_scored_instead_of_drawn() -> None:
    logits = torch.randn(3, 20000, generator=torch.Generator().manual_seed(8))
    logits[2, 7] = float("nan")
    rows = np.concatenate([row(given=18, logprobs=0), row(given=20000, logprobs=2), row(given=3, logprobs=1)])
    logits[0, [3, 19]] = logits[0, 17].clone()
    drawn, top_tokens, logprobs = draw(logits.cuda(), rows, width=3)
    assert drawn[2] == -1
    for index, token in ((0, 17), (1, 19999)):
        expected = reference.log_softmax(logits.double().numpy()[index])
        order = np.argsort(-logits.numpy()[index], kind="stable")
        assert order[drawn[index] - 1] == top_tokens[index, 0] == token
        np.testing.assert_allclose(logprobs[index, 0], expected[token], atol=1e-12)
    assert top_tokens[1, 1] == int(logits[1].argmax())


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(20, 50000, device="cuda")
    rows = np.concatenate([row(seed=i, top_p=0.9) for i in range(20)])
    together = draw(logits, rows)[0]
    for i in (0, 7, 19):
        assert draw(logits[i : i + 1], rows[i : i + 1])[0] == [together[i]]
