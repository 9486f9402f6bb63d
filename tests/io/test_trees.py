"""Trees of parameters to adapters and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, dense

import coremerge_jax as cm


def qwix_tree(rank, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers": {
            str(i): {
                "w_lora_a": rng.standard_normal((8, rank)).astype(np.float32),
                "w_lora_b": rng.standard_normal((rank, 6)).astype(np.float32),
            }
            for i in range(2)
        }
    }


def test_factors_have_the_rank_that_the_scale_is_of():
    """qwix's alpha is of one rank: others would silently have another scale."""
    tree = qwix_tree(rank=2)
    adapter = cm.from_tree(tree, alpha=8)
    merged = cm.merge([adapter, cm.from_tree(qwix_tree(2, seed=1), alpha=8)], cm.mean())
    with pytest.raises(cm.MismatchError, match=r"'layers\.0' has rank 4, .* alpha / 2; truncate"):
        cm.to_tree(merged, tree, alpha=8)
    larger = cm.to_tree(merged, tree, alpha=8, rank=4)
    smaller = cm.to_tree(cm.truncate(merged, rank=1)[0], tree, alpha=8)
    assert smaller["layers"]["0"]["w_lora_a"].shape == (8, 2)
    for again, expected in (
        (cm.from_tree(larger, alpha=8), merged),
        (cm.from_tree(smaller, alpha=8), cm.truncate(merged, rank=1)[0]),
    ):
        for path, lora in expected.items():
            np.testing.assert_allclose(again[path].dense(), lora.dense(), rtol=1e-5, atol=1e-6)


INPUTS, BLOCKS, RANK, OUTPUTS = 16, 3, 4, 32


def numbered_in_a_scan(axis, outer="layers", seed=0):
    """Two layers in each of three blocks, as MaxText has Gemma 3; and the updates by module."""
    rng = np.random.default_rng(seed)
    tree, updates = {}, {}
    for layer in range(2):
        a = rng.standard_normal((BLOCKS, INPUTS, RANK)).astype(np.float32)
        b = rng.standard_normal((BLOCKS, RANK, OUTPUTS)).astype(np.float32)
        tree[f"layers_{layer}"] = {
            "query": {
                "kernel_lora_a": np.moveaxis(a, 0, axis),
                "kernel_lora_b": np.moveaxis(b, 0, axis),
            }
        }
        for block in range(BLOCKS):
            update = (a[block] @ b[block]).T
            updates[f"decoder.{outer}.{block}.layers.{layer}.query"] = update
    return {"decoder": {outer: tree}}, updates


@pytest.mark.parametrize("outer", ["layers", "scanned_blocks", "moe_layers"])
@pytest.mark.parametrize("axis", [0, 1])
def test_numbered_layers_in_a_scan_are_a_module_each(axis, outer):
    tree, updates = numbered_in_a_scan(axis, outer)
    adapter = cm.from_tree(tree, alpha=RANK)
    assert_same(adapter, updates, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, cm.to_tree(adapter, tree, alpha=RANK), tree)
    shape = (BLOCKS, INPUTS, OUTPUTS) if axis == 0 else (INPUTS, BLOCKS, OUTPUTS)
    kernels = {name: {"query": {"kernel": np.zeros(shape, np.float32)}} for name in layers_of(tree)}
    folded = cm.fold_tree({"decoder": {outer: kernels}}, adapter)["decoder"][outer]
    for path, update in updates.items():
        block, layer = int(path.split(".")[2]), path.split(".")[4]
        kernel = np.moveaxis(folded[f"layers_{layer}"]["query"]["kernel"], axis, 0)
        np.testing.assert_allclose(kernel[block], update.T, rtol=1e-5, atol=1e-5)


def layers_of(tree):
    (outer,) = tree["decoder"].values()
    return list(outer)


