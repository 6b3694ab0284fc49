"""What proofs of four MNIST networks rest on, and what an edit made a proof rest on.

``python -m benchmarks.fig_interpretation run [--count 200] [--threads 2] [--cache FOLDER]
[--smoke]`` writes ``benchmarks/results/interpretation.json`` after every cell and skips the cells
that are there already; ``... plot`` draws it from the JSON alone. Without a command it does both.

Networks: ``_interpretation_nets`` (trained on first use, the seconds are in the JSON; ``--cache``
keeps the weights). Properties: the maximum-norm ball around the first ``count`` test
images, clipped to [0, 1]; networks need not classify them rightly, what is not proved is counted
as such. Each kept set of the three searches is replayed by the certificate checker as the pruned
network; the baselines ``weight`` and ``random`` (the paper's search in another order) are sizes
that the bounds claim. Interval and zonotope proofs are studied on a quarter of the images.

The last part edits a network of VNN-COMP's mnist_fc and compares the proofs before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import _figure
from benchmarks._common import FIGURES, RESULTS, SCHEMA, environment, write_json
from benchmarks._interpretation_nets import TRAININGS, Digits, load_digits, train_network
from benchmarks._interpretation_plots import draw_edit, draw_maps, draw_sizes
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import load_onnx
from torch_prepared.edit import edit_network
from torch_prepared.interpret import (
    Choices,
    Explanation,
    FeatureOrder,
    FeatureSet,
    ProofFeatures,
    compare_proofs,
    explain_proof,
    feature_maps,
    foreground_share,
    proof_size_report,
)
from torch_prepared.interpret._query import PruneQuery
from torch_prepared.interpret._search import order_features, prefix_search
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property, load_vnnlib, local_robustness

SEARCHES = (("prefix", "priority"), ("greedy", "priority"), ("exact", "priority"))
BASELINES = (FeatureOrder.WEIGHT, FeatureOrder.RANDOM)
CELLS = (("crown", 0.02), ("ibp", 0.02), ("crown", 0.1), ("zonotope", 0.02))
SHOWN = (3, 2, 1, 18, 4)  # test images 0, 1, 2, 3 and 4: digits 0 1 2 3 4
EDITED = ("mnist-net_256x2", "prop_1_0.03")


class Study:
    """The result file, rewritten after every cell."""

    def __init__(self, path: Path, head: Mapping[str, object]) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.exists() else {}
        same = old.get("parameters") == head["parameters"]
        self.data: dict[str, object] = {**head, "cells": old.get("cells", {}) if same else {}}
        self.cells: dict[str, object] = self.data["cells"]  # type: ignore[assignment]

    def keep(self, name: str, cell: object) -> None:
        """Add a cell and write the file."""
        self.cells[name] = cell
        self.data["rows"] = [row for c in self.cells.values() for row in c["rows"]]  # type: ignore[index]
        write_json(self.path, self.data)
        print(f"{name}: written to {self.path}", flush=True)


def run(options: argparse.Namespace, output: Path) -> None:
    """Measure every cell that the result file lacks."""
    torch.set_num_threads(options.threads)
    count = 3 if options.smoke else options.count
    parameters = {"count": count, "smoke": options.smoke, "seed": 0, "epochs": TRAININGS}
    head = {
        "schema": SCHEMA,
        **environment(),
        "dtype": "bounds float64, networks float32",
        "threads": options.threads,
        "load_average": os.getloadavg(),
        "parameters": parameters,
    }
    study = Study(output, head)
    digits = load_digits(options.data / "mnist")
    if options.smoke:
        digits = Digits(*(part[:2000] for part in vars(digits).values()))
    for kind in TRAININGS:
        if options.nets and kind not in options.nets:
            continue
        model, seconds = train_network(
            kind, digits, options.cache, epochs=1 if options.smoke else None
        )
        graph = capture_module(model, digits.test[:1])
        with torch.no_grad():
            right = evaluate_graph(graph, digits.test).argmax(dim=1) == digits.test_labels
        if kind not in study.cells:
            rows = _rows(kind, {"accuracy": (float(right.double().mean()), "1")})
            rows += _rows(kind, {"training": (seconds, "s")})
            study.keep(kind, {"rows": rows, "maps": _shown_maps(graph, digits)})
        for method, eps in CELLS:
            name = f"{kind} {method} {eps}"
            if name not in study.cells:
                part = count if method == "crown" else -(-count // 4)
                study.keep(name, _cell(name, graph, digits, method, eps, part))
    if "edit" not in study.cells and not options.nets:
        study.keep("edit", _edit_cell(options.data, digits, options.smoke))


def _rows(case: str, values: Mapping[str, tuple[float, str]]) -> list[dict[str, object]]:
    return [{"case": case, "metric": m, "value": v, "unit": u} for m, (v, u) in values.items()]


def _property(digits: Digits, position: int, eps: float) -> Property:
    label = int(digits.test_labels[position])
    return local_robustness(digits.test[position], label, eps, 10, clip=(0.0, 1.0))


def _cell(
    name: str, graph: Graph, digits: Digits, method: str, eps: float, count: int
) -> dict[str, object]:
    """Sizes, priorities and maps of one network's proofs of one kind."""
    properties = [_property(digits, i, eps) for i in range(count)]
    baselines: dict[str, list[int]] = {order.value: [] for order in BASELINES}
    shares: list[float] = []
    areas: list[float] = []
    histogram = [0] * 20
    sizes: dict[str, list[int]] = {search: [] for search, _ in SEARCHES}
    seconds: list[float] = []
    start = time.perf_counter()
    bar = tqdm(total=count, desc=name, leave=False)

    def visit(
        position: int, features: ProofFeatures, sets: dict[tuple[str, str], FeatureSet]
    ) -> None:
        bar.update()
        if not sets:
            return
        for (search, _), found in sets.items():
            if found.sufficient:
                sizes[search].append(len(found.kept))
        seconds.append(sum(s.seconds for s in sets.values()))
        query = PruneQuery(features)
        for order in BASELINES:
            ordered = order_features(query, order, position)
            baselines[order.value].append(prefix_search(query, ordered).count)
        used = features.priority[features.priority > 0]
        for value in (used / used.max()).tolist():
            histogram[min(19, int(20 * value))] += 1
        top = features.priority.argmax().reshape(1)
        picture = feature_maps(features, top)
        shares.extend(foreground_share(picture, digits.test[position] > 0).tolist())
        areas.append(_area(picture[0]))

    with bar:
        report = proof_size_report(graph, properties, method=method, searches=SEARCHES, visit=visit)
    rows: list[dict[str, object]] = []
    for line in report:
        numbers = {k: float(v) for k, v in vars(line).items() if k not in ("method", "order")}
        units = {k: "s" if "seconds" in k else "1" for k in numbers}
        rows += _rows(name, {f"{line.method} {k}": (v, units[k]) for k, v in numbers.items()})
    for order, counts in baselines.items():
        if counts:
            values = {f"{order} kept_mean": (statistics.fmean(counts), "1")}
            values[f"{order} kept_median"] = (float(statistics.median(counts)), "1")
            rows += _rows(name, values)
    if shares:
        rows += _rows(name, {"map share on foreground": (statistics.fmean(shares), "1")})
        rows += _rows(name, {"pixels holding 90 % of map": (statistics.fmean(areas), "1")})
        rows += _rows(name, {"extraction_largest": (max(seconds), "s")})
    rows += _rows(name, {"wall per property": ((time.perf_counter() - start) / count, "s")})
    return {"rows": rows, "sizes": {**sizes, **baselines}, "histogram": histogram}


