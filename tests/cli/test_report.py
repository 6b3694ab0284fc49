"""``edit --report`` and ``report``: a page from a file that is not trusted."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torch_prepared.cli._report_file import load_record
from torch_prepared.cli._report_map import map_plane
from torch_prepared.cli._report_page import render_page
from torch_prepared.cli._report_view import read_view
from torch_prepared.core.onnx import load_onnx
from torch_prepared.errors import ReportError
from torch_prepared.specs import load_vnnlib

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json


@pytest.fixture(scope="module")
def edited_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edited")


@pytest.fixture
def edited(
    edited_folder: Path, run: Run, write_model: WriteModel, write_property: WriteProperty,
    tmp_path: Path,
) -> Path:  # fmt: skip
    """A folder with the files of one edit; made once, copied for every test."""
    if not (edited_folder / "result.json").exists():
        model, prop = write_model(), write_property()
        keep = write_property("(>= Y_0 4.0)", name="keep.vnnlib")
        other = write_property("(>= Y_0 1.0)", name="<b>&other.vnnlib")
        result = run(
            *("edit", model, prop, "--keep", keep, "--holdout", other, "--method", "one_shot"),
            *("-o", tmp_path / "out.onnx", "--certificate", tmp_path / "cert.json"),
            *("--report", tmp_path / "result.json", "--domain=-2,2", "--time-limit", 30),
        )
        assert result.exit_code == 0, result.output
        shutil.copytree(tmp_path, edited_folder, dirs_exist_ok=True)
    target = tmp_path / "work"
    shutil.copytree(edited_folder, target)
    return target


def record(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


class Page(HTMLParser):
    """Tags with attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_holds_all_numbers_and_digests(edited: Path) -> None:
    data = record(edited)
    assert data["format"] == "torch_prepared.report"
    result = data["result"]
    roles = {p["name"]: p["role"] for p in result["properties"]}
    assert roles == {"prop": "edit", "keep": "keep", "<b>&other": "holdout"}
    states = {p["name"]: (p["before"]["state"], p["after"]["state"]) for p in result["properties"]}
    assert states["prop"] == ("violated", "certified")
    assert states["keep"] == ("holds", "certified")
    assert [p["status"] for p in result["properties"]] == ["certified", "certified", "unknown"]
    assert len(result["delta"]["by_layer"]) == 2
    assert result["locality"]["outside"]["samples"] > 0
    assert result["generalization"]["properties"] == 1
    files = data["files"]
    assert [files[k]["path"] for k in ("model", "output")] == ["net.onnx", "out.onnx"]
    assert re.fullmatch("[0-9a-f]{64}", files["output"]["sha256"])


def test_the_certificate_of_kept_properties_replays(run: Run, edited: Path) -> None:
    names = ("cert.json", "out.onnx", "prop.vnnlib", "keep.vnnlib")
    result = run("check", *(edited / name for name in names))
    assert result.exit_code == 0, result.output
    assert "  keep: certified" in result.stdout


def test_the_page_stands_alone_and_escapes_names(run: Run, edited: Path) -> None:
    result = run("report", edited / "result.json", "--json")
    assert result.exit_code == 0, result.output
    data = only_json(result)
    assert data["page"] == str(edited / "result.html")
    assert data["pictures"] == ["attempts", "layers", "locality", "map", "margins"]
    page = Page(edited / "result.html")
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 5
    for source in images:
        assert source is not None
        head, data64 = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data64, validate=True).startswith(b"\x89PNG")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "b/"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "href"]
    assert "http" not in (edited / "result.html").read_text().replace("http-equiv", "")
    assert "<b>&other" in page.text
    assert "certified" in page.text


