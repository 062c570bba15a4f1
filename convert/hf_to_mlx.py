"""The same command as `mlx_dgemma.convert`, for use from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_dgemma.cli.convert import main

if __name__ == "__main__":
    main()
