"""Compares the results of two versions of this library, bit for bit.

    python benchmarks/same_results.py record before.npz
    python benchmarks/same_results.py record after.npz        # with the other version
    python benchmarks/same_results.py compare before.npz after.npz

Records some 250 merges of random adapters: each rule in each space, mixed ranks, dtypes, kinds of
modules, weights and scales, streams in small batches, merges of projections, meshes of eight
simulated devices, files and trees. Both recordings have to be made on one machine, by one version
of JAX. `compare` prints each result that differs, and the largest relative difference.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import coremerge_jax as cm

SHAPES = {"l.0.q": (24, 16), "l.1.q": (24, 16), "up": (20, 28), "o": (18, 18)}
# name: ranks, dtype, adapters in which the last module is missing
SETS = {
    "mixed": ((2, 5, 3), "float32", ()),
    "equal": ((4, 4), "float64", ()),
    "saturated": ((9, 7, 6), "float32", ()),
    "bfloat16": ((4, 2, 4), "bfloat16", ()),
    "partial": ((3, 3, 3), "float32", (1,)),
}
KEY = jax.random.key(3)
RULES = {
    "mean": cm.mean(),
    "task_arithmetic": cm.task_arithmetic(),
    "ties": cm.ties(density=0.4),
    "ties by number": cm.ties(density=0.8, elect="count", reduce="max"),
    "ties of the model": cm.ties(density=0.4, scope="model"),
    "sce": cm.sce(density=0.4),
    "prune": cm.prune(density=0.4),
    "dare|ties": cm.chain(cm.dare(drop=0.3), cm.ties()),
    "tsv": cm.tsv(),
    "tsv of a rank": cm.tsv(rank=2),
    "cart": cm.cart(rank=2, scale=0.7),
    "isotropize": cm.isotropize(),
    "flatten|tsv": cm.chain(cm.flatten(power=0.5), cm.tsv()),
    "tsv|isotropize": cm.chain(cm.tsv(), cm.isotropize()),
    "ties|isotropize": cm.chain(cm.ties(density=0.7), cm.isotropize()),
    "iso_cts": cm.iso_cts(common=3, specific=1),
    "svc": cm.svc(),
    "dc_merge": cm.dc_merge(density=0.2, rho=5.0),
    "pico|tsv": cm.chain(cm.pico(), cm.tsv()),
    "a function": lambda x: jax.numpy.tanh(x).sum(0),
}
SPACES = {
    "core": cm.core(),
    "balanced": cm.core(gauge="balanced"),
    "full": cm.full(),
    "knots": cm.knots(),
    "knots, scaled": cm.knots(scaled=True),
    "tucker": cm.tucker(rank=6),
}
# `pico` needs the factors of the adapters, which these spaces do not have.
UNDEFINED = {("knots", "pico|tsv"), ("knots, scaled", "pico|tsv"), ("tucker", "pico|tsv")}
FEW = ("task_arithmetic", "ties", "dare|ties", "tsv|isotropize", "cart")


def random_adapters(name: str) -> list[cm.Adapter]:
    """Returns the adapters of a set."""
    ranks, dtype, missing = SETS[name]
    rng = np.random.default_rng(len(name))
    return [
        cm.Adapter(
            {
                path: cm.LoRA(
                    a=rng.standard_normal((rank, n)).astype(dtype),
                    b=rng.standard_normal((m, rank)).astype(dtype),
                )
                for path, (m, n) in SHAPES.items()
                if not (path == "o" and i in missing)
            },
            metadata=cm.Metadata(name=f"task{i}", base_model="a/base"),
        )
        for i, rank in enumerate(ranks)
    ]


def layers(rank: int, seed: int) -> dict[str, Any]:
    """Returns LoRA factors as a tree: a stack of three layers, and a module beside it."""
    rng = np.random.default_rng(seed)

    def pair(*lead: int) -> dict[str, np.ndarray]:
        return {
            "lora_a": rng.standard_normal((*lead, 12, rank)).astype("float32"),
            "lora_b": rng.standard_normal((*lead, rank, 10)).astype("float32"),
        }

    return {"layers": {"q": pair(3)}, "head": pair()}


def cases() -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Yields a name and a function that returns the factors by module path, case by case."""
    for rule in RULES:
        for space in SPACES:
            if (space, rule) not in UNDEFINED:
                yield f"{space}/{rule}", lambda r=rule, s=space: merged("mixed", r, space=SPACES[s])
        for name in SETS:
            yield f"{name}/{rule}", lambda r=rule, s=name: merged(s, r)
    options = {
        "weights": {"weights": (0.5, 2.0, -1.0)},
        "scale": {"scale": {"l.0*": 0.3, "o": 2.0}},
        "float32": {"precision": "float32"},
    }
    for rule in FEW:
        for name, values in options.items():
            yield f"{name}/{rule}", lambda r=rule, v=values: merged("mixed", r, **v)
        yield f"stream/{rule}", lambda r=rule: streamed(r)
        yield f"projected/{rule}", lambda r=rule: projected(r)
        for shape in ((8,), (4, 2)):
            label = "x".join(map(str, shape))
            yield f"mesh {label}/{rule}", lambda r=rule, s=shape: merged("mixed", r, mesh=mesh(s))
    for dtype in ("float32", "bfloat16", "float16"):
        yield f"peft/{dtype}", lambda d=dtype: through_peft(dtype=d)
    yield "peft/rank", lambda: through_peft(rank=3)
    yield "peft/energy", lambda: through_peft(energy=0.9)
    yield "orbax", through_orbax
    yield "tree", through_a_tree


