"""The Stokes example: its solver, its composite network, and that it certifies what it claims."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import fig_geodynamics
from benchmarks.examples._stokes_case import (
    WALLS,
    FlowNetwork,
    Settings,
    StencilNetwork,
    continuity_row,
    guide_properties,
    measure_flow,
    reference_flow,
    required_properties,
    wall_box,
    wall_row,
    within,
)
from benchmarks.examples._stokes_judge import certify_within
from benchmarks.examples._stokes_plot import draw
from benchmarks.examples._stokes_solver import gaussian_plume, solve_stokes
from benchmarks.examples._stokes_training import METHODS, train, violations
from benchmarks.examples.stokes_flow import run_method, table
from torch_prepared.bounds import PropertyBatch, certified_margin, compute_bounds
from torch_prepared.certify import Verdict, check_certificate
from torch_prepared.core.capture import capture_module
from torch_prepared.edit import edit_network
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.specs import Box, Property

SMOKE = Settings.smoke()


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def composite() -> StencilNetwork:
    torch.manual_seed(3)
    return StencilNetwork(FlowNetwork(8), SMOKE.spacing)


def _vortex_error(cells: int) -> tuple[float, float]:
    """Largest errors of u and v against the flow of the stream function sin(pi x) sin(pi y)."""
    pi = np.pi
    flow = solve_stokes(cells, lambda x, y: -4 * pi**3 * np.cos(pi * x) * np.sin(pi * y))
    edge, middle = np.arange(cells + 1) / cells, (np.arange(cells) + 0.5) / cells
    x, y = np.meshgrid(edge, middle, indexing="ij")
    u = np.abs(flow.u - pi * np.sin(pi * x) * np.cos(pi * y)).max()
    x, y = np.meshgrid(middle, edge, indexing="ij")
    v = np.abs(flow.v + pi * np.cos(pi * x) * np.sin(pi * y)).max()
    return float(u), float(v)


def test_solver_is_of_second_order() -> None:
    coarse, fine = _vortex_error(16), _vortex_error(32)
    for before, after in zip(coarse, fine, strict=True):
        assert 3.8 < before / after < 4.2


@pytest.mark.parametrize("no_slip", [False, True])
def test_discrete_divergence_and_wall_velocities_vanish(no_slip: bool) -> None:
    flow = solve_stokes(24, gaussian_plume, no_slip=no_slip)
    flow = flow.scaled(1.0 / flow.mean_speed)
    assert flow.mean_speed == pytest.approx(1.0)
    assert np.abs(flow.divergence).max() < 1e-9
    for wall in (flow.u[0], flow.u[-1], flow.v[:, 0], flow.v[:, -1]):
        assert not wall.any()


def test_no_slip_slows_the_flow() -> None:
    free, held = (solve_stokes(24, gaussian_plume, no_slip=n).mean_speed for n in (False, True))
    assert held < 0.7 * free


def test_solver_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        solve_stokes(1, gaussian_plume)
    with pytest.raises(ValueError, match="finite"):
        solve_stokes(4, lambda x, y: np.full_like(x, np.nan))


def test_composite_is_the_stencil(composite: StencilNetwork) -> None:
    h, net = SMOKE.spacing, composite.net
    c = torch.rand(50, 2)
    x, y = torch.tensor([h / 2, 0.0]), torch.tensor([0.0, h / 2])
    east, west, north, south = (net(c + d) for d in (x, -x, y, -y))
    expected = (east[:, 0] - west[:, 0] + north[:, 1] - south[:, 1]) / h
    got = (composite(c).double() @ continuity_row(h).T)[:, 0]
    assert torch.allclose(got, expected.double(), atol=1e-5)


class _SolverFlow(nn.Module):
    """Looks the solver's velocities up at face centers."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.flow = reference_flow(cells)

    def forward(self, points: Tensor) -> Tensor:
        n = self.flow.cells
        flat = points.reshape(-1, 2).double().numpy() * n
        i, j = np.floor(flat + 1e-3).astype(int).T
        u = self.flow.u[np.minimum(i, n), np.minimum(j, n - 1)]
        v = self.flow.v[np.minimum(i, n - 1), np.minimum(j, n)]
        return torch.tensor(np.stack([u, v], axis=1)).reshape(*points.shape)


