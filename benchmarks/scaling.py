"""Times merges on simulated devices, and estimates them for accelerators.

    python benchmarks/scaling.py [--only measured|model] [--rules RULE ...] [--repeat N] [--tiny]

Measured: `cm.merge(..., mesh=)` on CPU devices that JAX simulates, a fresh process for each number
of them. Estimated: from the cost model and public figures of TPUs and GPUs. Writes tables and
JSON to ``benchmarks/results/jax-VERSION``. All of it takes about two minutes on two cores.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from common import machine
from common.paper import RULE_TITLES
from common.peers import RULES
from common.publish import Sheet, digits, publish, script
from common.shapes import SHAPES, Kind, Shape
from common.timing import Runner
from jax.sharding import AxisType, Mesh

import coremerge_jax as cm
from coremerge_jax.merging.cost import Cost, batch_size, cost
from coremerge_jax.merging.groups import Group

SHAPE = SHAPES["llama-3-8b"]
MEASURED = ("tsv+iso-c", "ties")
MODELLED = "tsv+iso-c"
PARTS = ("measured", "model")

# --- Measured ----------------------------------------------------------------------------------

MEASURED_NOTES = """\
**Measured.** {title}, {layers} layers, {modules} modules, NumPy arrays in memory before and after;
medians after a first run. A process with N simulated devices has at most N of the {cores} cores,
one thread of BLAS, and none of XLA within an operation. More devices than cores cannot help (*at
best*): the table shows the cost of sharing, not the speed of accelerators.
*times one*: modules per second over those of one device on one core. A mesh (rows, columns) has
modules spread over its rows, and the rows and columns of each module over its columns. *none*: no
mesh, but a thread for each core."""


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row for each number of devices, mesh and rule."""
    rows = [row for devices in options.devices for row in _in_process(devices, options)]
    one = {row["rule"]: row["rate"] for row in rows if row["devices"] == 1}
    for row in rows:
        row["over_one"] = row["rate"] / one[row["rule"]] if one else None
        row["at_best"] = min(row["devices"], machine.cores())
    return rows


