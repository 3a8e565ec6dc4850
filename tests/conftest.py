"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A shell starts background jobs with SIGINT ignored, and every process that a test starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_USER_MODEL_CACHE = os.environ.get("FD_MODEL_CACHE")

# No deadline: a busy machine is not a bug. Developers look for new counterexamples; CI, which decides
# whether a change may land, takes the same examples each time.
settings.register_profile("person", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "person")


#: Fixtures that start processes. Tests that use one are left out of `make test-fast`.
STARTS_PROCESSES = frozenset(
    {
        *("calling", "chrome", "demo", "endpoint", "engine", "engines", "faulty", "fleet", "front", "group"),
        *("installed_service", "joined", "launched", "launcher", "lent_router", "live"),
        *("machines", "new_group", "nginx", "pair", "prometheus", "quick_beats", "ranks"),
        *("replica", "resumed", "roomy", "router", "running", "server", "service", "serving"),
        *("shared_router", "small_cgroup", "small_fleet", "staged", "stage", "stalled"),
        *("standing", "start", "start_fleet", "start_monitor", "start_replica", "start_router"),
        *("start_with_registry", "stopped", "system", "thinking", "told_router", "unlimited", "with_hosts"),
    }
)
#: Files whose tests start processes without such a fixture.
PROCESS_FILES = frozenset(
    {
        *("test_board_deaths", "test_commands", "test_disk_removed", "test_drain", "test_expert_parallel"),
        *("test_intents", "test_library_environment", "test_replica_processes", "test_resume"),
        *("test_llm", "test_rollout", "test_run_batch", "test_tool_conformance", "test_weight_cache"),
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
        if item.path.stem in PROCESS_FILES or not STARTS_PROCESSES.isdisjoint(fixtures):
            item.add_marker("processes")


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the hundreds of small models that tests pack out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_MODEL_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture(scope="module")
def user_model_cache(model_cache: None) -> Iterator[None]:
    """Use the user's cache, so that the demo model is fetched and packed only once."""
    with pytest.MonkeyPatch.context() as patch:
        if _USER_MODEL_CACHE is None:
            patch.delenv("FD_MODEL_CACHE")
        else:
            patch.setenv("FD_MODEL_CACHE", _USER_MODEL_CACHE)
        yield
