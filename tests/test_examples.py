"""The worked examples on small sizes, and the training study's script."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import fig_training
from benchmarks.examples import controller_safety, robust_digits

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_robust_digits():
    found = robust_digits.main(["--smoke"])
    assert found["status"] == "certified"
    assert found["edits"] > 0
    assert found["margin_plain"] < 0 < found["margin_hook"]
    assert found["accuracy_hook"] > found["accuracy_plain"] - 3.0 > 60.0


def test_controller_safety():
    found = controller_safety.main(["--smoke"])
    assert found["status"] == "certified"
    assert found["broken_teacher"] == 0
    assert found["broken_plain"] > 0
    assert found["broken_hook"] == 0
    assert found["agreement_hook"] > found["agreement_plain"] - 0.05


def test_the_parts_of_the_region_cover_it():
    case = controller_safety.own_case()
    points = case.property.region.sample(500, torch.Generator().manual_seed(0))
    inside = torch.stack([part.region.contains(points) for part in case.parts()])
    assert bool(inside.any(dim=0).all())


def test_the_simulator_turns_away_from_a_head_on_intruder_and_ignores_far_ones():
    states = torch.tensor([[0.4, 0.0, 1.0], [1.0, 0.5, 0.5]])
    advice = controller_safety.advise(states).argmin(1).tolist()
    assert advice[0] in (3, 4)
    assert advice[1] == 0


def test_controller_safety_with_a_real_teacher(data_dir):
    found = controller_safety.main(["--smoke", "--data", str(data_dir)])
    assert found["status"] == "certified"
    assert found["broken_hook"] == 0


def test_the_training_study_writes_and_draws(tmp_path):
    output = tmp_path / "training.json"
    fig_training.run(fig_training.SMOKE, None, output)
    record = json.loads(output.read_text())
    values = {(row["case"], row["metric"]): row["value"] for row in record["rows"]}
    assert values["hook 0.03", "certified"] == 1.0
    assert values["hook 0.03", "failures"] == 0.0
    assert values["plain", "step_cpu"] > 0
    assert values["prepared 0.03", "lowest_margin"] > 0
    assert len(record["looks"]["0.03"]) > 0
    fig_training.plot(output, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
