"""Metadata lives in setup.cfg; here the libraries are compiled: the operations, against the Paddle that is
installed, the same kernels behind the C interface of a device, and the router's fast path."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

try:
    from paddle.utils.cpp_extension import CppExtension
except ImportError as error:
    raise SystemExit(
        f"fd-dp: building needs Paddle ({error}); pip install paddlepaddle first, or leave out "
        "--no-build-isolation"
    ) from None

OPERATIONS = Path("custom_ops")


class BuildLibraries(build_ext):
    """Compiles the sources of an extension side by side, and those that two have in common once.

    Not Paddle's own command, which is made for `setup.py install`: it leaves its object files in wheels, and
    has another name for the library in each way of installing.
    """

    def run(self) -> None:
        self._compiled: dict[str, list[str]] = {}
        super().run()

    def build_extensions(self) -> None:
        compile_all, compiled = self.compiler.compile, self._compiled

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            new = [source for source in sources if source not in compiled]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: compile_all([source], **options), new)
                compiled.update(zip(new, parts, strict=True))
            return [file for source in sources for file in compiled[source]]

        self.compiler.compile = compile_each
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        # Libraries, not modules of Python: Paddle loads one, ctypes the other. So they have no suffix of one
        # interpreter.
        return os.path.join(*fullname.split(".")) + ".so"


class Wheel(bdist_wheel):
    """A wheel for every version of Python, because the libraries are none of its modules."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def sources(*folders: str) -> list[str]:
    return sorted(str(file) for folder in folders for file in (OPERATIONS / folder).rglob("*.cc"))


depends = sorted(str(file) for file in OPERATIONS.rglob("*") if file.suffix in (".h", ".inl"))
# Fused multiply-adds are written where they are meant: if the compiler chose them, the bits of a sum
# would depend on how it was inlined. No -march: each file of kernels names its instruction set.
flags = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off"]
interface = sources("cpu/device")

operations = CppExtension(
    sources=[source for source in sources("cpu", "paddle") if source not in interface],
    include_dirs=[str(OPERATIONS / folder) for folder in ("include", "cpu", "paddle")],
    depends=depends,
    extra_compile_args=flags,
)
operations.name = "fastdeploy.custom_ops.libfd_ops"

# This library needs no Paddle. A process may load both libraries, so this one must not call the other.
device = Extension(
    "fastdeploy.custom_ops.libfd_cpu",
    sources("cpu"),
    include_dirs=[str(OPERATIONS / folder) for folder in ("include", "cpu")],
    depends=depends,
    extra_compile_args=flags,
    extra_link_args=["-Wl,-Bsymbolic", "-pthread"],
    language="c++",
)

fast_path = Extension(
    "fastdeploy.daemon.router.http.libfd_fast_path",
    ["daemon/router/http/fast_path.cc"],
    extra_compile_args=["-O2", "-g0", "-std=c++17", "-Wall", "-Wextra", "-pthread"],
    language="c++",
)

setup(
    ext_modules=[operations, device, fast_path],
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildLibraries},
)
