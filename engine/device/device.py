"""Where a replica computes: the contract between the engine and a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from ..common.request import Batch
from .draws import Draw, Drawn, draw_from

#: Called with the completed fraction and a description of the current stage; may raise.
Progress = Callable[[float, str], None]


#: A submitted step, of a type that is the runner's own.
Ticket = Any
#: Tokens drawn for the sampling rows of a step, and those for its scored positions; None if it has none.
Results = tuple[Drawn | None, Drawn | None]


class Runner(Protocol):
    """Computes batches. It hides tensors and the memory of the cache from the engine."""

    #: True if a second step may be submitted before the first one is awaited. Tokens that the first one draws
    #: are then named by their rows (`ScheduledSequence.drawn_by`).
    runs_ahead: bool

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> Ticket:
        """Begin a step: write keys and values of all rows to the cache, compute logits, and draw from them.

        Position p of a sequence is stored in block `block_ids[p // block_size]` at offset `p % block_size`.
        Positions before `start` are already computed; no other slot may be written. Steps read and write the
        cache in the order of their submission. Nothing of the arguments is read after the return.

        Args:
            sampled: a row for each sampling row of the batch, in its order; None if there is none.
            scored: a row for each scored position of the batch, in its order; None if there is none.

        Raises:
            DeviceBroken: the process must end.
        """
        ...

    def wait(self, ticket: Ticket) -> Results:
        """Return the results of a step; each step is awaited once, in the order of submission.

        Raises:
            DeviceBroken: the process must end.
        """
        ...


class Device(Runner, Protocol):
    """A place with memory for weights and cache, on which the network runs.

    The order is: `load`, `allocate_cache`, then any number of steps. Nothing is allocated in a step.
    """

    @property
    def title(self) -> str:
        """Return a description for the log, such as "8 threads on amx" or "NVIDIA H200"."""
        ...

    @property
    def numeric_version(self) -> str:
        """Return the version of the arithmetic. Devices with equal versions compute the same bits."""
        ...

    def load(self, progress: Progress) -> None:
        """Read the weights of the checkpoint."""
        ...

    def allocate_cache(self, progress: Progress) -> int:
        """Allocate the KV cache, prepare the steps, and return the number of blocks."""
        ...

    def close(self) -> None:
        """Free what the device holds."""
        ...


class TensorRunner(ABC):
    """A runner whose logits are tensors in host memory. A submitted step is complete."""

    runs_ahead = False

    @abstractmethod
    def execute(self, batch: Batch) -> Any:
        """Write the cache as `Runner.compute` says, and return the logits.

        Returns:
            float32 [sampling rows + scored positions, vocabulary]: first the logits of the sampling rows,
            then those of the scored positions, both in batch order.
        """

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> Results:
        logits = self.execute(batch)
        if scored is None:
            return None if sampled is None else draw_from(logits, sampled), None
        if sampled is None:
            return None, draw_from(logits, scored)
        count = sampled.count
        return draw_from(logits[:count], sampled), draw_from(logits[count:], scored)

    def wait(self, ticket: Results) -> Results:
        return ticket
