"""What is loaded, what the native library defines, and that the reference can replace it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_prepared import ops
from torch_prepared.ops._register import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]


def test_build_info_says_what_is_present() -> None:
    info = ops.build_info()
    assert info.torch_version == torch.__version__
    assert info.native == (info.reason == "")
    assert torch.__version__ in str(info)
    assert ("native" in str(info)) == info.native


@pytest.mark.skipif(not ops.build_info().native, reason="the native library is not built")
@pytest.mark.parametrize("name", SCHEMAS)
def test_python_and_native_schemas_are_equal(name: str) -> None:
    operator = getattr(torch.ops.torch_prepared, name).default
    assert str(operator._schema) == f"torch_prepared::{name}{SCHEMAS[name]}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_prepared::{name}", "CPU")


def test_reference_runs_without_the_native_library() -> None:
    code = """
import sys
sys.modules["torch_prepared._C"] = None
import torch
from torch_prepared import ops
info = ops.build_info()
assert not info.native and info.reason, info
low, high = torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 0.75])
lines = ops.activation_coefficients(low, high, "tanh")
assert all(bool(line.isfinite().all()) for line in lines)
rows = torch.randn(1, 3, 2, requires_grad=True)
out, bias = ops.relaxed_backward(rows, *(line[None] for line in lines))
bound = bias + ops.concretize(out, low[None], high[None])
bound.sum().backward()
assert rows.grad is not None
ops.interval_linear(low[None], high[None], torch.ones(3, 2))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_benchmark_script_runs(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.fig_kernels", "run", "--smoke", "--output"]
    subprocess.run([*command, str(output)], check=True, timeout=300, cwd=ROOT)
    assert '"fraction_of_copy"' in output.read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library")
def test_freed_memory_is_kept_for_the_next_call() -> None:
    """Convolutions with fresh absolute weights of 9 MB soon cause no page faults any more."""
    code = """
import resource, torch
import torch_prepared.ops
torch.set_num_threads(1)
weight, x = torch.ones(512, 512, 3, 3), torch.ones(2, 512, 2, 2)
def faults():
    with torch.no_grad():
        torch.conv2d(x, weight.abs(), None, 1, 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start = max(faults() for _ in range(10))
print(max(faults() for _ in range(50)) - start)
"""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    )
    # The heap may grow once more by the 2304 pages of a weight; trimmed, it would again and again.
    assert int(done.stdout) < 2 * 2304
