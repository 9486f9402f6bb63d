"""`coremerge merge`: what it writes, shows and records."""

import json

import jax
import numpy as np
import pytest
import yaml
from helpers import assert_same

import coremerge_jax as cm
from coremerge_jax.io.formats import hash_source
from coremerge_jax.io.peft.reader import load_peft
from coremerge_jax.recipe import Recipe


def loaded(paths):
    return [load_peft(path) for path in paths]


def test_writes_what_the_library_merges(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    rules = ["--rule", "ties:density=0.5,elect=count", "--rule", "isotropize", "--mixed-ranks"]
    result = coremerge("merge", *adapters, "-o", out, *rules, "--scale", 0.9, "--weights", "1,2,.5")
    assert result.code == 0
    assert result.err.startswith("note: the modules have ranks 5 to 6")
    expected = cm.merge(
        loaded(adapters),
        cm.chain(cm.ties(density=0.5, elect="count"), cm.isotropize()),
        scale=0.9,
        weights=(1, 2, 0.5),
    )
    assert_same(load_peft(out), expected, 1e-6)


def test_default_rule_is_tsv(coremerge, adapters, tmp_path):
    assert coremerge("merge", *adapters, "-o", tmp_path / "out").code == 0
    assert_same(load_peft(tmp_path / "out"), cm.merge(loaded(adapters), cm.tsv()), 1e-6)


@pytest.mark.parametrize("space", ["full", "knots", "knots:scaled=true"])
def test_space(coremerge, adapters, tmp_path, space):
    args = ["--rule", "ties", "--space", space]
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", *args).code == 0
    assert_same(
        load_peft(tmp_path / "out"),
        Recipe(rules=("ties",), space=space).run(loaded(adapters)),
        1e-6,
    )


def test_scale_patterns(coremerge, adapters, tmp_path):
    args = ["--scale", "0.5", "--scale", "*.query=2", "--rule", "mean"]
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", *args).code == 0
    expected = cm.merge(loaded(adapters), cm.mean(), scale={"*.query": 2.0, "*": 0.5})
    assert_same(load_peft(tmp_path / "out"), expected, 1e-6)


def test_seed(coremerge, adapters, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = ["--rule", "dare:drop=0.5", "--seed", seed]
        assert coremerge("merge", *adapters, "-o", tmp_path / name, *args).code == 0
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    expected = cm.merge(loaded(adapters), cm.dare(drop=0.5), key=jax.random.key(1))
    assert_same(load_peft(tmp_path / "a"), expected, 1e-6)


def test_rank_reports_the_energy_kept(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    result = coremerge("merge", *adapters, "-o", out, "--rank", 2, "--json")
    report = json.loads(result.out)
    full = cm.merge(loaded(adapters), cm.tsv())
    for path, lora in load_peft(out).items():
        s = np.linalg.svd(full[path].dense(), compute_uv=False)
        assert lora.rank == 2
        assert report["energy_kept"][path] == pytest.approx(sum(s[:2] ** 2) / sum(s**2), abs=1e-5)
    table = coremerge("merge", *adapters, "-o", out, "--rank", 2, "--force").out
    assert "energy kept" in table


def test_energy(coremerge, adapters, tmp_path):
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", "--energy", 0.9, "--json")
    report = json.loads(result.out)
    assert all(0.9 <= kept <= 1 for kept in report["energy_kept"].values())
    ranks = {p: r for signature in report["signatures"] for p, r in signature["ranks_out"].items()}
    assert ranks == {path: lora.rank for path, lora in load_peft(tmp_path / "out").items()}


def test_dtype(coremerge, adapters, tmp_path):
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", "--dtype", "bfloat16").code == 0
    assert load_peft(tmp_path / "out").metadata.dtype == "bfloat16"


def test_extras(coremerge, save, tmp_path):
    head = {"head.weight": np.ones((2, 2), np.float32)}
    sources = [save("math"), save("code", extras=head)]
    refused = coremerge("merge", *sources, "-o", tmp_path / "out")
    assert refused.code == 1
    assert "'code'" in refused.err
    assert "--extras" in refused.err
    kept = coremerge("merge", *sources, "-o", tmp_path / "out", "--extras", "keep=code")
    assert kept.code == 0
    assert list(load_peft(tmp_path / "out").extras) == ["head.weight"]


def test_another_base_may_be_allowed(coremerge, save, tmp_path):
    sources = [save("math", base_model="org/a"), save("code", base_model="org/b")]
    refused = coremerge("merge", *sources, "-o", tmp_path / "out")
    assert refused.code == 1
    assert "--allow-other-base" in refused.err
    assert coremerge("merge", *sources, "-o", tmp_path / "out", "--allow-other-base").code == 0


def test_the_base_model_may_be_named(coremerge, save, tmp_path):
    """The hub's spelling is taken of several; a card has none that the hub would refuse."""
    bases = {"math": "C:\\models\\Qwen3-8B", "code": "unsloth/Qwen3-8B-bnb-4bit"}
    sources = [save(name, base_model=base) for name, base in bases.items()]
    for options, name in (([], bases["code"]), (["--base-model", "models/own"], "models/own")):
        out = tmp_path / name.replace("/", "-")
        assert coremerge("merge", *sources, "-o", out, *options).code == 0
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
        header = (out / "README.md").read_text().split("---")[1]
        assert ("base_model" in header) == (options == [])


def test_table(coremerge, adapters, save, tmp_path):
    extra = save("extra", 1, {"layer.0.query": (6, 8), "layer.0.odd": (3, 3)})
    options = ["--rule", "mean", "--mixed-ranks"]
    result = coremerge("merge", *adapters, extra, "-o", tmp_path / "out", *options)
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "1: query 6 × 8 1, 2, 3 ×2 6" in lines
    assert "1: value 6 × 8 2, 3 ×2 6" in lines
    assert "1: odd 3 × 3 1 1" in lines
    assert lines[-2].startswith("merged 4 adapters by mean in core space in ")
    assert lines[-1].startswith(f"wrote {tmp_path / 'out'} (")


def test_json(coremerge, adapters, tmp_path):
    report = json.loads(coremerge("merge", *adapters, "-o", tmp_path / "out", "--json").out)
    assert report["output"] == str(tmp_path / "out")
    assert report["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert set(report["seconds"]) == {"open", "merge", "compile"}
    assert report["recipe"] == Recipe(adapters=tuple(map(str, adapters))).to_dict()


def test_record_is_enough_to_merge_again(coremerge, adapters, tmp_path):
    args = ["--rule", "dare", "--rule", "ties", "--seed", 7, "--scale", "*.query=0.5"]
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", *args).code == 0
    record = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    recipe = Recipe.from_dict(record["recipe"])
    sources = [source["path"] for source in record["sources"]]
    assert "ties:density=0.2,elect=sum,reduce=mean,scope=module" in recipe.rules
    assert [source["sha256"] for source in record["sources"]] == list(map(hash_source, sources))
    assert_same(load_peft(tmp_path / "out"), recipe.run(loaded(sources)), 1e-6)


def test_model_card_shows_the_recipe_without_paths(coremerge, adapters, tmp_path):
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", "--scale", "*.query=.5").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = Recipe.from_yaml(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == Recipe(scale={"*.query": 0.5}, space="core:gauge=given,rows=given")
    assert str(tmp_path) not in card


def test_recipe_file_does_what_the_options_do(coremerge, adapters, tmp_path):
    recipe = {
        "adapters": ["math", "code", "chat"],
        "weights": [1, 0.5, 2],
        "rules": ["ties:density=0.5", "isotropize"],
        "space": "knots",
        "scale": {"*.query": 0.5, "*": 0.9},
        "rank": 3,
        "dtype": "bfloat16",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    options = ["--rule", "ties:density=0.5", "--rule", "isotropize", "--weights", "1,0.5,2"]
    options += ["--space", "knots", "--scale", "*.query=0.5", "--scale", "0.9", "--rank", "3"]
    options += ["--dtype", "bfloat16"]
    file = tmp_path / "recipe.yaml"
    assert coremerge("merge", "--recipe", file, "-o", tmp_path / "a").code == 0
    assert coremerge("merge", *adapters, *options, "-o", tmp_path / "b").code == 0
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_command_line_goes_before_the_recipe(coremerge, adapters, tmp_path):
    (tmp_path / "recipe.yaml").write_text("{adapters: [math], rules: [mean], scale: 0.5, seed: 3}")
    args = ["merge", *adapters, "--recipe", tmp_path / "recipe.yaml", "--scale", "2", "--json"]
    recipe = json.loads(coremerge(*args, "-o", tmp_path / "out").out)["recipe"]
    assert recipe["adapters"] == [str(path) for path in adapters]
    assert (recipe["rules"], recipe["scale"], recipe["seed"]) == (["mean"], 2, 3)


RULES = ["tsv", "ties:scope=model", "dare", "mean", "cart"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [[], ["--rank", "4"]])
def test_dry_run_tells_what_a_run_does(coremerge, adapters, tmp_path, rule, rank):
    args = ["merge", *adapters, "--rule", rule, *rank, "--json"]
    plan = json.loads(coremerge(*args, "--dry-run").out)
    done = json.loads(coremerge(*args, "-o", tmp_path / "out").out)
    assert plan["signatures"] == done["signatures"]
    assert plan["recipe"] == done["recipe"]
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert plan["bytes"] <= size <= plan["bytes"] + 2000


def test_dry_run_writes_nothing(coremerge, adapters, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = coremerge(
        "merge", *adapters, "-o", tmp_path / "out", "--dry-run", "--precision", "float64"
    )
    assert result.code == 0
    assert "nothing was written" in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_refuses_what_a_run_refuses(coremerge, adapters, save):
    other = save("other", base_model="org/other")
    for args in ([*adapters, other], [*adapters, "--scale", "*.none=1"], [*adapters, "-o", other]):
        assert coremerge("merge", *args, "--dry-run").code == 1


def test_replaces_only_with_force(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    assert coremerge("merge", *adapters, "-o", out, "--rule", "mean").code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    refused = coremerge("merge", *adapters, "-o", out)
    assert refused.code == 1
    assert "already exists" in refused.err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert coremerge("merge", *adapters, "-o", out, "--force").code == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_a_dry_run_counts_the_programs_of_both_passes(coremerge, adapters):
    command = ["merge", *adapters, "--rule", "ties", "--dry-run", "--json"]
    programs = [
        json.loads(coremerge(*command, *scale).out)["cost"]["programs"]
        for scale in (["--scale", "1"], ["--scale", "auto"])
    ]
    assert programs == [2, 4]


def test_dry_run_tells_the_cost(coremerge, adapters):
    result = coremerge("merge", *adapters, "--dry-run", "--json")
    cost = json.loads(result.out)["cost"]
    assert cost["programs"] == 2
    assert min(cost["operations"].values()) > 0
    assert cost["bytes"]["read"] == 4 * 8 * ((6 + 8) * 2 + 8 + 5)
    assert set(cost["seconds"]) == {
        "trace",
        "compile",
        "read",
        "products",
        "core",
        "copies",
        "write",
    }
    assert "expected memory" in coremerge("merge", *adapters, "--dry-run").out


def test_memory_is_limited(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    refused = coremerge("merge", *adapters, "-o", out, "--max-memory", "1MB")
    assert refused.code == 2
    assert "give more" in refused.err
    refused = coremerge("merge", *adapters, "-o", out, "--max-memory", "much")
    assert (refused.code, "must be like 2GiB" in refused.err) == (2, True)
    assert coremerge("merge", *adapters, "-o", out, "--max-memory", "64GiB").code == 0
    assert_same(load_peft(out), Recipe().run(loaded(adapters)), 1e-6)


def test_adapters_without_effect_are_told_of(coremerge, adapters, tmp_path):
    dead = []
    for name, alpha in (("no_alpha", 0), ("untrained", 4)):
        lora = load_peft(adapters[0])
        if alpha:
            lora = lora.replace(
                modules={x: cm.LoRA(a=y.a, b=np.zeros_like(y.b)) for x, y in lora.items()}
            )
        cm.save_peft(lora, tmp_path / name)
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        text = json.dumps({**written, "lora_alpha": alpha, "alpha_pattern": {}})
        (tmp_path / name / "adapter_config.json").write_text(text)
        dead.append(tmp_path / name)
    how = ["--rule", "mean"]
    result = coremerge("merge", *dead, adapters[0], "-o", tmp_path / "out", *how)
    assert result.code == 0
    assert result.err.splitlines()[1:] == [
        "note: adapter 'no_alpha' has no effect: its alpha is 0; set the one that it was trained "
        "with (lora_alpha)",
        "note: adapter 'untrained' has no effect: all its updates are zero, as of one that was "
        "never trained",
    ]
    result = coremerge("merge", *dead, "-o", tmp_path / "dead", "--rule", "mean")
    assert result.code == 1
    assert result.err.startswith("error: all merged updates are zero, so nothing is written: ")
    assert result.err.count("\n") == 1
    assert not list(tmp_path.glob("*dead*"))
