"""Small valid inputs of every kind, and ways to break them."""

import contextlib
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from hypothesis import strategies as st
from safetensors.numpy import save_file

import coremerge_jax as cm
from coremerge_jax.cli import main
from coremerge_jax.io.orbax.orbax_adapter import save_orbax
from coremerge_jax.io.peft.writer import save_peft

MODULES = {"layers.0.q": (4, 6), "layers.0.v": (3, 6)}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "owner/base",
    "task_type": "CAUSAL_LM",
    "peft_version": "0.21.2",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q", "v"],
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {"nothing.here": 3},
    "alpha_pattern": {"layers.*q": 4},
    "modules_to_save": ["head"],
    "target_parameters": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
    "use_dora": False,
    "loftq_config": {},
}
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "vocab_size": 50,
    "text_config": {"vocab_size": 50, "is_encoder_decoder": False},
    "rope_scaling": {"factor": 8.0},
}
RECIPE = """\
adapters: [adapter, adapter]
weights: [1, 0.5]
rules: [ties:density=0.5, isotropize]
space: core
scale: {"*.q": 0.5, "*": 1}
rank: 2
seed: 3
extras: first
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def run(*args: object) -> Result:
    """Runs the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGTERM)
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(arg) for arg in args])
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, handler)
    return Result(code or 0, out.getvalue(), err.getvalue())


def write_tensors(file: Path, header: object, data: bytes) -> None:
    """A safetensors file with any header: text, or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_inputs(folder: Path) -> Path:
    """An adapter, a base model, a merge, an orbax checkpoint, a pack and a recipe."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    factors = {}
    for path, (m, n) in MODULES.items():
        factors[f"base_model.model.{path}.lora_A.weight"] = draw(2, n)
        factors[f"base_model.model.{path}.lora_B.weight"] = draw(m, 2)
    factors["base_model.model.head.weight"] = draw(5, 6)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")

    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASE))
    (base / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"path": "1_Dense"}]))
    shapes = {f"{path}.weight": shape for path, shape in MODULES.items()} | {"head.weight": (5, 6)}
    where = {}
    for i, (name, shape) in enumerate(shapes.items()):
        where[name] = f"model-{i}.safetensors"
        save_file({name: draw(*shape)}, base / where[name])
    index = {"metadata": {"total_size": 288}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    (folder / "recipe.yaml").write_text(RECIPE)
    adapter = cm.load_peft(folder / "adapter")
    source = {"name": "adapter", "path": str(folder / "adapter"), "sha256": {"a": "0" * 64}}
    recipe = {"rules": ["mean"], "extras": "first"}
    card = {"recipe": recipe, "sources": [source, source], "precision": "float32"}
    save_peft(adapter, folder / "merged", card=card)
    save_orbax(adapter.replace(extras={}), folder / "orbax")
    cm.save_pack(cm.pack([adapter]), folder / "pack")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every other thing by its name."""
    found = {}
    for place, folders, files in os.walk(folder):
        found |= {f"{place}/{name}": b"" for name in folders}
        found |= {f"{place}/{name}": Path(place, name).read_bytes() for name in files}
    return found


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


odd_texts = st.sampled_from(
    ["", "x", "false", "none", "\x00", "\x1b[31m", "\ud800", "../..", "/", "(a+)+(a+)+x", "*", "é"]
) | st.text(max_size=6)
odd_numbers = st.sampled_from(
    [0, 1, 2, -1, 2**31, 2**63, 2**64, 10**50, 10**400, 1e308, 0.5, -0.0]
) | st.sampled_from([float("nan"), float("inf"), -float("inf")])
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    odd_numbers,
    odd_texts,
    st.sampled_from([[], {}, [0], [""], [[]], {"": 0}, {"a": None}, nested(70), nested(500)]),
    st.recursive(
        st.none() | st.booleans() | odd_numbers | odd_texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3),
        max_leaves=5,
    ),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    pairs: list = []
    if isinstance(value, dict | list):
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [path, *(place for key, inner in pairs for place in places(inner, (*path, key)))]


@st.composite
def changed(draw, value):
    """A JSON value of which one part is another, is gone, or is there under another name."""
    path = draw(st.sampled_from(places(value)))
    how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
    if not path:
        return draw(odd_values)
    copy = json.loads(json.dumps(value))
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    if how == "replace" or isinstance(owner, list):
        owner[path[-1]] = draw(odd_values)
    else:
        held = owner.pop(path[-1])
        if how == "rename":
            owner[draw(odd_texts)] = held
    return copy


@st.composite
def damaged(draw, data: bytes):
    """Bytes of which some are gone, others, or there twice."""
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(start + 40, len(data))))
    other = draw(
        st.sampled_from([b"", b"\x00", b"\xff\xfe", b"{", b"[" * 2000, b'"', b"9" * 400, b"NaN"])
        | st.binary(max_size=8)
        | st.just(data[start:stop] * 2)
    )
    return data[:start] + other + (b"" if draw(st.booleans()) else data[stop:])


@st.composite
def broken(draw, file: Path):
    """Other bytes for a file: of JSON and of headers, mostly with a changed value in them."""
    data = file.read_bytes()
    whole = draw(st.booleans())
    if whole and file.suffix == ".json":
        return json.dumps(draw(changed(json.loads(data)))).encode()
    if whole and file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        text = json.dumps(draw(changed(json.loads(data[8:end])))).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]
    if whole and file.suffix == ".yaml":
        return json.dumps(draw(changed(yaml.safe_load(data)))).encode()
    return draw(damaged(data))
