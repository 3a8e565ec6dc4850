"""The header traceparent, and where traces go."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.common.trace_context import TraceContext, parse_traceparent
from fastdeploy.common.tracing_config import TracingConfig, tracing_config

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"
URL = "http://127.0.0.1:4318"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": URL}

hex_digits = st.text("0123456789abcdef")


def test_valid_header_is_read() -> None:
    context = parse_traceparent(VALID)
    assert context == TraceContext(TRACE, SPAN, 1)
    assert context.is_sampled
    assert context.header == VALID


@pytest.mark.parametrize(
    "value",
    [
        "",
        VALID.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01more",
        f"00-{TRACE}-{SPAN}-1",
        f"{VALID},{VALID}",
        f"{VALID}\n",
        f"00-{TRACE}-{SPAN}-0\u0661",
    ],
)
def test_invalid_header_is_ignored(value: str) -> None:
    assert parse_traceparent(value) is None


def test_later_version_may_have_more_fields() -> None:
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-fd-more") == TraceContext(TRACE, SPAN, 1)


@given(st.binary() | st.builds(lambda *words: "-".join(words).encode(), *[hex_digits] * 4))
def test_any_bytes_give_a_context_or_none(value: bytes) -> None:
    context = parse_traceparent(value.decode("latin-1"))
    if context is not None:
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", context.header)


@given(
    st.integers(1, 2**128 - 1).map("{:032x}".format),
    st.integers(1, 2**64 - 1).map("{:016x}".format),
    st.integers(0, 3),
)
def test_header_of_a_context_reads_as_the_context(trace_id: str, span_id: str, flags: int) -> None:
    context = TraceContext(trace_id, span_id, flags)
    assert parse_traceparent(context.header) == context


@given(st.integers(0, len(VALID) - 1), st.characters())
def test_one_wrong_character_is_noticed(index: int, char: str) -> None:
    context = parse_traceparent(VALID[:index] + char + VALID[index + 1 :])
    assert context is None or char in "0123456789abcdef" + VALID[index]


@pytest.mark.parametrize(
    ("flag", "environment", "config"),
    [
        ("", {}, None),
        ("", {"OTEL_SERVICE_NAME": "x"}, None),
        (URL, {}, TracingConfig(f"{URL}/v1/traces")),
        (f"{URL}/", {}, TracingConfig(f"{URL}/v1/traces")),
        (f"{URL}/my/path", {}, TracingConfig(f"{URL}/my/path")),
        ("", ENDPOINT, TracingConfig()),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, TracingConfig()),
        (URL, {"OTEL_SDK_DISABLED": "True"}, None),
        (URL, {"OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_endpoint_comes_from_flag_or_environment(
    flag: str, environment: dict[str, str], config: TracingConfig | None
) -> None:
    assert tracing_config(flag, None, environment) == config


@pytest.mark.parametrize("name", ["OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"])
def test_variable_that_is_not_supported_does_not_prevent_the_start(name: str) -> None:
    config = tracing_config("", None, {**ENDPOINT, name: "grpc"})
    assert config is not None
    assert name in config.obstacle


@pytest.mark.parametrize(
    ("flag", "ratio", "problem"),
    [
        ("collector:4318", None, "must be a URL"),
        ("http://", None, "must be a URL"),
        ("http://x:999999", None, "must be a URL"),
        ("http://a b", None, "must be a URL"),
        ("http://me:secret@x", None, "must not contain a password"),
        (URL, 1.5, "--trace-sample-ratio is 1.5; it must be 0..1"),
    ],
)
def test_wrong_flag_is_refused_without_its_secrets(flag: str, ratio: float | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        tracing_config(flag, ratio, {})
    assert "secret" not in str(error.value)
