"""A module has one name in a merge, whatever names adapters have for it."""

import jax
import numpy as np
import pytest
from helpers import dense, distance, plain_merge

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.io.peft.writer import save_peft
from coremerge_jax.merging.alignment import align
from coremerge_jax.naming.spelling import canonical
from coremerge_jax.recipe import Recipe

pytestmark = pytest.mark.wide

SHAPES = {"gate": (6, 4), "up": (6, 4), "down": (4, 6), "q": (8, 4), "k": (4, 4), "v": (4, 4)}
EXPERTS = 2

# Paths of the same weights in two releases; weights of one fused module are joined by "+", and
# {e} is an expert's number.
Q = "model.layers.0.self_attn.q_proj"
NAMINGS = {
    "mixtral": (
        {
            "q": Q,
            "gate": "model.layers.0.block_sparse_moe.experts.{e}.w1",
            "up": "model.layers.0.block_sparse_moe.experts.{e}.w3",
            "down": "model.layers.0.block_sparse_moe.experts.{e}.w2",
        },
        {
            "q": Q,
            "gate+up": "model.layers.0.mlp.experts.gate_up_proj[{e}]",
            "down": "model.layers.0.mlp.experts.down_proj[{e}]",
        },
    ),
    "qwen3_moe": (
        {
            "q": Q,
            "gate": "model.layers.0.mlp.experts.{e}.gate_proj",
            "up": "model.layers.0.mlp.experts.{e}.up_proj",
            "down": "model.layers.0.mlp.experts.{e}.down_proj",
        },
        {
            "q": Q,
            "gate+up": "model.layers.0.mlp.experts.gate_up_proj[{e}]",
            "down": "model.layers.0.mlp.experts.down_proj[{e}]",
        },
    ),
    "nemotron_h": (
        {
            "q": "backbone.layers.0.mixer.q_proj",
            "up": "backbone.layers.1.mixer.experts.{e}.up_proj",
        },
        {"q": "model.layers.0.mixer.q_proj", "up": "model.layers.1.mixer.experts.up_proj[{e}]"},
    ),
    "granitemoe": (
        {"gate+up": "model.layers.0.block_sparse_moe.input_linear.weight[{e}]", "q": Q},
        {"gate+up": "model.layers.0.block_sparse_moe.experts.gate_up_proj[{e}]", "q": Q},
    ),
    "gpt_oss": (
        {
            "q": Q,
            "gate+up": "model.layers.0.mlp.experts.gate_up_proj[{e}]",
            "down": "model.layers.0.mlp.experts.down_proj[{e}]",
        },
        {
            "q": Q,
            "gate+up": "model.layers.0.mlp.experts.gate_up_projs.{e}",
            "down": "model.layers.0.mlp.experts.down_projs.{e}",
        },
    ),
    "qwen2_vl": (
        {"q": Q, "v": "visual.blocks.0.attn.proj"},
        {
            "q": "model.language_model.layers.0.self_attn.q_proj",
            "v": "model.visual.blocks.0.attn.proj",
        },
    ),
    "llava": (
        {
            "q": "language_model.model.layers.0.self_attn.q_proj",
            "up": "language_model.lm_head",
            "v": "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
        },
        {
            "q": "model.language_model.layers.0.self_attn.q_proj",
            "up": "lm_head",
            "v": "model.vision_tower.encoder.layers.0.self_attn.out_proj",
        },
    ),
    "vit": (
        {
            "q": "vit.encoder.layer.0.attention.attention.query",
            "v": "vit.encoder.layer.0.attention.output.dense",
            "up": "vit.encoder.layer.0.intermediate.dense",
            "down": "vit.encoder.layer.0.output.dense",
        },
        {
            "q": "vit.layers.0.attention.q_proj",
            "v": "vit.layers.0.attention.o_proj",
            "up": "vit.layers.0.mlp.fc1",
            "down": "vit.layers.0.mlp.fc2",
        },
    ),
    "swin": (
        {
            "q": "swin.encoder.layers.0.blocks.0.attention.self.query",
            "up": "swin.encoder.layers.0.blocks.0.intermediate.dense",
        },
        {
            "q": "swin.encoder.layers.0.blocks.0.attention.q_proj",
            "up": "swin.encoder.layers.0.blocks.0.mlp.fc1",
        },
    ),
    "dinov2_attention": (
        {"q": "dinov2.encoder.layer.0.attention.attention.query", "v": "classifier"},
        {"q": "dinov2.encoder.layer.0.attention.q_proj", "v": "classifier"},
    ),
    "dinov2": (
        {"gate+up": "encoder.layer.0.mlp.weights_in", "down": "encoder.layer.0.mlp.weights_out"},
        {
            "gate": "encoder.layer.0.mlp.gate_proj",
            "up": "encoder.layer.0.mlp.up_proj",
            "down": "encoder.layer.0.mlp.down_proj",
        },
    ),
    "phi3": (
        {
            "q+k+v": "model.layers.0.self_attn.qkv_proj",
            "gate+up": "model.layers.0.mlp.gate_up_proj",
        },
        {
            "q": Q,
            "k": "model.layers.0.self_attn.k_proj",
            "v": "model.layers.0.self_attn.v_proj",
            "gate": "model.layers.0.mlp.gate_proj",
            "up": "model.layers.0.mlp.up_proj",
        },
    ),
}


