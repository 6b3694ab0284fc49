"""Builds the optional native library ``torch_prepared._C``; metadata is in pyproject.toml.

TORCH_PREPARED_CUDA    auto (default): CUDA kernels when torch has CUDA and nvcc is found;
                       1: build them or fail; 0: CPU kernels only.
TORCH_PREPARED_NO_EXT  1: install without the native library.

torch is never a build requirement: without torch or a C++ compiler the pure-Python package is
installed. Build with ``pip install --no-build-isolation .`` to get the native library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from setuptools import setup

CPU_SOURCES = [
    "csrc/library.cpp",
    "csrc/cpu/activation_coefficients.cpp",
    "csrc/cpu/chain_bounds.cpp",
    "csrc/cpu/chain_slopes.cpp",
    "csrc/cpu/concretize.cpp",
    "csrc/cpu/interval_linear.cpp",
    "csrc/cpu/relaxed_backward.cpp",
    "csrc/cpu/row_program.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/activation_coefficients.cu",
    "csrc/cuda/concretize.cu",
    "csrc/cuda/interval_linear.cu",
    "csrc/cuda/relaxed_backward.cu",
]
# Oldest torch whose stable interface the library uses: one binary serves all newer ones.
STABLE_INTERFACES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No contraction or reassociation: the directed roundings in csrc/common/rounding.h rely on it.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]


def why_no_extension() -> str | None:
    """The reason not to build the native library, or None."""
    if os.environ.get("TORCH_PREPARED_NO_EXT") == "1":
        return "TORCH_PREPARED_NO_EXT=1"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build environment (use --no-build-isolation)"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def why_no_cuda() -> str | None:
    """The reason not to build the CUDA kernels, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support"
    if CUDA_HOME is None or not os.path.isfile(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return "nvcc was not found (set CUDA_HOME)"
    return None


def wants_cuda() -> bool:
    """Decides on the CUDA kernels; stops the build when they are requested but impossible."""
    choice = os.environ.get("TORCH_PREPARED_CUDA", "auto")
    if choice not in {"auto", "0", "1"}:
        sys.exit(f"TORCH_PREPARED_CUDA: got {choice!r}, expected auto, 0 or 1")
    if choice == "0":
        return False
    reason = why_no_cuda()
    if reason is not None and choice == "1":
        sys.exit(f"TORCH_PREPARED_CUDA=1: {reason}")
    return reason is None


def native_library() -> dict[str, object]:
    """Arguments of ``setup`` that build the native library."""
    reason = why_no_extension()
    if reason is not None:
        if os.environ.get("TORCH_PREPARED_CUDA") == "1":
            sys.exit(f"TORCH_PREPARED_CUDA=1: {reason}")
        print(f"torch_prepared: building without the native library: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = wants_cuda()
    options = [*STABLE_INTERFACES, *(["-DUSE_CUDA", "-DPREPARED_WITH_CUDA"] if cuda else [])]
    extension = (CUDAExtension if cuda else CppExtension)(
        "torch_prepared._C",
        sources=CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        extra_compile_args={"cxx": CXX_FLAGS + options, "nvcc": NVCC_FLAGS + options},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**native_library())
