"""Command lines and environments as terminals and logs show them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common import masking


@pytest.mark.parametrize(
    "name",
    [
        *("--api-key", "--api-key=x", "FD_API_KEY", "HF_TOKEN", "TOKEN", "ClientSecret", "db-password"),
        *("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert masking.is_secret(name)


@pytest.mark.parametrize(
    "name", ["--model", "--max-num-batched-tokens", "--tokenizer", "--api-keys-file", "FD_LOG_DIR"]
)
def test_harmless_names_are_not_masked(name: str) -> None:
    assert not masking.is_secret(name)


def test_values_of_a_secret_flag_are_masked_up_to_the_next_flag() -> None:
    words = ["python", "--key", "a", "b", "--port", "1", "--token=c", "d"]
    assert masking.argv(words) == ["python", "--key", "***", "***", "--port", "1", "--token=***", "d"]


@given(st.dictionaries(st.sampled_from(["A_KEY", "B_TOKEN", "PATH"]), st.text()))
def test_an_environment_keeps_its_names(variables: dict[str, str]) -> None:
    shown = masking.env(variables)
    assert shown.keys() == variables.keys()
    assert {shown[name] for name in variables if name != "PATH"} <= {masking.MASK}
    assert shown.get("PATH") == variables.get("PATH")
