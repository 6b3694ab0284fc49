"""One case through the command line: edit, check in another process, judge in a third."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks._common import settings_digest
from benchmarks._process import Finished, run_limited
from benchmarks._reference import build_reference
from benchmarks._vnncomp import Case
from benchmarks.baselines import BASELINES

__all__ = ["Settings", "run_case"]

CHECK_SECONDS = 300.0
JUDGE_SECONDS = 300.0
START_SECONDS = 20.0

EDITING = 0.86  #: share of the limit that the editor gets; the rest is for starting and checking


@dataclass(frozen=True)
class Settings:
    """Everything that a row depends on besides the code.

    Args:
        method: name of the editor.
        mode: ``single`` property files; ``joint``, all violated ones of a network at once; or
            ``keep``, single ones with those of the network that hold and must still hold.
        limit: seconds for everything a user waits for: the edit, then the separate check. The
            editor is told ``EDITING`` of them.
        grace: seconds after ``limit`` at which the editor's process is killed.
        threads: CPU threads of every process.
        memory: bytes of address space of every process.
        seed: of everything random.
        norm: distance to minimize; the editor's choice when empty.
        fraction: share of the usual reference inputs.
        arguments: further options of the ``edit`` command.
    """

    method: str
    mode: str = "single"
    limit: float = 45.0
    grace: float = 30.0
    threads: int = 2
    memory: int = 8 << 30
    seed: int = 0
    norm: str = ""
    fraction: float = 1.0
    arguments: tuple[str, ...] = ()

    def key(self, case: Case) -> str:
        """Names a row: the same case under the same settings is not run twice."""
        return f"{self.method}/{self.mode}/{case.name}/{settings_digest(asdict(self))}"


def run_case(
    case: Case, root: Path, settings: Settings, work: Path, stop: threading.Event
) -> dict[str, object]:
    """Run one case and return its row.

    Args:
        case: network and property files.
        root: folder that holds ``mnist`` and ``cifar10``.
        settings: limits and method.
        work: empty folder for the case's files.
        stop: set to give up at once; the row's outcome is then ``interrupted``.
    """
    reference = build_reference(case, root, settings.seed, settings.fraction)
    reference.save(work / "preserve.npz", work / "evaluate.npz")
    np.savez(work / "known.npz", inputs=case.counterexamples())
    row: dict[str, object] = {
        "key": settings.key(case),
        "case": case.name,
        "benchmark": case.benchmark,
        "network": case.onnx,
        "properties": list(case.vnnlib),
        "keep": list(case.keep),
        "certified": False,
    }
    edited, certificate = work / "edited.onnx", work / "certificate.json.gz"
    files = [str(path) for path in case.property_files]
    keep = [str(path) for path in case.keep_files]
    edit = _run(
        [
            *_entry(settings.method), "edit", str(case.network), *files, "-o", str(edited),
            "--certificate", str(certificate), "--method", settings.method,
            "--preserve", str(work / "preserve.npz"),
            "--time-limit", str(EDITING * settings.limit),
            *(("--norm", settings.norm) if settings.norm else ()), *settings.arguments,
            *(word for name in keep for word in ("--keep", name)),
        ],
        settings, settings.limit + settings.grace, stop,
    )  # fmt: skip
    row |= _edit_columns(edit)
    row["per_property"] = property_rows(_answer(edit), {}, {})
    if not (edited.exists() and certificate.exists() and edit.outcome == "done"):
        return row | {"reason": _reason(edit, row)}
    check = _run(
        [*_entry("check"), "check", str(certificate), str(edited), *files, *keep],
        settings, CHECK_SECONDS, stop,
    )  # fmt: skip
    answer = _answer(check)
    row |= {
        "outcome": check.outcome if check.outcome == "interrupted" else row["outcome"],
        "check_seconds": check.seconds,
        "check_status": answer.get("status", "error"),
        "checked_margin": answer.get("margin"),
        "total_seconds": edit.seconds + check.seconds,
        "certificate_bytes": certificate.stat().st_size,
    }
    row["per_property"] = property_rows(_answer(edit), answer, {})
    if check.code != 0 or answer.get("status") != "certified":
        return row | {"reason": f"check: {_last_line(check) or answer.get('status')}"}
    found = _judged(case, edited, reference.evaluate.kind, settings, work, stop)
    judged = found.get("attack")
    singles = property_rows(_answer(edit), answer, judged if isinstance(judged, dict) else {})
    if found["certified"] and not (singles and all(single["certified"] for single in singles)):
        found |= {"certified": False, "reason": "check and judge speak of other properties"}
    return row | {"per_property": singles} | found


def _judged(
    case: Case, edited: Path, kind: str, settings: Settings, work: Path, stop: threading.Event
) -> dict[str, object]:
    """Columns of drawdown and attack; a case that could not be judged is not certified either."""
    task = work / "task.json"
    task.write_text(
        json.dumps(
            {
                "original": str(case.network),
                "edited": str(edited),
                "properties": [str(path) for path in case.property_files],
                "keep": [str(path) for path in case.keep_files],
                "evaluate": str(work / "evaluate.npz"),
                "counterexamples": str(work / "known.npz"),
                "kind": kind,
                "threads": settings.threads,
                "seed": settings.seed,
            }
        )
    )
    judge = _run(
        [sys.executable, "-m", "benchmarks._judge", str(task)],
        settings, JUDGE_SECONDS, stop, as_json=False,
    )  # fmt: skip
    answer = _answer(judge)
    attack = answer.get("attack")
    if judge.code != 0 or not isinstance(attack, dict):
        return {
            "outcome": judge.outcome,
            "certified": False,
            "reason": f"judge: {_last_line(judge) or judge.outcome}",
        }
    found: dict[str, object] = {"certified": not attack["violated"], **answer}
    if attack["violated"]:
        found["reason"] = f"attack: margin {attack['margin']:.6g} in spite of the certificate"
    return found


def _run(
    command: Sequence[str],
    settings: Settings,
    seconds: float,
    stop: threading.Event,
    *,
    as_json: bool = True,
) -> Finished:
    threads = str(settings.threads)
    options = ["--threads", threads, "--json"] if as_json else []
    if as_json and "edit" in command:
        options += ["--seed", str(settings.seed)]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return run_limited(
        [*command, *options],
        seconds=seconds,
        memory=settings.memory,
        stop=stop,
        environment=dict.fromkeys(names, threads),
    )


def _entry(method: str) -> list[str]:
    """The package's command line; through this folder's runner for the editors of this folder."""
    module = "benchmarks._runner" if method in BASELINES else "torch_prepared"
    return [sys.executable, "-m", module]


def _edit_columns(edit: Finished) -> dict[str, object]:
    """Columns that come from the editor's process and its answer."""
    answer = _answer(edit)
    delta = answer.get("delta")
    changed = delta if isinstance(delta, dict) else {}
    attempts = answer.get("attempts")
    notes = [a.get("note", "") for a in attempts] if isinstance(attempts, list) else []
    return {
        "outcome": edit.outcome,
        "exit_code": edit.code,
        "status": answer.get("status", "error"),
        "method_used": answer.get("method"),
        "notes": notes[-12:],
        "edit_seconds": edit.seconds,
        "total_seconds": edit.seconds,
        "phases": answer.get("phases"),
        "margin": answer.get("margin"),
        "message": answer.get("message"),
        "conflicts": answer.get("conflicts"),
        "peak_bytes": edit.peak_bytes,
        **{name: changed.get(name) for name in ("relative_l2", "l1", "l2", "linf", "changed")},
        "layers": sorted(changed.get("by_parameter") or {}),
    }


