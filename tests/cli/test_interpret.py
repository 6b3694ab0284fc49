"""``interpret``: page, exit codes, JSON, comparison, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from torch_prepared.core.onnx import load_onnx, save_onnx
from torch_prepared.specs import Box, Property, load_vnnlib, save_vnnlib

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json

HOLDS, FAILS = "(>= Y_0 2.5)", "(>= Y_0 1.5)"


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("method", ["crown", "zonotope", "ibp"])
@pytest.mark.parametrize("mode", ["prune", "coarsen"])
def test_a_proof_becomes_a_page(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    method: str,
    mode: str,
) -> None:
    page, prop = tmp_path / "page.html", write_property("(>= Y_0 0.45)", low=-0.1, high=0.1)
    arguments = ["interpret", write_model(), prop, "-o", page, "--json"]
    data = only_json(ok(run(*arguments, "--method", method, "--mode", mode, "--extract", "exact")))
    assert data["status"] == "sufficient"
    found = data["properties"][0]
    assert found["outcome"] == "sufficient"
    assert found["kept_margin"] > 0
    assert found["features"] == 4
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert found["statement"] in text
    assert left_over(tmp_path) == []


def test_text_says_what_is_proved(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    result = ok(run("interpret", write_model(), write_property(HOLDS), "-o", tmp_path / "p.html"))
    assert "SUFFICIENT" in result.stdout
    assert "This is a statement about that pruned network" in result.stdout


def test_a_violated_property_is_refuted_with_an_input(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    page = tmp_path / "p.html"
    result = run("interpret", write_model(), write_property(FAILS), "-o", page, "--json")
    assert result.exit_code == 10
    data = only_json(result)
    assert data["status"] == "refuted"
    assert len(data["answers"][0]["counterexample"]["x"]) == 2
    assert page.exists()
    text = run("interpret", write_model(), write_property(FAILS), "-o", page)
    assert "X = [" in text.stdout


def test_what_the_bounds_cannot_prove_is_unknown(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    # the intervals of |x_0| + |x_1| reach 4, its true maximum is 2
    arguments = ["interpret", write_model(), write_property(HOLDS), "-o", tmp_path / "p.html"]
    result = run(*arguments, "--method", "ibp", "--json")
    assert result.exit_code == 20
    assert only_json(result)["status"] == "unknown"


def test_networks_are_compared(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    other = write_model("other.onnx", output_weight=2.0)
    arguments = ["interpret", write_model(), write_property(HOLDS), "-o", tmp_path / "p.html"]
    data = only_json(ok(run(*arguments, "--compare", other, "--json")))
    compared = data["comparisons"][0]
    assert compared["before"]["outcome"] == "not proved"
    assert compared["after"]["outcome"] == "sufficient"
    assert 0 < compared["proved_fraction"]["before"] < 1
    change = compared["margin_change"]
    total = change["constant"] + change["features"]
    assert total == pytest.approx(change["after"] - change["before"])
    assert "other.onnx" in (tmp_path / "p.html").read_text()
    assert "compared: margin" in run(*arguments, "--compare", other).stdout


def test_bad_input_is_one_line_and_writes_nothing(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop, page = write_model(), write_property(HOLDS), tmp_path / "p.html"
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.read_bytes()[:100])
    strange = write_model("strange.onnx", op="Erf")
    wide = write_property(HOLDS, name="wide.vnnlib", inputs=3)
    empty = write_property(HOLDS, name="empty.vnnlib", low=1.0, high=-1.0)
    cases = [
        ([broken, prop], "broken.onnx"),
        ([strange, prop], "Erf"),
        ([model, wide], "input"),
        ([model, empty], "empty.vnnlib"),
        ([model, tmp_path / "none.vnnlib"], "none.vnnlib"),
        ([model, prop, "--compare", broken], "broken.onnx"),
        ([model, prop, "--time-limit", "0"], "time-limit"),
        ([model, prop, "--widen", "0.5"], "widen"),
        ([model, prop, "--method", "magic"], "method"),
    ]
    for arguments, part in cases:
        error = one_line_error(run("interpret", *arguments, "-o", page))
        assert part in error, error
        assert not page.exists()
    for target, part in ((tmp_path / "p.txt", ".html"), (tmp_path / "no" / "p.html", "written")):
        assert part in one_line_error(run("interpret", model, prop, "-o", target))
    assert left_over(tmp_path) == []


def test_an_existing_page_survives_a_failure(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    page = tmp_path / "p.html"
    page.write_text("old")
    one_line_error(run("interpret", write_model(), tmp_path / "none.vnnlib", "-o", page))
    assert page.read_text() == "old"


def test_an_interruption_leaves_nothing(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch_prepared.interpret as package

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "explain_with", interrupt)
    page = tmp_path / "p.html"
    error = one_line_error(run("interpret", write_model(), write_property(), "-o", page), 130)
    assert "interrupted" in error
    assert not page.exists()
    assert left_over(tmp_path) == []


def test_real_network_from_a_compressed_file(run: Run, data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "vnncomp2022" / "mnist_fc"
    model = folder / "onnx" / "mnist-net_256x2.onnx.gz"
    network = load_onnx(model)
    names = sorted(network.graph.editable)
    moved = {names[-1]: network.graph.parameters[names[-1]] * 1.01}
    other = tmp_path / "other.onnx"
    save_onnx(network, moved, other)
    wide = load_vnnlib(folder / "vnnlib" / "prop_2_0.03.vnnlib.gz")[0]
    center = (wide.region.lower + wide.region.upper) / 2
    near = Property(Box(center - 1e-3, center + 1e-3), wide.safe)
    save_vnnlib([near], tmp_path / "p.vnnlib")
    page = tmp_path / "page.html"
    result = run(
        "interpret", model, tmp_path / "p.vnnlib", "-o", page, "--compare", other, "--json"
    )
    data = only_json(ok(result))
    assert data["properties"][0]["features"] == 256
    assert data["comparisons"][0]["jaccard"] == 1.0
    assert len(page.read_text()) < 2_000_000
    assert np.isfinite(data["properties"][0]["margin"])
    assert torch.get_num_threads() <= 2
