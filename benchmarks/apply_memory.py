"""Measures the time and memory of folding an adapter into a model on disk.

    python benchmarks/apply_memory.py [--layers N] [--repeat N] [--check]

Writes a base model of random bfloat16 weights in four files (4.6 GB) and a PEFT adapter for all its
linear layers, then runs ``coremerge apply`` in fresh processes. One more is killed half-way:
it must leave no output, and the base unchanged. Writes a table and JSON to
``benchmarks/results/jax-VERSION``. For POSIX systems.
"""

# Imports little: Linux counts the memory of the process that starts another one as the other's.
import argparse
import hashlib
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine
from common.command import gib, run
from common.publish import Sheet, digits, publish, script

SHARDS = 4
RANK = 16
# Rows and columns of the weights in a layer.
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
EMBEDDING = (32000, 4096)
NOTES = """\
Wall seconds of the process, median, the fastest in brackets; peak memory is the largest of all
runs. *copy*: seconds to copy the same files, and nothing else. *bound*: twice the largest tensor,
plus the memory of `--dry-run`, which reads no tensor. The files have
just been written, and are read out of the page cache."""


def layers(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Returns the shape of the weight of each adapted layer, by its path."""
    return {
        f"model.layers.{i}.{name}": (m // options.shrink, n // options.shrink)
        for i in range(options.layers)
        for name, (m, n) in LAYER.items()
    }


def write_files(options: argparse.Namespace) -> None:
    """Writes the base model and the adapter to ``options.write``."""
    import ml_dtypes
    import numpy as np

    import coremerge_jax as cm
    from coremerge_jax.io.tensors import TensorWriter

    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    embedding = tuple(size // options.shrink for size in EMBEDDING)
    shapes = {"model.embed_tokens": embedding, **layers(options), "lm_head": embedding}
    names = [f"{path}.weight" for path in shapes]
    base = options.write / "base"
    base.mkdir(parents=True)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        with TensorWriter(base / file, part, {"format": "pt"}) as writer:
            for name in part:
                shape = shapes[name.removesuffix(".weight")]
                writer.write(name, np.resize(noise, shape))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    modules = {
        path: cm.LoRA(
            a=rng.standard_normal((RANK, n), np.float32) / math.sqrt(n),
            b=rng.standard_normal((m, RANK), np.float32) * 0.02,
        )
        for path, (m, n) in layers(options).items()
    }
    cm.save_peft(cm.Adapter(modules), options.write / "adapter", dtype="bfloat16")


def size(path: Path) -> int:
    """Returns the bytes of all files in a folder that may be changing."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def hashes(path: Path) -> dict[str, str]:
    """Returns the hash of each file in a folder."""
    found = {}
    for file in sorted(path.iterdir()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha1").hexdigest()
    return found


def copy_seconds(base: Path, target: Path) -> float:
    """Returns the seconds that copying the files to the disk takes."""
    start = time.perf_counter()
    shutil.copytree(base, target)
    for file in target.iterdir():
        subprocess.run(["sync", file], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def kill_half_way(arguments: Sequence[str | Path], base: Path, place: Path) -> dict[str, Any]:
    """Kills the command when half of its output is written; returns what it left."""
    before, half = hashes(base), size(base) / 2
    place.mkdir()
    command = [sys.executable, "-m", "coremerge_jax", *arguments, "-o", place / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and size(place) < half:
        time.sleep(0.001)
    written = size(place)
    process.kill()
    code = process.wait()
    left = {
        "killed": code == -signal.SIGKILL,
        "written": written,
        "output": (place / "out").exists(),
        "base_untouched": hashes(base) == before,
    }
    shutil.rmtree(place)
    return left


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Runs the command, and kills it once."""
    command = [sys.executable, __file__, "--write", place, "--layers", str(options.layers)]
    subprocess.run([*command, *["--tiny"] * options.tiny], check=True)
    base, adapter, cache = place / "base", place / "adapter", place / "cache"
    arguments = ["apply", adapter, "--base", base]
    footprint = run([*arguments, "--dry-run"], cache)["peak"]
    runs = []
    for _ in range(options.repeat):
        runs.append(run([*arguments, "-o", place / "out"], cache))
        for file in base.glob("*.safetensors"):
            if file.stat().st_size != (place / "out" / file.name).stat().st_size:
                sys.exit(f"{file.name} is not complete")
        shutil.rmtree(place / "out")
    largest = 2 * max(m * n for m, n in (*LAYER.values(), EMBEDDING)) // options.shrink**2
    seconds = [entry["seconds"] for entry in runs]
    return {
        "base_bytes": size(base),
        "modules": len(layers(options)),
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "runs": len(runs),
        "stages": runs[-1]["stages"],
        "copy_seconds": copy_seconds(base, place / "copy"),
        "peak_bytes": max(entry["peak"] for entry in runs),
        "footprint_bytes": footprint,
        "largest_tensor_bytes": largest,
        "bound_bytes": 2 * largest + footprint,
        "killed": kill_half_way(arguments, base, place / "killed"),
    }


def misses(found: dict[str, Any], *, tiny: bool = False) -> list[str]:
    """Returns a line for each target that was missed."""
    missed, killed = [], found["killed"]
    if found["peak_bytes"] > found["bound_bytes"] and not tiny:
        missed.append(f"memory: {gib(found['peak_bytes'])}, bound {gib(found['bound_bytes'])}")
    if not killed["killed"]:
        missed.append("the command ended before it was killed")
    if killed["output"] or not killed["base_untouched"]:
        missed.append("killed half-way, it left an output, or changed the base")
    return missed


def sheet(found: dict[str, Any]) -> Sheet:
    """Returns the table."""
    header = ["base", "modules", "seconds", "copy", "peak memory", "bound", "program alone"]
    row = [
        gib(found["base_bytes"]),
        str(found["modules"]),
        f"{digits(found['seconds'])} ({digits(found['min'])})",
        digits(found["copy_seconds"]),
        gib(found["peak_bytes"]),
        gib(found["bound_bytes"]),
        gib(found["footprint_bytes"]),
    ]
    return Sheet(header, [row])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument(
        "--layers", type=int, default=10, help="layers of the model; default: %(default)s"
    )
    parser.add_argument("--tiny", action="store_true", help="only try it, on a tiny model")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="folder with room for three models")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.shrink = 8 if options.tiny else 1
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    if options.write:
        write_files(options)
        return 0
    watch = machine.Watch()
    with tempfile.TemporaryDirectory(prefix="coremerge-", dir=options.folder) as scratch:
        found = measure(options, Path(scratch))
    missed = misses(found, tiny=options.tiny)
    result = {"machine": machine.describe(watch), **found, "missed": missed}
    publish(options.output / "apply", "Into a base model", result, [sheet(found)], NOTES)
    print("\n".join(missed) or "all targets met")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
