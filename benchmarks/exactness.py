"""Compares merges of real adapters with the paper's equations in NumPy.

    python benchmarks/exactness.py ADAPTER...

Merges PEFT adapters by TSV and Iso-C at scale 0.9 in core space: once by the command
line's own steps (read, merge, write, read again), and once by the equations of arXiv 2509.17786 in
float64, with full singular value decompositions. Prints the largest relative
difference of a module's update.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common.reference import Reference

import coremerge_jax as cm

SCALE = 0.9


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the largest relative error over all modules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path, help="PEFT folders")
    adapters = [cm.load_peft(path) for path in parser.parse_args(argv).adapters]
    merged = cm.merge(adapters, cm.chain(cm.tsv(), cm.isotropize()), scale=SCALE)
    with tempfile.TemporaryDirectory() as folder:
        cm.save_peft(merged, Path(folder) / "merged")
        merged = cm.load_peft(Path(folder) / "merged")
    reference, errors = Reference(float(np.finfo(np.float64).eps)), {}
    for path, lora in merged.items():
        factors = [
            (adapter[path].a.astype(np.float64), adapter[path].b.astype(np.float64))
            for adapter in adapters
        ]
        expected = SCALE * reference.merge("tsv+iso-c", factors)
        update = lora.b.astype(np.float64) @ lora.a.astype(np.float64)
        errors[path] = np.linalg.norm(update - expected) / np.linalg.norm(expected)
    worst = max(errors, key=errors.__getitem__)
    print(f"{len(adapters)} adapters, {len(merged)} modules: largest relative error", end=" ")
    print(f"{errors[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
