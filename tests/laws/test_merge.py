import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, dense, plain_merge, random_adapters

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning

BUILDS = {
    "weights": lambda x: (cm.tsv(), {"weights": x}),
    "weights of the rule": lambda x: (cm.ties(weights=x), {}),
    "parameter of the rule": lambda x: (cm.cart(rank=2, scale=x[0]), {}),
    "scale": lambda x: (cm.tsv(), {"scale": {"*.p": x[0], "*": x[1]}}),
}


@pytest.mark.wide
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_gradients_in_parameters_while_the_adapters_are_constants(build):
    adapters = random_adapters({"x.p": (9, 7), "x.q": (9, 7)}, (2, 3, 3), dtype="float32")

    def loss(x):
        rule, options = build(x)
        merged = plain_merge(adapters, rule, **options)
        return sum(jnp.sum(lora.dense() ** 2) for lora in merged.values())

    x = jnp.asarray([0.8, 1.1, 0.9])
    gradient = jax.jit(jax.grad(loss))(x)
    step = jnp.full(3, 0.02)
    expected = (loss(x + step) - loss(x - step)) / 2
    assert gradient.dtype == x.dtype
    np.testing.assert_allclose(jnp.vdot(gradient, step), expected, rtol=1e-2)


def paper_tsv_isotropize(updates, ranks):
    """The paper's equations in NumPy: joint bases, cores, TSV and Iso-C on them, lift."""
    a = np.concatenate([a for a, _ in updates])
    b = np.concatenate([b for _, b in updates], axis=1)
    u = np.linalg.svd(b, full_matrices=False)[0]
    vt = np.linalg.svd(a, full_matrices=False)[2]
    triplets = []
    for (lora_a, lora_b), rank in zip(updates, ranks, strict=True):
        left, s, right = np.linalg.svd((u.T @ lora_b) @ (lora_a @ vt.T))
        triplets.append((left[:, :rank], s[:rank], right[:rank]))

    def polar(x):
        left, _, right = np.linalg.svd(x, full_matrices=False)
        return left @ right

    left = polar(np.concatenate([t[0] for t in triplets], axis=1))
    right = polar(np.concatenate([t[2] for t in triplets]))
    left, s, right = np.linalg.svd((left * np.concatenate([t[1] for t in triplets])) @ right)
    return u @ (s.mean() * left @ right) @ vt


@pytest.mark.parametrize(("shape", "ranks"), [((60, 40), (8, 8, 8)), ((32, 48), (2, 9, 5))])
def test_equals_the_papers_equations(shape, ranks):
    adapters = random_adapters({"q": shape}, ranks, dtype="float32")
    merged = plain_merge(adapters, cm.chain(cm.tsv(), cm.isotropize()), scale=0.9)
    updates = [
        (np.asarray(x["q"].a, np.float64), np.asarray(x["q"].b, np.float64)) for x in adapters
    ]
    assert_same(merged, {"q": 0.9 * paper_tsv_isotropize(updates, ranks)}, 1e-6)


@pytest.mark.wide
def test_modules_that_only_some_adapters_have():
    first, second, third = random_adapters({"q": (8, 6), "v": (6, 6), "o": (6, 8)}, (2, 3, 1))
    second = second.replace(modules={path: second[path] for path in ("v", "o")})
    third = third.replace(modules={"v": third["v"]})
    for rule in (cm.mean(), cm.tsv(), cm.ties(density=0.5)):
        merged = plain_merge([first, second, third], rule)
        assert list(merged) == ["q", "v", "o"]
        for path, owners in {
            "q": [first],
            "v": [first, second, third],
            "o": [first, second],
        }.items():
            alone = [adapter.replace(modules={path: adapter[path]}) for adapter in owners]
            assert_same(plain_merge(alone, rule), {path: merged[path]}, 1e-12)


def test_weights_of_a_rule_follow_their_adapter():
    first, second = random_adapters({"q": (8, 6), "v": (6, 6)}, (2, 3))
    first = first.replace(modules={"q": first["q"]})
    merged = plain_merge([first, second], cm.task_arithmetic(weights=(2.0, 5.0)))
    assert_same(
        merged,
        {"q": 2 * dense(first["q"]) + 5 * dense(second["q"]), "v": 5 * dense(second["v"])},
        1e-12,
    )


def test_the_first_scale_pattern_that_matches_counts():
    adapters = random_adapters({"l.q": (8, 6), "l.v": (8, 6), "o": (8, 6)}, (2, 3))
    scaled = plain_merge(adapters, cm.mean(), scale={"*.q": 0.5, "l.*": 3.0, "*": 1.0})
    plain = plain_merge(adapters, cm.mean())
    expected = {p: f * dense(plain[p]) for p, f in {"l.q": 0.5, "l.v": 3, "o": 1}.items()}
    assert_same(scaled, expected, 1e-12)


def with_metadata(adapters, *changes):
    return [
        adapter.replace(metadata=dataclasses.replace(adapter.metadata, **change))
        for adapter, change in zip(adapters, changes, strict=True)
    ]


