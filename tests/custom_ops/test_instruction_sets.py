"""AVX-512 and AVX2 give the same bits, generic code agrees within rounding, and each is row invariant."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

INSTRUCTION_SETS = ("amx", "avx512", "avx2", "generic")


@cache
def results(instruction_set: str) -> dict[str, np.ndarray] | str:
    """Return the results of every operation by name, or a line that says why there are none."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "results.npz"
        process = subprocess.run(
            [sys.executable, "-m", "tests.custom_ops.every_operation", str(file)],
            env=os.environ | {"FD_ISA": instruction_set},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            return process.stderr.strip().splitlines()[-1]
        return dict(np.load(file))


def results_here(instruction_set: str) -> dict[str, np.ndarray]:
    found = results(instruction_set)
    if isinstance(found, dict):
        return found
    if "this processor has" in found:
        pytest.skip(found)
    pytest.fail(found)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_operation_runs_on_the_requested_instruction_set(instruction_set: str) -> None:
    assert results_here(instruction_set)["instruction set"] == instruction_set


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_row_has_the_same_bits_alone_and_in_a_batch(instruction_set: str) -> None:
    found = results_here(instruction_set)
    names = [name for name in found if f"{name} alone" in found]
    assert len(names) == 12
    for name in names:
        np.testing.assert_array_equal(found[name], found[f"{name} alone"], err_msg=name)


def test_avx512_and_avx2_agree_to_the_bit() -> None:
    one, other = results_here("avx512"), results_here("avx2")
    for name in one.keys() - {"instruction set"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_plain_code_agrees_within_rounding() -> None:
    """Generic code rounds between product and sum."""
    one, other = results_here("generic"), results_here("avx2")
    for name in one.keys() - {"instruction set"}:
        scale = np.abs(one[name]).max()
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=3e-6 * scale, err_msg=name)


def test_amx_equals_avx512_except_for_rounding_with_bfloat16_matrices() -> None:
    one, other = results_here("amx"), results_here("avx512")
    for name in one.keys() - {"instruction set"}:
        if name.startswith(("linear", "fused_moe")) and "bfloat16" in name:
            scale = np.abs(one[name]).max()
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-2 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_unknown_instruction_set_is_a_one_line_error() -> None:
    found = results("sse9")
    assert isinstance(found, str)
    assert "FD_ISA is 'sse9'; this processor has generic" in found