def _area(picture: Tensor) -> float:
    """Share of the pixels that together hold 90 % of a map's absolute values."""
    values = picture.abs().flatten().sort(descending=True).values
    if not float(values.sum()) > 0:
        return float("nan")
    return float((values.cumsum(0) < 0.9 * values.sum()).sum() + 1) / values.numel()


def _shown_maps(graph: Graph, digits: Digits) -> list[dict[str, object]]:
    """The feature of highest priority on a few images, with and without optimized slopes."""
    found = []
    for position in SHOWN:
        prop = _property(digits, position, 0.02)
        result = explain_proof(graph, prop, extract="prefix", time_limit=20)
        top = result.features.priority.argmax().reshape(1)
        found.append(
            {
                "image": position,
                "label": int(digits.test_labels[position]),
                "outcome": result.selected.outcome.value,
                "kept": result.selected.kept.tolist(),
                "pixels": _short(digits.test[position]),
                "frozen": _short(feature_maps(result.features, top)),
                "alpha": _short(feature_maps(result.features, top, style="alpha")),
            }
        )
    return found


def _short(values: Tensor) -> str:
    """A picture scaled to a largest value of 1, one byte a pixel (0 is 128), in hexadecimal."""
    flat = values.detach().double().flatten()
    scaled = flat / flat.abs().max().clamp(min=1e-300)
    return bytes((128 + 127 * scaled).round().to(torch.uint8).tolist()).hex()


