"""Where an edit stood: written whole, read without trust, used to go on."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_prepared as tp
from tests.cluster.program import task
from torch_prepared.edit import _driver, sequential
from torch_prepared.edit._base import EditOptions, EditProblem, Norm
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._checkpoint import Checkpoint, Progress
from torch_prepared.errors import SpecError

THETA, SLOPES = torch.arange(5.0).double(), torch.rand(2, 3, dtype=torch.float64)


def checkpoint(tmp_path: Path) -> Checkpoint:
    made = Checkpoint(tmp_path / "a.npz", every=0.0)
    made.save(Progress(THETA, SLOPES, 0.5))
    return made


def test_what_was_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    found = checkpoint(tmp_path).load(5, (2, 3))
    assert found is not None
    assert found.slopes is not None
    assert torch.equal(found.theta, THETA)
    assert torch.equal(found.slopes, SLOPES)
    assert found.size == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "none.npz").load(5, (2, 3)) is None


def test_it_is_not_written_too_often(tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    made.every = 1000.0
    made.save(Progress(THETA + 1, SLOPES, 0.5))
    found = made.load(5, (2, 3))
    assert found is not None
    assert torch.equal(found.theta, THETA)
    made.save(Progress(THETA + 1, SLOPES, 0.5), now=True)
    found = made.load(5, (2, 3))
    assert found is not None
    assert torch.equal(found.theta, THETA + 1)


def test_where_it_cannot_be_written_the_edit_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Checkpoint(tmp_path / "gone" / "a.npz", every=0.0)
    made.save(Progress(THETA, SLOPES, 0.5))
    assert "cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == []


def damaged(kind: str, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "nan":
        np.savez(path, theta=THETA.numpy() * np.nan, slopes=SLOPES.numpy(), size=0.5)
    elif kind == "other sizes":
        np.savez(path, theta=np.zeros(6), slopes=SLOPES.numpy(), size=0.5)
    elif kind == "float32":
        np.savez(path, theta=THETA.float().numpy(), slopes=SLOPES.numpy(), size=0.5)
    elif kind == "missing":
        np.savez(path, theta=THETA.numpy(), size=0.5)
    elif kind == "pickle":
        np.savez(path, theta=np.array([object] * 5), slopes=SLOPES.numpy(), size=0.5)
    elif kind == "short":  # the header promises more numbers than there are
        stream = io.BytesIO()
        header = {"descr": "<f8", "fortran_order": False, "shape": (5,)}
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("theta.npy", stream.getvalue() + b"\0" * 16)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "text", "empty", "nan", "other sizes", "float32", "missing", "pickle", "short"],
)
def test_damaged_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    damaged(kind, made.path)
    with pytest.raises(SpecError, match="damaged checkpoint") as caught:
        made.load(5, (2, 3))
    assert "\n" not in str(caught.value)
    assert str(made.path) in str(caught.value)


def test_a_second_run_goes_on_where_the_first_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "LAST_SHRINK_STEPS", 3)
    monkeypatch.setattr(_driver, "GLANCE_MOST", 0.1)
    model, properties = task()
    first = tp.edit_network(
        model, properties, method="sequential", norm="2", checkpoint=tmp_path / "notes"
    )
    names = sorted(path.name for path in (tmp_path / "notes").iterdir())
    assert [name.rpartition("-")[0] for name in names] == ["sequential-0.1"]

    def refuse(*_: object) -> None:
        raise AssertionError("restored again")

    monkeypatch.setattr(sequential._Search, "_restore_once", refuse)
    second = tp.edit_network(
        model, properties, method="sequential", norm="2", checkpoint=tmp_path / "notes"
    )
    assert second.status is tp.Verdict.CERTIFIED
    assert second.report.delta.l2 <= first.report.delta.l2 * (1 + 1e-6)
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == names


def problem(folder: Path | None, count: int = 5, seed: int = 3, **options: object) -> EditProblem:
    model, properties = task(seed=seed)
    graph, chosen = tp.capture_module(model, torch.zeros(1, 4)), tuple(properties[-count:])
    reference = Reference.of(graph, torch.zeros(1, 4), None, None, chosen, 0)
    return EditProblem(graph, chosen, reference, EditOptions(checkpoint=folder, **options))


def test_only_the_very_same_task_has_the_same_checkpoint(tmp_path: Path) -> None:
    same = [problem(tmp_path), problem(tmp_path, threads=1)]
    others = [
        problem(tmp_path, 4),
        problem(tmp_path, seed=4),
        problem(tmp_path, norm=Norm.L1),
        problem(tmp_path, margin=0.1),
    ]
    paths = [Checkpoint.of(p, "a").path for p in (*same, *others)]
    assert paths[0] == paths[1]
    assert len(set(paths[1:])) == len(others) + 1
    assert Checkpoint.of(problem(None), "a") is None


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    with pytest.raises(SpecError, match="checkpoint"):
        Checkpoint.of(problem(tmp_path / "notes"), "a")
