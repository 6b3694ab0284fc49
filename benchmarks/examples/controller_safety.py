"""A collision-avoidance controller learned by imitation while a safety property holds provably.

    python -m benchmarks.examples.controller_safety [--smoke] [--data DIR]

An aircraft chooses among five advisories: clear of conflict, weak or strong turns left or right.
The teacher scores each by simulating both aircraft in the plane and is right but costly; a small
student imitates its scores on noisy samples. Imitation alone may say "clear of conflict" where the
intruder comes head-on. The property: for *every* state of the region, "clear of conflict" is not
the advisory. It is held by an ``EditHook`` while the student learns, and certified at the end.
*Regret* is what the student's advice scores above the teacher's, in score units.
With ``--data`` the teacher is the ACAS Xu network 1_1 of VNN-COMP and the property its number 3.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_prepared.core.onnx import load_onnx
from torch_prepared.hooks import EditHook, EverySteps
from torch_prepared.relax.module import graph_to_module
from torch_prepared.specs import Box, Property, SafeSet, load_vnnlib

__all__ = ["Case", "acas_case", "advise", "imitate", "own_case", "run"]

TURNS = (0.0, 1.5, -1.5, 3.0, -3.0)  #: degrees per second; the first is clear of conflict
SPEED, RANGE, HORIZON, STEP = 100.0, 4000.0, 40.0, 1.0  #: m/s, m, s, s
SAFE = 300.0  #: m
SCALE = 20.0  #: of the ACAS Xu scores, which are small; the lowest stays the lowest
PARTS = 4  #: of the region, along its first two sides: bounds of small boxes are tight
REGION = ((0.30, -0.04, 0.96), (0.50, 0.04, 1.0))  #: near, ahead, head-on


@dataclass(frozen=True)
class Case:
    """A teacher on inputs in [-1, 1]^n or the box of its domain, and what must hold.

    Args:
        teacher: inputs (q, n) to scores (q, 5); the lowest is the advice.
        domain: lower and upper ends (n,).
        property: never the first advisory, on a region.
    """

    teacher: Callable[[Tensor], Tensor]
    domain: tuple[Tensor, Tensor]
    property: Property

    def parts(self) -> tuple[Property, ...]:
        """The property on pieces that cover its region."""
        low, high = self.property.region.lower, self.property.region.upper
        found = []
        for i in range(PARTS**2):
            place = torch.tensor([i % PARTS, i // PARTS])
            ends = []
            for shift in (0, 1):
                end = (high if shift else low).clone()
                end[:2] = low[:2] + (high - low)[:2] * (place + shift) / PARTS
                ends.append(end)
            name = f"{self.property.name}, part {i}"
            found.append(Property(Box(*ends), self.property.safe, name))
        return tuple(found)

    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs (count, n) of the domain, every tenth one of the region, and their scores."""
        generator = torch.Generator().manual_seed(seed)
        low, high = self.domain
        x = low + (high - low) * torch.rand(count, len(low), generator=generator)
        x[::10] = self.property.region.sample(len(x[::10]), generator).float()
        return x, self.teacher(x)


def advise(state: Tensor) -> Tensor:
    """Scores (q, 5) of the advisories, lower is better.

    Args:
        state: (q, 3): distance over RANGE in [0, 1], bearing and relative heading over pi.
    """
    distance, bearing, heading = RANGE * state[:, 0], math.pi * state[:, 1], math.pi * state[:, 2]
    scores = []
    for turn in TURNS:
        x, y = distance * bearing.cos(), distance * bearing.sin()  # the intruder, as seen
        angle, closest = torch.zeros_like(x), distance
        for _ in range(int(HORIZON / STEP)):
            angle = angle + math.radians(turn) * STEP
            x = x + SPEED * STEP * (heading.cos() - angle.cos())
            y = y + SPEED * STEP * (heading.sin() - angle.sin())
            closest = torch.minimum(closest, torch.hypot(x, y))
        scores.append(2.0 * torch.sigmoid((SAFE - closest) / 200.0) + 0.02 * abs(turn))
    return torch.stack(scores, dim=1)