def property_rows(
    edit: Mapping[str, object], check: Mapping[str, object], attack: Mapping[str, object]
) -> list[dict[str, object]]:
    """One row per property: before the edit, the separate check's verdict, the judge's attack.

    Properties are matched by position, as ``edit``, ``check`` and the judge read the same files in
    the same order; where names or counts differ nothing is certified.

    Args:
        edit: what ``edit --json`` printed.
        check: what ``check --json`` printed; empty when it did not run.
        attack: the judge's attack; empty likewise.
    """
    told = [p for p in _dicts(edit.get("properties")) if p.get("role") != "holdout"]
    checks, attacks = _dicts(check.get("properties")), _dicts(attack.get("properties"))
    rows = []
    for i, prop in enumerate(told):
        before = prop.get("before")
        was = before if isinstance(before, dict) else {}
        seen = checks[i] if len(checks) == len(told) else {}
        tried = attacks[i] if len(attacks) == len(told) else {}
        same = prop.get("name") == seen.get("name") == tried.get("name")
        rows.append(
            {
                "name": prop.get("name"),
                "role": prop.get("role"),
                "before": was.get("state"),
                "margin_before": was.get("upper"),
                "status": seen.get("status", "unknown"),
                "checked_margin": seen.get("margin"),
                "attack_margin": tried.get("margin"),
                "violated": tried.get("violated"),
                "reason": prop.get("reason") or seen.get("reason") or "",
                "certified": same
                and seen.get("status") == "certified"
                and tried.get("violated") is False,
            }
        )
    return rows


def _dicts(value: object) -> list[dict[str, object]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _reason(edit: Finished, row: dict[str, object]) -> str:
    """Why there is nothing to check."""
    if edit.outcome != "done":
        return f"edit: {edit.outcome} after {edit.seconds:.0f} s"
    message = row.get("message") if row.get("status") != "error" else None
    return f"edit: {message or _last_line(edit) or f'exit code {edit.code}'}"


def _answer(process: Finished) -> dict[str, object]:
    """The JSON object a child printed; empty when it printed none."""
    try:
        answer = json.loads(process.stdout.strip() or "{}")
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _last_line(process: Finished) -> str:
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
