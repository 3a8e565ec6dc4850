"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A shell starts background work with SIGINT ignored, and each process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_USER_MODEL_CACHE = os.environ.get("FD_MODEL_CACHE")

# No deadline: a busy machine is not a bug. People look for new counterexamples; CI, which decides whether a
# change may land, takes the same examples each time.
settings.register_profile("person", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "person")


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hundreds of small models get packed; the cache of whoever runs the tests is not the place for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_MODEL_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture(scope="module")
def user_model_cache(model_cache: None) -> Iterator[None]:
    """For tests of the demo model, which is fetched and packed once and not for every run."""
    with pytest.MonkeyPatch.context() as patch:
        if _USER_MODEL_CACHE is None:
            patch.delenv("FD_MODEL_CACHE")
        else:
            patch.setenv("FD_MODEL_CACHE", _USER_MODEL_CACHE)
        yield
