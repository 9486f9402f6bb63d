"""Runs `text8.command`, for ``python benchmarks/text8``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from text8.command import main  # noqa: E402

sys.exit(main())