def _in_process(devices: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns rows from a fresh process, as JAX fixes its devices when it starts."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, "--child", str(devices), "--layers", str(options.layers)]
    command += ["--repeat", str(options.repeat), *["--tiny"] * options.tiny]
    command += ["--rules", *options.rules]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    print(f"{devices} devices: measured", file=sys.stderr, flush=True)
    return json.loads(output)


def time_meshes(shape: Shape, rules: Sequence[str], repeat: int) -> list[dict[str, Any]]:
    """Times merges without a mesh, and on all devices of this process, on one axis and on two."""
    devices, adapters = jax.device_count(), shape.adapters()
    meshes: list[tuple[int, ...]] = [()] if devices <= machine.cores() else []
    meshes += [(devices,), (devices // 2, 2)] if devices > 1 else []
    runners = {
        (rule, size): Runner(
            rule, partial(cm.merge, adapters, RULES[rule], mesh=_mesh(size) if size else None)
        )
        for rule in rules
        for size in meshes
    }
    for runner in runners.values():
        runner.warm_up()
    for _ in range(repeat):
        for runner in runners.values():
            runner.round()
    return [_row(rule, size, len(adapters[0]), runner) for (rule, size), runner in runners.items()]


def _mesh(size: tuple[int, ...]) -> Mesh:
    names = ("modules", "features")[: len(size)]
    return jax.make_mesh(size, names, axis_types=(AxisType.Auto,) * len(size))


def _row(rule: str, size: tuple[int, ...], modules: int, runner: Runner) -> dict[str, Any]:
    times = runner.record()
    rate = modules / times["seconds"]
    return {"rule": rule, "devices": jax.device_count(), "mesh": size, "rate": rate} | times


def measured_sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the table."""
    header = ["rule", "mesh", "devices", "seconds", "modules/s", "times one", "at best"]
    return Sheet(
        header,
        [
            [
                RULE_TITLES[row["rule"]],
                str(tuple(row["mesh"])) if row["mesh"] else "none",
                str(row["devices"]),
                f"{digits(row['seconds'])} ({digits(row['min'])})",
                f"{row['rate']:.1f}",
                f"{row['over_one']:.2f}×" if row["over_one"] else "",
                f"{row['at_best']}×",
            ]
            for row in sorted(rows, key=lambda row: row["rule"])
        ],
    )


# --- Estimated ---------------------------------------------------------------------------------


class Assumption(NamedTuple):
    """A number that is neither measured nor specified."""

    value: float
    what: str


ASSUMED = {
    "products": Assumption(0.25, "share of the peak that products of matrices reach"),
    "decompositions": Assumption(0.002, "share of the same peak that decompositions reach"),
    "memory": Assumption(0.7, "share of the memory's bandwidth that is reached"),
    "links": Assumption(0.7, "share of the links' bandwidth, between devices and to the host"),
    "tpu_host": Assumption(16e9, "B/s between a TPU v5e chip and its host, one way"),
    "storage": Assumption(2e9, "B/s that a host reads from its storage and converts, or writes"),
}

MODEL_NOTES = """\
**Estimated.** Nothing here is measured: it is arithmetic with the cost model of `--dry-run`, public
figures and the assumptions in the table, which are guesses. {rule}, factors in float32 in files.

- Seconds are those of the busiest device or host. *compute*: modules of each kind, divided by rows
  and rounded up, times operations and bytes over rates. *read*, *write*: from and to the host's
  storage, and between host and device. They overlap, so that *total* is the longest of the three;
  compiling comes on top.
- Mesh: as many rows as devices, unless there are fewer modules: then columns, as many as one host
  has devices, and so that each has at least R rows of a module. Columns share products with
  factors, repeat all work on R × R matrices, and add up Gram matrices: where R is large, most of
  the work is repeated, and columns save memory rather than time (in float32, at the price of
  time). Rows beyond the number of modules have nothing to do.
- *memory*: of the batches on their way on a device, two with one column and else one, each of
  *batch* modules, which it works on at once. Counted as in float64.
- In float32, bases come from QR and singular value decompositions, on several columns from three
  Gram matrices each; operations after Golub and Van Loan.
- TPU v5e: 197 TFLOP/s in bfloat16, 16 GB, 819 GB/s, 400 GB/s between chips in both directions
  (Google Cloud documentation, "TPU v5e", System architecture), 64 chips as 8 hosts (the same,
  Configurations). Computes in float32 with `Precision.HIGHEST`, six bfloat16 passes (JAX
  documentation, `jax.lax.Precision`): a sixth of the peak.
- H100 SXM: 67 TFLOP/s in float64 on tensor cores, 80 GB, 3.35 TB/s, NVLink 900 GB/s and PCIe Gen5
  128 GB/s in both directions (NVIDIA H100 datasheet, Technical Specifications). Computes in
  float64."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A device, with the rates that it is expected to reach.

    Attributes:
        name: of the device.
        double: whether it computes in float64, else in float32.
        products: FLOP/s in products of matrices, in that precision.
        decompositions: FLOP/s in everything else.
        bandwidth: B/s of its memory.
        memory: bytes.
        link: B/s to other devices of its host, one way.
        host_link: B/s from or to its host.
        devices_per_host: how many share a host.
        storage: B/s that a host reads, and that it writes.
    """

    name: str
    double: bool
    products: float
    decompositions: float
    bandwidth: float
    memory: float
    link: float
    host_link: float
    devices_per_host: int = 8
    storage: float = ASSUMED["storage"].value


def _reached(what: str, peak: float) -> float:
    """Returns the assumed part of a peak."""
    return ASSUMED[what].value * peak


V5E = Accelerator(
    "TPU v5e",
    double=False,
    products=_reached("products", 197e12 / 6),
    decompositions=_reached("decompositions", 197e12 / 6),
    bandwidth=_reached("memory", 819e9),
    memory=16e9,
    link=_reached("links", 400e9 / 2),
    host_link=_reached("links", ASSUMED["tpu_host"].value),
)
H100 = Accelerator(
    "H100 SXM",
    double=True,
    products=_reached("products", 67e12),
    decompositions=_reached("decompositions", 67e12),
    bandwidth=_reached("memory", 3.35e12),
    memory=80e9,
    link=_reached("links", 900e9 / 2),
    host_link=_reached("links", 128e9 / 2),
)


class Cluster(NamedTuple):
    """A number of devices of one sort."""

    name: str
    accelerator: Accelerator
    devices: int

    @property
    def per_host(self) -> int:
        """Devices of each host."""
        return min(self.devices, self.accelerator.devices_per_host)


CLUSTERS = (
    Cluster("1 TPU v5e", V5E, 1),
    Cluster("v5e-8, 1 host", V5E, 8),
    Cluster("v5e-64, 8 hosts", V5E, 64),
    Cluster("1 H100", H100, 1),
    Cluster("8 H100, 1 host", H100, 8),
    Cluster("32 H100, 4 hosts", H100, 32),
)
CASES = (
    SHAPES["llama-3-8b"],
    dataclasses.replace(SHAPES["llama-3-70b"], title="Llama-3-70B, T 8, r 16", layers=80, tasks=8),
    Shape("huge", "2 × 16384², T 8, r 256", 2, (Kind(16384, 16384, ("q_proj",)),), 8, 256),
)


def mesh_for(shape: Shape, cluster: Cluster) -> tuple[int, int]:
    """Returns rows and columns."""
    modules = sum(map(shape.modules, shape.kinds))
    least = min(min(kind.m, kind.n) for kind in shape.kinds) // shape.stacked_rank
    most = min(cluster.devices // modules, cluster.per_host, least)
    columns = 2 ** (max(most, 1).bit_length() - 1)
    return cluster.devices // columns, columns


def cost_of_part(shape: Shape, kind: Kind, columns: int, double: bool) -> Cost:
    """Returns the cost of one module to each of the columns that share it (R rows or more)."""
    part = Kind(kind.m // columns, kind.n // columns, kind.names)
    one = cost(group_of(shape, part, 1), cm.chain(RULES[MODELLED]), cm.core())
    if double:
        return one
    # Counted beside the Cholesky factors that only float64 allows: see `linalg.basis`.
    sides, cubes = shape.stacked_rank**2 * (part.m + part.n), 2 * shape.stacked_rank**3
    products, core = 0, 2 * sides + 20 * cubes  # QR, and an SVD of the triangular factor
    if columns > 1:  # three times a product, its Gram matrix and eigenvectors; and an SVD
        products, core = 12 * sides + 12 * cubes, (3 * 9 + 20) * cubes
    return dataclasses.replace(one, products=one.products + products, core=one.core + core)


def group_of(shape: Shape, kind: Kind, modules: int) -> Group:
    """Returns the first modules of a kind."""
    paths = tuple(shape.paths(kind, modules))
    tasks = np.zeros((modules, shape.tasks), np.int32)
    return Group(paths, tasks, (kind.m, kind.n), (shape.rank,) * shape.tasks, modules)


def compute_seconds(part: Cost, shape: Shape, accelerator: Accelerator, columns: int) -> float:
    """Returns the seconds of a module: operations, bytes in memory, sums over the columns."""
    grams, size = (1, 8) if accelerator.double else (3, 4)
    added = grams * size * 2 * shape.stacked_rank**2  # bytes, of A and of B
    return (
        part.products / accelerator.products
        + part.core / accelerator.decompositions
        + 2 * (part.read + part.written) / accelerator.bandwidth
        + 2 * (columns - 1) / columns * added / accelerator.link  # around a ring
    )


class Share(NamedTuple):
    """The largest share of the modules of a kind.

    Attributes:
        part: the cost of one module to one device.
        on_device: modules of the busiest device.
        on_host: modules of the busiest host.
        batch: modules that a device works on at once.
    """

    part: Cost
    on_device: int
    on_host: int
    batch: int


def _share(shape: Shape, kind: Kind, cluster: Cluster, rows: int, columns: int) -> Share:
    local = cluster.per_host // columns
    on_device = -(-shape.modules(kind) // rows)
    on_host = min(shape.modules(kind), on_device * local)
    group, chain = group_of(shape, kind, on_host), cm.chain(RULES[MODELLED])
    batch = batch_size(group, chain, cm.core(), _batches(columns), None, local) // local
    part = cost_of_part(shape, kind, columns, cluster.accelerator.double)
    return Share(part, on_device, on_host, batch)


def _batches(columns: int) -> int:
    """Returns the number of batches in flight, as in `cm.merge`."""
    return 1 if columns > 1 else 2


def estimate(shape: Shape, cluster: Cluster, mesh: tuple[int, int] | None = None) -> dict[str, Any]:
    """Returns a row of the table: seconds of each stage, and memory."""
    rows, columns = mesh or mesh_for(shape, cluster)
    device = cluster.accelerator
    shares = [_share(shape, kind, cluster, rows, columns) for kind in shape.kinds]
    read = sum(x.on_host * columns * x.part.read for x in shares)
    written = sum(x.on_host * columns * x.part.written for x in shares)
    to_device = sum(x.on_device * x.part.read for x in shares)
    from_device = sum(x.on_device * x.part.written for x in shares)
    seconds = {
        "compute": sum(
            x.on_device * compute_seconds(x.part, shape, device, columns) for x in shares
        ),
        "read": read / device.storage + to_device / device.host_link,
        "write": from_device / device.host_link + written / device.storage,
    }
    total = max(seconds.values())
    return {
        "case": shape.title,
        "cluster": cluster.name,
        "mesh": [rows, columns],
        "busiest": sum(x.on_device for x in shares),
        "read_per_host": read,
        "seconds": seconds | {"total": total},
        "batch": max(x.batch for x in shares),
        "memory": _batches(columns) * max(x.batch * (x.part.held + x.part.work) for x in shares),
        "rate": sum(map(shape.modules, shape.kinds)) / total,
    }


def model() -> list[dict[str, Any]]:
    """Returns one row for each case and cluster."""
    return [estimate(shape, cluster) for shape in CASES for cluster in CLUSTERS]


def model_sheets(rows: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """Returns the tables of estimates, of their rates, and of assumptions."""
    header = ["adapters", "machine", "mesh", "modules on the busiest device", "GB read per host"]
    header += ["compute, s", "read, s", "write, s", "total, s", "modules/s"]
    header += ["batch", "memory per device, GB"]
    estimates = [
        [
            row["case"],
            row["cluster"],
            f"{row['mesh'][0]} × {row['mesh'][1]}",
            str(row["busiest"]),
            f"{row['read_per_host'] / 1e9:.2f}",
            *(digits(row["seconds"][stage]) for stage in ("compute", "read", "write", "total")),
            f"{row['rate']:.3g}",
            str(row["batch"]),
            f"{row['memory'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    rates = ["products, TFLOP/s", "decompositions, GFLOP/s", "memory, GB", "memory, GB/s"]
    rates += ["between devices, GB/s", "host, GB/s", "storage, GB/s"]
    devices = [
        [
            device.name,
            "float64" if device.double else "float32",
            f"{device.products / 1e12:.2f}",
            f"{device.decompositions / 1e9:.0f}",
            f"{device.memory / 1e9:.0f}",
            *(f"{rate / 1e9:.0f}" for rate in (device.bandwidth, device.link)),
            *(f"{rate / 1e9:.1f}" for rate in (device.host_link, device.storage)),
        ]
        for device in (V5E, H100)
    ]
    assumptions = [[name, what, f"{value:g}"] for name, (value, what) in ASSUMED.items()]
    return [
        Sheet(header, estimates),
        Sheet(["rates of the estimate", "precision", *rates], devices),
        Sheet(["assumption", "what", "value"], assumptions),
    ]


# --- Command -----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument("--only", choices=PARTS, help="run only this part")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=MEASURED, metavar="RULE")
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of the model; default: %(default)s"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="only try it, on tiny modules")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if any(n > 1 and n % 2 for n in options.devices):
        parser.error("an odd number of devices")
    if min(*options.devices, options.layers, options.repeat) < 1:
        parser.error("fewer than one device, layer or round")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, estimates, prints and writes the results; returns the exit code."""
    options = parse(argv)
    shape = SHAPE.tiny() if options.tiny else dataclasses.replace(SHAPE, layers=options.layers)
    if options.child:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.child])
        print(json.dumps(time_meshes(shape, options.rules, options.repeat)))
        return 0
    parts = (options.only,) if options.only else PARTS
    watch, result = machine.Watch(), dict[str, Any]()
    sheets, notes = list[Sheet](), list[str]()
    if "measured" in parts:
        result["measured"] = measure(options)
        sheets.append(measured_sheet(result["measured"]))
        modules = sum(map(shape.modules, shape.kinds))
        counts = {"layers": shape.layers, "modules": modules, "cores": machine.cores()}
        notes.append(MEASURED_NOTES.format(title=shape.title, **counts))
    described = machine.describe(watch)
    if "model" in parts:
        result["model"] = model()
        result["assumed"] = {name: assumption.value for name, assumption in ASSUMED.items()}
        sheets += model_sheets(result["model"])
        notes.append(MODEL_NOTES.format(rule=RULE_TITLES[MODELLED]))
    machine.is_busy(described)
    title = "More devices: simulated ones measured, accelerators estimated"
    stem = options.output / "scaling"
    publish(stem, title, {"machine": described} | result, sheets, "\n\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
