"""Models of many shapes against stored results of transformers; `make parity` computes them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import LAYOUTS
from tests.parity.compare import compare

RECORDINGS = sorted((Path(__file__).parent.parent / "fixtures" / "parity").glob("*.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.stem)
def test_logits_texts_and_routing_equal_transformers(recording: Path, layout: str) -> None:
    parity = compare(recording, layout)
    assert parity.holds, parity