def merged(name: str, rule: str, **options: Any) -> cm.Adapter:
    """Returns the merge of a set."""
    return cm.merge(random_adapters(name), RULES[rule], key=KEY, **{"scale": 1.0, **options})


def streamed(rule: str) -> dict[str, Any]:
    """Returns a merge in batches as small as memory of 64 KiB makes them."""
    stream = cm.merge_stream(
        random_adapters("mixed"), RULES[rule], key=KEY, scale=1.0, max_memory=2**16
    )
    return {path: lora for part in stream for path, lora in part.items()}


def projected(rule: str) -> cm.Adapter:
    """Returns the merge of a projection."""
    return cm.project(random_adapters("mixed")).merge(RULES[rule], key=KEY, scale=1.0)


def mesh(shape: tuple[int, ...]) -> Mesh:
    """Returns a mesh of all devices."""
    names = ("modules", "columns")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def through_peft(**options: Any) -> cm.Adapter:
    """Returns a merge of adapters from files, written and read again."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [Path(folder) / str(i) for i in range(3)]
        for adapter, path in zip(random_adapters("mixed"), sources, strict=True):
            cm.save_peft(adapter, path)
        stream = cm.merge_stream([cm.open_peft(path) for path in sources], cm.tsv(), scale=1.0)
        cm.save_peft(stream, Path(folder) / "out", **options)
        return cm.load_peft(Path(folder) / "out")


def through_orbax() -> dict[str, Any]:
    """Returns a merge, written and read again as an orbax checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        cm.save_orbax(merged("mixed", "tsv"), Path(folder) / "out")
        adapter = cm.open_orbax(Path(folder) / "out")
        return {path: adapter[path] for path in adapter}


def through_a_tree() -> dict[str, Any]:
    """Returns the leaves of merged trees."""
    trees = [layers(rank, seed) for seed, rank in enumerate((2, 4))]
    adapter = cm.merge([cm.from_tree(tree) for tree in trees], cm.tsv(), scale=1.0)
    leaves = jax.tree_util.tree_leaves_with_path(cm.to_tree(adapter, like=trees[0]))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def record(out: Path) -> None:
    """Writes the results of all cases; of one that fails, its error."""
    arrays: dict[str, np.ndarray] = {}
    for i, (name, result) in enumerate(cases()):
        try:
            found = dict(result().items())
        except (cm.CoreMergeError, MemoryError) as error:
            arrays[f"{name}: error"] = np.array(f"{type(error).__name__}: {error}")
            continue
        for path, value in found.items():
            factors = {"a": value.a, "b": value.b} if isinstance(value, cm.LoRA) else {"": value}
            for factor, array in factors.items():
                array = np.asarray(array)
                wide = array.astype("float32") if array.dtype.name == "bfloat16" else array
                arrays[f"{name}: {path}.{factor}"] = wide
        if i % 12 == 11:
            jax.clear_caches()  # each program takes memory maps, of which Linux has 65530
    np.savez(out, **arrays)
    print(f"{i + 1} cases, {len(arrays)} arrays, JAX {jax.__version__}")


def compare(before: Path, after: Path) -> None:
    """Prints what differs."""
    with np.load(before) as x, np.load(after) as y:
        names, different = sorted({*x.files, *y.files}), 0
        for name in names:
            if name not in x.files or name not in y.files:
                different += 1
                print(f"{name}: only in {before if name in x.files else after}")
            elif x[name].tobytes() != y[name].tobytes() or x[name].shape != y[name].shape:
                different += 1
                print(f"{name}: {difference(x[name], y[name])}")
    cases = {name.split(": ")[0] for name in names}
    print(f"{len(cases)} merges, {len(names)} arrays: {different} differ")


def difference(x: np.ndarray, y: np.ndarray) -> str:
    """Returns how far two arrays are from each other, in words."""
    if x.dtype.kind in "US":
        return f"{x}\n  now: {y}"
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype}{x.shape}, now {y.dtype}{y.shape}"
    scale = np.linalg.norm(x.astype("float64")) or 1.0
    return f"{np.linalg.norm(y.astype('float64') - x.astype('float64')) / scale:.1e}"


def main() -> None:
    """Parses arguments, records or compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="write the results of this version")
    recorder.add_argument("out", type=Path)
    recorder.set_defaults(run=record)
    comparer = commands.add_parser("compare", help="print what differs between two recordings")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.set_defaults(run=compare)
    options = vars(parser.parse_args())
    options.pop("run")(**options)


if __name__ == "__main__":
    main()
