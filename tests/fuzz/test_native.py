"""A short run of the compiled fuzz targets of `make fuzz`."""

from __future__ import annotations

import pytest

from . import native
from .native import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.skipif(not native.is_possible(), reason=native.MISSING)
def test_the_fuzzer_finds_nothing_in_seconds(target: Target) -> None:
    native.build(target)
    outcome = native.run(target, 5)
    assert not outcome.finding, outcome.finding
    assert outcome.inputs > 100