def test_solver_flow_satisfies_all_required_properties_on_its_grid() -> None:
    n, h = SMOKE.cells, SMOKE.spacing
    stencil = StencilNetwork(_SolverFlow(n), h)
    middle = (torch.arange(n) + 0.5) * h
    centers = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), dim=-1).reshape(-1, 2)
    for prop in required_properties(dataclasses.replace(SMOKE, continuity=1e-6, wall=1e-9)):
        inside = centers[prop.region.contains(centers.double())]
        assert len(inside) == (n * n if prop.name == "continuity" else n)
        assert float(violations(stencil, prop, inside).max()) <= 1.0


@pytest.mark.parametrize("wall", WALLS)
def test_wall_regions_cover_the_walls(wall: str) -> None:
    """The face that the row reads runs along all of the wall, in exact arithmetic."""
    coordinates = StencilNetwork(nn.Identity(), SMOKE.spacing)
    box, row = wall_box(wall, SMOKE.spacing), wall_row(wall)
    face = row.reshape(4, 2).abs().sum(dim=1).argmax()
    ends = coordinates(torch.stack([box.lower, box.upper]).float()).reshape(2, 4, 2)[:, face]
    normal = int(row.reshape(4, 2)[face].argmax())
    place = 0.0 if wall in ("west", "south") else 1.0
    assert ends[:, normal].tolist() == [place, place]
    assert ends[:, 1 - normal].tolist() == [0.0, 1.0]


def test_shared_weights_are_bounded_soundly(composite: StencilNetwork) -> None:
    graph = capture_module(composite.double(), torch.zeros(1, 2).double())
    assert len(graph.editable) == 6
    row, box = continuity_row(SMOKE.spacing), Box([0.3, 0.4], [0.4, 0.5])
    bound = compute_bounds(graph, box, row)
    points = box.sample(2000, torch.Generator().manual_seed(0))
    values = composite(points) @ row.T
    assert bool((values >= bound.lower[0]).all())
    assert bool((values <= bound.upper[0]).all())
    composite.float()