def modules(naming):
    """Path of each module of a naming, and the weights that are its rows."""
    return [
        (pattern.format(e=e), [f"{weight}{e}" for weight in weights.split("+")])
        for weights, pattern in naming.items()
        for e in range(EXPERTS if "{e}" in pattern else 1)
    ]


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def made(rng, shapes, name=None, extras=None, config=None):
    """An adapter of rank 2 with modules of these shapes, or of one shape."""
    found = {}
    for path in shapes:
        m, n = shapes[path] if isinstance(shapes, dict) else (4, 4)
        a, b = (rng.standard_normal(size, np.float32) for size in ((2, n), (m, 2)))
        found[path] = cm.LoRA(a, b, cm.Kind("expert" if path.endswith("]") else "linear"))
    return cm.Adapter(found, metadata=cm.Metadata(name=name, config=config or {}), extras=extras)


def by_naming(rng, naming, name):
    rows = {path: [SHAPES[x.rstrip("01")] for x in weights] for path, weights in modules(naming)}
    return made(rng, {path: (sum(m for m, _ in x), x[0][1]) for path, x in rows.items()}, name)


def updates(adapter, naming):
    """The dense update of each weight."""
    found, known = {}, dict(modules(naming))
    for path, x in adapter.items():
        ends = np.cumsum([SHAPES[weight.rstrip("01")][0] for weight in known[path]])
        found |= zip(known[path], np.split(dense(x), ends[:-1]), strict=True)
    return found


def in_files(adapters, folder):
    for i, x in enumerate(adapters):
        save_peft(x, folder / f"{i}")
    return [cm.open_peft(folder / f"{i}", name=x.metadata.name) for i, x in enumerate(adapters)]


def aligned(adapters):
    with pytest.warns(CoreMergeWarning, match="names the same modules in another way"):
        return align(adapters)


@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("case", NAMINGS)
def test_names_are_those_of_one_adapter_and_updates_stay(rng, tmp_path, case, backwards, files):
    namings = NAMINGS[case][:: -1 if backwards else 1]
    adapters = [by_naming(rng, x, f"t{i}") for i, x in enumerate(namings)]
    expected = [updates(*pair) for pair in zip(adapters, namings, strict=True)]
    adapters = in_files(adapters, tmp_path) if files else adapters
    one, other = aligned(adapters)
    assert set(one) == set(other)
    (naming,) = (x for x in namings if set(dict(modules(x))) == set(one))
    assert any(x is y for x, y in zip((one, other), adapters, strict=True))
    for before, after, weights in zip(adapters, (one, other), expected, strict=True):
        assert after.in_memory == before.in_memory == (not files)
        assert (after.folders, after.metadata) == (before.folders, before.metadata)
        assert {x.rank for x in after.outline.values()} == {2}
        assert all(path.endswith("]") == (after[path].kind.name == "expert") for path in after)
        found = updates(after, naming)
        assert found.keys() == weights.keys()
        for weight, value in weights.items():
            assert np.array_equal(found[weight], value)
            assert np.array_equal(updates(after.read(after), naming)[weight], value)