def _edit_cell(data: Path, digits: Digits, smoke: bool) -> dict[str, object]:
    """Edit a network until a violated property is certified; compare the proofs."""
    model, prop_name = EDITED
    folder = data / "vnncomp2022" / "mnist_fc"
    network = load_onnx(folder / "onnx" / f"{model}.onnx.gz")
    size = network.graph.input_size
    prop = load_vnnlib(folder / "vnnlib" / f"{prop_name}.vnnlib.gz", input_size=size)[0]
    result = edit_network(
        network,
        prop,
        preserve=digits.train[:1000].double(),
        labels=digits.train_labels[:1000],
        time_limit=10 if smoke else 60,
        threads=2,
        raise_on_failure=False,
    )
    accuracy = [
        float((evaluate_graph(g, digits.test).argmax(1) == digits.test_labels).double().mean())
        for g in (network.graph, result.model.graph)  # type: ignore[union-attr]
    ]
    compared = compare_proofs(network, result.model, prop, Choices(extract="exact"))
    alike = compared.to_json()
    values = {
        "certified": (float(result.certificate is not None), "1"),
        "accuracy before": (accuracy[0], "1"),
        "accuracy after": (accuracy[1], "1"),
        "margin before": (compared.before.features.margin, "1"),
        "margin after": (compared.after.features.margin, "1"),
        "proved fraction before": (compared.fraction[0], "1"),
        "proved fraction after": (compared.fraction[1], "1"),
        "jaccard": (compared.jaccard, "1"),
        "rank correlation": (compared.rank_correlation, "1"),
        "map cosine": (compared.map_cosine, "1"),
        "kept after": (float(len(compared.after.selected.kept)), "1"),
    }
    pictures = {"before": _leading(compared.before), "after": _leading(compared.after)}
    region = prop.region
    return {
        "rows": _rows("edit", values),
        "network": model,
        "property": prop_name,
        "center": _short((region.lower + region.upper) / 2),
        "maps": pictures,
        "comparison": alike,
    }


def _leading(explanation: Explanation, count: int = 4) -> list[dict[str, object]]:
    """The features of highest priority, and whether they are kept."""
    features, kept = explanation.features, set(explanation.selected.kept.tolist())
    first = features.priority.argsort(descending=True, stable=True)[:count]
    maps = feature_maps(features, first)
    return [
        {"feature": i, "kept": i in kept, "map": _short(m)}
        for i, m in zip(first.tolist(), maps, strict=True)
    ]


def plot(source: Path) -> None:
    """Draw the three pictures from the JSON, beside it unless it is a committed result."""
    record = json.loads(source.read_text())
    cells: Mapping[str, Mapping[str, object]] = record["cells"]
    stem = source.stem
    drawings: Sequence[tuple[str, object]] = (
        (stem, draw_sizes(cells)),
        (f"{stem}_maps", draw_maps(cells)),
        (f"{stem}_edit", draw_edit(cells.get("edit"))),
    )
    folder = FIGURES if source.parent == RESULTS else source.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawings:
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=130)  # type: ignore[attr-defined]
            print(f"wrote {folder / f'{name}.png'}")


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2, data="mnist and vnncomp2022")
    parser.add_argument("--count", type=int, default=200, help="properties per network")
    parser.add_argument("--cache", type=Path, help="folder for trained weights")
    parser.add_argument("--nets", nargs="*", help="only these networks, and no edit")
    options = _figure.parse(parser, "interpretation")
    if options.command != "plot":
        run(options, options.output)
    if options.command != "run":
        plot(options.output)


if __name__ == "__main__":
    main()
