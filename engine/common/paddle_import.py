"""Import of Paddle without its side effects, and without the parts of it that an engine does not use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Lines of paddle/version/__init__.py. Any other release or build is imported as a whole, because it may use a
# deferred part during its import.
_KNOWN = ("full_version     = '3.3.1'", "cuda_version     = 'False'")
#: Modules of Paddle that are imported when they are first used. They take more than half of the CPU time.
DEFERRED = (
    *("_paddle_docs", "amp", "audio", "callbacks", "compat", "dataset", "decomposition", "distributed"),
    *(
        "distribution",
        "fft",
        "geometric",
        "hapi",
        "hub",
        "incubate",
        "inference",
        "io",
        "jit",
        "metric",
        "nn",
    ),
    *("onnx", "optimizer", "profiler", "quantization", "reader", "signal", "sparse", "static", "text"),
    *("utils.cpp_extension", "utils.download", "utils.image_util", "utils.install_check", "vision"),
)


def import_paddle() -> None:
    """Import Paddle without creating its data set directory and without its signal handlers.

    Paddle creates the directory in the home directory or in /tmp and fails if it cannot, so a full or
    read-only disk would prevent the start of replicas. Its signal handlers print a C++ stack trace on
    SIGTERM. Call this before starting threads and before setting signal handlers.
    """
    if "paddle" in sys.modules:
        return
    make, temporary, flags = os.makedirs, tempfile.tempdir, sys.getdlopenflags()
    os.makedirs = lambda *_, **__: None
    # Paddle's own search for a writable directory would fail as well.
    tempfile.tempdir = tempfile.tempdir or "/tmp"
    # Resolves a function of a library when it is first called; an engine calls few of the 90,000.
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        with _deferring() if _is_known() else contextlib.nullcontext():
            import paddle
    finally:
        os.makedirs, tempfile.tempdir = make, temporary
        sys.setdlopenflags(flags)
    paddle.disable_signal_handler()


def _is_known() -> bool:
    spec = importlib.util.find_spec("paddle")
    if spec is None or spec.origin is None:
        return False
    try:
        version = Path(spec.origin).with_name("version").joinpath("__init__.py").read_text()
    except OSError:
        return False
    return all(line in version for line in _KNOWN)


@contextlib.contextmanager
def _deferring() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        finder.is_deferring = False
        for name, module in list(sys.modules.items()):
            if isinstance(module, _DeferredModule):
                del sys.modules[name]


class _Finder:
    """Finds placeholders for the deferred modules, and the modules when one of them is imported later."""

    def __init__(self) -> None:
        self.is_deferring = True
        self._names = frozenset(f"paddle.{name}" for name in DEFERRED)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.is_deferring:
            is_below = isinstance(sys.modules.get(name.rpartition(".")[0]), _DeferredModule)
            return _spec(name, _DeferredModule(name)) if is_below or name in self._names else None
        if name not in self._names:
            return None
        sys.meta_path.remove(self)
        # They import each other, which works only in Paddle's order: this one is first.
        paddle = importlib.import_module("paddle")
        is_dynamic = paddle.in_dynamic_mode()
        importlib.import_module("paddle.distributed.fleet")
        if is_dynamic:
            # One of its modules calls enable_static().
            paddle.disable_static()
        return _spec(name, sys.modules[name]) if name in sys.modules else None


class _Existing:
    """Loads a module that exists already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec or module.__spec__


def _spec(name: str, module: ModuleType) -> ModuleSpec:
    return ModuleSpec(name, _Existing(module), is_package=True)  # type: ignore[arg-type]


class _DeferredModule(ModuleType):
    """Stands for a module during Paddle's import; afterwards its attributes are those of the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            return _DeferredName(self.__name__, name)
        return getattr(importlib.import_module(self.__name__), name)


class _DeferredName:
    """Stands for a function or a class that was imported from a deferred module."""

    def __init__(self, module: str, name: str) -> None:
        self._deferred = (module, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._load()(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._load())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._load(),)

    def _load(self) -> Any:
        module, name = self._deferred
        loaded = importlib.import_module(module)
        if isinstance(loaded, _DeferredModule):
            raise ImportError(f"{module}.{name} is used during the import of Paddle, which defers it")
        return getattr(loaded, name)