def test_numbered_layers_in_no_scan_that_is_known_are_asked_for():
    tree = {"decoder": {"stack": numbered_in_a_scan(1)[0]["decoder"]["layers"]}}
    with pytest.raises(cm.FormatError, match=r"layers_0/query: .* several ways .*--scan-axis"):
        cm.from_tree(tree, alpha=RANK)
    assert {x.shape for x in cm.from_tree(tree, alpha=RANK, scan_axis=1).values()} == {(32, 16)}
    assert {x.shape for x in cm.from_tree(tree, alpha=RANK, scan_axis=None).values()} == {(96, 48)}


@pytest.mark.parametrize("option", ["axes", "ignore"])
def test_patterns_that_match_nothing_are_refused(option):
    pattern = {"axes": {"layer/*": "ir,ro"}, "ignore": ["layer/*"]}[option]
    with pytest.raises(
        cm.FormatError, match=rf"{option} \(--{option}\): pattern 'layer/\*' .*near"
    ):
        cm.from_tree(qwix_tree(2), alpha=8, **{option: pattern})


def test_patterns_for_folding_that_match_nothing_are_refused():
    adapter = cm.from_tree(qwix_tree(2), alpha=8)
    params = {"layers": {str(i): {"w": np.zeros((8, 6), np.float32)} for i in range(2)}}
    with pytest.raises(
        cm.FormatError, match=r"axes .*'layer/0' matches no module; nearest is 'lay"
    ):
        cm.fold_tree(params, adapter, axes={"layer/0": "io"})
    with pytest.raises(cm.FormatError, match="scan_axis is 2"):
        cm.fold_tree(params, adapter, scan_axis=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("alpha", value) for value in (float("nan"), -8.0, "8", 0, True, 10**400)),
        *(("rank", value) for value in (0, -2, 2.0, True)),
    ],
)
def test_an_alpha_or_rank_that_is_none_is_refused(option, value):
    with pytest.raises(cm.FormatError, match=f"{option} is .*; expected a positive"):
        cm.from_tree(qwix_tree(2), **{"alpha": 8, option: value})


@pytest.mark.parametrize("dtype", ["complex64", "uint8", "bool", "float8_e4m3fn", "int32"])
def test_factors_that_are_no_floats_are_refused(dtype):
    tree = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), qwix_tree(2))
    with pytest.raises(cm.FormatError, match=f"is of dtype {dtype}; expected floating point"):
        cm.from_tree(tree, alpha=8)


def test_factors_of_openpi_are_refused():
    """Its einsums sum over heads between the factors: no choice of axes reads them."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 6, 3)), rng.standard_normal((2, 4, 3, 12))
    tree = {"layers": {"attn": {"attn_vec_einsum": {"lora_a": a, "lora_b": b}}}}
    for options in ({}, {"layout": "nnx", "axes": {"*": "leir,lero"}}):
        with pytest.raises(cm.UnsupportedError, match="as openpi stores them"):
            cm.from_tree(tree, **options)


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("on_device", [False, True])
def test_stacks_of_adapters_are_read_one_by_one(layers, on_device):
    """Slots of the ranks 4, 0 and 2 with a scale each; the base model's kernel is left out."""
    rng, lead = np.random.default_rng(0), () if layers is None else (layers,)
    scales, ranks = np.array([0.5, 1, 2], np.float32), np.array([4, 0, 2], np.int32)
    q = {
        "lora_A": rng.standard_normal((*lead, 3, 8, 4), np.float32),
        "lora_B": rng.standard_normal((*lead, 3, 4, 10), np.float32),
        "lora_scaling": np.broadcast_to(scales, (*lead, 3)),
        "lora_ranks": np.broadcast_to(ranks, (*lead, 3)),
        "kernel": np.zeros((*lead, 8, 10), np.float32),
    }
    if on_device:
        q = jax.tree.map(jnp.asarray, q)
    below = {"layers": {"_stacked": {"q_proj": q}}} if layers else {"layers": {"0": {"q_proj": q}}}
    found = cm.from_stacks({"model": below}, name="math")
    assert [x.metadata.name for x in found] == ["math-0", "math-2"]
    for adapter, slot in zip(found, (0, 2), strict=True):
        assert list(adapter) == [f"model.layers.{i}.q_proj" for i in range(layers or 1)]
        for i, lora in enumerate(adapter.values()):
            at = (i, slot) if layers else (slot,)
            a, b = (np.asarray(q[part][at], float) for part in ("lora_A", "lora_B"))
            assert lora.rank == ranks[slot]
            expected = scales[slot] * (a[:, : lora.rank] @ b[: lora.rank]).T
            np.testing.assert_allclose(dense(lora), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_scaling": None}, "has no lora_scaling"),
        ({"lora_scaling": np.ones(2)}, "expected lora_A .adapters, inputs, r"),
        ({"lora_B": np.ones((4, 10))}, "expected lora_A .adapters, inputs, r"),
        ({"lora_ranks": np.zeros(3, int)}, "no slot holds an adapter"),
    ],
)
def test_stacks_that_are_not_whole_are_refused(changes, message):
    q = {"lora_A": np.ones((3, 8, 4)), "lora_B": np.ones((3, 4, 10)), "lora_scaling": np.ones(3)}
    q = {name: x for name, x in {**q, **changes}.items() if x is not None}
    with pytest.raises(cm.FormatError, match=message):
        cm.from_stacks({"q_proj": q})
    with pytest.raises(cm.FormatError, match="no stacks of adapters"):
        cm.from_stacks({"q_proj": {"kernel": np.ones((8, 4))}})


