"""Adapters folded into base weights: what is changed, what is not, and what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, SHAPES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.io.base_model import apply as files
from coremerge_jax.io.peft.writer import save_peft
from coremerge_jax.trees import fold as addition

CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 50}
LINEAR = {"layers.0.q": (4, 6), "layers.0.v": (4, 6), "layers.1.q": (4, 6)}
UNTOUCHED = {"norm.weight": (6,), "layers.0.q.bias": (4,), "count": ()}


def exact(rng, *shape):
    """Numbers whose products and sums are exact in float32."""
    return rng.integers(-8, 9, shape).astype(np.float32) / 8


def update(rng, m=4, n=6, kind=cm.Kind()):  # noqa: B008
    return cm.LoRA(a=exact(rng, 2, n), b=exact(rng, m, 2), kind=kind)


def linear(rng, paths=LINEAR, **options):
    return cm.Adapter({path: update(rng, *shape) for path, shape in paths.items()}, **options)


def stored(lora):
    """The update in the layout of the base model's weight."""
    dense = lora.b @ lora.a
    if lora.kind.name == "conv2d":
        return dense.reshape(len(dense), *lora.kind.kernel)
    return dense.T if lora.kind.transposed else dense


def weights(rng, shapes, dtype="float32"):
    made = {name: rng.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in shapes}
    return made | {"count": np.asarray(7)} if "count" in made else made


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def parts(file):
    """Header, in the order of the file, and what follows."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.fixture
def base(tmp_path):
    """Writes a model: one file of tensors, or a file for each of several."""

    def make(*shards, name="base", **config):
        folder = tmp_path / name
        folder.mkdir()
        fields = {**CONFIG, **config}
        fields = {field: value for field, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))
        if len(shards) == 1:
            save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for index, shard in enumerate(shards, 1):
            file = f"model-{index:05}-of-{len(shards):05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        size = sum(value.nbytes for shard in shards for value in shard.values())
        index = {"metadata": {"total_size": size, "by": "me"}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        return folder

    return make


@pytest.fixture
def small(base, rng):
    """A model for `linear`."""

    def make(dtype="float32", more=(), **options):
        shapes = [(f"{path}.weight", shape) for path, shape in LINEAR.items()]
        return base(weights(rng, [*shapes, *UNTOUCHED.items(), *more], dtype), **options)

    return make


def refusal(adapter, folder, error=cm.MismatchError, **options):
    """The message; neither output nor anything else is left, and the base is as it was."""
    before, out = digests(folder.parent), folder.parent / "out"
    with pytest.raises(error) as caught:
        cm.apply_adapter(adapter, folder, out, **options)
    assert digests(folder.parent) == before
    assert not out.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


TENSORS = {
    "layers.0.q": ("layers.0.q.weight", (4, 6)),
    "conv1d": ("conv1d.weight", (6, 4)),
    "embed": ("embed.weight", (6, 4)),
    "conv": ("conv.weight", (4, 2, 3, 1)),
    "attention": ("attention.in_proj_weight", (4, 6)),
    "attention.base_layer.out_proj": ("attention.out_proj.weight", (4, 6)),
    "moe.experts.gate_up_proj": ("moe.experts.gate_up_proj", (3, 10, 4)),
    "moe.experts.down_proj": ("moe.experts.down_proj", (3, 4, 5)),
    "moe.gate.weight": ("moe.gate.weight", (4, 6)),
}


@pytest.mark.parametrize("block", [addition.BLOCK, 9])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("split", [False, True])
def test_every_kind_of_module(base, rng, tmp_path, monkeypatch, dtype, split, block):
    monkeypatch.setattr(addition, "BLOCK", block)
    modules = {}
    for path, kind in KINDS.items():
        name = path.partition("[")[0].rpartition(".")[2]
        modules[path] = update(rng, *SHAPES.get(name, (4, 6)), kind)
    before = weights(rng, [*TENSORS.values(), *UNTOUCHED.items()], dtype)
    names = sorted(before)
    shards = [{name: before[name] for name in part} for part in (names[:4], names[4:])]
    folder = base(*shards) if split else base(before)
    old = digests(folder)
    report = cm.apply_adapter(cm.Adapter(modules), folder, tmp_path / "out")

    wide = np.float64 if dtype == "float64" else np.float32
    expected = {name: value.astype(wide) if value.ndim else value for name, value in before.items()}
    for path, lora in modules.items():
        parameter, _, index = path.partition("[")
        target = expected[TENSORS[parameter][0]]
        if index and target.ndim == 3:
            target = target[int(index[:-1])]
        target += stored(lora)
    after = tensors(tmp_path / "out")
    assert set(after) == set(before)
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert np.array_equal(value, expected[name].astype(value.dtype)), name
    assert digests(folder) == old
    assert list(report.modules) == list(modules)
    files = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files | {"coremerge.json"}
    for file in folder.glob("*.safetensors"):
        assert parts(file)[0] == parts(tmp_path / "out" / file.name)[0]
    if split:
        index = "model.safetensors.index.json"
        assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()


def test_all_bytes_but_those_of_adapted_tensors_stay(small, rng, tmp_path):
    folder = small("bfloat16")
    header, data = parts(folder / "model.safetensors")
    first, last = header["layers.0.v.weight"]["data_offsets"]
    header["layers.0.v.weight"] = header.pop("layers.0.v.weight")  # in an order of its own
    header["eight"] = {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    text = json.dumps(header, indent=1).encode()
    text += b" " * (-len(text) % 8)
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + b"abc")

    adapter = linear(rng, {"layers.0.v": (4, 6)})
    cm.apply_adapter(adapter, folder, tmp_path / "out")
    old, new = file.read_bytes(), (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + len(text)
    assert old[: start + first] == new[: start + first]
    assert old[start + last :] == new[start + last :]
    assert old != new


def test_an_adapter_in_a_file(small, rng, tmp_path):
    adapter, folder = linear(rng), small("bfloat16")
    save_peft(adapter, tmp_path / "adapter")
    cm.apply_adapter(adapter, folder, tmp_path / "one")
    cm.apply_adapter(cm.open_peft(tmp_path / "adapter"), folder, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_scale(small, rng, tmp_path):
    bias = {"layers.0.q.lora_B.bias": exact(rng, 4)}
    adapter, folder = linear(rng, extras=bias), small()
    cm.apply_adapter(adapter, folder, tmp_path / "out", scale=-0.5)
    before, after = tensors(folder), tensors(tmp_path / "out")
    for path, lora in adapter.items():
        name = f"{path}.weight"
        assert np.array_equal(after[name], before[name] - stored(lora) / 2)
    expected = before["layers.0.q.bias"] - bias["layers.0.q.lora_B.bias"] / 2
    assert np.array_equal(after["layers.0.q.bias"], expected)
    with pytest.raises(cm.RecipeError, match="finite"):
        cm.apply_adapter(adapter, folder, tmp_path / "other", scale=np.inf)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_rounding_loss(small, rng, tmp_path, dtype):
    modules = dict(linear(rng))
    for path in ("layers.0.q", "layers.0.v"):
        modules[path] = cm.LoRA(a=modules[path].a, b=modules[path].b * np.float32(0.01))
    modules["layers.1.q"] = cm.LoRA(a=np.zeros((2, 6)), b=np.ones((4, 2)))
    folder = small(dtype)
    report = cm.apply_adapter(cm.Adapter(modules), folder, tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    losses = {path: module.rounding_loss for path, module in report.modules.items()}
    assert losses["layers.1.q"] == 0.0
    for path in ("layers.0.q", "layers.0.v"):
        old, new = (x[f"{path}.weight"].astype(np.float64) for x in (before, after))
        delta = modules[path].b.astype(np.float64) @ modules[path].a
        loss = np.linalg.norm(new - (old + delta)) / np.linalg.norm(delta)
        assert losses[path] == pytest.approx(loss, rel=0.02, abs=2e-7)
    assert (losses["layers.0.q"] > 1e-3) == (dtype in ("bfloat16", "float16"))
    told = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    assert told["modules"]["layers.0.q"]["rounding_loss"] == losses["layers.0.q"]
    assert told["modules"]["layers.0.q"]["tensor"] == "layers.0.q.weight"
    assert (told["base"], told["scale"]) == (str(folder), 1.0)


NAMES = {
    "as they are": ("", "", ["model.layers.0.q", "lm_head"]),
    "lacking": ("transformer.", "", ["transformer.h.0.q", "transformer.h.1.v", "lm_head"]),
    "added": ("", "bert.", ["encoder.0.q", "encoder.1.v"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_prefix(base, rng, tmp_path, case):
    lacking, added, paths = NAMES[case]
    places = {path: added + path.removeprefix(lacking) for path in paths}
    first = places[paths[0]]
    shapes = dict.fromkeys(paths, (4, 6))
    adapter = linear(rng, shapes, extras={f"{paths[0]}.bias": exact(rng, 4)})
    before = weights(rng, [(f"{place}.weight", (4, 6)) for place in places.values()])
    before |= {f"{first}.bias": exact(rng, 4), "vision.q.bias": exact(rng, 4)}
    folder = base(before)
    cm.apply_adapter(adapter, folder, tmp_path / "out")
    after = tensors(tmp_path / "out")
    for path, place in places.items():
        expected = before[f"{place}.weight"] + stored(adapter[path])
        assert np.array_equal(after[f"{place}.weight"], expected)
    assert np.array_equal(after[f"{first}.bias"], adapter.extras[f"{paths[0]}.bias"])


def test_a_prefix_that_is_not_certain(base, rng):
    names = ["text_model.layers.0.q.weight", "vision_model.layers.0.q.weight"]
    folder = base(weights(rng, [(name, (4, 6)) for name in names]))
    message = refusal(linear(rng, {"layers.0.q": (4, 6)}), folder)
    assert "2 ways (with 'text_model.', or with 'vision_model.')" in message


def expert(rng, m, n, count=2):
    return [update(rng, m, n, cm.Kind("expert")) for _ in range(count)]


def indexed(parameter, loras):
    return {f"{parameter}[{e}]": lora for e, lora in enumerate(loras)}


def vision_language(rng):
    modules = {
        "model.language_model.layers.0.self_attn.q_proj": update(rng),
        "model.visual.blocks.0.attn.qkv": update(rng),
    }
    names = ["model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"]
    added = dict(zip(names, map(stored, modules.values()), strict=True))
    extras = {"model.language_model.norm.weight": exact(rng, 6)}
    return modules, dict.fromkeys(names, (4, 6)), added, extras, "model.norm.weight"


def fused_experts(rng, block, names):
    gate_up, down = expert(rng, 6, 4), expert(rng, 4, 3)
    owner = "model.layers.0.mlp.experts"
    modules = {**indexed(f"{owner}.gate_up_proj", gate_up), **indexed(f"{owner}.down_proj", down)}
    added = {}
    for e, (x, y) in enumerate(zip(gate_up, down, strict=True)):
        values = [stored(x)[:3], stored(x)[3:], stored(y)]
        added |= {
            f"model.layers.0.{block}.experts.{e}.{name}.weight": value
            for name, value in zip(names, values, strict=True)
        }
    return modules, {name: value.shape for name, value in added.items()}, added, {}, None


def layers_of_experts(rng, names, transposed):
    """Layers of each expert, for a base with one tensor of all."""
    owner, modules, gate_up, down = "model.layers.0.mlp.experts", {}, [], []
    for e in range(2):
        sizes = [(3, 4), (3, 4), (4, 3)] if len(names) == 3 else [(6, 4), (4, 3)]
        loras = [update(rng, *size) for size in sizes]
        for name, lora in zip(names, loras, strict=True):
            modules[f"{owner}.{name.format(e=e)}"] = lora
        gate_up.append(np.concatenate([stored(lora) for lora in loras[:-1]]))
        down.append(stored(loras[-1]))
    values = {f"{owner}.gate_up_proj": np.stack(gate_up), f"{owner}.down_proj": np.stack(down)}
    if transposed:
        values = {name: value.swapaxes(1, 2) for name, value in values.items()}
    return modules, {name: value.shape for name, value in values.items()}, values, {}, None


def vit(rng):
    modules = {
        "vit.layers.0.attention.q_proj": update(rng),
        "vit.layers.0.attention.o_proj": update(rng),
        "vit.layers.0.mlp.fc2": update(rng),
    }
    old = ["attention.attention.query", "attention.output.dense", "output.dense"]
    names = [f"vit.encoder.layer.0.{name}.weight" for name in old]
    added = dict(zip(names, map(stored, modules.values()), strict=True))
    extras = {"vit.layers.0.attention.q_proj.bias": exact(rng, 4)}
    bias = "vit.encoder.layer.0.attention.attention.query.bias"
    return modules, dict.fromkeys(names, (4, 6)), added, extras, bias


def gated_mlp(rng):
    gate, up = update(rng), update(rng)
    start = "encoder.layer.0.mlp"
    name = f"{start}.weights_in.weight"
    modules = {f"{start}.up_proj": up, f"{start}.gate_proj": gate}
    return modules, {name: (8, 6)}, {name: np.concatenate([stored(gate), stored(up)])}, {}, None


def projections(rng, together):
    start = "model.layers.0.self_attn"
    shapes = {"q_proj": (8, 6), "k_proj": (4, 6), "v_proj": (4, 6)}
    parts = {f"{start}.{name}": update(rng, *shape) for name, shape in shapes.items()}
    if not together:
        whole = np.concatenate([stored(lora) for lora in parts.values()])
        del parts[f"{start}.k_proj"]
        whole[8:12] = 0
        name = f"{start}.qkv_proj.weight"
        return parts, {name: (16, 6)}, {name: whole}, {}, None
    fused = update(rng, 16, 6)
    names = [f"{path}.weight" for path in parts]
    values = np.split(stored(fused), [8, 12])
    added = dict(zip(names, values, strict=True))
    shapes = {name: value.shape for name, value in added.items()}
    return {f"{start}.qkv_proj": fused}, shapes, added, {}, None


QWEN = ("gate_proj", "up_proj", "down_proj")
RELEASES = {
    "qwen2_5_vl": vision_language,
    "mixtral": lambda rng: fused_experts(rng, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": lambda rng: fused_experts(rng, "mlp", QWEN),
    "experts of earlier releases": lambda rng: layers_of_experts(
        rng, [f"{{e}}.{name}" for name in QWEN], False
    ),
    "qwen3_vl_moe": lambda rng: layers_of_experts(rng, [f"{{e}}.{name}" for name in QWEN], True),
    "gpt_oss": lambda rng: layers_of_experts(rng, ["gate_up_projs.{e}", "down_projs.{e}"], True),
    "vit": vit,
    "dinov2": gated_mlp,
    "phi3, fused adapter": lambda rng: projections(rng, True),
    "phi3, fused base": lambda rng: projections(rng, False),
    "by their ends": lambda rng: (
        {"encoder.text.layers.0.q": update(rng), "encoder.text.layers.3.v": update(rng)},
        {f"lm.layers.{i}.{x}.weight": (4, 6) for i in range(4) for x in "qv"},
        {},
        {"encoder.text.layers.1.q.bias": exact(rng, 4)},
        "lm.layers.1.q.bias",
    ),
}


@pytest.mark.parametrize("block", [addition.BLOCK, 5])
@pytest.mark.parametrize("case", RELEASES)
def test_names_of_other_releases(base, rng, tmp_path, monkeypatch, case, block):
    monkeypatch.setattr(addition, "BLOCK", block)
    modules, shapes, added, extras, place = RELEASES[case](rng)
    before = {name: exact(rng, *shape) for name, shape in shapes.items()}
    before["other.weight"] = exact(rng, 4, 6)
    if place:
        before[place] = exact(rng, *next(iter(extras.values())).shape)
    config = {"modules_to_save": ["norm"], "bias": "all"}
    adapter = cm.Adapter(modules, extras=extras, metadata=cm.Metadata(config=config))
    folder = base(before)
    save_peft(adapter, tmp_path / "adapter")
    for out, given in {"memory": adapter, "file": cm.open_peft(tmp_path / "adapter")}.items():
        if case == "by their ends":
            with pytest.warns(CoreMergeWarning, match=r"taken for 'lm\.layers\.0\.q\.weight'"):
                report = cm.apply_adapter(given, folder, tmp_path / out)
            added = {
                "lm.layers.0.q.weight": stored(modules["encoder.text.layers.0.q"]),
                "lm.layers.3.v.weight": stored(modules["encoder.text.layers.3.v"]),
            }
        else:
            report = cm.apply_adapter(given, folder, tmp_path / out)
        after = tensors(tmp_path / out)
        assert after.keys() == before.keys()
        for name, value in before.items():
            expected = next(iter(extras.values())) if name == place else value
            assert np.array_equal(after[name], expected + added.get(name, 0)), name
        assert {module.tensor for module in report.modules.values()} == added.keys()


def test_names_that_end_like_those_of_several_tensors(base, rng):
    names = ["a.text.layers.0.q.weight", "b.vision.layers.0.q.weight"]
    folder = base(weights(rng, [(name, (4, 6)) for name in names]))
    message = refusal(linear(rng, {"m.layers.0.q": (4, 6)}), folder)
    assert "'m.layers.0.q' ends like both" in message
    assert all(repr(name) in message for name in names)
    # Each alone is certain, but then one model of the adapter is two of the base.
    names = ["a.one.layers.0.q.weight", "b.other.layers.0.v.weight"]
    folder = base(weights(rng, [(name, (4, 6)) for name in names]), name="apart")
    message = refusal(linear(rng, dict.fromkeys(("m.layers.0.q", "m.layers.0.v"), (4, 6))), folder)
    assert "begin with 'm.layers' end like tensors of both 'a.one.layers' and 'b.other" in message


@pytest.mark.parametrize(
    ("path", "tensors"),
    [
        # A tower whose own names are others; without its prefix, they are the language model's.
        ("vision_tower.layers.0.q", ["language_model.model.layers.0.q", "vision_tower.stem"]),
        ("visual.layers.0.q", ["layers.0.q", "visual.blocks.0.q"]),
        ("model.vision_tower.trunk.layers.0.q", ["model.layers.0.q", "vision_model.layers.0.qkv"]),
        # The other way round
        ("model.language_model.layers.0.o_proj", ["visual.encoder.layers.0.out_proj"]),
    ],
)
def test_no_tensor_of_another_tower_is_taken(base, rng, path, tensors):
    folder = base(weights(rng, [(f"{name}.weight", (4, 6)) for name in tensors]))
    message = refusal(linear(rng, {path: (4, 6)}), folder)
    assert repr(path) in message
    assert "nearest" in message


@pytest.mark.parametrize(
    ("path", "tensor"),
    [("vision_model.layers.0.q", "layers.0.q"), ("layers.0.q", "vision_model.layers.0.q")],
)
def test_a_base_that_is_a_tower_alone(base, rng, path, tensor):
    folder = base(weights(rng, [(f"{tensor}.weight", (4, 6)), ("post.weight", (4, 6))]))
    report = cm.apply_adapter(linear(rng, {path: (4, 6)}), folder, folder.parent / "out")
    assert report.modules[path].tensor == f"{tensor}.weight"


def test_trained_weights_by_names_of_another_release_than_all_modules(base, rng):
    q, gate = "model.layers.0.self_attn.q_proj", "model.layers.0.block_sparse_moe.gate.weight"
    expert = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    folder = base(weights(rng, [(f"{q}.weight", (4, 6)), (gate, (2, 6)), (expert, (6, 4))]))
    # What the base has in parts only is no new module.
    parts = {"model.layers.0.mlp.experts.down_proj": exact(rng, 24).reshape(1, 6, 4)}
    message = refusal(linear(rng, {q: (4, 6)}, extras=parts), folder)
    assert "no place for the adapter's 'model.layers.0.mlp.experts.down_proj'" in message
    value = exact(rng, 2, 6)
    new = {"model.layers.0.mlp.gate.weight": value, "score.weight": exact(rng, 3, 6)}
    adapter = linear(rng, {q: (4, 6)}, extras=new)
    report = cm.apply_adapter(adapter, folder, folder.parent / "out")
    assert (report.replaced, report.appended) == ([gate], ["score.weight"])
    assert np.array_equal(tensors(folder.parent / "out")[gate], value)


def test_experts_of_a_model_with_more_of_them(base, rng):
    names = [f"layers.0.experts.{e}.{x}.weight" for e in range(3) for x in ("w1", "w3")]
    folder = base(weights(rng, [(name, (4, 6)) for name in names]))
    paths = [f"layers.0.experts.gate_up_proj[{e}]" for e in range(2)]
    modules = {path: update(rng, 8, 6, cm.Kind("expert")) for path in paths}
    message = refusal(cm.Adapter(modules), folder)
    assert "3 tensors 'layers.0.experts.#.w1.weight', but the adapter has 2 experts" in message
    assert repr(paths[0]) in message


@pytest.mark.parametrize(
    ("paths", "shapes", "parts"),
    [
        ({"e.experts.gate_up_proj[0]": (6, 4)}, {"gate": (2, 4), "up": (3, 4)}, "(6, 4)"),
        ({"e.experts.gate_up_proj[0]": (5, 4)}, {"gate": (3, 4), "up": (3, 4)}, "(5, 4)"),
    ],
)
def test_parts_that_do_not_fit(base, rng, paths, shapes, parts):
    folder = base(
        weights(rng, [(f"e.experts.0.{x}_proj.weight", shape) for x, shape in shapes.items()])
    )
    modules = {path: update(rng, *shape, cm.Kind("expert")) for path, shape in paths.items()}
    message = refusal(cm.Adapter(modules), folder)
    assert parts in message
    assert "'e.experts.0.gate_proj.weight'" in message


def test_where_projections_begin_that_is_not_certain(base, rng):
    folder = base(weights(rng, [("a.qkv_proj.weight", (16, 6))]))
    for shapes in ({"a.q_proj": (8, 6)}, {"a.q_proj": (8, 6), "a.v_proj": (5, 6)}):
        message = refusal(linear(rng, shapes), folder)
        assert "where the parts begin is not certain" in message


def test_two_names_of_one_tensor(base, rng):
    folder = base(weights(rng, [("layers.0.mlp.fc2.weight", (4, 6))]))
    paths = ["layers.0.mlp.fc2", "encoder.layer.0.output.dense"]
    message = refusal(linear(rng, dict.fromkeys(paths, (4, 6))), folder)
    assert f"{paths[0]!r} and {paths[1]!r} are both tensor" in message


@pytest.mark.parametrize("square", ["gate_up", "down"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_pair_of_experts_shows_how_they_are_stored(base, rng, tmp_path, square, transposed):
    shapes = (
        {"gate_up": (4, 4), "down": (4, 2)}
        if square == "gate_up"
        else {"gate_up": (8, 4), "down": (4, 4)}
    )
    order = slice(None, None, -1 if transposed else 1)
    folder = base(weights(rng, [(f"e.{x}_proj", (2, *shapes[x][order])) for x in shapes]))
    path = f"e.{square}_proj"
    modules = {f"{path}[{i}]": update(rng, *shapes[square], cm.Kind("expert")) for i in range(2)}
    cm.apply_adapter(cm.Adapter(modules), folder, tmp_path / "out")
    delta = tensors(tmp_path / "out")[path] - tensors(folder)[path]
    for i, lora in enumerate(modules.values()):
        expected = stored(lora).T if transposed else stored(lora)
        assert np.allclose(delta[i], expected, atol=1e-6)


def test_modules_that_the_base_does_not_have(small, rng):
    folder = small()
    message = refusal(linear(rng, {"blocks.0.query": (4, 6), "blocks.1.query": (4, 6)}), folder)
    assert "none of the adapter's 2 modules" in message
    assert "'blocks.0.query'" in message
    assert "'layers.0.q.weight'" in message
    message = refusal(linear(rng, {"layers.0.q": (4, 6), "layers.9.qq": (4, 6)}), folder)
    assert "1 of the adapter's 2 modules are not in this model: 'layers.9.qq'" in message
    assert "nearest to 'layers.0.q.weight'" in message


@pytest.mark.parametrize("flag", [True, False])
def test_conv1d_is_transposed_whatever_the_adapter_says(base, rng, tmp_path, flag):
    shapes = {"h.0.attn.c_attn": (18, 6), "h.0.attn.c_proj": (6, 6), "lm_head": (6, 6)}
    flipped = [x for x in shapes if x != "lm_head"]
    modules = {x: update(rng, *shape, cm.Kind(transposed=flag)) for x, shape in shapes.items()}
    there = [(f"{x}.weight", s[::-1] if x in flipped else s) for x, s in shapes.items()]
    folder = base(weights(rng, there), model_type="gpt2")
    cm.apply_adapter(cm.Adapter(modules), folder, tmp_path / "out")
    for path, lora in modules.items():
        name, dense = f"{path}.weight", lora.b @ lora.a
        delta = tensors(tmp_path / "out")[name] - tensors(folder)[name]
        assert np.allclose(delta, dense.T if path in flipped else dense, atol=1e-6)


WRONG = {
    "shape": ("layers.0.q", (4, 6), cm.Kind(), (4, 7), ["(4, 7)", "(4, 6)"]),
    "transposed": ("layers.0.q", (4, 6), cm.Kind(), (6, 4), ["if fan_in_fan_out were true"]),
    "not transposed": (
        "layers.0.q",
        (4, 6),
        cm.Kind(transposed=True),
        (4, 6),
        ["(6, 4)", "if fan_in_fan_out were false"],
    ),
    "embedding": (
        "embed",
        (4, 6),
        cm.Kind("embedding", transposed=True),
        (4, 6),
        ["needs (6, 4); is it"],
    ),
    "kernel": ("c", (4, 6), cm.Kind("conv2d", kernel=(2, 3, 1)), (4, 2, 1, 3), ["(4, 2, 3, 1)"]),
    "experts": ("e.up[0]", (4, 6), cm.Kind("expert"), (2, 4, 6), ["(2, 4, 6)", "1 experts"]),
    "experts' shape": ("e.up[0]", (4, 6), cm.Kind("expert"), (1, 4, 7), ["(1, 4, 7)", "(4, 6)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit(base, rng, case):
    path, (m, n), kind, shape, parts = WRONG[case]
    name = path.removesuffix("[0]") if "[" in path else f"{path}.weight"
    folder = base(weights(rng, [(name, shape)]))
    message = refusal(cm.Adapter({path: update(rng, m, n, kind)}), folder)
    assert all(part in message for part in [repr(name), *parts]), message


def test_square_experts_are_stored_as_their_siblings(base, rng, tmp_path):
    def experts(*names):
        shapes = {"up": (4, 6), "down": (6, 6)}
        return {
            f"e.{name}[{i}]": update(rng, *shapes[name], cm.Kind("expert"))
            for name in names
            for i in range(2)
        }

    for name, up in (("plain", (2, 4, 6)), ("flipped", (2, 6, 4))):
        folder = base(weights(rng, [("e.up", up), ("e.down", (2, 6, 6))]), name=name)
        modules = experts("up", "down")
        cm.apply_adapter(cm.Adapter(modules), folder, tmp_path / f"{name}-out")
        delta = tensors(tmp_path / f"{name}-out")["e.down"] - tensors(folder)["e.down"]
        for i in range(2):
            dense = stored(modules[f"e.down[{i}]"])
            assert np.allclose(delta[i], dense.T if name == "flipped" else dense, atol=1e-6)
    message = refusal(cm.Adapter(experts("down")), folder, cm.UnsupportedError)
    assert "neither shape nor adapter shows" in message


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"tie_word_embeddings": True}, "embed_tokens"),
        ({"tie_word_embeddings": True}, "lm_head"),
        ({"tie_word_embeddings": None}, "embed_tokens"),
        ({"tie_word_embeddings": None, "architectures": ["GPT2LMHeadModel"]}, "embed_tokens"),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, "lm_head"),
        ({"tie_word_embeddings": None, "architectures": None, "vocab_size": None}, "embed_tokens"),
        ({"tie_word_embeddings": True, "vocab_size": None}, "lm_head"),
        ({"is_encoder_decoder": True}, "embed_tokens"),
    ],
)
def test_tied_embeddings(small, rng, config, path):
    folder = small(more=[("embed_tokens.weight", (50, 6))], **config)
    kind = cm.Kind("embedding", transposed=True) if path == "embed_tokens" else cm.Kind()
    shape = (6, 50) if path == "embed_tokens" else (50, 6)
    message = refusal(cm.Adapter({path: update(rng, *shape, kind)}), folder, cm.UnsupportedError)
    assert "embedding" in message
    assert path in message
    extras = {f"{path}.weight": np.ones((50, 6), np.float32)}
    if len(config) == 1 and "is_encoder_decoder" not in config:
        refusal(linear(rng, extras=extras), folder, cm.UnsupportedError)


HEADS = ("embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("on_disk", [HEADS[:1], HEADS])
def test_one_tensor_takes_the_equal_weights_of_tied_embeddings(small, rng, tmp_path, on_disk):
    folder = small(more=[(name, (50, 6)) for name in on_disk], tie_word_embeddings=True)
    same = rng.standard_normal((50, 6)).astype(np.float32)
    other = linear(rng, extras={name: same + i for i, name in enumerate(HEADS)})
    assert "'embed_tokens.weight' and 'lm_head.weight' differ" in refusal(
        other, folder, cm.UnsupportedError
    )
    adapter = linear(rng, extras={name: same.copy() for name in HEADS})
    cm.apply_adapter(adapter, folder, tmp_path / "applied")
    after = tensors(tmp_path / "applied")
    assert {name for name in HEADS if name in after} == set(on_disk)
    for name in on_disk:
        assert np.array_equal(after[name], same.astype(after[name].dtype))


def test_a_tie_that_training_kept_takes_one_embedding(small, rng, tmp_path):
    folder = small(more=[("embed_tokens.weight", (50, 6))], tie_word_embeddings=True)
    tied = cm.Metadata(config={"ensure_weight_tying": True})
    for name in HEADS:
        adapter = linear(rng, extras={name: np.ones((50, 6), np.float32)}).replace(metadata=tied)
        if name == "lm_head.weight":
            assert "no place for the adapter's 'lm_head.weight'" in refusal(adapter, folder)
        else:
            cm.apply_adapter(adapter, folder, tmp_path / "applied")
            assert np.all(tensors(tmp_path / "applied")[name] == 1)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": None, "architectures": ["BertModel"]},
        {"tie_word_embeddings": None, "architectures": ["BertForSequenceClassification"]},
        {"tie_word_embeddings": None},
    ],
)
def test_embeddings_that_are_not_tied(small, rng, tmp_path, config):
    both = [("embed_tokens.weight", (50, 6)), ("lm_head.weight", (50, 6))]
    folder = small(more=both if config == {"tie_word_embeddings": None} else both[:1], **config)
    lora = update(rng, 6, 50, cm.Kind("embedding", transposed=True))
    cm.apply_adapter(cm.Adapter({"embed_tokens": lora}), folder, tmp_path / "out")
    before, after = (tensors(x)["embed_tokens.weight"] for x in (folder, tmp_path / "out"))
    assert np.array_equal(after, before + stored(lora))


def test_two_embeddings_that_are_equal(base, rng):
    same = exact(rng, 50, 6)
    folder = base({"embed.weight": same, "lm_head.weight": same}, tie_word_embeddings=None)
    lora = update(rng, 6, 50, cm.Kind("embedding", transposed=True))
    refusal(cm.Adapter({"embed": lora}), folder, cm.UnsupportedError)


def test_other_embeddings_of_a_tied_model(small, rng, tmp_path):
    folder = small(more=[("wpe.weight", (20, 6))], tie_word_embeddings=True)
    lora = update(rng, 6, 20, cm.Kind("embedding", transposed=True))
    cm.apply_adapter(cm.Adapter({"wpe": lora}), folder, tmp_path / "out")
    assert "wpe.weight" in tensors(tmp_path / "out")


def test_quantized_bases(small, rng, base):
    quantized = {"quantization_config": {"quant_method": "awq"}}
    message = refusal(linear(rng), small(**quantized), cm.UnsupportedError)
    assert "quantization_config says that the model is quantized (awq)" in message
    folder = base({"layers.0.q.weight": np.ones((4, 6), np.int8)}, name="int8")
    adapter = linear(rng, {"layers.0.q": (4, 6)})
    assert "'layers.0.q.weight' has dtype int8" in refusal(adapter, folder, cm.UnsupportedError)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"I8"', b'"U8"').replace(b'"U8"', b'"F8_E4M3"'))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little") + len("F8_E4M3") - 2
    file.write_bytes(size.to_bytes(8, "little") + content[8:])
    message = refusal(adapter, folder, cm.UnsupportedError)
    assert "'layers.0.q.weight' has dtype F8_E4M3" in message


def shorten(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def edit_index(folder, edit):
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def remove_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def only_pickles(folder):
    remove_weights(folder)
    (folder / "pytorch_model.bin").touch()


BROKEN = {
    "corrupt shard": (shorten, ["model-00002-of-00002.safetensors: not a readable"]),
    "missing shard": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
        ["model-00001-of-00002.safetensors: missing"],
    ),
    "missing tensor": (
        lambda folder: edit_index(
            folder,
            lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors"),
        ),
        ["tensor 'x' is not in model-00001"],
    ),
    "tensor twice": (
        lambda folder: save_file(
            {"a.weight": np.ones(1), "b.weight": np.ones(1)},
            folder / "model-00002-of-00002.safetensors",
        ),
        ["'a.weight' is in model-00001-of-00002.safetensors and model-00002"],
    ),
    "no weight_map": (
        lambda folder: edit_index(folder, lambda index: index.pop("weight_map")),
        ["no weight_map"],
    ),
    "a path in the index": (
        lambda folder: edit_index(
            folder, lambda index: index["weight_map"].update(x="../x.safetensors")
        ),
        ["'../x.safetensors' is not the name of a file"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json: not valid JSON"],
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["expected a JSON object, got list"],
    ),
    "no weights": (remove_weights, ["no model.safetensors and no model.safetensors.index.json"]),
    "pickles": (only_pickles, ["pytorch_model.bin: pickle files can run code"]),
    "modules.json": (
        lambda folder: (folder / "modules.json").write_text("{"),
        ["modules.json: expected a list"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bases(base, rng, case):
    change, parts = BROKEN[case]
    folder = base(*({f"{x}.weight": np.ones((4, 6), np.float32)} for x in "ab"))
    change(folder)
    error = cm.UnsupportedError if case == "pickles" else cm.FormatError
    message = refusal(linear(rng, {"a": (4, 6)}), folder, error)
    assert all(part in message for part in parts), message


def test_values_that_do_not_fit(small, rng):
    folder = small("float16")
    big = {path: cm.LoRA(a=lora.a * 300, b=lora.b * 300) for path, lora in linear(rng).items()}
    message = refusal(cm.Adapter(big), folder, cm.FormatError)
    assert "'layers.0.q.weight': the result has values that float16 cannot hold" in message


HEAD = {"score.weight": (3, 6), "score.bias": (3,)}


@pytest.mark.parametrize("split", [False, True])
def test_heads_are_replaced_or_appended(base, rng, tmp_path, split):
    before = weights(rng, [(f"{path}.weight", shape) for path, shape in LINEAR.items()], "bfloat16")
    before["lm_head.weight"] = rng.standard_normal((5, 6)).astype(jnp.bfloat16)
    extras = {name: exact(rng, *shape) for name, shape in HEAD.items()}
    extras["lm_head.weight"] = exact(rng, 5, 6)
    names = sorted(before)
    shards = [{name: before[name] for name in part} for part in (names[:2], names[2:])]
    folder = base(*shards) if split else base(before)
    (tmp_path / "adapter").mkdir()
    report = cm.apply_adapter(linear(rng, extras=extras), folder, tmp_path / "out")
    assert (report.replaced, report.appended) == (["lm_head.weight"], list(HEAD))
    after = tensors(tmp_path / "out")
    assert set(after) == {*before, *HEAD}
    for name in ("lm_head.weight", *HEAD):
        assert after[name].dtype == jnp.bfloat16
        assert np.array_equal(after[name], extras[name].astype(jnp.bfloat16))
    last = max(folder.glob("*.safetensors")).name
    old, new = (parts(x / last)[0] for x in (folder, tmp_path / "out"))
    assert list(new) == [*old, *HEAD]
    assert {name: new[name] for name in old} == old
    with safe_open(tmp_path / "out" / last, framework="numpy") as stream:
        assert stream.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "out" / last).read_bytes()[:8], "little") % 8 == 0
    if split:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["weight_map"]["score.weight"] == last
        size = sum(value.nbytes for value in after.values())
        assert index["metadata"] == {"total_size": size, "by": "me"}


def test_biases(small, rng, tmp_path):
    extras = {
        "layers.0.q.bias": exact(rng, 4),
        "layers.0.v.lora_B.bias": np.zeros(4, np.float32),  # the base has no such bias
    }
    folder = small("bfloat16")
    report = cm.apply_adapter(linear(rng, extras=extras), folder, tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert np.array_equal(after["layers.0.q.bias"], extras["layers.0.q.bias"].astype(jnp.bfloat16))
    assert (report.replaced, report.appended) == (["layers.0.q.bias"], [])


def test_an_embedding_that_is_saved_along(base, rng, tmp_path):
    folder = base(weights(rng, [("embed.weight", (50, 6))]))
    lora = update(rng, 6, 50, cm.Kind("embedding", transposed=True))
    extras = {"embed.weight": exact(rng, 50, 6)}
    cm.apply_adapter(cm.Adapter({"embed": lora}, extras=extras), folder, tmp_path / "out")
    after = tensors(tmp_path / "out")["embed.weight"]
    assert np.array_equal(after, extras["embed.weight"] + stored(lora))


def token_adapter(rng, rows=(0, 3, 49), indices=(0, 3, 49), name="model.embed", **options):
    extras = {f"{name}.token_adapter.trainable_tokens_delta": exact(rng, len(rows), 6)}
    metadata = cm.Metadata(config={"trainable_token_indices": indices})
    return linear(rng, extras=extras, metadata=metadata, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[0, 3, 49], {"embed": [0, 3, 49], "other": [1]}])
def test_token_rows(small, rng, tmp_path, indices, tied):
    folder = small("bfloat16", more=[("model.embed.weight", (50, 6))], tie_word_embeddings=tied)
    adapter = token_adapter(rng, indices=indices)
    cm.apply_adapter(adapter, folder, tmp_path / "out")
    expected, after = (tensors(x)["model.embed.weight"] for x in (folder, tmp_path / "out"))
    expected[[0, 3, 49]] = next(iter(adapter.extras.values()))
    assert np.array_equal(after, expected)


def test_extras_that_have_no_place(small, rng):
    folder = small(more=[("model.embed.weight", (50, 6)), ("twin.weight", (50, 6))])

    def told(error=cm.MismatchError, **extras):
        return refusal(linear(rng, extras=extras), folder, error)

    bias = np.ones(4, np.float32)
    assert "'layers.0.v.bias'; nearest" in told(**{"layers.0.v.bias": bias})
    assert "'layers.0.v.bias'; nearest" in told(**{"layers.0.v.lora_B.bias": bias})
    assert "no tensor 'layers.7.v.bias'" in told(**{"layers.7.v.bias": bias})
    assert "shape (6,), but" in told(**{"norm.weight": bias})
    assert "int64" in told(count=np.asarray(1.0, np.float32))
    message = refusal(token_adapter(rng, indices=[0, 3, 50]), folder)
    assert "the indices [0, 3, 50]" in message
    assert "indices [1]" in refusal(token_adapter(rng, indices=[1]), folder)
    assert "indices []" in refusal(token_adapter(rng, indices={"x": [1]}), folder)
    assert "no tensor 'emb.weight'" in refusal(token_adapter(rng, name="emb"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(token_adapter(rng), folder, cm.UnsupportedError)
    assert "may be tied though both are there" in message


def test_rows_and_update_of_one_embedding(base, rng):
    folder = base(weights(rng, [("model.embed.weight", (50, 6))]))
    lora = update(rng, 6, 50, cm.Kind("embedding", transposed=True))
    adapter = token_adapter(rng).replace(modules={"model.embed": lora})
    message = refusal(adapter, folder, cm.UnsupportedError)
    assert "both trained rows and a low-rank update" in message


def test_a_tensor_that_would_not_be_aligned(base, rng):
    odd = {"layers.0.q.weight": np.ones((4, 6), np.float32), "x": np.ones(3, np.uint8)}
    extras = {"score.weight": exact(rng, 3, 6)}
    adapter = linear(rng, {"layers.0.q": (4, 6)}, extras=extras)
    message = refusal(adapter, base(odd), cm.UnsupportedError)
    assert "'score.weight' would not be aligned" in message


def test_other_files(small, rng, tmp_path):
    folder = small()
    kept = ["tokenizer.json", "sub/vocab.txt", "README.md", "2_Dense/model.safetensors"]
    stale = ["pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx", "x.gguf"]
    stale += ["adapter_config.json", "adapter_model.safetensors"]  # which has its own adapter
    stale += ["model.safetensors.index.json", "1_Other/model.safetensors", "tf_model.h5"]
    for name in [*kept, *stale, ".git/HEAD", ".gitattributes", "coremerge.json"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    modules = [{"path": ""}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    report = cm.apply_adapter(linear(rng), folder, tmp_path / "out")
    assert sorted(report.copied) == sorted([*kept, "modules.json", "config.json"])
    assert sorted(report.skipped) == sorted(stale)
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = {path.relative_to(tmp_path / "out").as_posix() for path in written}
    assert names == {*report.copied, "model.safetensors", "coremerge.json"}
    for name in report.copied:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert "skipped" in json.loads((tmp_path / "out" / "coremerge.json").read_text())


def test_outputs_that_may_not_be_written(small, rng, tmp_path):
    folder, adapter = small(), linear(rng)
    before = digests(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "out", tmp_path, tmp_path / "link"):
        with pytest.raises(cm.FormatError, match="choose another output"):
            cm.apply_adapter(adapter, folder, out, force=True)
    (tmp_path / "link").unlink()
    assert digests(tmp_path) == before
    cm.apply_adapter(adapter, folder, tmp_path / "out")
    with pytest.raises(cm.FormatError, match="already exists"):
        cm.apply_adapter(adapter, folder, tmp_path / "out")
    cm.apply_adapter(adapter, folder, tmp_path / "out", scale=0.0, force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_an_exception_half_way(base, rng, monkeypatch):
    folder = base(*({f"{x}.weight": np.ones((4, 6), np.float32)} for x in "abc"))
    adapter = linear(rng, dict.fromkeys("abc", (4, 6)))
    write, calls = files.TensorEditor.write, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(files.TensorEditor, "write", failing)
    refusal(adapter, folder, KeyboardInterrupt)
    assert len(calls) == 3


KILLED = """
import os, signal, sys
import coremerge_jax as cm
from coremerge_jax.io.base_model import apply as files

