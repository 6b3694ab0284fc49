"""Guaranteed edits of 1 to 1,000 examples: what they take, and what they do to accuracy.

``python -m benchmarks.fig_pointwise run [--threads 2] [--limit 120] [--smoke]`` writes
``benchmarks/results/pointwise.json`` row by row (finished rows are not run again unless
``--fresh``); ``... plot`` draws ``benchmarks/figures/pointwise.png`` from the JSON alone.

Networks: ``mnist_fc 256x2`` of VNN-COMP 2022 and a 784-256-256-10 ReLU network trained here. Tasks:

implant   m training images that no method sees otherwise, each to a random wrong class
repair    m test images that the network gets wrong, to their right classes
there     test image 0 to a wrong class
back      test image 0 back to its class, from the network that ``there`` returned

Accuracy is that on all 10,000 test images, before and after. ``behavior`` preserves the outputs on
40,000 other training images; the other methods minimize a norm of the weight change. ``seconds``
are wall time, ``cpu_seconds`` those of the process. Rows of one image that was given a wrong class
also hold bounds of the radius around it in which that class reaches after the edit
(``certified_radius``, by CROWN, and ``attacked_radius``), and the distance to the nearest of the
40,000 images, in both norms.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, write_json
from benchmarks._pointwise_radius import class_radius, nearest
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import load_onnx
from torch_prepared.edit.pointwise import Outcome, edit_points
from torch_prepared.relax import evaluate_graph

NETWORK = "vnncomp2022/mnist_fc/onnx/mnist-net_256x2.onnx.gz"
PRESERVE, HELD = 40_000, 10_000
EPOCHS, RATE, BATCH = 6, 1e-3, 128


@dataclass(frozen=True)
class Images:
    """Inputs (q, 784) in [0, 1] and classes (q,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Case:
    """One row: a network, a task and a method."""

    network: str
    task: str
    count: int
    method: str

    @property
    def key(self) -> str:
        """Names the row."""
        return f"{self.network}/{self.task}/{self.count}/{self.method}"

    def options(self, graph: Graph) -> dict[str, object]:
        """Arguments of ``edit_points``."""
        layers = [n.name for n in graph.nodes if n.op == "linear"]
        known: dict[str, dict[str, object]] = {
            "behavior": {"norm": "behavior"},
            "projection": {"norm": "behavior", "layer": layers[-1]},
            "lp-inf": {"norm": "inf"},
            "lp-1": {"norm": "1"},
            "milp-inf": {"norm": "inf", "layer": layers[-2]},
            "milp-1": {"norm": "1", "layer": layers[-2]},
            "z3-any": {"norm": "inf", "solver": "z3", "budget": 0.2},
        }
        return known[self.method]


def read_images(data: Path, part: str) -> Images:
    """``part`` is ``train`` or ``t10k``."""

    def array(kind: str, offset: int) -> np.ndarray:
        raw = gzip.decompress((data / f"mnist/{part}-{kind}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, np.uint8, offset=offset)

    pixels = array("images-idx3", 16).reshape(-1, 784).astype(np.float32) / 255
    labels = array("labels-idx1", 8).astype(np.int64)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def train_network(images: Images, seed: int = 0, epochs: int = EPOCHS) -> Graph:
    """A ReLU network with two hidden layers of 256, trained with cross entropy."""
    torch.manual_seed(seed)
    sizes = (784, 256, 256, 10)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for part in torch.randperm(len(images.inputs)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(
                model(images.inputs[part]), images.labels[part]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return capture_module(model, images.inputs[:1])


def decide(graph: Graph, inputs: Tensor) -> Tensor:
    """Classes (q,)."""
    with torch.no_grad():
        return torch.cat([evaluate_graph(graph, p).argmax(1) for p in inputs.split(2048)])


def pick(case: Case, graph: Graph, train: Images, test: Images) -> tuple[Tensor, Tensor]:
    """Examples and the classes that they shall get."""
    generator = torch.Generator().manual_seed(case.count)
    if case.task == "repair":
        wrong = (decide(graph, test.inputs) != test.labels).nonzero().flatten()[: case.count]
        return test.inputs[wrong], test.labels[wrong]
    if case.task in ("there", "back"):
        x = test.inputs[:1]
        own = decide(graph, x)
        return x, own if case.task == "back" else (own + 1) % 10
    held = train.inputs[-HELD:]
    x = held[torch.randperm(HELD, generator=generator)[: case.count]]
    shift = 1 + torch.randint(9, (case.count,), generator=generator)
    return x, (decide(graph, x) + shift) % 10


def run_case(
    case: Case, graph: Graph, start: Graph, train: Images, test: Images, limit: float, threads: int
) -> tuple[dict[str, object], Graph]:
    """Edit ``start``; targets and the accuracy before come from the original ``graph``."""
    x, targets = pick(case, graph, train, test)
    options = case.options(graph)
    if options["norm"] == "behavior":
        options["preserve"] = train.inputs[:PRESERVE]
    clock, cpu = time.perf_counter(), time.process_time()
    result = edit_points(start, x, targets, time_limit=limit, threads=threads, **options)
    seconds, used = time.perf_counter() - clock, time.process_time() - cpu
    model = result.model
    before, after = (decide(g, test.inputs) for g in (graph, model))
    right = [float((d == test.labels).double().mean()) for d in (before, after)]
    row: dict[str, object] = {
        "key": case.key,
        **asdict(case),
        "examples": len(x),
        "outcome": result.outcome.value,
        "status": result.status.value,
        "used": result.method,
        "seconds": seconds,
        "cpu_seconds": used,
        "phases": dict(result.seconds),
        "accuracy_before": 100 * right[0],
        "accuracy_after": 100 * right[1],
        "points_lost": 100 * (right[0] - right[1]),
        "agreement": 100 * float((before == after).double().mean()),
        "margin": float(result.margins.min()),
        "margin_float": float(result.margins_float.min()),
        "size": result.size,
        "bound": result.bound,
        "changed": result.delta.changed,
        "linf": result.delta.linf,
        "relative_l2": result.delta.relative_l2,
        "message": result.message[:200],
    }
    if len(x) == 1 and case.task in ("implant", "there") and result.outcome is Outcome.EDITED:
        row |= class_radius(model, x[0], int(targets[0]))
        row |= nearest(x[0], train.inputs[:PRESERVE])
    return row, model


def cases(smoke: bool) -> Iterator[Case]:
    """What is run, quick ones first."""
    networks = ("mnist_fc 256x2", "trained 256x2")
    for network in networks[1:] if smoke else networks:
        yield Case(network, "there", 1, "behavior")
        yield Case(network, "back", 1, "behavior")
        for count in (1,) if smoke else (1, 10, 100, 1000):
            for method in ("lp-inf", "lp-1", "projection", "behavior"):
                if count <= 100 or method == "behavior":
                    yield Case(network, "implant", count, method)
        if smoke:
            continue
        for count in (1, 10, 100):
            for method in ("lp-inf", "behavior"):
                yield Case(network, "repair", count, method)
        for count in (1, 10):
            for method in ("milp-inf", "milp-1"):
                yield Case(network, "implant", count, method)
        yield Case(network, "implant", 1, "z3-any")


def run(
    output: Path, data: Path, limit: float, threads: int, smoke: bool, fresh: bool, only: str
) -> None:
    """Run what is missing; the file is rewritten after every row."""
    torch.set_num_threads(threads)
    old = json.loads(output.read_text()) if output.exists() and not fresh else {"rows": []}
    rows = {row["key"]: row for row in old["rows"]}
    train, test = read_images(data, "train"), read_images(data, "t10k")
    wanted = [c for c in cases(smoke) if only in c.key]
    graphs = {"mnist_fc 256x2": load_onnx(data / NETWORK).graph}
    if any(c.network.startswith("trained") and c.key not in rows for c in wanted):
        kept = Images(train.inputs[:-HELD], train.labels[:-HELD])
        graphs["trained 256x2"] = train_network(kept, epochs=1 if smoke else EPOCHS)
    there: dict[str, Graph] = {}
    for case in wanted:
        if case.key in rows and case.task != "there":
            continue
        graph = graphs[case.network] if case.network in graphs else None
        if graph is None:
            continue
        start = there.get(case.network, graph) if case.task == "back" else graph
        row, model = run_case(case, graph, start, train, test, limit, threads)
        if case.task == "there":
            there[case.network] = model
        rows[case.key] = row
        print(
            f"{case.key}: {row['status']} by {row['used']} in {row['seconds']:.1f} s "
            f"(cpu {row['cpu_seconds']:.1f}), accuracy {row['accuracy_before']:.2f} -> "
            f"{row['accuracy_after']:.2f}"
            + (
                f", class reaches {row['certified_radius']:.4f} to {row['attacked_radius']:.4f}, "
                f"nearest kept image at {row['nearest_kept_linf']:.3f} (2-norm "
                f"{row['nearest_kept_l2']:.2f})"
                if "certified_radius" in row
                else ""
            ),
            flush=True,
        )
        settings = {"limit": limit, "threads": threads, "preserve": PRESERVE, "held": HELD}
        head = {"schema": SCHEMA, "settings": settings, "environment": environment()}
        write_json(output, {**head, "rows": list(rows.values())})


def plot(source: Path, picture: Path) -> None:
    """Accuracy lost and seconds against the number of examples, implants only."""
    data = json.loads(source.read_text())
    rows = [r for r in data["rows"] if r["task"] == "implant" and r["outcome"] == "edited"]
    networks = sorted({r["network"] for r in rows})
    names = {
        "lp-inf": "LP, last layer, max norm",
        "lp-1": "LP, last layer, 1-norm",
        "projection": "projection, last layer, behavior",
        "behavior": "behavior, all layers",
        "milp-inf": "MILP, hidden layer, max norm",
        "milp-1": "MILP, hidden layer, 1-norm",
        "z3-any": "Z3, last layer, max norm",
    }
    figure, axes = _figure.new(2, len(networks), (5 * len(networks), 7), squeeze=False)
    for column, network in enumerate(networks):
        for method, name in names.items():
            mine = sorted(
                (r for r in rows if r["network"] == network and r["method"] == method),
                key=lambda r: r["count"],
            )
            if not mine:
                continue
            counts = [r["count"] for r in mine]
            lost = [max(r["points_lost"], 0.01) for r in mine]
            axes[0][column].plot(counts, lost, "o-", label=name)
            axes[1][column].plot(counts, [r["cpu_seconds"] for r in mine], "o-", label=name)
        axes[0][column].set_title(network)
        axes[0][column].set_ylabel("points of test accuracy lost (0.01 or less)")
        axes[1][column].set_ylabel("CPU seconds, verification included")
        for axis in axes[:, column]:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("examples forced to a wrong class")
            axis.grid(alpha=0.3)
    figure.set_layout_engine("constrained")  # makes room for what is outside of all panels
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    _figure.save(figure, picture, dpi=120)


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2, data="mnist and vnncomp2022")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per edit")
    parser.add_argument("--only", default="", help="part of a row's key")
    parser.add_argument("--fresh", action="store_true", help="run finished cases again")
    options = _figure.parse(parser, "pointwise")
    if options.command != "plot":
        run(
            options.output, options.data, options.limit, options.threads,
            options.smoke, options.fresh, options.only,
        )  # fmt: skip
    if options.command != "run":
        plot(options.output, options.figure)


if __name__ == "__main__":
    main()
