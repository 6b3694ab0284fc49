"""One case of ``fig_scaling``, in a process of its own or, under torchrun's variables, in several.

``python -m benchmarks._scaling_case project N M THREADS`` and ``... edit B THREADS`` print one
line of JSON. Seconds are wall time unless named otherwise; bytes are the peak of the resident set
over that of the interpreter with everything imported, before any data exist.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

import torch_prepared as tp
from torch_prepared.cluster import join_team
from torch_prepared.edit import sequential
from torch_prepared.solvers import project_streamed
from torch_prepared.specs import Box, Property, SafeSet

__all__ = ["Measured", "edit_case", "network_and_properties", "project_case"]

CHUNK, SLACK = 2**16, 2**13
WIDTHS = (16, 64, 64, 64, 5)
SHRINK_STEPS = 10
POOL, EVERY, RADIUS = 20_000, 20, 0.02  #: points to choose from; one property in so many violated


@dataclass(frozen=True)
class Measured:
    """One case.

    Args:
        outcome: a status.
        seconds: wall time.
        cpu: CPU seconds of this process.
        critical: CPU seconds on the critical path, had every rank a core of its own: those of the
            leader outside of shared operations, and in each shared operation the slowest rank's.
        waited: wall seconds that the leader spent talking to other ranks, and waiting for them.
        sent: bytes that the leader sent.
        peak: bytes of memory, see above.
        baseline: bytes of the interpreter, subtracted from ``peak``.
        detail: further numbers.
    """

    outcome: str
    seconds: float
    cpu: float
    critical: float
    waited: float
    sent: int
    peak: int
    baseline: int
    detail: dict[str, float]


def project_case(n: int, m: int) -> Measured:
    """Project n float32 weights onto m rows that are never in memory at once.

    Blocks of columns are shifted views of one random bank, so that time is that of the projection
    and not of a random number generator.
    """
    generator = torch.Generator().manual_seed(0)
    baseline = resident()
    bank = torch.randn(m, min(n, CHUNK) + SLACK, generator=generator)
    x0 = torch.randn(n, generator=generator)

    def rows(start: int, stop: int) -> torch.Tensor:
        shift = (start // CHUNK * 2_654_435_761) % SLACK
        return bank[:, shift : shift + stop - start]

    clock, cpu = time.perf_counter(), time.process_time()
    found = project_streamed(x0, rows, torch.zeros(m, dtype=torch.float64), chunk=CHUNK)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    report = found.report
    detail = {"weights_bytes": 4.0 * n, "violation": float(report.violation)}
    return Measured(
        report.statuses[0].name, seconds, cpu, cpu, 0.0, 0, peak() - baseline, baseline, detail
    )


def network_and_properties(count: int) -> tuple[torch.nn.Module, list[Property]]:
    """A network of 9,733 weights, and boxes in which its first output must stay below a level.

    One property in twenty is violated at its center.
    """
    generator = torch.Generator().manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layer = torch.nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
            layer.bias.zero_()
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    pool = torch.rand(POOL, WIDTHS[0], generator=generator)
    scores = model(pool).detach()[:, 0]
    level = float(scores.quantile(1 - 1 / EVERY))
    row = torch.eye(WIDTHS[-1], dtype=torch.float64)[:1]
    safe = SafeSet.from_polytopes([(row, torch.tensor([level], dtype=torch.float64))])
    bad, good = pool[scores > level].double(), pool[scores <= level].double()
    points = [good[i] if i % EVERY else bad[i // EVERY] for i in range(count)]
    return model, [
        Property(Box(x - RADIUS, x + RADIUS), safe, f"p{i}") for i, x in enumerate(points)
    ]


def edit_case(count: int) -> Measured | None:
    """One edit for ``count`` properties by all ranks there are; None in ranks that do not lead."""
    sequential.DEPTH, sequential.LAST_SHRINK_STEPS = math.inf, SHRINK_STEPS
    model, properties = network_and_properties(count)
    baseline = resident()
    with join_team() as team:
        clock, cpu = time.perf_counter(), time.process_time()
        result = tp.edit_network(
            model, properties, method="sequential", raise_on_failure=False,
            team=team if team.group.size > 1 else None,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        group = team.group
    if group.rank:
        return None
    detail = {f"seconds_{name}": value for name, value in result.report.seconds.items()}
    detail |= {"l2": result.report.delta.l2, "candidates": len(result.report.attempts)}
    detail |= {"shared_cpu": team.shared_seconds, "slowest_cpu": team.slowest_seconds}
    critical = cpu - team.shared_seconds + team.slowest_seconds
    return Measured(
        result.status.value, seconds, cpu, critical, group.seconds, group.sent,
        peak() - baseline, baseline, detail,
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as stream:  # Linux, like the schedulers this is about
        return int(stream.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes of this process that were ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the case that the command line names."""
    kind, *numbers, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    found = {"project": project_case, "edit": edit_case}[kind](*map(int, numbers))
    if found is not None:
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