def test_a_moved_folder_still_makes_a_page(run: Run, edited: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    edited.rename(moved)
    result = run("report", moved / "result.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["net.onnx", "out.onnx", "prop.vnnlib"])
@pytest.mark.parametrize("how", ["changed", "missing", "folder"])
def test_files_other_than_the_edit_s_are_refused(
    run: Run, edited: Path, name: str, how: str
) -> None:
    path = edited / name
    if how == "changed":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    line = one_line_error(run("report", edited / "result.json"))
    assert name in line
    assert "--no-map" in line
    assert not (edited / "result.html").exists()
    assert run("report", edited / "result.json", "--no-map").exit_code == 0


def paths(value: object, where: tuple = ()) -> list[tuple]:
    """Places of all scalars and lists inside JSON data."""
    found = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += [(*where, key), *paths(item, (*where, key))]
    elif isinstance(value, list) and value:
        found += paths(value[0], (*where, 0))
    return found


def test_no_change_of_one_field_breaks_the_page(run: Run, edited: Path, tmp_path: Path) -> None:
    """Each field in turn replaced: a page, or one line with exit code 2, never a traceback."""
    original = record(edited)
    refused = 0
    for place in paths(original):
        for value in ("<script>alert(1)</script>", -1e308, None, [], {}):
            data = copy.deepcopy(original)
            inner = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (edited / "bad.json").write_text(json.dumps(data))
            try:
                view = read_view(*load_record(edited / "bad.json"))
            except ReportError:
                refused += 1
                continue
            assert "<script" not in render_page(view, {}, {})
    assert refused > 100


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[]", "{}", "null", '{"format": 1}', "[" * 10_000, '{"format": "x", "version": 1}',
        '{"format": "torch_prepared.report", "version": 2}',
        '{"format": "torch_prepared.report", "version": 1, "files": NaN}',
        '{"format": "torch_prepared.report", "version": 1, "files": {}, "result": []}',
        "\x00\xff",
    ],
)  # fmt: skip
def test_files_that_are_no_report_are_refused(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    line = one_line_error(run("report", path))
    assert "result.json" in line
    assert not (tmp_path / "result.html").exists()


def test_a_truncated_report_is_refused(run: Run, edited: Path) -> None:
    path = edited / "result.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    one_line_error(run("report", path))


def test_numbers_beyond_reason_still_draw(run: Run, edited: Path) -> None:
    data = record(edited)
    for prop in data["result"]["properties"]:
        prop["before"].update(lower=-1e300, upper=None)
        prop["after"].update(lower=None, upper=1e-300)
    data["result"]["locality"]["bands"][0].update(nearest=0.0, farthest=1e30, relative=1e30)
    data["result"]["delta"]["by_layer"][0]["relative_l2"] = None
    data["result"]["properties"] *= 40
    data["result"]["delta"]["by_layer"] *= 200
    (edited / "result.json").write_text(json.dumps(data))
    result = run("report", edited / "result.json", "--no-map")
    assert result.exit_code == 0, result.output


def test_the_output_is_never_the_input(run: Run, edited: Path) -> None:
    before = (edited / "result.json").read_bytes()
    one_line_error(run("report", edited / "result.json", "-o", edited / "result.json"))
    assert (edited / "result.json").read_bytes() == before


def test_a_failed_edit_has_a_report_and_no_other_file(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    above = write_property("(<= Y_0 3.0)", name="above.vnnlib")
    below = write_property("(>= Y_0 1.0)", name="below.vnnlib")
    result = run(
        *("edit", write_model(), above, below, "-o", tmp_path / "out.onnx", "--certificate"),
        *(tmp_path / "cert.json", "--report", tmp_path / "result.json", "--json"),
    )
    assert result.exit_code == 20, result.output
    assert only_json(result)["conflicts"] == [["above", "below"]]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"net.onnx", "above.vnnlib", "below.vnnlib", "result.json"}
    assert record(tmp_path)["files"]["output"] is None
    page = run("report", tmp_path / "result.json")
    assert page.exit_code == 0, page.output
    assert "Contradict each other: above, below" in Page(tmp_path / "result.html").text


def test_the_map_shows_the_margins_of_its_points(edited: Path) -> None:
    before = load_onnx(edited / "net.onnx").graph
    after = load_onnx(edited / "out.onnx").graph
    (prop,) = load_vnnlib(edited / "prop.vnnlib")
    plane = map_plane(before, after, prop, progress=False)
    assert plane is not None
    # y_0 = |x_0| + |x_1| is unsafe from 1.5 on: the corners, and the middle is safe.
    middle = tuple(size // 2 for size in plane.margins[0].shape)
    assert plane.margins[0][middle] == pytest.approx(1.5, abs=0.05)
    assert plane.margins[0].min() < -1
    (x, y), _ = plane.worst
    assert abs(x) + abs(y) > 1.3
    inside = abs(plane.a) < 0.5
    assert plane.margins[1][abs(plane.b) < 0.5][:, inside].min() > 0
    assert abs(plane.outline).max() <= 2**0.5 + 1e-9


def test_regions_of_one_dimension_have_no_map(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    prop = write_property()
    text = prop.read_text().replace("(assert (<= X_1 1.0))", "(assert (<= X_1 -1.0))")
    prop.write_text(text)
    result = run(
        *("edit", write_model(), prop, "-o", tmp_path / "out.onnx", "--method", "one_shot"),
        *("--certificate", tmp_path / "cert.json", "--report", tmp_path / "result.json"),
    )
    assert result.exit_code == 0, result.output
    page = run("report", tmp_path / "result.json")
    assert page.exit_code == 0, page.output
    assert "fewer than two free coordinates" in Page(tmp_path / "result.html").text
