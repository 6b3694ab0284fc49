"""The README's first example runs; its tables are what the package and the studies give."""

from __future__ import annotations

import re
from pathlib import Path

from torch_prepared.relax import support_table

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_example_runs() -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    assert block.group(1).count("\n") <= 20
    names: dict[str, object] = {}
    exec(compile(block.group(1), "README.md", "exec"), names)
    assert names["result"].status.name == "CERTIFIED"  # type: ignore[attr-defined]
    assert names["edited"] is not names["model"]


def test_the_training_example_runs() -> None:
    section = README.read_text().split("## In your training loop")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(compile(block.group(1), "README.md", "exec"), names)
    assert names["loop"].result.status.name == "CERTIFIED"  # type: ignore[attr-defined]


def test_the_operator_table_is_the_registry() -> None:
    text = README.read_text()
    table = text.split("<!-- table:operators -->\n")[1].split("<!-- /table -->")[0]
    assert table.strip() == support_table().strip()
