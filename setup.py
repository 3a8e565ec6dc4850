"""Metadata lives in setup.cfg; here the compiled operations are built, with Paddle's own build rules."""

from pathlib import Path

from setuptools import setup

try:
    from paddle.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"fd-dp: building needs Paddle ({error}); "
        "pip install paddlepaddle first, or build without --no-build-isolation"
    ) from None

OPERATIONS = Path("custom_ops")

extension = CppExtension(
    sources=sorted(str(file) for folder in ("cpu", "paddle") for file in (OPERATIONS / folder).glob("*.cc")),
    include_dirs=[str((OPERATIONS / folder).absolute()) for folder in ("include", "cpu", "paddle")],
    # Fused multiply-adds are written where they are meant: the compiler must not choose them, because then the
    # bits of a sum would depend on how it was inlined. No -march: each kernel names its instruction set.
    extra_compile_args=[
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-Wall",
        # GCC 12 takes the undefined operands inside of AVX-512 intrinsics for mistakes (its bug 105593).
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    depends=[str(file) for file in OPERATIONS.rglob("*") if file.suffix in (".h", ".inl")],
)
extension.name = "fastdeploy.custom_ops._native"

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
