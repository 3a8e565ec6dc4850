"""The description of the API holds: schemathesis draws requests from it and checks the responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    allow_header_conformance,
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from fastdeploy.common.api_paths import is_api_path
from fastdeploy.entrypoints.openai.api_description import openapi

from .conftest import System

DESCRIPTION = json.loads(openapi())
OPERATIONS = [(path, method) for path, methods in DESCRIPTION["paths"].items() for method in methods]
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance),
    *(response_schema_conformance, unsupported_method, allow_header_conformance),
]
MESSAGES = [{"role": "user", "content": "a"}]
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "prompt_token_ids": None},
    "/v1/completions": {"prompt": "a", "prompt_token_ids": None},
    "/v1/responses": {"input": "a"},
    "/tokenize": {"messages": MESSAGES, "prompt": None},
}


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_responses_to_described_requests_are_as_described(
    system: System, path: str, method: str, examples: int
) -> None:
    seen: list[tuple[int, str]] = []

    def check(case: Case) -> None:
        if isinstance(case.body, dict):
            shorten(case.path, case.body)
        if len(seen) % 2:
            make_acceptable(case, streamed=len(seen) % 4 == 1)
        seen.append(checked(system, case))

    run(path, method, GenerationMode.POSITIVE, examples, check)
    described = DESCRIPTION["paths"][path][method]["responses"]["200"]["content"]
    assert {(200, kind) for kind in described} <= set(seen)


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", [path for path, method in OPERATIONS if method == "post"])
def test_requests_that_are_not_described_are_refused(system: System, path: str, examples: int) -> None:
    def check(case: Case) -> None:
        status, _ = checked(system, case)
        assert 400 <= status < 500

    run(path, "post", GenerationMode.NEGATIVE, examples, check)


def run(path: str, method: str, mode: GenerationMode, examples: int, check: Callable[[Case], None]) -> None:
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][method]

    examine = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(case=operation.as_strategy(generation_mode=mode))(check))
    examine()


def shorten(path: str, body: dict[str, Any]) -> None:
    """Limit the work that the request makes."""
    if path in LIMITS:
        body[LIMITS[path]] = 2
    for name, most in (("max_completion_tokens", 2), ("n", 3), ("best_of", 3)):
        if isinstance(body.get(name), int | float):
            body[name] = min(body[name], most)


def make_acceptable(case: Case, *, streamed: bool) -> None:
    """Replace what hardly any drawn request has right."""
    if case.path_parameters:
        case.path_parameters["model"] = "tiny"
    if isinstance(case.body, dict):
        case.body |= PROMPTS.get(case.path, {})
        if streamed and case.path in LIMITS:
            case.body["stream"] = True


def checked(system: System, case: Case) -> tuple[int, str]:
    """Send the request and check the response; return its status and media type."""
    # The router keeps the paths for operators to itself.
    url = system.router.url if is_api_path(case.path) else system.replicas[0].url
    response = case.call(base_url=url, timeout=60)
    case.validate_response(response, checks=CHECKS)
    kind = response.headers["content-type"][0].partition(";")[0]
    return response.status_code, kind