def test_margin_gradient_counts_all_four_uses(composite: StencilNetwork) -> None:
    """Against central differences: each shared weight moves four points at once."""
    graph = capture_module(composite.double(), torch.zeros(1, 2).double())
    batch = PropertyBatch.of(guide_properties(SMOKE)[:1])
    name = "net.2.weight"
    weight = graph.parameters[name].clone().requires_grad_()
    margin = certified_margin(graph, batch, parameters={name: weight}).margin.sum()
    (gradient,) = torch.autograd.grad(margin, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-5 * direction
    ends = [
        float(certified_margin(graph, batch, parameters={name: weight.detach() + s}).margin.sum())
        for s in (step, -step)
    ]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(
        float((gradient * direction).sum()), rel=1e-3
    )
    composite.float()


def test_vectorized_gradients_equal_those_of_single_properties(
    composite: StencilNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = capture_module(composite, torch.zeros(1, 2)).to(torch.float64)
    vector = ParameterVector.of(graph)
    margins = LiveMargins(graph, PropertyBatch.of(guide_properties(SMOKE)), vector)
    theta, which = vector.flatten(graph.parameters), torch.tensor([3, 0, 40])
    together = margins.gradients(theta, which)
    monkeypatch.setattr("torch_prepared.hooks._margins.SMALL_FLOPS", 0.0)
    assert torch.allclose(together, margins.gradients(theta, which), rtol=1e-9, atol=1e-9)
    assert margins.gradients(theta, which[:0]).shape == (0, vector.count)


class _FourCalls(nn.Module):
    """The same stencil with the network called once per face: parameters of several nodes."""

    def __init__(self, stencil: StencilNetwork) -> None:
        super().__init__()
        self.net, half = stencil.net, SMOKE.spacing / 2
        self.east, self.north = torch.tensor([half, 0.0]), torch.tensor([0.0, half])

    def forward(self, c: Tensor) -> Tensor:
        moves = (self.east, -self.east, self.north, -self.north)
        return torch.cat([self.net(c + move) for move in moves], dim=1)


def test_parameters_shared_by_several_nodes_are_edited_and_certified(
    composite: StencilNetwork,
) -> None:
    several = _FourCalls(composite)
    graph = capture_module(several, torch.zeros(1, 2))
    assert len(graph.editable) == 6
    assert {len(graph.readers(name)) for name in graph.editable} == {4}
    box, row = Box([0.3, 0.4], [0.32, 0.42]), continuity_row(SMOKE.spacing)
    one, other = (
        compute_bounds(g.to(torch.float64), box, row)
        for g in (graph, capture_module(composite, torch.zeros(1, 2)))
    )
    assert torch.allclose(one.lower, other.lower, atol=1e-6)
    assert torch.allclose(one.upper, other.upper, atol=1e-6)
    size = float(torch.maximum(-one.lower, one.upper))
    wanted = Property(box, within(row, 0.5 * size), "half of the outflow")
    result = edit_network(
        several, wanted, method="sequential", preserve=torch.rand(100, 2), time_limit=6, threads=1
    )
    assert result.status is Verdict.CERTIFIED
    assert isinstance(result.model, nn.Module)
    values = result.model(box.sample(500, torch.Generator().manual_seed(0)).float())
    assert float((values.detach().double() @ row.T).abs().max()) <= 0.5 * size


def test_measurements_are_split_and_only_training_data_are_noisy() -> None:
    seen, held = measure_flow(SMOKE)
    n = SMOKE.cells
    assert len(seen.value) == SMOKE.samples
    assert len(seen.value) + len(held.value) == 2 * n * (n + 1)
    flow = _SolverFlow(n)
    assert float(held.residual(lambda x: flow(x).float()).abs().max()) < 1e-6
    noise = float(seen.residual(lambda x: flow(x).float()).std())
    assert noise == pytest.approx(SMOKE.noise, rel=0.3)


def test_untrained_network_is_not_certified(composite: StencilNetwork) -> None:
    tight = dataclasses.replace(SMOKE, wall=1e-3)
    graph = capture_module(composite, torch.zeros(1, 2))
    assert certify_within(graph, required_properties(tight), 5.0) is None


def test_smoke_run_certifies() -> None:
    trained = train(SMOKE, "provable")
    assert trained.looks
    assert trained.certified is not None
    wanted = required_properties(SMOKE)
    record = capture_module(trained.model, torch.zeros(1, 2)).record()
    again = check_certificate(trained.certified.certificate, record, [p.record() for p in wanted])
    assert again.status is Verdict.CERTIFIED
    generator = torch.Generator().manual_seed(9)
    for prop in wanted:
        points = prop.region.sample(5000, generator).float()
        assert float(violations(trained.model, prop, points).detach().max()) <= 1.0
    _, held_out = measure_flow(SMOKE)
    error = held_out.residual(trained.model.net).detach().norm() / held_out.value.norm()
    assert float(error) < 0.2


def test_plain_training_breaks_the_walls_and_says_so() -> None:
    row, trained = run_method(SMOKE, "plain")
    assert trained.certified is None
    assert row["certified"] is False
    assert float(str(row["wall_largest"])) > SMOKE.wall
    assert "| plain |" in table([row])
    assert "| no |" in table([row])


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="plain, physics, penalty, guarded, provable"):
        train(SMOKE, "magic")


def test_figure_is_drawn_from_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = dataclasses.replace(SMOKE, steps=20, continuity=50.0, wall=10.0)
    monkeypatch.setattr("benchmarks.examples.stokes_flow.PROVED_BOXES", 6)
    monkeypatch.setattr("benchmarks.examples._stokes_judge.SAMPLES", 4000)
    monkeypatch.setattr("benchmarks.examples._stokes_judge.ABOVE", ())
    output = tmp_path / "geodynamics.json"
    fig_geodynamics.run(quick, [0], 1, output)
    before = output.read_text()
    fig_geodynamics.run(quick, [0], 1, output)
    assert output.read_text() == before, "finished rows must not be run again"
    record = json.loads(before)
    assert [row["method"] for row in record["rows"]] == list(METHODS)
    for row in record["rows"]:
        assert row["cell_mean"] <= row["cell_largest"] <= row["cell_certified"] <= 50.0
        assert row["wall_mean"] <= row["wall_largest"] <= row["wall_certified"] <= 10.0
    draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert all(row["certified"] for row in fig_geodynamics.summary(record["rows"]))
