from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import _common, _study, fig_vnncomp  # noqa: E402 - needs the path above
from benchmarks._judge import attack_network, compare_networks  # noqa: E402
from benchmarks._process import run_limited  # noqa: E402
from benchmarks._study import Settings  # noqa: E402
from benchmarks._vnncomp import Case, find_cases, merge_by_network  # noqa: E402
from benchmarks._vnncomp_report import (  # noqa: E402
    END,
    START,
    draw,
    load_studies,
    markdown_table,
    replace_table,
)

DATA = ROOT.parent / "shared" / "data"
MEMORY = 4 << 30


@pytest.fixture
def folder(tmp_path):
    """A benchmark folder with three violated instances of two networks and one that holds."""
    path = tmp_path / "data" / "vnncomp2022" / "toy"
    path.mkdir(parents=True)
    rows = ["a.onnx,p.vnnlib,1,sat", "a.onnx,q.vnnlib,1,sat", "b.onnx,p.vnnlib.gz,1,sat"]
    text = "\n".join(["onnx,vnnlib,timeout,status", *rows, "b.onnx,q.vnnlib,1,unsat"])
    (path / "instances.csv").write_text(text + "\n")
    np.savez(path / "counterexamples.npz", a__p=np.ones(3, np.float32))
    return path


@pytest.fixture
def cases(folder):
    return find_cases(folder.parent, ["toy"])


def _row(case, settings, certified=True, seconds=3.0, percent=1.5):
    drawdown = {"kind": "ranking", "percent": percent, "agreement_argmin": 1 - percent / 500}
    return {
        "key": settings.key(case),
        "case": case.name,
        "benchmark": "acasxu",
        "certified": certified,
        "edit_seconds": seconds - 1,
        "total_seconds": seconds,
        "relative_l2": 0.01,
        "drawdown": drawdown if certified else None,
    }


class TestCases:
    def test_only_violated_instances_are_found_and_the_pattern_selects(self, folder, cases):
        assert [c.name for c in cases] == ["toy/a/p", "toy/a/q", "toy/b/p"]
        assert [c.name for c in find_cases(folder.parent, ["toy"], "a/q")] == ["toy/a/q"]

    def test_joint_cases_have_all_violated_files_of_a_network(self, cases):
        assert [c.vnnlib for c in merge_by_network(cases)] == [
            ("p.vnnlib", "q.vnnlib"),
            ("p.vnnlib.gz",),
        ]

    def test_stored_counterexamples_are_found_by_name(self, cases):
        assert cases[0].counterexamples().shape == (1, 3)
        assert cases[1].counterexamples().shape == (0, 0)

    def test_absent_benchmark_is_an_error(self, folder):
        with pytest.raises(FileNotFoundError):
            find_cases(folder.parent, ["nowhere"])


class TestCommon:
    def test_files_are_whole_and_not_finite_numbers_are_null(self, tmp_path):
        path = tmp_path / "deep" / "x.json"
        _common.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.0]})
        assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.0]}
        assert list(path.parent.iterdir()) == [path]

    def test_measure_counts_only_repeats_after_warm_up(self):
        calls = []
        timing = _common.measure(lambda: calls.append(1), repeats=3, warmup=2)
        assert len(calls) == 5
        assert timing.repeats == 3
        assert timing.median >= 0

    def test_environment_names_commit_and_versions(self):
        found = _common.environment()
        assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]
        assert found["commit"]


class TestProcess:
    def test_a_child_that_takes_too_long_is_killed_with_its_children(self):
        start = time.monotonic()
        done = run_limited(["sh", "-c", "sleep 60 & sleep 60"], seconds=0.5, memory=MEMORY)
        assert done.outcome == "timeout"
        assert done.code == -signal.SIGKILL
        assert time.monotonic() - start < 10

    def test_memory_beyond_the_limit_fails_inside_the_child(self):
        command = [sys.executable, "-c", "x = bytearray(600_000_000); print('got it')"]
        done = run_limited(command, seconds=30, memory=300_000_000)
        assert done.code != 0
        assert "MemoryError" in done.stderr

    def test_stop_ends_the_child_and_output_is_kept(self):
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        done = run_limited(
            ["sh", "-c", "echo here; sleep 60"], seconds=30, memory=MEMORY, stop=stop
        )
        assert done.outcome == "interrupted"
        assert done.stdout == "here\n"

    def test_peak_memory_is_measured(self):
        command = [sys.executable, "-c", "x = bytes(200_000_000)"]
        assert run_limited(command, seconds=30, memory=MEMORY).peak_bytes > 200_000_000


