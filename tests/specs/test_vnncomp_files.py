"""The reader on the property files of VNN-COMP 2022, and their stored counterexamples."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_prepared.specs import Box, load_vnnlib

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vnncomp2022"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}")

# benchmark: number of files, possible (inputs, outputs), properties in all the files
EXPECTED = {
    "acasxu": (10, {(5, 5)}, 11),
    "cifar_biasfield": (3, {(16, 10)}, 3),
    "collins_rul_cnn": (32, {(400, 1), (800, 1)}, 32),
    "mnist_fc": (30, {(784, 10)}, 30),
    "nn4sys": (15, {(1, 1), (154, 1), (308, 1)}, 4203),
    "oval21": (30, {(3072, 10)}, 30),
    "reach_prob_density": (31, {(3, 3), (5, 5), (14, 14)}, 31),
    "rl_benchmarks": (262, {(4, 2), (8, 4), (8, 8)}, 262),
    "sri_resnet_a": (68, {(3072, 10)}, 68),
    "sri_resnet_b": (68, {(3072, 10)}, 68),
    "tllverifybench": (19, {(2, 1)}, 19),
}
LARGE = ("nn4sys", "oval21", "sri_resnet_a", "sri_resnet_b")


def files(benchmark):
    return sorted((DATA / benchmark / "vnnlib").glob("*.vnnlib.gz"))


def sizes(properties):
    (size,) = {(p.region.size, p.safe.size) for p in properties}
    assert all(isinstance(p.region, Box) for p in properties)
    return size


@pytest.mark.parametrize("benchmark", [name for name in EXPECTED if name not in LARGE])
def test_every_small_file_is_read(benchmark):
    loaded = [load_vnnlib(path) for path in files(benchmark)]
    count, expected_sizes, properties = EXPECTED[benchmark]
    assert len(loaded) == count
    assert {sizes(p) for p in loaded} == expected_sizes
    assert sum(map(len, loaded)) == properties


@pytest.mark.parametrize("benchmark", LARGE)
def test_some_large_files_are_read(benchmark):
    paths = files(benchmark)
    assert len(paths) == EXPECTED[benchmark][0]
    assert {sizes(load_vnnlib(path)) for path in paths[::10]} <= EXPECTED[benchmark][1]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", LARGE)
def test_every_large_file_is_read(benchmark):
    loaded = [load_vnnlib(path) for path in files(benchmark)]
    assert {sizes(p) for p in loaded} == EXPECTED[benchmark][1]
    assert sum(map(len, loaded)) == EXPECTED[benchmark][2]


def test_acasxu_property_2_is_coc_not_maximal():
    (prop,) = load_vnnlib(DATA / "acasxu" / "vnnlib" / "prop_2.vnnlib.gz", input_size=5)
    y = torch.tensor([[3.0, 1.0, 2.0, 0.0, 1.0], [1.0, 3.0, 2.0, 0.0, 1.0], [1.0] * 5])
    assert prop.safe.contains(y).tolist() == [False, True, False]
    assert prop.safe.strict


def counterexamples():
    for benchmark in EXPECTED:
        source = DATA / benchmark / "counterexamples.npz"
        if not source.is_file():
            continue
        with np.load(source) as points, (DATA / benchmark / "instances.csv").open() as table:
            for row in csv.DictReader(table):
                stems = [Path(row[k]).name.split(f".{k}")[0] for k in ("onnx", "vnnlib")]
                key = "__".join(stems)
                if key in points:
                    yield DATA / benchmark / row["vnnlib"], points[key]


def test_stored_counterexamples_lie_in_a_region():
    """They were clipped into the box rounded to float32, so within one such rounding."""
    cache, checked = {}, 0
    for path, point in counterexamples():
        if path not in cache:
            cache[path] = load_vnnlib(path, input_size=point.size)
        x = torch.from_numpy(point).double()
        assert any(
            bool((x >= p.region.lower - slack(p.region.lower)).all())
            and bool((x <= p.region.upper + slack(p.region.upper)).all())
            for p in cache[path]
        ), path
        checked += 1
    assert checked >= 170


def slack(bound):
    return 1.2e-7 * bound.abs() + 1e-38
