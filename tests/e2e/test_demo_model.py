"""A first question to the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from .conftest import System

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.usefixtures("user_model_cache")]


def test_the_demo_model_knows_the_capital_of_france(tmp_path: Path) -> None:
    system = System(tmp_path, replicas=1, model="demo")
    try:
        system.wait_ready()
        answer = requests.post(
            f"{system.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "What is the capital of France?"}]},
            timeout=120,
        )
    finally:
        system.stop()
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