fold, calls = files._fold, []

def killing(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fold(*arguments)

files._fold = killing
cm.apply_adapter(cm.open_peft(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_half_way(base, rng, tmp_path):
    folder = base(*({f"{x}.weight": np.ones((4, 6), np.float32)} for x in "abc"))
    save_peft(linear(rng, dict.fromkeys("abc", (4, 6))), tmp_path / "adapter")
    before = digests(folder)
    command = [sys.executable, "-c", KILLED, tmp_path / "adapter", folder, tmp_path / "out"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert digests(folder) == before
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_output(small, rng, small_disk):
    folder = small(more=[("big.weight", (1000, 100))])
    before = digests(folder)
    with pytest.raises(OSError, match="No space left"):
        cm.apply_adapter(linear(rng), folder, small_disk / "out")
    assert digests(folder) == before
    assert list(small_disk.iterdir()) == []


def test_hub_ids_come_from_the_cache(small, rng, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    small().rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    cm.apply_adapter(linear(rng), "owner/model", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    assert told["base"] == "owner/model"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(cm.FormatError, match="cannot be reached"):
        cm.apply_adapter(linear(rng), "owner/model", tmp_path / "other")


def test_trained_weights_beside_the_adapter_are_told_of(small, rng, tmp_path):
    cm.save_peft(linear(rng), tmp_path / "adapter")
    (tmp_path / "adapter" / "mm_projector.bin").touch()
    adapter = cm.open_peft(tmp_path / "adapter")
    with pytest.warns(CoreMergeWarning, match=r"\(mm_projector.bin\) are not applied"):
        cm.apply_adapter(adapter, small(), tmp_path / "out")
