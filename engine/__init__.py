"""fd-dp: data-parallel serving of Mixture-of-Experts language models.

Importing this package is cheap: the daemon and the router are subpackages and must not load Paddle.
"""

import importlib
import warnings
from typing import Any

__version__ = "0.1.0"

#: Names that users import from here, as in FastDeploy.
_OFFLINE = ("LLM", "SamplingParams")

# On import Paddle recommends installing ccache, but nothing is compiled at run time.
warnings.filterwarnings("ignore", message="No ccache found")


def __getattr__(name: str) -> Any:
    """Import the classes for generation without a server when a user first asks for one."""
    if name in _OFFLINE:
        return getattr(importlib.import_module(".entrypoints.llm", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
