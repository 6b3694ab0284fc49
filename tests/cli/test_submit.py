"""``submit`` and ``collect``: idempotent jobs, refused early, merged faithfully."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.ranks import start_ranks
from torch_prepared.cluster import JobFolder, JobSpec, JobState, Resources, collect_jobs
from torch_prepared.cluster import job as job_module
from torch_prepared.cluster.submit import run_job, submit_job
from torch_prepared.errors import ClusterError

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json

pytest.importorskip("submitit", reason="needs the extra 'cluster'")


def slurm_reason() -> str:
    """Why Slurm cannot be used here; empty when it can."""
    if shutil.which("sbatch") is None:
        return "no sbatch here"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    return "" if " UP" in ping.stdout else "Slurm's controller is not up"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    return tmp_path


def words(model: Path, prop: Path) -> list[str]:
    return ["--", "verify", str(model), str(prop), "--time-limit", "20"]


@pytest.mark.parametrize(
    "cluster",
    [
        "local",
        pytest.param(
            "slurm",
            marks=[
                pytest.mark.optional,
                pytest.mark.skipif(bool(slurm_reason()), reason=slurm_reason() or "-"),
            ],
        ),
    ],
)
def test_a_job_runs_once_and_its_result_is_returned_ever_after(
    cluster: str, run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    model, prop = write_model(), write_property()
    line = ["submit", "--cluster", cluster, "--time", "5", "--wait", "--json", *words(model, prop)]
    first = run(*line)
    assert first.exit_code == 10, first.output
    data = only_json(first)
    assert data["status"] == "finished"
    assert data["submitted"] is True
    assert data["cluster"] == cluster
    result = data["result"]
    assert isinstance(result, dict)
    assert result["outcome"]["status"] == "refuted"
    again = run(*line)
    assert again.exit_code == 10
    assert only_json(again) == {**data, "submitted": False}
    merged = run("collect", here / "jobs", "-o", here / "all.json", "--json")
    assert merged.exit_code == 10
    assert only_json(merged) == json.loads((here / "all.json").read_text())
    assert only_json(merged)["counts"] == {"refuted": 1}


def test_a_failed_job_is_submitted_again(
    run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    model, prop = write_model(), write_property()
    line = ["submit", "--cluster", "local", "--wait", *words(model, prop)]
    spec_before = run(*line)
    assert spec_before.exit_code == 10
    (path,) = (p.parent for p in (here / "jobs").glob("*/result.json"))
    failed = {"code": 1, "outcome": None, "seconds": 1.0, "host": "h", "error": "boom"}
    JobFolder(path).write("result", failed)
    assert JobFolder(path).state() is JobState.FAILED
    assert run("collect", here / "jobs").exit_code == 20
    assert run(*line).exit_code == 10
    found = JobFolder(path).result()
    assert found is not None
    assert found.code == 10


def test_a_running_job_is_reported_and_not_submitted_twice(
    run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    model, prop = write_model(), write_property()
    line = ["submit", "--cluster", "local", "--json", *words(model, prop)]
    first = only_json(run(*line))
    job = JobFolder(Path(str(first["folder"])))
    assert first["status"] in ("running", "finished")
    second = only_json(run(*line))
    assert (second["id"], second["submitted"]) == (first["id"], False)
    deadline = time.monotonic() + 60.0
    while job.result() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert job.state() is JobState.FINISHED


@pytest.mark.parametrize(
    "bad",
    [
        ["verify", "none.onnx", "none.vnnlib"],
        ["verify", "net.onnx", "broken.vnnlib"],
        ["verify", "net.onnx"],
        ["verify", "net.onnx", "prop.vnnlib", "--no-such-option"],
        ["edit", "net.onnx", "prop.vnnlib"],
        ["destroy", "net.onnx"],
        ["check", "broken.vnnlib", "net.onnx", "prop.vnnlib"],
        [],
    ],
)
def test_what_could_not_run_is_refused_before_the_queue(
    bad: list[str], run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    write_model(), write_property()
    (here / "broken.vnnlib").write_text("(declare-const X_0 Real")
    one_line_error(run("submit", "--cluster", "local", "--", *bad))
    assert not (here / "jobs").exists()


def test_only_edits_share_ranks(
    run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    error = one_line_error(
        run("submit", "--ranks", "2", "--cluster", "local", *words(write_model(), write_property()))
    )
    assert "--ranks" in error


def test_ranks_share_one_edit_that_is_told_and_written_once(
    run: Run, write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    model, prop = write_model(), write_property()
    line = ["edit", str(model), str(prop), "--method", "sequential", "--time-limit", "15"]
    line += ["-o", "o.onnx", "--certificate", "c.json", "--checkpoint", "notes", "--threads", "1"]
    told = start_ranks(2, ["-m", "torch_prepared", *line, "--json"], cwd=here).finish()
    assert [code for code, _, _ in told] == [0, 0], told
    assert json.loads(told[0][1])["status"] == "certified"
    assert told[1][1] == ""
    assert run("check", here / "c.json", here / "o.onnx", prop).exit_code == 0
    assert list((here / "notes").glob("sequential-*.npz"))
    left = {path.name for path in here.iterdir()}
    assert left == {"net.onnx", "prop.vnnlib", "o.onnx", "c.json", "notes"}


def test_an_error_of_the_leader_is_told_once(
    write_model: WriteModel, write_property: WriteProperty, here: Path
) -> None:
    line = ["edit", str(write_model()), str(write_property()), "--method", "sequential"]
    line += ["-o", "o.onnx", "--certificate", "c.json", "--layers", "nope", "--threads", "1"]
    told = start_ranks(2, ["-m", "torch_prepared", *line], cwd=here).finish()
    assert [code for code, _, _ in told] == [2, 2], told
    assert told[0][2].count("error: ") == 1
    assert told[1][1:] == ("", "")
    assert not (here / "o.onnx").exists()


def spec(folder: Path, *command: str) -> JobSpec:
    (folder / "in.txt").write_text("1")
    return JobSpec.of(command or ("verify",), [Path("in.txt")], folder=folder)


def test_a_job_is_named_after_command_content_and_versions(here: Path) -> None:
    first = spec(here)
    assert spec(here).digest == first.digest
    assert spec(here, "check").digest != first.digest
    (here / "in.txt").write_text("2")
    assert JobSpec.of(["verify"], [Path("in.txt")], folder=here).digest != first.digest


def test_an_answer_whose_files_are_gone_is_no_answer(here: Path) -> None:
    made = JobSpec.of(["edit"], [], [Path("out.onnx")], folder=here)
    job = JobFolder(here / "jobs" / made.digest)
    job.write("job", {**vars(made), "command": ["edit"], "outputs": ["out.onnx"]})
    job.write("result", {"code": 0, "outcome": {}, "seconds": 1.0, "host": "", "error": ""})
    assert job.state() is JobState.FAILED
    (here / "out.onnx").write_text("")
    assert job.state() is JobState.FINISHED


def test_a_job_that_vanished_has_failed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobFolder(here / "jobs" / spec(here).digest)
    assert job.state() is JobState.NEW
    job.write("submission", {"cluster": "local", "id": "1", "host": "", "time": time.time() - 60})
    assert job.state() is JobState.FAILED
    with job.running():
        assert job.state() is JobState.RUNNING
    monkeypatch.setattr(job_module, "slurm_has", lambda number: number == "7")
    for number, state in (("7", JobState.RUNNING), ("8", JobState.FAILED)):
        job.write("submission", {"cluster": "slurm", "id": number, "host": "", "time": 0.0})
        assert job.state() is state


@pytest.mark.parametrize("name", ["job", "result"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"code": 0}', "null"])
def test_damaged_job_files_are_refused_in_one_line(
    name: str, text: str, run: Run, here: Path
) -> None:
    made = spec(here)
    job = JobFolder(here / "jobs" / made.digest)
    job.write("job", {**vars(made), "command": ["verify"], "outputs": []})
    (job.path / f"{name}.json").write_text(text)
    one_line_error(run("collect", here / "jobs"))


def test_a_job_file_of_another_job_is_refused(here: Path) -> None:
    made = spec(here)
    job = JobFolder(here / "jobs" / "0123456789abcdef")
    job.write("job", {**vars(made), "command": ["verify"], "outputs": []})
    with pytest.raises(ClusterError, match="another job"):
        collect_jobs(here / "jobs")


def test_a_command_that_fails_leaves_its_last_word(here: Path) -> None:
    made = JobSpec.of(["verify", "none.onnx", "none.vnnlib", "--json"], [], folder=here)
    job = JobFolder(here / "jobs" / made.digest)
    job.write("job", {**vars(made), "command": list(made.command), "outputs": []})
    run_job(str(job.path), Resources())
    found = job.result()
    assert found is not None
    assert found.code == 2
    assert found.error.startswith("error: none.onnx")
    assert job.state() is JobState.FAILED


def test_a_folder_that_cannot_be_written_is_refused(here: Path) -> None:
    (here / "file").write_text("")
    with pytest.raises(ClusterError, match="expected a writable folder"):
        submit_job(here / "file", spec(here), "local", Resources())
    assert sorted(path.name for path in here.iterdir()) == ["file", "in.txt"]
