"""Fixtures: Chromium, and the page of a router in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from ..router.conftest import fleet, lent_router, new_engine, running, shared_router, start_router
from .browser import Page, chromium

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

__all__ = ["fleet", "lent_router", "new_engine", "running", "shared_router", "start_router"]


@pytest.fixture(scope="session")
def chrome() -> Iterator[Chrome]:
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(chrome: Chrome) -> Iterator[Callable[[str], Page]]:
    pages: list[Page] = []

    def open_one(url: str) -> Page:
        pages.append(Page(chrome, url))
        return pages[-1]

    yield open_one
    for page in pages:
        page.close()
