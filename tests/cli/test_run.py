"""Merges and sweeps as jobs of the library: results, plans, progress and warnings."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from helpers import assert_same

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning, RecipeError
from coremerge_jax.io.peft.reader import load_peft
from coremerge_jax.recipe import Recipe
from coremerge_jax.run import Merged, MergePlan, run_merge, run_sweep


def resolved(adapters, **fields):
    return Recipe(adapters=tuple(map(str, adapters)), **fields).resolve()


class Steps:
    """A progress that counts."""

    def __init__(self):
        self.stages, self.left = [], 0

    @contextlib.contextmanager
    def __call__(self, stage, total=None):
        self.stages.append(stage)
        self.left = total or 0

        def advance():
            self.left -= 1

        yield advance
        assert self.left == 0


def test_a_merge_writes_what_the_recipe_makes(adapters, tmp_path):
    recipe, steps = resolved(adapters, rules=("ties:density=0.5",), rank=2), Steps()
    merged = run_merge(recipe, tmp_path / "out", progress=steps)
    assert isinstance(merged, Merged)
    assert steps.stages == ["open", "merge"]
    loaded = load_peft(tmp_path / "out")
    expected, kept = cm.truncate(recipe.recipe.run([load_peft(x) for x in adapters]), rank=2)
    assert_same(loaded, expected, 1e-6)
    assert merged.energy_kept == pytest.approx(kept, rel=1e-5)
    assert json.loads(json.dumps(merged.to_dict()))["recipe"] == recipe.recipe.to_dict()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_plan_writes_nothing(adapters, tmp_path, dry_run):
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "out" if dry_run else None
    plan = run_merge(resolved(adapters), output, dry_run=dry_run)
    assert isinstance(plan, MergePlan)
    assert plan.decisions["batches"] >= len(plan.signatures) == plan.cost["programs"]
    assert sorted(tmp_path.rglob("*")) == before


def test_adapters_without_an_effect_are_warned_of(adapters, tmp_path):
    dead = load_peft(adapters[0])
    dead = dead.replace(modules={p: cm.LoRA(a=x.a, b=np.zeros_like(x.b)) for p, x in dead.items()})
    cm.save_peft(dead, tmp_path / "dead")
    with pytest.warns(CoreMergeWarning, match="adapter 'dead' has no effect"):
        run_merge(resolved([tmp_path / "dead", adapters[1]]), tmp_path / "out")
    with pytest.raises(cm.MismatchError, match="all merged updates are zero"):
        run_merge(resolved([tmp_path / "dead"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_adapters_that_are_merged_twice_are_warned_of(adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "copy")
    recipe = resolved([*adapters, tmp_path / "copy"], rank=2)
    with pytest.warns(CoreMergeWarning, match="adapter 'copy' is in the merge more than once"):
        run_merge(recipe, tmp_path / "out")
    with pytest.warns(CoreMergeWarning, match="adapter 'copy' is in the merge more than once"):
        run_sweep(recipe, tmp_path / "swept", {"scale": [1.0]}, evaluate=len)
    run_merge(resolved(adapters, rank=2), tmp_path / "each")  # warnings are errors here


def test_a_sweep_writes_the_best(adapters, tmp_path):
    recipe = resolved(adapters, rules=("mean",), dtype="bfloat16", uniform_rank=False)
    size = lambda adapter: sum(np.linalg.norm(x.dense()) for x in adapter.values())  # noqa: E731
    swept = run_sweep(recipe, tmp_path / "out", {"scale": [0.5, 2.0, 1.0]}, evaluate=size)
    assert swept.best == tmp_path / "out" / "best"
    best = recipe.with_rule(recipe.rule, 2.0)
    assert (swept.sweep.best.scale, best.recipe.scale, best.explicit.scale) == (2.0, 2.0, 2.0)
    with pytest.warns(CoreMergeWarning, match="the modules have ranks 5 to 6"):
        again = run_merge(best, tmp_path / "again")
    for name in ("adapter_model.safetensors", "coremerge.json"):
        files = [(folder / name).read_bytes() for folder in (swept.best, tmp_path / "again")]
        assert files[0] == files[1]
    assert again.recipe == best.recipe


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        ({}, {}, "nothing to try"),
        ({"scale": [1.0]}, {"method": "line"}, "compare candidates"),
        ({"scale": [1.0]}, {"maximize": False}, "compare candidates"),
        ({"scale": [1.0]}, {"method": "lin"}, "did you mean 'line'"),
    ],
)
def test_a_sweep_without_an_aim_is_refused(adapters, tmp_path, values, more, message):
    with pytest.raises(RecipeError, match=message):
        run_sweep(resolved(adapters), tmp_path / "out", values, **more)
    assert not (tmp_path / "out").exists()
