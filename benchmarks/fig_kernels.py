"""Fused operators against the copy bandwidth of the device they run on.

``python -m benchmarks.fig_kernels run [--device cuda] [--threads 2] [--smoke]`` writes
``benchmarks/results/kernels_<device>.json``; ``... plot`` draws it from the JSON alone. Without a
command it does both. Each case is measured in turn with a copy of the same number of bytes, so
that both see the same machine. Bytes are those an operator must move: each distinct element of
its inputs read once, each output written once. On the CPU the script starts itself again with the C
allocator told to keep its memory, because page faults on fresh outputs would drown the kernels.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, write_json
from torch_prepared import ops

ROWS_CASES = {  # name -> (b, s, n), coefficients shared by the s rows of a batch element
    "n=50": (256, 2000, 50),
    "n=512": (64, 800, 512),
    "n=1001": (50, 500, 1001),
    "n=4096": (16, 400, 4096),
}
SMOKE_CASES = {"n=50": (4, 20, 50), "n=512": (2, 8, 512)}
ELEMENTS, SMOKE_ELEMENTS = 8_000_000, 4096
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
LINEAR, SMOKE_LINEAR = (512, 1024, 1024), (8, 32, 32)  # b, n, m


@dataclass(frozen=True)
class Case:
    """One measured call: what it must move, and how often it is repeated."""

    name: str
    call: Callable[[], object]
    bytes: int


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _row_cases(
    name: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype
) -> list[Case]:
    b, s, n = shape
    rows = torch.randn(b, s, n, device=device, dtype=dtype)
    coefficients = [torch.rand(b, 1, n, device=device, dtype=dtype) for _ in range(4)]
    center, radius = coefficients[0][:, 0], coefficients[1][:, 0]
    grad_rows, grad_bias = torch.randn_like(rows), rows[..., 0].clone()
    kernels = torch.ops.torch_prepared
    coefficient_bytes = _bytes(*coefficients)
    return [
        Case(
            f"relaxed_backward {name}",
            lambda: kernels.relaxed_backward(rows, *coefficients),
            _bytes(rows, rows, grad_bias) + coefficient_bytes,
        ),
        Case(
            f"relaxed_backward_grad {name}",
            lambda: kernels.relaxed_backward_grad(grad_rows, grad_bias, rows, *coefficients),
            _bytes(rows, rows, rows, grad_bias) + 2 * coefficient_bytes,
        ),
        Case(
            f"concretize {name}",
            lambda: kernels.concretize(rows, center, radius),
            _bytes(rows, grad_bias, center, radius),
        ),
    ]


def _element_cases(count: int, device: str, dtype: torch.dtype) -> list[Case]:
    lower = torch.randn(count, device=device, dtype=dtype)
    upper = lower + torch.rand_like(lower) * 2
    op = torch.ops.torch_prepared.activation_coefficients
    return [
        Case(
            f"activation_coefficients {kind}",
            lambda kind=kind: op(lower, upper, kind, 0.1, None),  # type: ignore[misc]  # default binds kind
            6 * _bytes(lower),
        )
        for kind in ("relu", "tanh", "sigmoid", "softplus", "gelu")
    ]


def _linear_cases(sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Case]:
    b, n, m = sizes
    lower = torch.randn(b, n, device=device, dtype=dtype)
    upper = lower + torch.rand_like(lower)
    weight, bias = (torch.randn(*s, device=device, dtype=dtype) for s in ((m, n), (m,)))
    wide, wide_weight = lower.double(), weight.double()
    op = torch.ops.torch_prepared.interval_linear
    outputs = 2 * b * m * lower.element_size()
    moved = _bytes(lower, upper, weight, bias) + outputs
    name = f"b={b} n={n} m={m}"
    return [
        Case(f"interval_linear {name}", lambda: op(lower, upper, weight, bias), moved),
        Case(
            f"two float64 matmuls {name}",
            lambda: (wide @ wide_weight.T, wide @ wide_weight.T),
            moved,
        ),
    ]


def _seconds(call: Callable[[], object], device: str) -> float:
    """Synchronized wall time of one call."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _measure(case: Case, device: str, repeats: int) -> list[dict[str, object]]:
    """A case and the copy in turn; the fraction compares the best of each.

    What other processes take away is no property of a kernel, and it hits copies as well.
    """
    source = torch.empty(max(case.bytes // 2, 4) // 4, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    call, copy = [], []
    for _ in range(repeats + 2):
        copy.append(_seconds(lambda: target.copy_(source), device))
        call.append(_seconds(case.call, device))
        copy.append(_seconds(lambda: target.copy_(source), device))
    call, copy = call[2:], copy[4:]
    copy_rate = 2 * _bytes(source) / min(copy)
    quartiles = statistics.quantiles(call, n=4)
    values = {
        "seconds": (min(call), "s"),
        "median": (statistics.median(call), "s"),
        "spread": (quartiles[2] - quartiles[0], "s"),
        "bandwidth": (case.bytes / min(call) / 1e9, "GB/s"),
        "copy_bandwidth": (copy_rate / 1e9, "GB/s"),
        "fraction_of_copy": (case.bytes / min(call) / copy_rate, "1"),
    }
    return [
        {"case": case.name, "metric": metric, "value": value, "unit": unit}
        for metric, (value, unit) in values.items()
    ]


def run(device: str, dtype: torch.dtype, threads: int, smoke: bool, output: Path) -> None:
    """Measure every case and write the JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    repeats = 5 if smoke else 21
    cases = (SMOKE_CASES if smoke else ROWS_CASES).items()
    rows: list[dict[str, object]] = []
    makers: list[Callable[[], list[Case]]] = [
        lambda name=name, shape=shape: _row_cases(name, shape, device, dtype)  # type: ignore[misc]  # defaults bind the case
        for name, shape in cases
    ]
    makers.append(lambda: _element_cases(SMOKE_ELEMENTS if smoke else ELEMENTS, device, dtype))
    makers.append(lambda: _linear_cases(SMOKE_LINEAR if smoke else LINEAR, device, dtype))
    for make in makers:
        for case in make():
            rows += _measure(case, device, repeats)
            seconds, fraction = rows[-6]["value"], rows[-1]["value"]
            print(f"{case.name:42s} {seconds:10.6f} s  {fraction:6.2f} of copy", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    record = {
        "schema": SCHEMA,
        "commit": environment()["commit"],
        "build": str(ops.build_info()),
        "python": platform.python_version(),
        "device": name,
        "dtype": str(dtype),
        "seed": 0,
        "threads": threads,
        "repeats": repeats,
        "smoke": smoke,
        "rows": rows,
    }
    write_json(output, record)
    print(f"wrote {output}")


def plot(source: Path, figure: Path) -> None:
    """Draw the fractions of copy bandwidth from the JSON."""
    record = json.loads(source.read_text())
    bars = [r for r in record["rows"] if r["metric"] == "fraction_of_copy"]
    labels, values = [r["case"] for r in bars], [r["value"] for r in bars]
    drawing, axes = _figure.new(1, 1, (8, 0.3 * len(bars) + 1.2))
    axes.barh(labels[::-1], values[::-1])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of copy bandwidth")
    axes.set_title(f"{record['device']}, {record['dtype']}, {record['build']}", fontsize=8)
    _figure.save(drawing, figure)


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = _figure.parse(parser, "kernels_{device}")
    if options.device == "cpu" and "MALLOC_MMAP_MAX_" not in os.environ:
        command = [sys.executable, "-m", "benchmarks.fig_kernels", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})
    if options.command != "plot":
        dtype = getattr(torch, options.dtype)
        run(options.device, dtype, options.threads, options.smoke, options.output)
    if options.command != "run":
        plot(options.output, options.figure)


if __name__ == "__main__":
    main()
