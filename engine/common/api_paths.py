"""Paths of the API of a replica, which the router passes on: all under /v1/, and a few beside it."""

from __future__ import annotations

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
CONFIG_PATH = "/config-info"
OPENAPI_PATH = "/openapi.json"
DOCS_PATH = "/docs"
#: The router sends it to all replicas.
ABORT_PATH = "/v1/abort_requests"

_WITH_KEY = frozenset({TOKENIZE_PATH, DETOKENIZE_PATH, CONFIG_PATH})
#: Paths that need no API key.
OPEN = frozenset({OPENAPI_PATH, DOCS_PATH})
BESIDE_V1 = _WITH_KEY | OPEN
_BESIDE_V1_BYTES = frozenset(path.encode() for path in BESIDE_V1)
#: Further paths that web pages may read.
_FOR_PAGES = frozenset({"/version", "/load", "/health", "/ping"})
_FOR_PAGES_BYTES = frozenset(path.encode() for path in _FOR_PAGES)


def is_api_path(path: str) -> bool:
    """Return True for a path of the API, as opposed to one for operators."""
    return path.startswith("/v1/") or path in BESIDE_V1


def is_raw_api_path(path: bytes) -> bool:
    """Do the same as `is_api_path` for a path as it is in a request, without a query."""
    return path.startswith(b"/v1/") or path in _BESIDE_V1_BYTES


def is_for_pages(path: str) -> bool:
    """Return True for a path whose responses web pages of allowed origins may read."""
    return is_api_path(path) or path in _FOR_PAGES


def is_raw_path_for_pages(path: bytes) -> bool:
    """Do the same as `is_for_pages` for a path as it is in a request, without a query."""
    return is_raw_api_path(path) or path in _FOR_PAGES_BYTES


def needs_key(path: str) -> bool:
    """Return True if a path of a replica needs an API key where keys are set."""
    return path.startswith("/v1") or path in _WITH_KEY