class TestResume:
    def test_finished_cases_are_skipped_until_fresh(self, cases, tmp_path, monkeypatch):
        ran = []

        def fake(case, root, settings, work, stop):
            ran.append(case.name)
            return _row(case, settings)

        monkeypatch.setattr(fig_vnncomp, "run_case", fake)
        output, settings = tmp_path / "vnncomp_x.json", Settings("x")
        fig_vnncomp.run(cases[:1], tmp_path, settings, output)
        rows = fig_vnncomp.run(cases, tmp_path, settings, output, jobs=2)
        assert sorted(ran) == [c.name for c in cases]
        assert [r["case"] for r in rows] == [c.name for c in cases]
        fig_vnncomp.run(cases[:1], tmp_path, settings, output, fresh=True)
        assert ran.count(cases[0].name) == 2

    def test_other_settings_are_other_rows(self, cases):
        assert Settings("x").key(cases[0]) != Settings("x", limit=1.0).key(cases[0])
        assert Settings("x").key(cases[0]) == Settings("x").key(cases[0])

    def test_a_fault_of_the_harness_is_a_failed_row_with_its_reason(self, cases, tmp_path):
        output = tmp_path / "vnncomp_x.json"
        rows = fig_vnncomp.run(cases[:1], tmp_path, Settings("x"), output)
        assert not rows[0]["certified"]
        assert "harness: KeyError" in rows[0]["reason"]  # no reference data rule for 'toy'

    def test_an_interrupted_case_leaves_no_row(self, cases, tmp_path, monkeypatch):
        monkeypatch.setattr(
            fig_vnncomp,
            "run_case",
            lambda case, *_: {"key": "k", "certified": False, "outcome": "interrupted"},
        )
        assert fig_vnncomp.run(cases[:1], tmp_path, Settings("x"), tmp_path / "x.json") == []


class TestReport:
    @pytest.fixture
    def results(self, cases, tmp_path):
        settings = Settings("one_shot")
        rows = [
            _row(cases[0], settings, seconds=3.0, percent=1.5),
            _row(cases[1], settings, seconds=50.0, percent=2.5),
            _row(cases[2], settings, certified=False),
            {**_row(cases[2], Settings("one_shot", limit=1.0)), "at": -1},
        ]
        path = tmp_path / "results"
        data = {"schema": 1, "settings": {"method": "one_shot", "mode": "single", "limit": 45.0}}
        _common.write_json(path / "vnncomp_one_shot.json", {**data, "rows": rows})
        _common.write_json(path / "vnncomp_one_shot_smoke.json", {**data, "rows": []})
        return path

    def test_table_counts_and_medians(self, results):
        lines = markdown_table(load_studies(results)).splitlines()
        assert lines[2] == (
            "| acasxu | one_shot | 2 / 3 | 1 | 26.5 | 0.01 | 2 (2.5) % of decisions; "
            "of advice alone 0.4 (0.5) % |"
        )
        assert lines[3].startswith("| **all** | one_shot | 2 / 3 | 1 |")

    @pytest.mark.parametrize(
        ("demanded", "told"),
        [([50.0, 150.0], "; its properties demand 100 % inside"), ([50.0], ""), ([1.0, 2.0], "")],
    )
    def test_table_tells_what_is_demanded_where_it_is_much_and_known(self, results, demanded, told):
        (study,) = load_studies(results)
        good = [row for row in study.rows if row["certified"]]
        for row in good:
            row["drawdown"]["kind"] = "relative"
        for row, value in zip(good, demanded, strict=False):
            row["drawdown"]["demanded"] = value
        assert f"2 (2.5) % of output change{told} |" in markdown_table([study])

    def test_table_goes_between_the_markers_and_nowhere_else(self, results, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
        table = markdown_table(load_studies(results))
        replace_table(readme, table)
        replace_table(readme, table)
        assert readme.read_text() == f"before\n{START}\n{table}\n{END}\nafter\n"
        replace_table(readme, "")
        assert readme.read_text() == f"before\n{START}\n{END}\nafter\n"
        readme.write_text("nothing")
        with pytest.raises(ValueError, match="add the two markers"):
            replace_table(readme, table)

    def test_pictures_are_drawn(self, results, tmp_path):
        assert [p.name for p in draw(load_studies(results), tmp_path)] == [
            "vnncomp_cactus.png",
            "vnncomp_drawdown.png",
        ]

    def test_readme_shows_the_committed_results(self):
        readme = ROOT / "README.md"
        text = readme.read_text() if readme.exists() else ""
        if START not in text:
            pytest.skip("README.md has no table of results")
        shown = re.search(f"{START}\n(.*?){END}", text, re.DOTALL)
        assert shown is not None
        assert shown[1].strip() == markdown_table(load_studies(_common.RESULTS))


def _network(weight, bias):
    from torch_prepared.core.capture import capture_module

    size = len(weight[0])
    module = torch.nn.Sequential(torch.nn.Linear(size, len(weight)))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor(weight))
        module[0].bias.copy_(torch.tensor(bias))
    return capture_module(module, torch.zeros(1, size))