def test_what_the_sources_agree_on_is_kept():
    adapters = with_metadata(
        random_adapters({"q": (8, 6)}, (2, 3)),
        {"base_model": "org/base", "task_type": "CAUSAL_LM"},
        {"base_model": "org/base/", "task_type": "SEQ_CLS"},
    )
    with pytest.warns(CoreMergeWarning, match="task types CAUSAL_LM, SEQ_CLS"):
        metadata = plain_merge(adapters, cm.mean()).metadata
    assert (metadata.base_model, metadata.task_type) == ("org/base", None)


ADAPTERS = random_adapters({"q": (8, 6), "v": (6, 6)}, (2, 3))
OTHER_SHAPE = [ADAPTERS[0], *random_adapters({"q": (8, 7)}, (2,), seed=1)]
CONV = cm.LoRA(a=np.ones((2, 6)), b=np.ones((8, 2)), kind=cm.Kind("conv2d", (6, 1, 1)))
BASES = with_metadata(ADAPTERS, {"base_model": "x"}, {"base_model": "y"})


def with_extras(*values):
    return [
        adapter.replace(extras={"head": np.asarray(value, np.float32)})
        for adapter, value in zip(ADAPTERS, values, strict=True)
    ]


EXTRAS = [ADAPTERS[0], ADAPTERS[1].replace(extras={"head.weight": np.ones(3)})]


@pytest.mark.parametrize(
    ("error", "message", "adapters", "rule", "options"),
    [
        (cm.MismatchError, "no adapters", [], cm.mean(), {}),
        (cm.MismatchError, r"'q' has shape .* \(8, 6\) in .* but \(8, 7\)",
         OTHER_SHAPE, cm.mean(), {}),
        (cm.MismatchError, "'q' has kind", [ADAPTERS[0], cm.Adapter({"q": CONV})], cm.mean(), {}),
        (cm.MismatchError, "'task0' was trained on base model 'x', .*'task1' on 'y'",
         BASES, cm.mean(), {}),
        (cm.MismatchError, "'task0' has no module in common",
         [ADAPTERS[0], *random_adapters({"z": (8, 6)}, (2,))], cm.mean(), {}),
        (cm.MismatchError, "1 weights for 2 adapters", ADAPTERS, cm.mean(), {"weights": [1.0]}),
        (cm.MismatchError, "3 weights for 2", ADAPTERS, cm.ties(weights=(1, 2, 3)), {}),
        (cm.MismatchError, "all weights are 0", ADAPTERS, cm.mean(), {"weights": [0, 0.0]}),
        (cm.MismatchError, r"'\*.z' matches no module", ADAPTERS, cm.mean(), {"scale": {"*.z": 1}}),
        (cm.UnsupportedError, "'task1' has 1 tensors .*'head.weight'", EXTRAS, cm.mean(), {}),
        (cm.MismatchError, "only one of .* has 'head.weight'", EXTRAS, cm.mean(),
         {"extras": "mean"}),
        (cm.MismatchError, r"'head' has the shapes \(2,\) and \(3,\)",
         with_extras([0, 0], [0, 0, 0]), cm.mean(), {"extras": "mean"}),
        (cm.MismatchError, "trained rows .* same tokens", with_metadata(
            with_extras([0], [0]), *({"config": {"trainable_token_indices": [i]}} for i in (1, 2))
         ), cm.mean(), {"extras": "mean"}),
        (cm.MismatchError, "no adapter is named 'z'", EXTRAS, cm.mean(), {"extras": "keep=z"}),
        (ValueError, "extras='all'", ADAPTERS, cm.mean(), {"extras": "all"}),
        (ValueError, "precision='half'", ADAPTERS, cm.mean(), {"precision": "half"}),
        (ValueError, r"pass key=jax.random.key", ADAPTERS, cm.dare(), {}),
        (cm.RecipeError, "expected a merge rule", ADAPTERS, "ties", {}),
    ],
)  # fmt: skip
def test_refuses_by_name(error, message, adapters, rule, options):
    with pytest.raises(error, match=message):
        plain_merge(adapters, rule, **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cm.ties(density=0.0),
        lambda: cm.ties(density=1.5),
        lambda: cm.ties(elect="vote"),
        lambda: cm.ties(reduce="median"),
        lambda: cm.ties(scope="layer"),
        lambda: cm.dare(drop=1.0),
        lambda: cm.cart(rank=0),
        lambda: cm.cart(rank=1.5),
        lambda: cm.chain(cm.ties(), cm.tsv()),
        lambda: cm.chain(cm.mean(), cm.chain(cm.dare(), cm.tsv())),
    ],
)
def test_rules_refuse_impossible_parameters(build):
    with pytest.raises(ValueError, match=r"expected|keep one"):
        build()


def test_mismatch_may_be_allowed():
    assert set(plain_merge(BASES, cm.mean(), allow_other_base=True)) == {"q", "v"}
    apart = [ADAPTERS[0], *random_adapters({"z": (8, 6)}, (2,))]
    assert set(plain_merge(apart, cm.mean(), allow_disjoint=True)) == {"q", "v", "z"}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("first", 1.0), ("mean", 2.0), ("keep=task1", 3.0), ("keep=2", 3.0)],
)
def test_extras_follow_the_policy(policy, expected):
    merged = plain_merge(with_extras([1, 1], [3, 3]), cm.mean(), extras=policy)
    np.testing.assert_array_equal(merged.extras["head"], np.full(2, expected, np.float32))


