"""What the ranks of a test run: small edits that tell one line of JSON about their result."""

from __future__ import annotations

import json
import sys

import torch

import torch_prepared as tp
from torch_prepared.cluster import join_group, join_team
from torch_prepared.edit import _driver, sequential
from torch_prepared.errors import PreparedError
from torch_prepared.solvers import project_streamed
from torch_prepared.specs import Box, Property, SafeSet


def task(count: int = 5, seed: int = 3) -> tuple[torch.nn.Module, list[Property]]:
    """A network of 3 layers, and as many properties, one of them violated."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    x = torch.rand(count, 4, generator=generator)
    level = float(model(x)[:, 0].detach().sort().values[-2]) - 0.02
    safe = SafeSet.from_polytopes(
        [(torch.eye(3, dtype=torch.float64)[:1], torch.tensor([level], dtype=torch.float64))]
    )
    boxes = [Box(p.double() - 0.02, p.double() + 0.02) for p in x]
    return model, [Property(box, safe, f"p{i}") for i, box in enumerate(boxes)]


def edit(norm: str, seeds: str = "3", timeout: str = "60", steps: str = "3") -> None:
    """Edit in the group, or alone when there is none; rank i takes the task of ``seeds[i]``."""
    sequential.LAST_SHRINK_STEPS, _driver.GLANCE_MOST = int(steps), 0.1
    if int(steps) > 1000:
        sequential.STALE_STEPS, sequential.LAST_PULL = int(steps), float("inf")
    with join_team(float(timeout)) as team:
        rank = team.group.rank
        model, properties = task(seed=int(seeds[rank % len(seeds)]))
        sys.stderr.write("started\n")
        sys.stderr.flush()
        result = tp.edit_network(model, properties, method="sequential", norm=norm, team=team)
    parameters = torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])
    tell(
        status=result.status.value,
        margins=[c.margin for c in result.check.per_property],
        parameters=parameters.tolist(),
        digest=result.certificate.weights_digest,
        attempts=[a.note for a in result.report.attempts],
    )


def project(chunk: str = "7") -> None:
    """A projection whose point is spread over the ranks; tells this rank's part."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(101, generator=generator, dtype=torch.float64)
    rows = torch.randn(6, 101, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(101, generator=generator, dtype=torch.float64)
    b = rows @ x0 - torch.tensor([1.0, 0.5, -0.5, 2.0, -3.0, 0.1], dtype=torch.float64)
    with join_group(60.0) as group:
        part = slice(101 * group.rank // group.size, 101 * (group.rank + 1) // group.size)
        mine = rows[:, part]
        found = project_streamed(
            x0[part], lambda i, j: mine[:, i:j], b, metric=weights[part], chunk=int(chunk),
            all_reduce=group.all_reduce,
        )  # fmt: skip
    tell(x=found.x.tolist(), status=found.report.statuses[0].name)


def tell(**values: object) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        {"edit": edit, "project": project}[sys.argv[1]](*sys.argv[2:])
    except PreparedError as error:
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        sys.exit(2)