@pytest.mark.parametrize("case", NAMINGS)
def test_a_sum_is_that_of_the_weights(rng, case):
    adapters = [by_naming(rng, x, f"t{i}") for i, x in enumerate(NAMINGS[case])]
    parts = [updates(*pair) for pair in zip(adapters, NAMINGS[case], strict=True)]
    with pytest.warns(CoreMergeWarning):
        merged = plain_merge(adapters, cm.task_arithmetic())
    (naming,) = (x for x in NAMINGS[case] if set(dict(modules(x))) == set(merged))
    for weight, value in updates(merged, naming).items():
        assert distance(value, sum(part[weight] for part in parts)) < 1e-6


def test_layers_of_experts_win_and_parameters_win_over_lists_of_them(rng):
    for case, winner in {"mixtral": 0, "qwen3_moe": 0, "gpt_oss": 0}.items():
        for order in (1, -1):
            names = NAMINGS[case]
            with pytest.warns(CoreMergeWarning) as told:
                result = align([by_naming(rng, x, "x") for x in names[::order]])
            assert ("has experts in layers" in str(told[0].message)) == (case != "gpt_oss")
            assert set(result[0]) == set(dict(modules(names[winner])))


def test_nothing_changes_where_names_are_alike(rng):
    for first, second in (
        ([Q], [Q]),
        ([Q, "lm_head"], ["model.layers.1.self_attn.q_proj", "model.embed_tokens"]),
        # MiniMax: some layers have a fused projection, others have three
        ([Q, "model.layers.1.self_attn.qkv_proj"], [Q]),
        (["a.experts.gate_up_proj[0]"], ["b.experts.0.gate_proj"]),
        # Two models in one, that no release has renamed
        (["model.layers.0.q", "backbone.layers.0.q"], ["model.layers.0.q"]),
        (["x/kernel", "0", "#.q"], ["x/kernel"]),
    ):
        adapters = [made(rng, paths) for paths in (first, second)]
        result = align(adapters)
        assert all(x is y for x, y in zip(result, adapters, strict=True))


def test_layers_of_one_model_whose_names_differ(rng):
    attention, moe = "model.layers.{}.self_attn.{}".format, "model.layers.0.{}.experts.0.{}".format
    # MiniMax, with and without linear attention in a layer
    own = [attention(0, "o_proj"), attention(1, "out_proj")]
    for paths, others in ((own, own), (own, own[:1]), (own, own[1:])):
        adapters = [made(rng, paths), made(rng, others)]
        assert all(x is y for x, y in zip(align(adapters), adapters, strict=True))
    adapters = [
        made(rng, [*own, moe("block_sparse_moe", "w1")]),
        made(rng, [*own, moe("mlp", "gate_proj")]),
    ]
    one, other = aligned(adapters)
    assert set(one) == set(other)
    assert set(own) < set(one)
    # All of them are called so in an older release of another model
    old = made(rng, [attention(i, "out_proj") for i in range(2)])
    renamed = aligned([old, made(rng, [attention(0, "o_proj")])])[0]
    assert list(renamed) == [attention(i, "o_proj") for i in range(2)]


LEARNED = {
    "layers that the other lacks": (
        ["model.language_model.layers.0.q", "model.language_model.layers.0.v"],
        ["model.layers.0.q", "model.layers.7.v"],
        ["model.language_model.layers.0.q", "model.language_model.layers.7.v"],
    ),
    "a module beside the others": (
        ["model.language_model.layers.0.mlp.up", "model.language_model.layers.0.mlp.down"],
        ["model.layers.0.mlp.up", "model.layers.0.mlp.gate_proj"],
        ["model.language_model.layers.0.mlp.up", "model.language_model.layers.0.mlp.gate_proj"],
    ),
    "another part of the model": (
        ["model.language_model.layers.0.q", "lm_head"],
        ["model.layers.0.q", "visual.merger.fc"],
        ["model.language_model.layers.0.q", "model.visual.merger.fc"],
    ),
    "layers of newer names": (
        ["vit.layers.0.attention.q_proj", "vit.layers.0.x"],
        ["vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.1.output.dense"],
        ["vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2"],
    ),
    "layers of newer names, in the other order": (
        ["vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.1.output.dense"],
        ["vit.layers.0.attention.q_proj", "vit.layers.0.x"],
        ["vit.layers.0.attention.q_proj", "vit.layers.0.x"],
    ),
    "an expert's layer beside the others": (
        [Q, *(f"model.layers.0.block_sparse_moe.experts.{e}.w1" for e in range(2))],
        [Q, *(f"model.layers.0.mlp.experts.down_proj[{e}]" for e in range(2))],
        [Q, *(f"model.layers.0.block_sparse_moe.experts.{e}.w2" for e in range(2))],
    ),
}