def test_weights_in_other_files_need_a_decision(tmp_path):
    """They are never read: they go along as they are, or stay where they are."""
    adapters = []
    for name in ("math", "code"):
        cm.save_peft(ADAPTERS[0], tmp_path / name)
        (tmp_path / name / "value_head.safetensors").write_text(name)
        (tmp_path / name / "optimizer.pt").touch()
        adapters.append(cm.open_peft(tmp_path / name))
    with pytest.raises(cm.UnsupportedError, match=r"\(value_head.safetensors\); choose what"):
        plain_merge(adapters, cm.mean())
    with pytest.raises(cm.UnsupportedError, match=r"'math' .*which are not read"):
        plain_merge(adapters, cm.mean(), extras="mean")
    for policy, expected in (("first", "math"), ("keep=code", "code"), ("drop", None)):
        cm.save_peft(plain_merge(adapters, cm.mean(), extras=policy), out := tmp_path / policy)
        file = out / "value_head.safetensors"
        assert (file.read_text() if file.exists() else None) == expected


def test_equal_extras_need_no_decision_and_others_may_be_dropped():
    merged = plain_merge(with_extras([1, 2], [1, 2]), cm.mean())
    np.testing.assert_array_equal(merged.extras["head"], [1, 2])
    assert not plain_merge(with_extras([1, 2], [1, 3]), cm.mean(), extras="drop").extras
    with pytest.raises(cm.UnsupportedError, match="choose what to do"):
        plain_merge(with_extras([1, 2], [1, 3]), cm.mean())


def test_the_mean_of_heads_looks_at_names_and_shapes_alone():
    adapters = with_metadata(
        with_extras([1], [3]),
        {"config": {"modules_to_save": ["norm", "score"], "revision": "main"}},
        {"config": {"modules_to_save": ["score", "norm"], "bias": "none"}},
    )
    merged = plain_merge(adapters, cm.mean(), extras="mean")
    assert merged.extras["head"] == [2]
    assert merged.metadata.config == {"modules_to_save": ["norm", "score"]}


def test_an_adapter_to_keep_is_named_by_its_folder_or_number(tmp_path):
    """Two folders have one name, and one adapter has a weight of 0, so is not counted."""
    sources = []
    for owner, value in (("code", 1), ("math", 2), ("law", 3)):
        head = {"lm_head.weight": np.full(2, value, np.float32)}
        cm.save_peft(ADAPTERS[0].replace(extras=head), folder := tmp_path / owner / "final")
        sources.append(folder)
    opened = [cm.open_peft(folder) for folder in sources]
    for name in (str(sources[1]), f"{tmp_path}/code/../math/final/", "2"):
        kept = plain_merge(opened, cm.mean(), weights=[0, 1, 1], extras=f"keep={name}")
        assert set(np.asarray(kept.extras["lm_head.weight"])) == {2}
    with pytest.raises(cm.MismatchError, match=r"several adapters are named .*2: 'final'"):
        plain_merge(opened, cm.mean(), extras="keep=final")


def test_steps_have_their_place_in_a_chain():
    """dare | sum | isotropize, wherever the sum is left out."""
    written = cm.chain(cm.dare(), cm.task_arithmetic(), cm.isotropize())
    assert cm.chain(cm.dare(), cm.isotropize()) == written
    before = cm.chain(cm.isotropize(), cm.mean())
    assert before.before == (cm.isotropize(),)
    assert hash(written) != hash(before)
    assert str(written) == "chain(dare(drop=0.1), task_arithmetic(weights=None), isotropize())"


def test_dare_drops_its_share_and_keeps_the_mean():
    cores = jnp.ones((2, 200, 100))
    dropped = cm.dare(drop=0.3)(cores, key=jax.random.key(0)) / 2
    np.testing.assert_allclose(jnp.mean(dropped), 1, atol=0.02)
    np.testing.assert_allclose(np.unique(dropped), [0, 0.5 / 0.7, 1 / 0.7], rtol=1e-6)


@pytest.mark.wide
@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (8, 9), (14, 15)], ids=str)
@pytest.mark.parametrize("space", [cm.core(), cm.knots(scaled=True), cm.full()], ids=repr)
@pytest.mark.parametrize("equivariance", ["orthogonal", "elementwise"])
def test_a_sum_is_the_sum_of_updates_however_the_ranks_fit(equivariance, space, shape):
    """Ranks that add up to less or more than m, n or both; through the space, as a function."""
    adapters = random_adapters({"q": shape}, (4, 6))
    rule = cm.from_function(lambda cores: cores.sum(axis=0), equivariance)
    merged = plain_merge(adapters, rule, space=space)
    assert_same(merged, {"q": sum(dense(adapter["q"]) for adapter in adapters)}, 1e-9)
    if not isinstance(space, type(cm.full())):
        assert merged["q"].rank <= min(*shape, 10)