def test_stacks_of_adapters_of_skyrl_are_refused():
    q = {"lora_A": np.ones((2, 3, 8, 4)), "lora_B": np.ones((2, 3, 4, 10))}
    with pytest.raises(
        cm.FormatError, match=r"SkyRL-tx has factors of several .* which from_stacks reads"
    ):
        cm.from_tree({"model": {"layers": {"q_proj": q}}})


@pytest.mark.parametrize("on_device", [False, True])
def test_a_merge_is_folded_with_the_axes_that_were_read(on_device):
    """gemma's query: 2 heads of 4 are as wide as the 8 inputs."""
    rng = np.random.default_rng(0)
    trees = [
        {
            "q_einsum": {
                "lora": {"a": rng.standard_normal((8, 2)), "b": rng.standard_normal((2, 2, 4))}
            }
        }
        for _ in range(2)
    ]
    merged = cm.merge([cm.from_tree(tree) for tree in trees], cm.mean())
    kernel = np.zeros((2, 8, 4), np.float32)
    params = {"q_einsum": {"w": jnp.asarray(kernel) if on_device else kernel}}
    folded = cm.fold_tree(params, merged)["q_einsum"]["w"]
    update = dense(merged["q_einsum"]).reshape(2, 4, 8).swapaxes(1, 2)
    np.testing.assert_allclose(folded, update, rtol=1e-5, atol=1e-5)
    forgotten = merged.replace(metadata=cm.Metadata())
    with pytest.raises(cm.FormatError, match="say which with axes"):
        cm.fold_tree(params, forgotten)
    # As many heads as inputs: what was read does not tell it either.
    a, b = rng.standard_normal((8, 2)), rng.standard_normal((2, 8, 4))
    same = cm.from_tree({"q_einsum": {"lora": {"a": a, "b": b}}})
    with pytest.raises(cm.FormatError, match="say which with axes"):
        cm.fold_tree({"q_einsum": {"w": np.zeros((8, 8, 4), np.float32)}}, same)


def test_axes_that_two_adapters_tell_differently_are_forgotten():
    rng = np.random.default_rng(0)
    one, two = (
        cm.from_tree(
            {"q": {"lora": {"a": rng.standard_normal((8, 2)), "b": rng.standard_normal(b)}}}
        )
        for b in ((2, 2, 4), (2, 4, 2))
    )
    assert one.metadata.lengths == (("q", (8,), (2, 4)),)
    assert cm.merge([one, one], cm.mean()).metadata.lengths == one.metadata.lengths
    assert cm.merge([one, two], cm.mean()).metadata.lengths == ()


