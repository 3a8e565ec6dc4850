"""Packed matrices: the layout byte by byte, and the error of the values."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.custom_ops.packed_matrix import (
    FORMATS,
    GROUP,
    HEADER_BYTES,
    PANEL,
    PackedShape,
    from_bfloat16,
    gate_up_order,
    interleave_gate_up,
    pack,
    pack_panels,
    split_gate_up,
    to_bfloat16,
    unpack,
)

formats = st.sampled_from(FORMATS)
sizes = st.integers(1, 100)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Draw rows of very different magnitudes, some of them zero."""
    random = np.random.default_rng(seed)
    magnitudes = random.choice([0, 1e-20, 1e-3, 1, 1e10], size=(*shape[:-1], 1))
    return (random.standard_normal(shape) * magnitudes).astype(np.float32)


def body(weights: list[list[float]], weight_format: str) -> bytes:
    """Return the single panel without its biases."""
    blob = pack(np.array(weights, np.float32), weight_format=weight_format)
    return blob[HEADER_BYTES + 4 * PANEL :].tobytes()


def test_the_header_and_the_biases_are_where_the_kernels_look() -> None:
    weights, bias = np.ones((3, 40, 5), np.float32), np.arange(120, dtype=np.float32).reshape(3, 40)
    blob = pack(weights, bias, weight_format="wint8")
    panel = 448  # 128 of biases, 128 of scales, 5 * 32 of weights: 416, rounded up to a multiple of 64
    assert blob[:64].tobytes() == b"FDMATRIX" + struct.pack("<6I2Q16x", 2, 2, 40, 5, 3, 0, panel, 2 * panel)
    assert blob.nbytes == 64 + 3 * 2 * panel
    assert blob.ctypes.data % 64 == 0
    second = 64 + 2 * panel
    assert blob[second : second + 128].view(np.float32).tolist() == list(range(40, 72))
    tail = second + panel
    assert blob[tail : tail + 128].view(np.float32).tolist() == [*range(72, 80), *[0.0] * 24]


def test_float32_has_the_outputs_of_an_input_side_by_side() -> None:
    assert body([[1, 2], [3, 4], [5, 6]], "float32") == struct.pack("<3f116x3f116x", 1, 3, 5, 2, 4, 6)


def test_bfloat16_layout_pairs_inputs_per_word_and_pads_with_zeros() -> None:
    weights = [[float(10 * output + k) for k in range(3)] for output in range(18)]
    halves = from_bfloat16(np.frombuffer(body(weights, "bfloat16"), np.uint16)).reshape(16, 32, 2)
    outputs = [*(10.0 * np.arange(18)), *[0.0] * 14]
    assert halves[0, :, 0].tolist() == outputs
    assert halves[0, :18, 1].tolist() == [value + 1 for value in outputs[:18]]
    assert halves[1, :18, 0].tolist() == [value + 2 for value in outputs[:18]]
    assert not halves[:, 18:].any()
    assert not halves[1, :, 1].any()
    assert not halves[2:].any()


def test_wint8_has_scales_and_then_integers() -> None:
    expected = struct.pack("<2f120x", 0.5, 2.0) + struct.pack("<2b30x2b30x", -127, 127, 3, 1)
    assert body([[-63.5, 1.5], [254, 2]], "wint8") == expected


def test_wint4_has_scale_and_minimum_per_group_and_quads_of_inputs() -> None:
    """Output 1 counts up 0..15, output 17 down by 2.5 from -8, over one input more than a group."""
    weights = np.zeros((18, GROUP + 1), np.float32)
    weights[1] = -8 + 2.5 * (np.arange(GROUP + 1) % 16)
    weights[17] = -8 + 2.5 * (15 - np.arange(GROUP + 1) % 16)
    raw = np.frombuffer(body(weights.tolist(), "wint4"), np.uint32)[: 2 * 160]
    words, quads = raw[:32], raw[32:160].reshape(8, 16)
    scale, minimum = 0x4020, 0xC100  # 2.5 and -8 as bfloat16
    assert {i: hex(word) for i, word in enumerate(words) if word} == {
        1: hex(minimum << 16 | scale),
        17: hex(minimum << 16 | scale),
    }
    assert not np.delete(quads, 1, axis=1).any()
    assert quads[0, 1].tobytes() == bytes([0xF0, 0xE1, 0xD2, 0xC3])
    assert quads[3, 1].tobytes() == bytes([0x3C, 0x2D, 0x1E, 0x0F])
    # The second group has a single input, whose weights all equal its minimum.
    assert (raw[160 + 1] >> 16, raw[160 + 17] >> 16) == (0xC100, to_bfloat16(np.array([29.5], np.float32))[0])
    assert not raw[192:].any()


@given(formats, st.integers(1, 3), sizes, sizes, seeds)
def test_packed_weights_are_recovered(
    weight_format: str, count: int, outputs: int, inputs: int, seed: int
) -> None:
    weights, bias = draw(seed, count, outputs, inputs), draw(seed, count, outputs, 1)[..., 0]
    blob = pack(weights, bias, weight_format=weight_format)
    assert PackedShape.of(blob) == PackedShape(weight_format, outputs, inputs, count)
    values, biases = unpack(blob)
    np.testing.assert_array_equal(biases, bias)
    assert (np.abs(values - weights) <= tolerance(weights, weight_format)).all()


def tolerance(weights: np.ndarray, weight_format: str) -> np.ndarray:
    """Return the largest error of each weight."""
    magnitudes = np.abs(weights).max(axis=-1, keepdims=True)
    if weight_format == "float32":
        return np.zeros_like(weights)
    if weight_format == "bfloat16":
        return np.abs(weights) * 2.0**-8
    if weight_format == "wint8":
        # Half a step, plus the rounding of the scale.
        return magnitudes / 127 * 0.501 + 1e-36
    # Half a step of a range of up to twice the magnitude, plus the clipping and rounding of s and m.
    return magnitudes * 2 * (0.5 / 15 + 0.04) + 1e-36


