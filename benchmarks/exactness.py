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

import coremerge_jax as cm

SCALE = 0.9


def polar(x: np.ndarray) -> np.ndarray:
    """Returns the nearest matrix with orthonormal rows or columns."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def paper(factors: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the dense update of TSV with each adapter's own rank, then Iso-C (section 4)."""
    u = np.linalg.svd(np.concatenate([b for _, b in factors], axis=1), full_matrices=False)[0]
    vt = np.linalg.svd(np.concatenate([a for a, _ in factors]), full_matrices=False)[2]
    cores = [(u.T @ b) @ (a @ vt.T) for a, b in factors]
    triplets = []
    for core, (a, _) in zip(cores, factors, strict=True):
        left, s, right = np.linalg.svd(core)
        triplets.append((left[:, : len(a)], s[: len(a)], right[: len(a)]))
    left = polar(np.concatenate([t[0] for t in triplets], axis=1))
    right = polar(np.concatenate([t[2] for t in triplets]))
    s = np.concatenate([t[1] for t in triplets])
    core = (left * s) @ right
    return u @ (np.linalg.svd(core, compute_uv=False).mean() * polar(core)) @ vt


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the largest relative error over all modules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path, help="PEFT folders")
    adapters = [cm.load_peft(path) for path in parser.parse_args(argv).adapters]
    merged = cm.merge(adapters, cm.chain(cm.tsv(), cm.isotropize()), scale=SCALE)
    with tempfile.TemporaryDirectory() as folder:
        cm.save_peft(merged, Path(folder) / "merged")
        merged = cm.load_peft(Path(folder) / "merged")
    errors = {}
    for path, lora in merged.items():
        factors = [
            (adapter[path].a.astype(np.float64), adapter[path].b.astype(np.float64))
            for adapter in adapters
        ]
        expected = SCALE * paper(factors)
        update = lora.b.astype(np.float64) @ lora.a.astype(np.float64)
        errors[path] = np.linalg.norm(update - expected) / np.linalg.norm(expected)
    worst = max(errors, key=errors.__getitem__)
    print(f"{len(adapters)} adapters, {len(merged)} modules: largest relative error", end=" ")
    print(f"{errors[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
