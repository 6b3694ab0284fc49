"""The package's command line with the editors of this folder added.

``python -m benchmarks._runner edit MODEL PROP... -o OUT --certificate CERT --method penalty``
"""

from __future__ import annotations

from benchmarks.baselines import BASELINES
from torch_prepared.cli.main import main
from torch_prepared.edit import EDITORS

if __name__ == "__main__":
    EDITORS.update(BASELINES)
    main()
