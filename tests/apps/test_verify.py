"""`verify` finds what was done to a merge, and finds nothing where nothing was done."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import map_factors, random_adapters
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.io.orbax.orbax_adapter import save_orbax
from coremerge_jax.io.peft.writer import write_peft
from coremerge_jax.recipe import Recipe
from coremerge_jax.record import describe_sources, provenance
from coremerge_jax.verification.compare import Comparison
from coremerge_jax.verification.tolerance import Expected, norm, rounding_loss, roundoff, tolerance

SHAPES = {f"layers.{i}.q_proj": (24, 20) for i in range(3)}
PATHS = tuple(SHAPES)
WEIGHTS = "adapter_model.safetensors"


def write_sources(folder, ranks=(2, 2, 2), extras=False):
    """Adapters whose configuration scales them by 2."""
    kept = {"head.weight": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)}
    paths = []
    for adapter in random_adapters(SHAPES, ranks, dtype="float32"):
        path = folder / adapter.metadata.name
        metadata = cm.Metadata(
            name=adapter.metadata.name, config={"modules_to_save": ["head"]} if extras else {}
        )
        cm.save_peft(
            cm.Adapter(dict(adapter), metadata=metadata, extras=kept if extras else {}), path
        )
        edit_config(path, lora_alpha=2 * adapter[PATHS[0]].rank)
        paths.append(path)
    return paths


def write_merge(sources, out, **fields):
    """Merges as the command line does."""
    recipe = Recipe(adapters=tuple(map(str, sources)), **fields)
    adapters = [cm.open_peft(path) for path in sources]
    resolved = recipe.resolve()
    stream = resolved.stream(adapters)
    card = provenance(resolved, describe_sources(recipe, adapters), stream.scales_in_words)
    how = {**resolved.arguments_of("save_peft"), "uniform_rank": False}
    write_peft(stream, out, card=card, force=True, metric=resolved.metric(adapters), **how)
    return out


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


def edit_tensors(folder, change, only=""):
    """Puts ``change(name, value)`` in place of tensors; None drops one."""
    tensors = load_file(folder / WEIGHTS)
    changed = {
        name: change(name, value) if only in name else value for name, value in tensors.items()
    }
    save_file({name: x for name, x in changed.items() if x is not None}, folder / WEIGHTS)


def times(factor):
    return lambda name, x: x * x.dtype.type(factor) if "lora_B" in name else x


def through(dtype):
    return lambda _, x: x.astype(dtype).astype(x.dtype)


def kinds(found):
    return [finding.kind for finding in found.defects]


def told(found):
    return " ".join(finding.message for finding in found.findings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("mixed"), ranks=(3, 2, 3))


@pytest.fixture(scope="module")
def by_tsv(sources, tmp_path_factory):
    return write_merge(sources, tmp_path_factory.mktemp("merged") / "tsv", rules=("tsv",))


@pytest.fixture
def merged(by_tsv, tmp_path):
    """A merge to tamper with."""
    return shutil.copytree(by_tsv, tmp_path / "merged")


# --- Right merges ---------------------------------------------------------------------------

RIGHT = [
    {"rules": ("mean",)},
    {"rules": ("mean",), "dtype": "float16"},
    {"rules": ("task_arithmetic",), "weights": (1, -1, 0.5), "dtype": "bfloat16"},
    {"rules": ("task_arithmetic:weights=[1,2,3]",), "scale": {"*.1.*": 0.5, "*": 2}},
    {"rules": ("tsv",), "dtype": "float16"},
    {"rules": ("tsv",), "precision": "float32"},
    {"rules": ("tsv",), "rank": 3},
    {"rules": ("tsv",), "rank": 3, "dtype": "bfloat16"},
    {"rules": ("tsv",), "weights": (1, 0, 1)},
    {"rules": ("tsv", "isotropize"), "scale": 0.9},
    {"rules": ("tsv", "isotropize"), "rank": 4},  # all singular values are equal
    {"rules": ("tsv", "isotropize"), "energy": 0.5},
    {"rules": ("tsv",), "budget": 2.5, "dtype": "bfloat16"},
    {"rules": ("tsv", "isotropize"), "budget": 3},
    {"rules": ("tsv",), "parameters": 400},
    {"rules": ("cart",), "energy": 0.9, "dtype": "float16"},
    {"rules": ("iso_cts",)},
    {"rules": ("ties:density=0.5",)},
    {"rules": ("ties:density=0.5,scope=model",), "rank": 2},
    {"rules": ("dare:drop=0.3", "ties"), "seed": 7, "space": "knots"},
    {"rules": ("dare:drop=0.3", "task_arithmetic"), "seed": 7, "dtype": "bfloat16"},
    {"rules": ("ties",), "space": "full"},
    {"rules": ("tsv",), "space": "tucker:rank=4"},
    {"rules": ("dc_merge",)},
    {"rules": ("sce",), "scale": 0.0},  # which is a note
]


@pytest.mark.parametrize("fields", RIGHT, ids=str)
def test_nothing_is_wrong_with_a_merge_that_is_right(mixed, tmp_path, fields):
    out = write_merge(mixed, tmp_path / "out", **fields)
    found = cm.verify(out, mixed[::-1])
    assert found.ok, told(found)
    assert set(found.modules) == set(PATHS)
    assert all(one.error <= one.tolerance for one in found.modules.values())
    assert Recipe.from_dict(found.recipe).rules == tuple(
        json.loads((out / "coremerge.json").read_text())["recipe"]["rules"]
    )
    json.dumps(found.to_dict(), allow_nan=False)


def test_extras_and_other_files_of_a_right_merge(tmp_path):
    sources = write_sources(tmp_path, extras=True)
    for policy in ("first", "mean", "keep=task1"):
        out = write_merge(sources, tmp_path / "out", rules=("mean",), extras=policy)
        assert cm.verify(out).ok
    recipe = Recipe(rules=("mean",), extras="mean")
    merged = cm.load_peft(out)
    save_orbax(merged.replace(extras={}), tmp_path / "checkpoint")
    found = cm.verify(tmp_path / "checkpoint", sources, recipe=recipe)
    assert kinds(found) == ["extras"]
    assert cm.verify(merged, [cm.load_peft(x) for x in sources], recipe=recipe).ok


def test_a_merge_in_float32_is_right_where_the_record_leaves_precision_open(sources, tmp_path):
    """As on a TPU: errors are those of float32, times what the rule makes of them."""
    rules = ("tsv", "isotropize")
    out = write_merge(sources, tmp_path / "out", rules=rules, precision="float32")
    record = json.loads((out / "coremerge.json").read_text())
    assert record["precision"] == record["recipe"].pop("precision") == "float32"
    (out / "coremerge.json").write_text(json.dumps(record))
    found = cm.verify(out)
    assert found.ok, told(found)
    assert max(one.error for one in found.modules.values()) > 1e-9


def test_rounding_inside_a_merge_is_measured(sources):
    adapters = [cm.load_peft(path) for path in sources]
    flat = Comparison(adapters[0], adapters, Recipe(rules=("mean",)), "float32")
    ties = [adapters[0], *map_factors(adapters[:1], lambda a, b: (a, -b))]
    recipe = Recipe(rules=("ties:density=1.0",))
    steep = Comparison(adapters[0], ties, recipe, "float32")
    assert max(flat.noise(PATHS, 1).values()) < 1e-4
    assert min(steep.noise(PATHS, 1).values()) > 1e-1  # signs are elected by rounding
    found = cm.verify(adapters[0], ties, recipe=recipe)  # the merge is 0, or may be anything
    assert [(x.kind, x.defect) for x in found.findings] == [("sensitive", False)]
    single = Comparison(
        adapters[0], adapters, Recipe(rules=("mean",), precision="float32"), "float32"
    )
    assert min(single.noise(PATHS, 0).values()) > 0 == max(flat.noise(PATHS, 0).values())


def test_updates_are_compared_in_whichever_factors_they_are(sources, by_tsv):
    rng = np.random.default_rng(0)
    rank = cm.open_peft(by_tsv)[PATHS[0]].rank
    mix = rng.standard_normal((rank, rank))
    merged = map_factors([cm.load_peft(by_tsv)], lambda a, b: (mix @ a, b @ np.linalg.inv(mix)))[0]
    recipe = Recipe(rules=("tsv",))
    assert cm.verify(merged, sources, recipe=recipe).ok
    assert cm.verify(merged, sources[::-1], recipe=Recipe(rules=("mean",))).ok is False


def test_every_best_cut_is_right(sources):
    """Isotropic updates have equal singular values: any of their directions may be kept."""
    rules = ("tsv", "isotropize")
    adapters = [cm.load_peft(path) for path in sources]
    whole = Recipe(rules=rules).run(adapters)

    def keep(indices):
        def cut(a, b):
            u, s, vt = np.linalg.svd(b.astype(float) @ a)
            return vt[indices], u[:, indices] * s[indices]

        return map_factors([whole], cut)[0]

    recipe = Recipe(rules=rules, rank=4)
    assert cm.verify(keep([0, 1, 2, 3]), adapters, recipe=recipe).ok
    assert cm.verify(keep([1, 2, 4, 5]), adapters, recipe=recipe).ok
    for wrong in ([0, 1, 2], [0, 1, 2, 3, 4]):
        assert kinds(cm.verify(keep(wrong), adapters, recipe=recipe)) == ["differs"]
    # Whether 3 of 6 equal directions hold half of the energy is decided by rounding.
    half = Recipe(rules=rules, energy=0.5)
    kept = [cm.verify(keep(list(range(r))), adapters, recipe=half).ok for r in (2, 3, 4, 5)]
    assert kept == [False, True, True, False]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tolerance_is_near_to_what_rounding_does(dtype):
    adapters = random_adapters({"x": (96, 80)}, (64,))
    lora = adapters[0]["x"]
    rounded = map_factors(adapters, lambda *x: (y.astype(jnp.dtype(dtype)) for y in x))[0]["x"]
    lost = norm(lora) * rounding_loss(lora, dtype)
    bound = tolerance(rounded, Expected(lora, lora), dtype).at()
    assert 2 * lost <= bound <= 6 * lost
    assert bound < 0.5 * roundoff(rounded, dtype)


# --- Defects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "cause"),
    [
        (2.0, "alpha / r of the sources counted twice"),
        (0.5, "alpha / r of the sources left out"),
        (2**0.5, "alpha / sqrt(r) in place of alpha / r, for r = 2"),
        (6**-0.5, "alpha / r in place of alpha / sqrt(r), for r = 6"),
        (1 / 3, "a mean in place of a sum"),
        (-1.0, "the wrong sign"),
        (1.001, "1.001 times"),
    ],
)
def test_a_common_factor(merged, factor, cause):
    edit_tensors(merged, times(factor))
    found = cm.verify(merged)
    assert kinds(found) == ["factor"]
    assert found.defects[0].modules == PATHS
    assert cause in told(found)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"lora_alpha": 4}, "its alpha is 4 and its rank 6"),
        ({"use_rslora": True}, "alpha / sqrt(r) in place of alpha / r, for r = 6"),
    ],
)
def test_an_edited_configuration(merged, change, cause):
    edit_config(merged, **change)
    found = cm.verify(merged)
    assert kinds(found) == ["factor"]
    assert cause in told(found)


def test_a_factor_in_one_module_only(merged):
    edit_tensors(merged, times(0.25), only=PATHS[1])
    (finding,) = cm.verify(merged).defects
    assert (finding.kind, finding.modules) == ("factor", PATHS[1:2])


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_zero_effect(merged, factor):
    edit_tensors(merged, lambda name, x: 0 * x if factor in name else x, only=PATHS[1])
    (finding,) = cm.verify(merged).defects
    assert (finding.kind, finding.modules) == ("zero-effect", PATHS[1:2])


def test_one_module_reverted_to_that_of_a_source(sources, by_tsv):
    merged = cm.load_peft(by_tsv)
    source = cm.load_peft(sources[1])
    for scale in (1, 0.5):
        lora = dataclasses.replace(source[PATHS[2]], b=scale * source[PATHS[2]].b)
        tampered = merged.replace(modules={**merged, PATHS[2]: lora})
        (finding,) = cm.verify(tampered, sources, recipe=Recipe(rules=("tsv",))).defects
        assert (finding.kind, finding.modules) == ("reverted", PATHS[2:])
        assert "'task1'" in finding.message


@pytest.mark.parametrize(
    "fields",
    [
        {"rules": ("tsv",)},
        {"rules": ("dare:drop=0.3",)},  # whose numbers depend on places in the list
        {"rules": ("mean",), "dtype": "bfloat16"},
        {"rules": ("ties",), "rank": 3},
    ],
    ids=str,
)
def test_an_adapter_left_out(sources, tmp_path, fields):
    """The record names three, two were merged."""
    whole = write_merge(sources, tmp_path / "whole", **fields)
    for t in range(3):
        rest = [x for x in sources if x != sources[t]]
        out = write_merge(rest, tmp_path / f"without {t}", **fields)
        shutil.copy(whole / "coremerge.json", out / "coremerge.json")
        (finding,) = cm.verify(out).defects
        assert (finding.kind, finding.modules) == ("left-out", PATHS)
        assert f"'task{t}'" in finding.message


def test_a_source_that_the_record_does_not_name(sources, tmp_path):
    out = write_merge(sources[:2], tmp_path / "out", rules=("mean",))
    assert cm.verify(out, sources[:2]).ok
    (finding,) = cm.verify(out, sources).defects
    assert finding.kind == "left-out"
    assert "'task2'" in finding.message
    with pytest.raises(cm.MismatchError, match="'task1' not among the sources"):
        cm.verify(out, sources[:1])


def test_two_adapters_of_which_one_is_left_out(sources, tmp_path):
    out = write_merge(sources[:2], tmp_path / "out", rules=("mean",))
    alone = write_merge(sources[:1], tmp_path / "alone", rules=("mean",))
    shutil.copy(alone / WEIGHTS, out / WEIGHTS)
    shutil.copy(alone / "adapter_config.json", out / "adapter_config.json")
    assert kinds(cm.verify(out)) == ["left-out"]


def test_another_weight(sources, tmp_path):
    out = write_merge(sources, tmp_path / "out", rules=("mean",), scale=1.0)
    weights = (1, 0.25, 1)
    other = write_merge(sources, tmp_path / "other", rules=("mean",), scale=1.0, weights=weights)
    shutil.copy(other / WEIGHTS, out / WEIGHTS)
    (finding,) = cm.verify(out).defects
    assert (finding.kind, finding.modules) == ("weight", PATHS)
    assert "0.25 times the weight of 'task1'" in finding.message


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        ("float32", jnp.bfloat16),
        ("float32", np.float16),
        ("float16", jnp.bfloat16),  # where the error may be within the bound of float16
    ],
)
def test_values_that_went_through_another_dtype(sources, tmp_path, dtype, other):
    out = write_merge(sources, tmp_path / "out", rules=("tsv",), dtype=dtype)
    edit_tensors(out, through(other))
    (finding,) = cm.verify(out).defects
    assert (finding.kind, finding.modules) == ("rounding", PATHS)
    assert np.dtype(other).name in finding.message


def test_a_file_in_another_dtype_than_recorded(merged):
    edit_tensors(merged, lambda _, x: x.astype(jnp.bfloat16))
    found = cm.verify(merged)
    assert kinds(found) == ["rounding"]
    assert found.dtype == "bfloat16"


def test_losses_by_dtype_are_those_of_writing_it(sources, by_tsv, tmp_path):
    found = cm.verify(by_tsv)
    for dtype in ("bfloat16", "float16"):
        out = write_merge(sources, tmp_path / dtype, rules=("tsv",), dtype=dtype)
        written = cm.verify(out)
        assert written.ok
        for path, one in found.modules.items():
            assert written.modules[path].error == pytest.approx(one.losses[dtype], rel=1e-3)
            assert one.losses["float32"] < 1e-6 < one.losses[dtype]


def test_underflow_in_float16_is_told(sources, tmp_path):
    out = write_merge(sources, tmp_path / "out", rules=("mean",), dtype="float16", scale=1e-6)
    found = cm.verify(out)
    assert found.ok
    assert [finding.kind for finding in found.findings] == ["rounding"]
    assert "float16" in told(found)
    write_merge(sources, out, rules=("mean",), dtype="float16", scale=1e-9)
    assert kinds(cm.verify(out)) == ["zero-effect"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(merged, value):
    edit_tensors(
        merged,
        lambda _, x: np.where(np.arange(x.size).reshape(x.shape) == 3, value, x).astype(x.dtype),
        only=PATHS[0],
    )
    found = cm.verify(merged)
    assert kinds(found) == ["not-finite"]
    assert found.defects[0].modules == PATHS[:1]
    assert set(found.modules) == set(PATHS[1:])


def test_missing_and_extra_modules(merged):
    tensors = load_file(merged / WEIGHTS)
    renamed = {name.replace("layers.2.", "layers.7."): x for name, x in tensors.items()}
    save_file(renamed, merged / WEIGHTS)
    found = cm.verify(merged)
    assert kinds(found) == ["missing-module", "extra-module"]
    assert [finding.modules for finding in found.defects] == [PATHS[2:], ("layers.7.q_proj",)]


def test_a_module_of_another_shape(merged):
    edit_tensors(merged, lambda name, x: x[:, :-1] if "lora_A" in name else x, only=PATHS[0])
    found = cm.verify(merged)
    assert kinds(found) == ["wrong-shape"]
    assert "(24, 19)" in told(found)


def test_another_difference(merged):
    edit_tensors(merged, lambda name, x: x[::-1].copy() if "lora_B" in name else x, only=PATHS[0])
    (finding,) = cm.verify(merged).defects
    assert (finding.kind, finding.modules) == ("differs", PATHS[:1])


def test_one_value_of_one_factor(merged):
    def nudge(name, x):
        if "lora_B" in name:
            x[0, 0] += 1e-3 * np.abs(x).max()
        return x

    edit_tensors(merged, nudge, only=PATHS[0])
    assert kinds(cm.verify(merged)) == ["differs"]


def test_extras_that_were_changed(tmp_path):
    sources = write_sources(tmp_path, extras=True)
    out = write_merge(sources, tmp_path / "out", rules=("mean",), extras="first")
    edit_tensors(out, lambda _, x: 1.01 * x, only="head")
    assert kinds(cm.verify(out)) == ["extras"]


def test_a_source_that_has_changed(sources, tmp_path):
    copies = [shutil.copytree(path, tmp_path / path.name) for path in sources]
    out = write_merge(copies, tmp_path / "out", rules=("mean",))
    edit_config(copies[1], lora_dropout=0.5)
    found = cm.verify(out)
    assert found.ok  # as the values are the same
    assert [finding.kind for finding in found.findings] == ["changed-source"]
    assert "'task1'" in told(found)
    edit_tensors(copies[1], times(2))
    found = cm.verify(out)
    assert "changed-source" in kinds(found)
    assert "weight" in kinds(found)
    assert "sha256" in told(found)


def test_modules_that_a_base_does_not_have(merged, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weight = {f"{path}.weight": np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    save_file(weight, base / "model.safetensors")
    assert cm.verify(merged, base=base).ok
    for wrong, message in (
        ({PATHS[1].replace("q_", "x_"): SHAPES[PATHS[1]]}, "nearest to"),
        ({PATHS[1]: (20, 24)}, "shape"),
    ):
        shapes = {path: shape for path, shape in SHAPES.items() if path != PATHS[1]} | wrong
        tensors = {f"{path}.weight": np.zeros(shape, np.float32) for path, shape in shapes.items()}
        save_file(tensors, base / "model.safetensors")
        (finding,) = cm.verify(merged, base=base).defects
        assert finding.kind == "unmatched-base"
        assert PATHS[1] in finding.message
        assert message in finding.message


def test_sources_without_effect_are_told(tmp_path):
    sources = write_sources(tmp_path)
    edit_tensors(sources[0], lambda name, x: 0 * x if "lora_B" in name else x, only=PATHS[0])
    found = cm.verify(write_merge(sources, tmp_path / "out", rules=("mean",)))
    assert found.ok
    assert "'task0' has no effect" in told(found)
    assert found.findings[0].modules == PATHS[:1]


def test_refusals(merged, sources, tmp_path):
    (merged / "coremerge.json").unlink()
    with pytest.raises(cm.RecipeError, match=r"no coremerge\.json"):
        cm.verify(merged, sources)
    with pytest.raises(cm.RecipeError, match="no sources"):
        cm.verify(merged, recipe={"rules": ["tsv"]})
    assert cm.verify(merged, sources, recipe={"rules": ["tsv"]}).ok
    out = write_merge(sources, tmp_path / "out", rules=("mean",), scale=0.5)
    assert cm.verify(out, recipe={"scale": 0.25}).defects[0].kind == "factor"
    copies = [shutil.copytree(path, tmp_path / path.name) for path in sources]
    moved = write_merge(copies, tmp_path / "moved", rules=("mean",))
    shutil.rmtree(copies[0])
    with pytest.raises(cm.FormatError, match="say where it is"):
        cm.verify(moved)
    assert cm.verify(moved, sources).ok
