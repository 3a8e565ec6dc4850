"""A worker that sends itself a signal in the middle of a step if FD_TEST_TRAP is PHASE:LAYER:NTH:SIGNAL."""

from __future__ import annotations

import os
import signal
import sys

from fastdeploy.core import worker
from fastdeploy.core.cpu_share import SINGLE_THREADED


def main() -> int:
    if "FD_TEST_TRAP" not in os.environ:
        return worker.main()
    # The worker sets these before it imports Paddle, which the following imports do.
    os.environ.update(SINGLE_THREADED)
    from fastdeploy.expert_parallel import member
    from fastdeploy.expert_parallel.layout import PHASES

    phase, layer, nth, name = os.environ["FD_TEST_TRAP"].split(":")

    class TrappedGroup(member.NativeGroup):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.trap(PHASES.index(phase), int(layer), int(nth), signal.Signals[name])

    member.NativeGroup = TrappedGroup  # type: ignore[misc, assignment]
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
