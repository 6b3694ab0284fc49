"""Cases of several properties: judged one by one, certified only together."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import _study, fig_vnncomp  # noqa: E402 - needs the path above
from benchmarks._process import Finished  # noqa: E402
from benchmarks._study import Settings, property_rows, run_case  # noqa: E402
from benchmarks._vnncomp import Case, find_cases, keep_the_rest, merge_by_network  # noqa: E402
from benchmarks._vnncomp_report import Study, draw, markdown_table  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "vnncomp2022" / "toy"
    path.mkdir(parents=True)
    rows = ["a.onnx,p.vnnlib,1,sat", "a.onnx,q.vnnlib,1,sat", "a.onnx,p.vnnlib,1,sat"]
    rows += ["a.onnx,r.vnnlib,1,unsat", "a.onnx,s.vnnlib,1,unknown", "b.onnx,r.vnnlib,1,unsat"]
    (path / "instances.csv").write_text("\n".join(["onnx,vnnlib,timeout,status", *rows]) + "\n")
    return path


def told(*names):
    before = {"state": "violated", "lower": -2.0, "upper": -1.0}
    return {
        "properties": [
            {"name": name, "role": "edit", "before": before, "reason": ""} for name in names
        ]
    }


def checked(*names, status="certified"):
    return {"properties": [{"name": n, "status": status, "margin": 0.1} for n in names]}


def attacked(*names, violated=()):
    return {
        "properties": [{"name": n, "violated": n in violated, "margin": 0.2} for n in names],
        "violated": bool(violated),
        "margin": 0.2,
    }


def test_a_file_listed_twice_is_edited_for_once(folder):
    (case,) = merge_by_network(find_cases(folder.parent, ["toy"]))
    assert case.vnnlib == ("p.vnnlib", "q.vnnlib")


def test_only_properties_known_to_hold_are_kept(folder):
    cases = keep_the_rest(find_cases(folder.parent, ["toy"]))
    assert {case.keep for case in cases} == {("r.vnnlib",)}
    assert cases[0].keep_files == (folder / "r.vnnlib",)


def test_a_property_counts_when_check_and_judge_agree_on_it():
    rows = property_rows(told("p", "q"), checked("p", "q"), attacked("p", "q", violated=["q"]))
    assert [row["certified"] for row in rows] == [True, False]
    assert rows[0]["margin_before"] == -1.0
    assert rows[0]["checked_margin"] == 0.1
    assert rows[0]["attack_margin"] == 0.2


@pytest.mark.parametrize(
    ("check", "attack"),
    [
        ({}, {}),
        (checked("p", "q"), {}),
        ({}, attacked("p", "q")),
        (checked("p"), attacked("p", "q")),
        (checked("q", "p"), attacked("p", "q")),
        (checked("p", "q", status="unknown"), attacked("p", "q")),
        (checked("p", "q"), attacked("p", "q", violated=["p", "q"])),
        ({"properties": None}, {"properties": "p"}),
    ],
)
def test_nothing_counts_without_both(check, attack):
    rows = property_rows(told("p", "q"), check, attack)
    assert [row["certified"] for row in rows] == [False, False]


def test_another_choice_of_files_is_another_case(tmp_path):
    settings = Settings("x", "joint")
    case = Case(tmp_path, "a.onnx", ("p.vnnlib", "q.vnnlib"))
    other = Case(tmp_path, "a.onnx", ("p.vnnlib", "r.vnnlib"))
    assert settings.key(case) == settings.key(other)
    study = fig_vnncomp._Study(tmp_path / "x.json", settings, 1, False)
    study.add({"key": settings.key(case), "properties": list(case.vnnlib)})
    assert study.done(case)
    assert not study.done(other)
    assert not study.done(Case(tmp_path, "a.onnx", case.vnnlib, ("s.vnnlib",)))


class Children:
    """Answers in place of the three processes of one case."""

    def __init__(self, check, judge, code=0):
        self.answers = {"edit": told("p", "q"), "check": check, "judge": judge}
        self.code = code
        self.commands = []

    def __call__(self, command, settings, seconds, stop, *, as_json=True):
        self.commands.append(command)
        kind = next((k for k in ("edit", "check") if k in command), "judge")
        if kind == "edit":
            for option in ("-o", "--certificate"):
                Path(command[command.index(option) + 1]).write_text("x")
        text = json.dumps({"status": "certified", **self.answers[kind]})
        code = self.code if kind == "judge" else 0
        return Finished(code, 1.0, 1, text, "boom", "done")


class FixedReference:
    class evaluate:  # noqa: N801 - stands for a field
        kind = "accuracy"

    def save(self, preserve, evaluate):
        np.savez(preserve, inputs=np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("judge", "code", "certified"),
    [
        ({"attack": attacked("p", "q")}, 0, True),
        ({"attack": attacked("p", "q", violated=["q"])}, 0, False),
        ({"attack": attacked("p")}, 0, False),
        ({"attack": attacked("p", "q")}, 1, False),
        ({}, 0, False),
    ],
)
def test_a_case_is_certified_only_when_every_property_is(
    folder, tmp_path, monkeypatch, judge, code, certified
):
    children = Children(checked("p", "q"), judge, code)
    monkeypatch.setattr(_study, "_run", children)
    monkeypatch.setattr(_study, "build_reference", lambda *_: FixedReference())
    work = tmp_path / "work"
    work.mkdir()
    case = Case(folder, "a.onnx", ("p.vnnlib", "q.vnnlib"), ("r.vnnlib",))
    row = run_case(case, tmp_path, Settings("x", "joint"), work, threading.Event())
    assert row["certified"] is certified
    assert certified or row["reason"]
    assert len(row["per_property"]) == 2
    edit, check, _ = children.commands
    assert edit[edit.index("--keep") + 1] == str(folder / "r.vnnlib")
    assert check[-3:] == [str(folder / name) for name in ("p.vnnlib", "q.vnnlib", "r.vnnlib")]
    task = json.loads((work / "task.json").read_text())
    assert task["keep"] == [str(folder / "r.vnnlib")]


def test_the_table_counts_properties_too():
    single = {"certified": True, "benchmark": "toy", "total_seconds": 1.0, "relative_l2": 0.1}
    rows = ({**single, "per_property": [{"certified": True}, {"certified": False}]},)
    text = markdown_table([Study("auto", "joint", 45.0, rows)])
    assert "| toy | auto, joint | 1 / 1 (1 / 2 properties) |" in text


def test_another_limit_is_named_in_the_table_and_left_out_of_pictures(tmp_path: Path):
    single = {"certified": True, "benchmark": "toy", "total_seconds": 50.0, "relative_l2": 0.1}
    longer = Study("auto", "single", 300.0, ({**single, "per_property": []},))
    assert "| toy | auto, 300 s | 1 / 1 | 1 | 50 |" in markdown_table([longer])
    assert draw([longer], tmp_path) == []