class TestJudge:
    @pytest.fixture
    def prop(self):
        from torch_prepared.specs import Box, Property, SafeSet

        return Property(Box([0.0, 0.0], [1.0, 1.0]), SafeSet.argmax(0, 2))

    def test_decisions_inside_the_region_do_not_count(self, prop):
        before, after = (
            _network([[1.0, 0], [0, 1]], [0.0, 0]),
            _network([[1.0, 0], [0, 1]], [2.0, 0]),
        )
        inside = np.array([[0.2, 0.8]] * 5, np.float32)
        outside = np.array([[2.0, 3.0], [0.0, 9.0]], np.float32)
        found = compare_networks(
            before, after, [prop], np.concatenate([inside, outside]), None, "decision"
        )
        assert found.samples == 2
        assert found.percent == pytest.approx(50.0)
        assert found.outside

    def test_accuracy_is_compared_in_points(self, prop):
        before, after = (
            _network([[1.0, 0], [0, 1]], [0.0, 0]),
            _network([[1.0, 0], [0, 1]], [2.0, 0]),
        )
        inputs, labels = np.array([[2.0, 3.0], [0, 9]], np.float32), np.array([1, 1])
        found = compare_networks(before, after, [prop], inputs, labels, "accuracy")
        assert (found.before, found.after, found.percent) == (100.0, 50.0, 50.0)

    def test_what_a_property_demands_is_the_way_to_its_safe_set(self):
        """Outputs (x, -x) for x in [0, 1]: the first must be 1, or the second 0, or both."""
        from torch_prepared.specs import Box, Property, SafeSet

        before = _network([[1.0], [-1.0]], [0.0, 0.0])
        inputs = np.linspace(2, 3, 9, dtype=np.float32)[:, None]
        deviation = float(np.sqrt(2) * inputs.std())
        first = torch.tensor([[1.0, 0.0]]), torch.tensor([-1.0])
        either = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([-1.0, 0.0])
        x = Box([0.0], [1.0]).sample(2000, torch.Generator().manual_seed(0)).numpy()
        for clauses, away in (
            ([first], 1 - x),
            ([either], np.minimum(1 - x, x)),
            ([first, either], 1 - x),
        ):
            safe = SafeSet(tuple((rows.double(), offset.double()) for rows, offset in clauses))
            prop = Property(Box([0.0], [1.0]), safe)
            found = compare_networks(before, before, [prop], inputs, None, "relative")
            expected = 100 * np.sqrt(np.square(away).mean()) / deviation
            assert found.demanded == pytest.approx(expected, rel=1e-5)
            assert found.relative == 0.0

    def test_attack_finds_a_violation_in_a_corner(self, prop):
        class Session:
            def __init__(self, graph):
                self.graph = graph

            def __call__(self, x):
                from torch_prepared.relax import evaluate_graph

                return evaluate_graph(self.graph, torch.from_numpy(x)).numpy()

        none = np.zeros((0, 0), np.float32)
        bad = _network([[1.0, 0], [0, 1]], [0.99, 0])  # wrong only where x1 - x0 > 0.99
        assert attack_network(Session(bad), bad, [prop], none, 0).violated
        good = _network([[1.0, 0], [0, 1]], [1.01, 0])
        found = attack_network(Session(good), good, [prop], none, 0)
        assert not found.violated
        assert found.margin == pytest.approx(0.01, abs=1e-4)


@pytest.mark.skipif(not DATA.exists(), reason="the benchmark data are not beside the repository")
def test_smoke_study_end_to_end(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.fig_vnncomp", "run", "--smoke", "--method", "one_shot",
        "--data", str(DATA), "--results", str(tmp_path), "--threads", "1", "--jobs", "2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "vnncomp_one_shot_smoke.json").read_text())["rows"]
    assert len(rows) == fig_vnncomp.SMOKE_CASES
    for row in rows:
        assert row["certified"], row
        assert row["check_status"] == "certified"
        assert row["drawdown"]["samples"] > 0
        assert not row["attack"]["violated"]
        assert row["relative_l2"] > 0


def test_keys_name_method_mode_case_and_settings(cases):
    key = Settings("penalty").key(Case(cases[0].folder, "a.onnx", ("p.vnnlib", "q.vnnlib")))
    assert re.fullmatch(r"penalty/single/toy/a/2 files/[0-9a-f]{12}", key)


def test_own_editors_go_through_this_folder_s_runner():
    assert _study._entry("penalty")[-1] == "benchmarks._runner"