@pytest.mark.parametrize("case", LEARNED)
def test_names_that_only_one_adapter_has_follow_the_others(rng, case):
    first, second, expected = LEARNED[case]
    assert list(aligned([made(rng, first), made(rng, second)])[1]) == expected


def test_queries_keys_and_values_are_split_where_shapes_prove_it(rng):
    attention = "model.layers.{}.self_attn.{}_proj".format
    whole = made(rng, {attention(i, "qkv"): (16, 4) for i in range(2)}, "whole")
    parts = made(rng, {attention(0, "q"): (8, 4), attention(0, "v"): (4, 4)})
    split, _ = aligned([whole, parts])
    for i in range(2):  # also in a layer that the other does not have
        rows = dense(whole[attention(i, "qkv")])
        for name, found in zip("qkv", np.split(rows, [8, 12]), strict=True):
            assert np.array_equal(dense(split[attention(i, name)]), found)
    for shapes in ({"q": (8, 4)}, {"q": (8, 4), "v": (5, 4)}, {"k": (4, 4), "v": (4, 4)}):
        other = made(rng, {attention(0, name): shape for name, shape in shapes.items()})
        with pytest.raises(cm.MismatchError, match=r"'whole' has the fused module .* 16 rows"):
            align([whole, other])


def test_experts_whose_parts_are_columns_are_not_split(rng):
    llama4 = made(rng, {Q: (4, 4), "a.experts.gate_up_proj[0]": (4, 12)}, "llama4")
    layers = made(rng, {Q: (4, 4), "a.experts.0.gate_proj": (6, 4)})
    with pytest.raises(cm.MismatchError, match="'llama4' has the fused module"):
        align([llama4, layers])