@pytest.mark.parametrize(
    ("a", "b", "axes"),
    [
        ((3, 4, 8, 2), (3, 2, 6), "leir,lro"),
        ((3, 8, 2), (2, 2, 6), "lir,lro"),
        ((8, 2), (3, 2, 6), "ir,lro"),
    ],
)
def test_layers_and_experts_are_those_of_both_factors(a, b, axes):
    tree = {"moe": {"kernel_lora_a": np.ones(a), "kernel_lora_b": np.ones(b)}}
    with pytest.raises(cm.FormatError, match="expected equal layers"):
        cm.from_tree(tree, alpha=4.0, axes={"*moe": axes})


def test_a_b_that_is_stored_once_is_that_of_all(rng):
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 2), (2, 6)))
    tree = {"moe": {"kernel_lora_a": a, "kernel_lora_b": b}}
    options = {"alpha": 4.0, "axes": {"*moe": "lir,ro"}}
    adapter = cm.from_tree(tree, **options)
    again = cm.to_tree(adapter, tree, **options)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    first = next(iter(adapter))
    other = adapter[first].replace(b=2 * adapter[first].b)
    changed = adapter.replace(modules={**adapter, first: other})
    with pytest.raises(cm.MismatchError, match=r"axes iir,ro$"):
        cm.to_tree(changed, tree, **options)
    whole = cm.from_tree(tree, alpha=4.0, axes={"*moe": "iir,ro"})
    assert [lora.shape for lora in whole.values()] == [(6, 24)]


def test_extras_are_refused(tmp_path):
    tree = qwix_tree(rank=2)
    adapter = cm.from_tree(tree, alpha=2).replace(extras={"score.weight": np.ones((3, 8))})
    with pytest.raises(cm.UnsupportedError, match=r"score.weight.*trees of LoRA factors cannot"):
        cm.to_tree(adapter, tree, alpha=2)
    for options in ({}, {"like": tree, "layout": "qwix"}):
        with pytest.raises(cm.UnsupportedError, match=r"score.weight.*orbax adapters cannot"):
            cm.save_orbax(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_factors_that_overflow_are_refused():
    adapter = cm.Adapter({"up": cm.LoRA(a=np.full((2, 4), 1e-4), b=np.full((4, 2), 1e6))})
    for on in (np, jnp):
        like = {"up": {"lora_a": on.zeros((4, 2), "f4"), "lora_b": on.zeros((2, 4), "f4")}}
        half = jax.tree.map(lambda x: x.astype(np.float16), like)
        with pytest.raises(cm.MismatchError, match=r"'up/lora_b' overflows float16"):
            cm.to_tree(adapter, half)
        assert np.isfinite(cm.to_tree(adapter, like)["up"]["lora_b"]).all()


def test_a_parameter_named_value_is_not_the_level_of_flax(rng):
    kernels = [rng.standard_normal((8, 6)) for _ in range(3)]
    params = {"attn": dict(zip(("query", "value"), kernels, strict=False))}
    params |= {"mlp": {"kernel": {"value": kernels[2]}}}
    lora = cm.LoRA(a=rng.standard_normal((2, 8)), b=rng.standard_normal((6, 2)))
    adapter = cm.Adapter(dict.fromkeys(("attn.query", "attn.value", "mlp"), lora))
    folded = cm.fold_tree(params, adapter)
    for new, old in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(new, old + dense(lora).T, rtol=1e-6, atol=1e-6)


def test_scaling_of_stacks_is_not_rounded(rng):
    q = {
        "lora_A": rng.standard_normal((2, 8, 4)),
        "lora_B": rng.standard_normal((2, 4, 6)),
        "lora_scaling": np.array([1 / 3, 1.7]),
    }
    scales = q["lora_scaling"]
    q = {
        name: jnp.asarray(x, jnp.bfloat16 if name != "lora_scaling" else "f4")
        for name, x in q.items()
    }
    for adapter, scale, a, b in zip(
        cm.from_stacks({"q": q}), scales, q["lora_A"], q["lora_B"], strict=True
    ):
        expected = scale * (np.asarray(a, float) @ np.asarray(b, float)).T
        np.testing.assert_allclose(dense(adapter["q"]), expected, rtol=1e-5, atol=1e-5)