@given(st.sampled_from(["float32", "bfloat16", "wint8"]), sizes, sizes, seeds)
def test_values_that_a_format_can_hold_are_exact(
    weight_format: str, outputs: int, inputs: int, seed: int
) -> None:
    once, _ = unpack(pack(draw(seed, outputs, inputs), weight_format=weight_format))
    twice, _ = unpack(pack(once[0], weight_format=weight_format))
    # 127 times a scale is rounded, so dividing by 127 again may be one bit off.
    np.testing.assert_allclose(twice, once, rtol=2e-7 if weight_format == "wint8" else 0, atol=1e-36)


@given(sizes, st.integers(1, 4), seeds)
def test_weights_on_a_grid_of_sixteen_levels_are_exact_in_wint4(outputs: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = random.integers(0, 16, (outputs, groups, GROUP))
    # Both ends of the grid occur, as in every group that was quantised from its range.
    levels[..., 3], levels[..., 20] = 0, 15
    scales = from_bfloat16(to_bfloat16(random.lognormal(size=(outputs, groups, 1)).astype(np.float32)))
    minima = from_bfloat16(
        to_bfloat16(-8 * scales * random.uniform(0.5, 1.5, scales.shape).astype(np.float32))
    )
    weights = (levels.astype(np.float32) * scales + minima).reshape(outputs, groups * GROUP)
    values, _ = unpack(pack(weights, weight_format="wint4"))
    np.testing.assert_array_equal(values[0], weights)


def test_wint4_beats_the_plain_grid_from_least_to_greatest() -> None:
    weights = np.random.default_rng(1).standard_normal((256, 16 * GROUP)).astype(np.float32)
    groups = weights.reshape(256, 16, GROUP)
    low, step = groups.min(axis=2, keepdims=True), np.ptp(groups, axis=2, keepdims=True) / 15
    plain = (np.rint((groups - low) / step) * step + low).reshape(weights.shape)
    values, _ = unpack(pack(weights, weight_format="wint4"))
    assert ((values[0] - weights) ** 2).sum() < 0.93 * ((plain - weights) ** 2).sum()


@given(formats, st.integers(1, 90), st.integers(1, 70), seeds, st.integers(1, 3))
def test_rows_can_be_packed_some_panels_at_a_time(
    weight_format: str, outputs: int, inputs: int, seed: int, panels: int
) -> None:
    weights, bias = draw(seed, outputs, inputs), draw(seed, outputs, 1)[:, 0]
    step = panels * PANEL
    parts = [
        pack_panels(weights[i : i + step], bias[i : i + step], weight_format=weight_format)
        for i in range(0, outputs, step)
    ]
    whole = pack_panels(weights, bias, weight_format=weight_format)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_is_rounded_to_the_nearest_and_to_even(values: list[float]) -> None:
    array = np.array(values, np.float32)
    bits = to_bfloat16(array)
    neighbours = from_bfloat16(np.stack([bits - np.uint16(1), bits + np.uint16(1)]))
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(np.float64(from_bfloat16(bits)) - array)
        others = np.abs(np.float64(neighbours) - array)
    finite = np.isfinite(errors)
    closer = ~(others < errors)
    even = (others != errors) | (bits % 2 == 0)
    assert (closer & even)[:, finite & (bits & 0x7FFF != 0)].all()


@given(sizes, st.integers(1, 9), st.sampled_from([(), (2,)]))
def test_gate_and_up_are_interleaved_by_sixteen(width: int, inputs: int, stack: tuple[int, ...]) -> None:
    gate = draw(1, *stack, width, inputs)
    up = draw(2, *stack, width, inputs)
    both = interleave_gate_up(gate, up)
    assert both.shape == (*stack, 2 * -(-width // 16) * 16, inputs)
    assert len(gate_up_order(width)) == both.shape[-2]
    np.testing.assert_array_equal(both[..., 0, :], gate[..., 0, :])
    np.testing.assert_array_equal(both[..., 16, :], up[..., 0, :])
    assert not both[..., PANEL * (width // 16) + width % 16 : PANEL * (width // 16) + 16, :].any()
    for half, back in zip((gate, up), split_gate_up(both, width), strict=True):
        np.testing.assert_array_equal(back, half)


@pytest.mark.parametrize(("outputs", "inputs", "size"), [(256, 576, 299008), (64, 40, 2 * (128 + 64 * 64))])
def test_stacked_matrices_begin_at_pages_where_that_costs_little(
    outputs: int, inputs: int, size: int
) -> None:
    assert PackedShape("bfloat16", outputs, inputs, count=8).matrix_bytes == size
    alone = PackedShape("bfloat16", outputs, inputs)
    assert alone.matrix_bytes == alone.panels * alone.panel_bytes


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob[:40],
        lambda blob: blob[:-1],
        lambda blob: np.concatenate([blob, blob]),
        lambda blob: np.concatenate([np.array([0], np.uint8), blob[1:]]),
        lambda blob: np.concatenate([blob[:8], np.array([9], np.uint8), blob[9:]]),
        lambda blob: np.concatenate([blob[:16], np.array([99], np.uint8), blob[17:]]),
    ],
)
def test_damaged_packed_matrix_is_refused(damage: Callable[[np.ndarray], np.ndarray]) -> None:
    blob = pack(np.ones((4, 4), np.float32), weight_format="wint4")
    with pytest.raises(ValueError, match=r"packed matrix|do not match"):
        PackedShape.of(damage(blob))