REFUSED = {
    "fused and parts": (["a.experts.gate_up_proj[0]", "a.experts.0.gate_proj"], [Q]),
    "one expert twice": (["a.experts.down_proj[0]", "a.experts.0.w2"], [Q]),
    "two releases": (["model.layers.0.q", "model.language_model.layers.0.q"], [Q]),
    "old and new layers": (["encoder.layer.0.output.dense", "layers.0.mlp.fc2"], [Q]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_with_two_names_for_the_same_weights_is_refused(rng, case):
    paths, others = REFUSED[case]
    adapters = [made(rng, others), made(rng, paths, "both")]
    for given in (adapters, adapters[1:]):
        with pytest.raises(
            cm.MismatchError, match=r"'both' has modules .* are the same weights"
        ) as e:
            plain_merge(given, cm.mean(), allow_disjoint=True)
        assert all(repr(path) in str(e.value) for path in paths)


def test_names_that_are_not_certain_are_refused(rng):
    one = made(rng, ["model.language_model.layers.0.q", "lm_head"], "one")
    other = made(rng, ["model.layers.0.q", "perceiver.fc"], "other")
    with pytest.raises(cm.MismatchError, match=r"'other' has module 'perceiver.fc'.* 'one'") as e:
        align([one, other])
    assert "'model.language_model.layers.0.q'" in str(e.value)
    mixed = made(rng, ["a.attn.Wqkv", Q], "mixed")
    with pytest.raises(
        cm.MismatchError, match=r"'apart' has module 'a.attn.q_proj'.*'a.attn.Wqkv'"
    ):
        align([mixed, made(rng, ["a.attn.q_proj", Q], "apart")])


def test_extras_are_renamed_alike(rng, tmp_path):
    def made_with(start, head):
        names = [f"{start}.layers.0.q.bias", f"{start}.norm.weight", "score.weight"]
        extras = {name: rng.standard_normal(4).astype(np.float32) for name in names}
        config = {"bias": "all", "modules_to_save": ["norm", "score"]}
        return made(rng, [f"{start}.layers.0.q", *head], start, extras, config)

    one, other = made_with("model.language_model", ["lm_head"]), made_with("model", [])
    for adapters in ([one, other], in_files([one, other], tmp_path)):
        result = aligned(adapters)[1]
        assert list(result.extras) == list(one.extras)
        for new, old in zip(result.extras.values(), other.extras.values(), strict=True):
            assert np.array_equal(np.asarray(new), old)
    assert next(iter(other.extras)) == "model.layers.0.q.bias"


def test_traced_adapters(rng):
    adapters = [by_naming(rng, x, "x") for x in NAMINGS["mixtral"]]

    @jax.jit
    def gate(a, b):
        with pytest.warns(CoreMergeWarning):
            return plain_merge([a, b], cm.task_arithmetic())

    merged = gate(*adapters)
    (one, other) = (updates(*x) for x in zip(adapters, NAMINGS["mixtral"], strict=True))
    found = updates(merged, NAMINGS["mixtral"][0])
    assert all(distance(found[x], one[x] + other[x]) < 1e-6 for x in found)


@pytest.mark.parametrize("case", ["qwen2_vl", "llava", "vit", "swin", "dinov2_attention"])
def test_newer_names_win_in_any_order(rng, case):
    old, new = NAMINGS[case]
    for order in (1, -1):
        adapters = [by_naming(rng, x, "x") for x in (old, new)][::order]
        assert [set(x) for x in aligned(adapters)] == [set(dict(modules(new)))] * 2


@pytest.mark.parametrize(("case", "winner"), [("qwen2_vl", 1), ("vit", 1), ("llava", 0)])
def test_newer_names_win_if_they_are_certain_for_all(rng, case, winner):
    # The older adapter has a vision tower, and the newer one does not show what it is called now.
    old, new = NAMINGS[case]
    part = {weight: path for weight, path in new.items() if case == "vit" or weight != "v"}
    adapters = [by_naming(rng, x, "x") for x in (old, part)]
    assert set(aligned(adapters)[0]) == set(dict(modules((old, new)[winner])))


def test_what_else_reads_several_adapters_has_the_common_names(rng):
    adapters = [by_naming(rng, x, f"t{i}") for i, x in enumerate(NAMINGS["qwen2_vl"])]
    expected = list(adapters[1])
    with pytest.warns(CoreMergeWarning):
        assert list(cm.project(adapters).order) == expected
    with pytest.warns(CoreMergeWarning):
        merged = plain_merge(adapters, cm.mean())
    with pytest.warns(CoreMergeWarning):
        assert [x.path for x in cm.diagnose(adapters, merged).modules] == expected
    with pytest.warns(CoreMergeWarning):
        checked = cm.verify(merged, adapters, recipe=Recipe(rules=("mean",), scale=1.0))
    assert not checked.findings
    assert list(checked.modules) == expected


@pytest.mark.parametrize("case", NAMINGS)
def test_canonical_paths_are_their_own(case):
    for naming in NAMINGS[case]:
        keys = [canonical(path) for path, _ in modules(naming)]
        assert len(set(keys)) == len(keys)
        assert list(map(canonical, keys)) == keys


def test_the_weight_of_a_layer_is_the_layer(tmp_path):
    """As peft's target_parameters and target_modules name it."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6)), rng.standard_normal((4, 2))
    plain = cm.Adapter({"layers.0.v": cm.LoRA(a=a, b=b), "layers.0.q": cm.LoRA(a=a, b=b)})
    weight = cm.Adapter({"layers.0.v.weight[0]": cm.LoRA(a=2 * a, b=b, kind=cm.Kind("expert"))})
    merged = plain_merge([weight, plain], cm.task_arithmetic())
    assert set(merged) == {"layers.0.v", "layers.0.q"}
    assert {lora.kind for lora in merged.values()} == {cm.Kind()}
    assert distance(dense(merged["layers.0.v"]), 3 * b @ a) < 1e-6
    save_peft(merged, tmp_path / "out")
    alone = plain_merge([weight, weight], cm.task_arithmetic())
    assert set(alone) == {"layers.0.v.weight[0]"}
    both = cm.Adapter({**plain, **weight})
    with pytest.raises(cm.MismatchError, match=r"'layers\.0\.v', which it has too"):
        plain_merge([both, plain], cm.mean())
    layer = cm.Adapter({"c_proj": cm.LoRA(a=a, b=b)})
    weight = cm.Adapter({"c_proj.weight[0]": cm.LoRA(a=a, b=b, kind=cm.Kind("expert"))})
    with pytest.raises(cm.MismatchError, match="with target_modules, and not"):
        plain_merge([layer, weight], cm.mean(), allow_disjoint=True)
