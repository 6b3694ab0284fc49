"""``python -m torch_prepared`` is the console script ``torch-prepared``."""

from torch_prepared.cli.main import main

if __name__ == "__main__":
    main()
