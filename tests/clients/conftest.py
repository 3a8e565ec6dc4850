"""A router with two real replicas of the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import openai
import pytest

from ..entrypoints.conftest import ApiServer
from ..router.conftest import RouterProcess, start_router
from ..waiting import wait_until

__all__ = ["start_router"]


@dataclass(frozen=True)
class System:
    router: RouterProcess
    replicas: tuple[ApiServer, ...]

    @property
    def base_url(self) -> str:
        """Address that users give to their clients."""
        return f"{self.router.url}/v1"

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ExitStack() as stack:
        router = RouterProcess(tmp_path_factory.mktemp("router"))
        stack.callback(router.stop)
        # Descriptions of tools are long for the tiny tokenizer.
        flags = ["--max-model-len", "2048", "--router", router.url]
        flags += ["--data-parallel-size", "2", "--local-data-parallel-id"]
        replicas = tuple(
            stack.enter_context(ApiServer(tmp_path_factory.mktemp("replica"), *flags, str(number)))
            for number in range(2)
        )
        for replica in replicas:
            replica.wait_ready()
        wait_until(
            lambda: {replica.url for replica in replicas} <= router.urls(), "all are there", deadline=60
        )
        yield System(router, replicas)
