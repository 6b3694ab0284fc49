"""``invert``: bounds, pairs, pictures, exit codes, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from torch_prepared.certify import RadiusCertificate

from .conftest import Run, one_line_error, only_json


@pytest.fixture
def write_fold(tmp_path: Path):
    """Write (x, y) -> (|x| + shift, y)."""

    def write(name: str = "fold.onnx", *, slope: float = 1.0, op: str = "Relu") -> Path:
        weights = {
            "a.weight": np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32),
            "a.bias": np.zeros(4, np.float32),
            "b.weight": np.array([[1, slope, 0, 0], [0, 0, 1, -1]], np.float32),
            "b.bias": np.zeros(2, np.float32),
        }
        nodes = [
            helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["h"], transB=1),
            helper.make_node(op, ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "b.weight", "b.bias"], ["y"], transB=1),
        ]
        graph = helper.make_graph(
            nodes,
            "fold",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
            [numpy_helper.from_array(value, key) for key, value in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / name
        onnx.save_model(model, str(path))
        return path

    return write


def test_a_preimage_is_found_and_the_radius_certified(run: Run, write_fold, tmp_path: Path) -> None:
    model = write_fold()
    plot, proof = tmp_path / "pair.png", tmp_path / "proof.json"
    result = run(
        "invert", model, "--at", "0.25,0.5", "--norm", "inf", "--plot", plot,
        "--certificate", proof, "--json",
    )  # fmt: skip
    assert result.exit_code == 10, result.output
    data = only_json(result)
    assert data["lower"] <= 0.5 <= data["upper"]
    assert data["upper"] - data["lower"] < 1e-3
    assert data["evidence"] == "certified"
    x, y = data["witness"]["x"], data["witness"]["y"]
    assert x != y
    np.testing.assert_allclose(np.abs(x[0]), np.abs(y[0]))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert RadiusCertificate.load(proof).claim.radius == data["proved"]
    replay = run("check", proof, model, "--json")
    assert replay.exit_code == 0, replay.output
    assert only_json(replay)["kind"] == "preimage"
    assert only_json(replay)["radius"] == data["proved"]
    text = run("invert", model, "--at", "0.25,0.5")
    assert text.exit_code == 10
    assert "no collision  within 0.49" in text.stdout


def test_exit_codes_tell_proofs_from_claims(run: Run, write_fold) -> None:
    model = write_fold()
    proved = run("invert", model, "--at", "0.25,0.5", "--radius", "0.2")
    assert proved.exit_code == 0, proved.output
    claimed = run("invert", model, "--at", "0.25,0.5", "--radius", "0.4", "--method", "milp")
    assert claimed.exit_code == 20, claimed.output
    assert "claimed" in claimed.stdout
    pairs = run(
        "invert", model, "--at", "0.25,0.5", "--problem", "injectivity", "--time-limit", "5",
        "--json",
    )  # fmt: skip
    assert pairs.exit_code == 10
    assert only_json(pairs)["lower"] == pytest.approx(0.25, abs=2e-3)


def test_matching_two_files(run: Run, write_fold) -> None:
    fold, plane = write_fold(), write_fold("leaky.onnx", slope=-0.5)
    lost = run("invert", fold, "--match", plane, "--at", "0.25,0", "--time-limit", "5", "--json")
    assert lost.exit_code == 10, lost.output
    assert only_json(lost)["lower"] == pytest.approx(0.25, abs=2e-3)
    kept = run("invert", plane, "--match", fold, "--at", "0.25,0", "--json")
    assert kept.exit_code == 0, kept.output
    assert only_json(kept)["status"] == "excluded"
    assert only_json(kept)["evidence"] == "certified"
    near = run("invert", plane, "--match", fold, "--at", "0.25,3", "--radius", "0.2", "--json")
    assert near.exit_code == 0, near.output
    assert only_json(near)["evidence"] == "certified"


def test_check_replays_radii_of_pairs_and_of_two_networks(
    run: Run, write_fold, tmp_path: Path
) -> None:
    fold, bent = write_fold(), write_fold("leaky.onnx", slope=0.5)
    pairs, match = tmp_path / "pairs.json.gz", tmp_path / "match.json.gz"
    options = ("--at", "0.25,0.5", "--time-limit", "8", "--json")
    one = run("invert", fold, *options, "--problem", "injectivity", "--certificate", pairs)
    two = run("invert", fold, "--match", bent, *options, "--certificate", match)
    for made, files, kind in (
        (one, (pairs, fold), "injectivity"),
        (two, (match, fold, bent), "matching"),
    ):
        assert only_json(made)["proved"] == pytest.approx(0.25, abs=3e-3), made.output
        replay = run("check", *files, "--json")
        assert replay.exit_code == 0, replay.output
        assert only_json(replay)["kind"] == kind
        assert only_json(replay)["radius"] == only_json(made)["proved"]
    text = run("check", pairs, fold)
    assert "different inputs within max norm distance" in text.stdout
    assert run("check", pairs, bent).exit_code == 2
    assert run("check", match, fold).exit_code == 2
    assert run("check", pairs, fold, "--arithmetic", "float32").exit_code == 2
    pairs.write_bytes(pairs.read_bytes()[:-40])
    broken = run("check", pairs, fold)
    assert broken.exit_code == 2
    assert len(broken.stderr.strip().splitlines()) == 1


def test_outputs_within_a_tolerance_and_their_certificate(
    run: Run, write_fold, tmp_path: Path
) -> None:
    """a - b >= 0.2 and a + b <= 0.05 where a > 0 > b: b = -0.075 at best, 0.325 from 0.25."""
    model, proof = write_fold(), tmp_path / "proof.json"
    options = ("--at", "0.25,0.5", "--separation", "0.2", "--output-tolerance", "0.05",
               "--time-limit", "4", "--json")  # fmt: skip
    pairs = run("invert", model, *options, "--problem", "injectivity", "--certificate", proof)
    assert pairs.exit_code == 10, pairs.output
    data = only_json(pairs)
    assert 0.32 <= data["proved"] <= data["lower"] <= 0.325 <= data["upper"]
    assert data["upper"] - data["lower"] < 1e-3
    assert (data["output_tolerance"], data["separation"]) == (0.05, 0.2)
    replay = run("check", proof, model, "--json")
    assert replay.exit_code == 0, replay.output
    assert only_json(replay)["output_tolerance"] == 0.05
    assert only_json(replay)["separation"] == 0.2
    near = only_json(run("invert", model, *options))
    assert near["lower"] <= 0.45 <= near["upper"] * (1 + 1e-6)  # -0.2 has the output 0.2
    text = run("invert", model, *options[:-1])
    assert "of outputs within 0.05" in text.stdout
    tight = run("invert", model, *options, "--method", "milp", "--bounds", "obbt")
    assert only_json(tight)["lower"] == pytest.approx(0.45, abs=1e-3)


def test_distances_in_place_of_radii(run: Run, write_fold) -> None:
    fold, bent = write_fold(), write_fold("bent.onnx", slope=0.5)
    options = ("--at", "0.25,0", "--distance", "--json")
    pairs = run("invert", fold, *options, "--problem", "injectivity", "--radius", "0.5")
    assert pairs.exit_code == 10, pairs.output
    data = only_json(pairs)
    assert data["lower"] <= 0.5 <= data["upper"]
    assert data["upper"] - data["lower"] < 1e-3
    assert only_json(run("invert", fold, *options))["upper"] == pytest.approx(0.5, abs=1e-3)
    match = run("invert", fold, "--match", bent, *options, "--radius", "0.75")
    assert match.exit_code == 10, match.output
    data = only_json(match)
    assert data["problem"] == "matching distance"
    assert data["lower"] <= 0.25 <= data["upper"]  # 0.5 and -0.5: outputs 0.5 and 0.25
    assert data["upper"] - data["lower"] < 1e-3
    x, y = data["witness"]["x"], data["witness"]["y"]
    assert abs(x[0]) == pytest.approx(abs(y[0]))
    itself = write_fold("again.onnx")
    same = run("invert", fold, "--match", itself, *options)
    assert same.exit_code == 20, same.output
    assert only_json(same)["upper"] <= 1e-5
    text = run("invert", fold, "--match", bent, *options[:-1], "--radius", "0.75")
    assert "outputs of the second network differ" in text.stdout


def test_points_from_files_and_other_norms(run: Run, write_fold, tmp_path: Path) -> None:
    np.save(tmp_path / "at.npy", np.array([[0.25, 0.5]], np.float32))
    for norm in ("1", "2"):
        result = run("invert", write_fold(), "--at", tmp_path / "at.npy", "--norm", norm, "--json")
        assert result.exit_code == 10
        assert only_json(result)["upper"] == pytest.approx(0.5)
    other = run("invert", write_fold(), "--at", "0.25,0.5", "--of=-1,0.5", "--json")
    assert only_json(other)["upper"] == pytest.approx(0.75)


def test_a_file_without_points_is_one_line(run: Run, write_fold, tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", inputs=np.zeros((0, 2)))
    error = one_line_error(run("invert", write_fold(), "--at", tmp_path / "none.npz"))
    assert "--at" in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--at", "1"], "--at"),
        (["--at", "1,x"], "--at"),
        (["--at", "nan,1"], "--at"),
        (["--at", "nowhere.npy"], "nowhere.npy"),
        (["--at", "0,1", "--radius", "-1"], "--radius"),
        (["--at", "0,1", "--radius", "inf"], "radius"),
        (["--at", "0,1", "--norm", "3"], "--norm"),
        (["--at", "0,1", "--time-limit", "0"], "--time-limit"),
        (["--at", "0,1", "--domain", "1,0"], "--domain"),
        (["--at", "0,1", "--domain", "2,3"], "domain"),
        (["--at", "0,1", "--problem", "injectivity", "--of", "1,1"], "--problem"),
        (["--at", "0,1", "--problem", "injectivity", "--separation", "9"], "separation"),
        (["--at", "0,1", "--plot", "/nowhere/x.png"], "x.png"),
        (["--at", "0,1", "--radius", "0"], "--radius"),
        (["--at", "0,1", "--radius", "nan"], "--radius"),
        (["--at", "0,1,2"], "--at"),
        (["--at", "0,1", "--of", "1"], "--of"),
        (["--at", "0,1", "--output-tolerance", "-1"], "--output-tolerance"),
        (["--at", "0,1", "--output-tolerance", "nan"], "--output-tolerance"),
        (["--at", "0,1", "--output-tolerance", "inf"], "output_tolerance"),
        (["--at", "0,1", "--separation", "inf"], "separation"),
        (["--at", "0,1", "--distance", "--of", "1,1"], "--distance"),
        (["--at", "0,1", "--distance", "--plot", "x.png"], "--distance"),
        (["--at", "0,1", "--distance", "--certificate", "x.json"], "--distance"),
        (["--at", "0,1", "--distance", "--radius", "inf"], "radius"),
        ([], "--at"),
    ],
)
def test_bad_usage_is_one_line(run: Run, write_fold, arguments: list[str], word: str) -> None:
    assert word in one_line_error(run("invert", write_fold(), *arguments))


def test_bad_files_write_nothing(run: Run, write_fold, tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(write_fold().read_bytes()[:150])
    smooth = write_fold("smooth.onnx", op="Tanh")
    for model, word in ((broken, "broken.onnx"), (smooth, "tanh"), (tmp_path / "no.onnx", "no")):
        error = one_line_error(run("invert", model, "--at", "0,1", "--plot", plot))
        assert word in error
    nan = write_fold("nan.onnx", slope=float("nan"))
    one_line_error(run("invert", nan, "--at", "0,1", "--plot", plot))
    one_line_error(run("invert", write_fold(), "--at", "0.2,1", "--plot", tmp_path / "p.wrong"))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".onnx"] * 4


def test_pipes_and_devices_are_not_replaced_by_files(run: Run, write_fold, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    error = one_line_error(run("invert", write_fold(), "--at", "0.25,0.5", "--certificate", pipe))
    assert "pipe.json" in error
    assert pipe.is_fifo()


def _write_hard(path: Path) -> Path:
    """A network whose programs take minutes."""
    import torch

    torch.manual_seed(0)
    sizes = ((6, 40), (40, 40), (40, 6))
    layers = [part for n, m in sizes for part in (torch.nn.Linear(n, m), torch.nn.ReLU())]
    net = torch.nn.Sequential(*layers[:-1])
    torch.onnx.export(net, (torch.zeros(1, 6),), str(path), dynamo=False)
    return path


def test_a_network_of_other_inputs_is_no_match(run: Run, write_fold, tmp_path: Path) -> None:
    hard = _write_hard(tmp_path / "hard.onnx")
    for extra in ((), ("--distance",)):
        error = one_line_error(
            run("invert", write_fold(), "--match", hard, "--at", "0.2,1", *extra)
        )
        assert "second network" in error
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(hard.read_bytes()[:-100])
    error = one_line_error(run("invert", write_fold(), "--match", broken, "--at", "0.2,1"))
    assert "broken.onnx" in error


@pytest.mark.parametrize("extra", [[], ["--problem", "injectivity"], ["--distance"]])
def test_a_second_is_enough_for_bounds_that_hold(run: Run, tmp_path: Path, extra) -> None:
    hard = _write_hard(tmp_path / "hard.onnx")
    start = time.monotonic()
    result = run(
        "invert", hard, "--at", "0,0,0,0,0,0", "--radius", "3", "--time-limit", "1", *extra,
        "--json",
    )  # fmt: skip
    assert time.monotonic() - start < 15
    data = only_json(result)
    assert result.exit_code in (10, 20)
    assert data["status"] == "open"
    assert data["upper"] is None or 0.0 <= data["lower"] <= data["upper"]


_FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
from torch_prepared.cli.main import main
sys.argv = ["torch-prepared", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("option", ["--certificate", "--plot"])
def test_a_full_disk_leaves_nothing(write_fold, tmp_path: Path, option: str) -> None:
    model, folder = write_fold(), tmp_path / "full"
    folder.mkdir()
    name = "p.json" if option == "--certificate" else "p.png"
    (folder / name).write_text("before")
    command = [
        sys.executable, "-c", _FULL_DISK, "invert", str(model), "--at", "0.25,0.5",
        option, str(folder / name),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    assert name in done.stderr
    assert [p.name for p in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "before"


@pytest.mark.slow
def test_ctrl_c_prints_the_bounds_found_so_far(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch_prepared", "invert", str(_write_hard(tmp_path / "hard.onnx")),
        "--at", "0,0,0,0,0,0", "--radius", "3", "--method", "milp", "--time-limit", "150",
        "--plot", str(tmp_path / "p.png"), "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    time.sleep(45)  # past the search, into branch and bound
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert time.monotonic() - start < 30
    data = json.loads(printed)
    assert (data["status"], data["message"]) == ("open", "interrupted")
    assert data["lower"] > 0.0
    assert data["upper"] is None or data["lower"] <= data["upper"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hard.onnx", "p.png"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
