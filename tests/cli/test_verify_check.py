"""``verify``, ``check`` and ``info``: verdicts, exit codes, refusals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_prepared.cli._outcome import to_plain
from torch_prepared.core.onnx import load_onnx, run_onnx
from torch_prepared.edit.verify import (
    Answer,
    compare_with_onnxruntime,
    cross_check,
    verify_network,
)
from torch_prepared.specs import load_vnnlib

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json


@pytest.fixture
def certified(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> tuple[Path, Path, Path]:
    """Certificate, network and property that belong together."""
    model, prop = write_model(), write_property("(>= Y_0 2.5)")
    result = run("verify", model, prop, "--certificate", tmp_path / "cert.json")
    assert result.exit_code == 0, result.output
    return tmp_path / "cert.json", model, prop


def test_a_violating_input_is_printed_and_violates(
    run: Run, write_model: WriteModel, write_property: WriteProperty
) -> None:
    model, prop = write_model(), write_property()
    result = run("verify", model, prop, "--json")
    assert result.exit_code == 10
    data = only_json(result)
    assert data["status"] == "refuted"
    assert data["margin"] is None
    x = np.array([data["properties"][0]["counterexample"]["x"]], np.float32)
    assert bool(load_vnnlib(prop)[0].region.contains(torch.from_numpy(x))[0])
    assert run_onnx(model, x)[0, 0] >= 1.5
    text = run("verify", model, prop)
    assert text.exit_code == 10
    assert "X = [" in text.stdout


def test_several_files_refute_together(
    run: Run, write_model: WriteModel, write_property: WriteProperty
) -> None:
    holds = write_property("(>= Y_0 2.5)", name="holds.vnnlib")
    fails = write_property("(>= Y_0 1.5)", name="fails.vnnlib")
    result = run("verify", write_model(), holds, fails, "--json")
    assert result.exit_code == 10
    answers = {p["name"]: p["answer"] for p in only_json(result)["properties"]}
    assert answers == {"holds": "proved", "fails": "refuted"}


def test_what_neither_proof_nor_attack_decides_is_unknown(
    write_model: WriteModel, write_property: WriteProperty, monkeypatch: pytest.MonkeyPatch
) -> None:
    # |x_0| + |x_1| at (1, 1) is exactly 2: not strictly below it, yet nothing exceeds it.
    network = load_onnx(write_model())
    touching = load_vnnlib(write_property("(> Y_0 2.0)"))
    result = verify_network(network, touching)
    assert result.answer in (Answer.PROVED, Answer.UNKNOWN)
    assert result.properties[0].counterexample is None


def test_check_accepts_what_belongs_together(run: Run, certified: tuple[Path, Path, Path]) -> None:
    result = run("check", *certified, "--json")
    assert result.exit_code == 0
    data = only_json(result)
    assert data["status"] == "certified"
    assert data["onnxruntime"]["points"] >= 64
    assert run("check", *certified, "--arithmetic", "float32").exit_code == 0


def test_check_refuses_another_network_and_another_property(
    run: Run,
    certified: tuple[Path, Path, Path],
    write_model: WriteModel,
    write_property: WriteProperty,
) -> None:
    certificate, model, prop = certified
    other_model = write_model("other.onnx", output_weight=1.25)
    assert "weights" in one_line_error(run("check", certificate, other_model, prop))
    other_prop = write_property("(>= Y_0 2.25)", name="other.vnnlib")
    assert "another property" in one_line_error(run("check", certificate, model, other_prop))
    assert "properties" in one_line_error(run("check", certificate, model, prop, other_prop))


def test_check_refuses_altered_and_broken_certificates(
    run: Run, certified: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    certificate, model, prop = certified
    text = certificate.read_text()
    data = json.loads(text)
    data["metadata"]["method"] = "magic"
    for content in (json.dumps(data), text[: len(text) // 2], "[]", "nan", ""):
        certificate.write_text(content)
        one_line_error(run("check", certificate, model, prop))
    one_line_error(run("check", tmp_path / "nowhere.json", model, prop))


def test_a_certificate_whose_replay_proves_too_little_is_unknown(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    from torch_prepared.certify import Certificate, ProofTree

    model, prop = write_model(), write_property()
    properties = [p.record() for p in load_vnnlib(prop)]
    claim = Certificate.create(load_onnx(model).graph.record(), properties, [ProofTree.leaf([0])])
    claim.save(tmp_path / "claim.json")
    result = run("check", tmp_path / "claim.json", model, prop)
    assert result.exit_code == 20
    assert result.stdout.startswith("UNKNOWN")
    assert "lower bound" in result.stdout


def test_verify_writes_no_certificate_unless_proved(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    arguments = (write_model(), write_property(), "--certificate", tmp_path / "cert.json")
    assert run("verify", *arguments).exit_code == 10
    assert not (tmp_path / "cert.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_gzip_is_read_everywhere(
    run: Run, certified: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    packed = []
    for path in certified:
        packed.append(tmp_path / f"{path.name}.gz")
        packed[-1].write_bytes(gzip.compress(path.read_bytes()))
    assert run("check", *packed).exit_code == 0


def test_a_wrongly_imported_graph_does_not_agree(
    write_model: WriteModel, write_property: WriteProperty
) -> None:
    import dataclasses

    network, prop = load_onnx(write_model()), load_vnnlib(write_property())
    assert compare_with_onnxruntime(network, prop).holds
    name = "second.bias"
    wrong = network.graph.with_parameters({name: network.graph.parameters[name] + 1e-3})
    assert not compare_with_onnxruntime(dataclasses.replace(network, graph=wrong), prop).holds


def test_the_cross_check_sees_a_violation_in_onnxruntime_only(
    write_model: WriteModel, write_property: WriteProperty
) -> None:
    import dataclasses

    network, prop = load_onnx(write_model()), load_vnnlib(write_property())
    name = "second.weight"
    tame = network.graph.with_parameters({name: network.graph.parameters[name] * 0.1})
    found = cross_check(dataclasses.replace(network, graph=tame), prop)
    assert found.violations == ("prop",)
    assert found.smallest_margin == pytest.approx(-0.5)


def test_info_describes_the_network(run: Run, write_model: WriteModel) -> None:
    model = write_model()
    data = only_json(run("info", model, "--json", "--operators"))
    assert data["input_shape"] == [2]
    assert data["parameters"] == 8 + 4 + 8 + 2
    assert data["operators"] == {"linear": 2, "relu": 1}
    assert len(data["editable_layers"]) == 2
    assert "relu" in {row["operator"] for row in data["supported"]}
    assert "editable layers" in run("info", model).stdout
    assert "| relu |" in run("info", "--operators").stdout


def test_json_has_no_nan() -> None:
    assert to_plain({"a": float("nan"), "b": [float("inf"), np.float32(1.5)]}) == {
        "a": None,
        "b": [None, 1.5],
    }
