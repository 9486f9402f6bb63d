"""Runs `smollm.command`, for ``python benchmarks/smollm``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from smollm.command import main  # noqa: E402

sys.exit(main())
