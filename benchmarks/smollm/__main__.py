"""Runs `smollm.command`, for ``python benchmarks/smollm``."""

import os
import sys
from pathlib import Path

# XLA warns of a feature that its programs in the cache have, and that no processor needs to have.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[0] = str(Path(__file__).parents[1])

from smollm.command import main  # noqa: E402

sys.exit(main())
