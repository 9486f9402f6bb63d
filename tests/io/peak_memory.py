"""Prints by how many MiB each way to write and to read 192 MiB of modules raises peak memory."""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

import coremerge_jax as cm
from coremerge_jax.lora import ModuleStream

LORA = cm.LoRA(np.ones((32, 1 << 13), np.float32), np.ones((1 << 13, 32), np.float32))  # 2 MiB


class Stream(ModuleStream):
    def __init__(self, count):
        self.count = count

    @functools.cached_property
    def outline(self):
        return cm.Adapter({f"layers.{i}.q": LORA for i in range(self.count)}).outline

    def __iter__(self):
        for path in self.outline:
            yield {path: cm.LoRA(LORA.a + 0, LORA.b + 0)}


def read_each(adapter):
    for path in adapter:
        adapter[path]


def read_some(adapter):
    paths = list(adapter)
    for start in range(0, len(paths), 4):
        adapter.read(paths[start : start + 4])


def peak():
    """The highest resident memory so far; unlike getrusage's, of this program alone."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


folder = Path(sys.argv[1])
steps = {
    "write a stream": lambda out, name, n: cm.save_peft(Stream(n), out / name),
    "write bfloat16": lambda out, name, n: cm.save_peft(Stream(n), out / f"{name}-16", dtype=H),
    "open": lambda out, name, _: cm.open_peft(out / name).outline,
    "read each": lambda out, name, _: read_each(cm.open_peft(out / name)),
    "read some": lambda out, name, _: read_some(cm.open_peft(out / name)),
    "read bfloat16": lambda out, name, _: read_each(cm.open_peft(out / f"{name}-16")),
    "copy": lambda out, name, _: cm.save_peft(cm.open_peft(out / name), out / f"{name}-copy"),
    "load at once": lambda out, name, _: cm.load_peft(out / name),
}
H = "bfloat16"
growth = {}
for step in steps.values():
    step(folder, "small", 4)  # what is imported and allocated by any use
for name, step in steps.items():
    before = peak()
    step(folder, "big", 96)
    growth[name] = peak() - before
print(json.dumps(growth))