def not_clear() -> SafeSet:
    """Some other advisory has a lower score than "clear of conflict"."""
    rows = torch.tensor([[1.0, *(-1.0 if j == k else 0.0 for j in range(4))] for k in range(4)])
    return SafeSet(((rows, torch.zeros(4)),))


def own_case() -> Case:
    """The simulator, and the head-on region."""
    prop = Property(Box(*REGION), not_clear(), "head-on: not clear of conflict")
    return Case(advise, (torch.tensor([0.0, -1.0, -1.0]), torch.ones(3)), prop)


def acas_case(data: Path) -> Case:
    """ACAS Xu 1_1 as the teacher, its property 3 to keep."""
    folder = data / "vnncomp2022" / "acasxu"
    graph = load_onnx(folder / "onnx" / "ACASXU_run2a_1_1_batch_2000.onnx.gz").graph
    (prop,) = load_vnnlib(folder / "vnnlib" / "prop_3.vnnlib.gz")
    module = graph_to_module(graph)

    @torch.no_grad()
    def teacher(x: Tensor) -> Tensor:
        y: Tensor = module(x.reshape(len(x), *graph.input_shape)).flatten(1)
        return SCALE * y

    low = torch.tensor([-0.3, -0.5, -0.5, -0.5, -0.5])
    return Case(teacher, (low, torch.tensor([0.7, 0.5, 0.5, 0.5, 0.5])), prop)


def imitate(
    student: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    hook: EditHook | None = None,
    seed: int = 0,
) -> None:
    """Regress the teacher's scores, in place."""
    x, y = data
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    generator, taken = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            F.mse_loss(student(x[part]), y[part]).backward()
            optimizer.step()
            taken += 1
            if hook is not None:
                hook.after_step(student, taken, optimizer=optimizer)


def run(
    case: Case, count: int, epochs: int, width: int, noise: float, limit: float
) -> dict[str, object]:
    """Imitate without and with the hook; certify; print."""
    torch.manual_seed(0)
    x, y = case.sample(count, 1)
    noisy = y + noise * y.std() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    plain = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, y.shape[1]),
    )  # fmt: skip
    student = copy.deepcopy(plain)
    hook = EditHook(
        case.parts(), schedule=EverySteps(50), preserve=x[:1000], method="auto", threads=1,
        time_limit=limit,
    )  # fmt: skip
    imitate(plain, (x, noisy), epochs)
    imitate(student, (x, noisy), epochs, hook)
    result = hook.finish(student)
    fresh, scores = case.sample(4000, 3)
    held = case.property.region.sample(4000, torch.Generator().manual_seed(4)).float()
    found: dict[str, object] = {"status": result.status.value, "edits": 0}
    found["edits"] = sum(record.distance > 0 for record in hook.records)
    print(f"{case.property.name}: {found['status']}, {found['edits']} edits while learning")
    found["broken_teacher"] = int(
        (case.property.safe.margin(case.teacher(held).double()) <= 0).sum()
    )
    print(f"violations of the teacher in 4000 samples: {found['broken_teacher']}")
    print(f"{'':10}{'same advice':>13}{'regret':>10}{'violations':>12}{'lowest margin':>16}")
    for name, net in (("plain", plain), ("hook", student)):
        with torch.no_grad():
            advice = net(fresh).argmin(1)
            same = float((advice == scores.argmin(1)).double().mean())
            lost = scores.gather(1, advice[:, None])[:, 0] - scores.amin(1)
            broken = int((case.property.safe.margin(net(held).double()) <= 0).sum())
        lowest = float(hook.certified_margins(net).min())
        regret = float(lost.mean())
        found |= {f"agreement_{name}": same, f"regret_{name}": regret}
        found |= {f"broken_{name}": broken, f"margin_{name}": lowest}
        print(f"{name:10}{100 * same:12.1f}%{regret:10.4f}{broken:12d}{lowest:16.4f}")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few samples and epochs")
    parser.add_argument("--data", type=Path, help="folder that holds vnncomp2022/")
    parser.add_argument("--noise", type=float, default=0.3, help="of the scores, in deviations")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = own_case() if options.data is None else acas_case(options.data)
    if options.smoke:
        return run(case, 2000, 8, 16, options.noise, 20.0)
    return run(case, 20_000, 20, 32, options.noise, 60.0)


if __name__ == "__main__":
    main()
