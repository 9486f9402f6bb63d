import dataclasses
import hashlib
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from kinds import assert_same, update
from safetensors import safe_open

import coremerge_jax as cm
from coremerge_jax.io import adapter_writer as writer
from coremerge_jax.io.formats import hash_source


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_what_is_written_is_read_back_bit_by_bit(adapter, tmp_path):
    assert cm.save_peft(adapter, tmp_path / "out") is None
    again = cm.load_peft(tmp_path / "out")
    assert_same(adapter, again)
    assert again.metadata.base_model == "owner/base"
    assert again.metadata.task_type == "CAUSAL_LM"
    assert again.metadata.rank == again.metadata.alpha == 2


def test_jax_arrays_are_written_too(adapter, tmp_path):
    modules = {
        path: lora.replace(a=jnp.asarray(lora.a), b=jnp.asarray(lora.b))
        for path, lora in adapter.items()
    }
    cm.save_peft(adapter.replace(modules=modules), tmp_path / "out")
    assert_same(adapter, cm.load_peft(tmp_path / "out"))


def test_ranks_that_differ_and_paths_that_end_alike(rng, tmp_path):
    """`a.q` must not get the pattern of `q`, nor `a-b` that of `axb`."""
    ranks = {"q": 1, "a.q": 5, "b.a.q": 3, "axb": 2, "a.b": 4, "a": 5}
    modules = {path: update(rng, rank=rank) for path, rank in ranks.items()}
    cm.save_peft(cm.Adapter(modules), tmp_path / "out")
    assert_same(modules, cm.load_peft(tmp_path / "out"))
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["target_modules"]) == set(ranks)
    assert len(config["rank_pattern"]) == 4


def test_parts_of_one_layer_get_one_rank_without_a_change_of_the_update(rng, tmp_path):
    modules = {
        "attention": update(rng, rank=3),
        "attention.base_layer.out_proj": update(rng, rank=1),
        **{f"moe.w[{e}]": update(rng, cm.Kind("expert"), rank=e + 1) for e in range(3)},
        "q": update(rng, rank=2),
    }
    cm.save_peft(cm.Adapter(modules), tmp_path / "out")
    again = cm.load_peft(tmp_path / "out")
    assert {path: lora.rank for path, lora in again.items()} == {
        "attention": 3,
        "attention.base_layer.out_proj": 3,
        **{f"moe.w[{e}]": 3 for e in range(3)},
        "q": 2,
    }
    for path, lora in modules.items():
        a, b = again[path].a, again[path].b
        assert np.array_equal(a[: lora.rank], lora.a)
        assert np.array_equal(b[:, : lora.rank], lora.b)
        assert not a[lora.rank :].any()
        assert not b[:, lora.rank :].any()


def test_extras_are_read_back(write, factors, rng, tmp_path):
    names = [
        "q.base_layer.bias",
        "norm.bias",
        "score.dense.weight",
        "embed.token_adapter.trainable_tokens_delta",
        "embed_tokens.weight",
        "q.lora_B.bias",
        "v.lora_B.bias",
    ]
    tensors = factors({"q": (5, 4, 2), "v": (5, 4, 2)})
    tensors |= {f"base_model.model.{name}": rng.standard_normal(5, np.float32) for name in names}
    tensors["base_model.model.score.steps"] = np.array([7])
    folder = write(
        tensors,
        lora_alpha=2,
        bias="all",
        lora_bias=True,
        modules_to_save=["score"],
        trainable_token_indices={"embed": [1]},
    )
    cm.save_peft(cm.load_peft(folder), tmp_path / "out")
    for ours, theirs in zip(*(files(path) for path in (tmp_path / "out", folder)), strict=True):
        assert ours[0] == theirs[0]
        assert np.array_equal(ours[1], theirs[1])
    ours, theirs = config_of(tmp_path / "out"), config_of(folder)
    for field in ("bias", "lora_bias", "modules_to_save", "trainable_token_indices"):
        assert ours[field] == theirs[field]


def files(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as stream:
        return sorted((key, stream.get_tensor(key)) for key in stream.keys())  # noqa: SIM118


def test_a_bias_of_b_in_one_layer_gives_zeros_in_the_others(rng, tmp_path):
    modules = {"q": update(rng), "v": update(rng), "embed": update(rng, cm.Kind("embedding"))}
    extras = {"q.lora_B.bias": np.ones(4, np.float32)}
    cm.save_peft(cm.Adapter(modules, extras=extras), tmp_path / "out")
    again = cm.load_peft(tmp_path / "out").extras
    assert np.array_equal(again["q.lora_B.bias"], np.ones(4))
    assert np.array_equal(again["v.lora_B.bias"], np.zeros(4))
    assert len(again) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes_are_the_nearest_values(adapter, tmp_path, dtype):
    cm.save_peft(adapter, tmp_path / "out", dtype=dtype)
    again = cm.load_peft(tmp_path / "out")
    assert again.metadata.dtype == dtype
    for path, lora in adapter.items():
        assert np.array_equal(again[path].a, lora.a.astype(dtype).astype(np.float32))
        assert np.array_equal(again[path].b, lora.b.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, "float16", r"q\.lora_B\.weight.*overflows float16"),
        (np.nan, "float32", r"q\.lora_B\.weight.*NaN"),
        (1.0, "int8", "dtype 'int8'; expected one of float32"),
    ],
)
def test_values_that_a_file_cannot_hold(rng, tmp_path, value, dtype, message):
    lora = update(rng)
    lora.b[1, 1] = value
    with pytest.raises(cm.FormatError, match=message):
        cm.save_peft(cm.Adapter({"q": lora}), tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_experts_that_cannot_be_packed(rng, tmp_path):
    expert = cm.Kind("expert")
    for paths, error, message in (
        (["m.w[0]", "m.w[2]"], cm.FormatError, r"experts \[0, 2\]"),
        (["m.w"], cm.FormatError, "ends in"),
        (["m.w1[0]", "m.w2[0]"], cm.UnsupportedError, "w1, w2"),
    ):
        modules = {path: update(rng, expert) for path in paths}
        with pytest.raises(error, match=message):
            cm.save_peft(cm.Adapter(modules), tmp_path / "out")


@pytest.mark.parametrize(("rank", "energy"), [(1, None), (None, 0.9)])
def test_truncation_reports_the_energy_kept(adapter, tmp_path, rank, energy):
    kept = cm.save_peft(adapter, tmp_path / "out", rank=rank, energy=energy)
    again = cm.load_peft(tmp_path / "out")
    assert set(kept) == set(adapter)
    for path, lora in adapter.items():
        whole, part = (np.sum(np.asarray(x.dense(), np.float64) ** 2) for x in (lora, again[path]))
        assert kept[path] == pytest.approx(part / whole, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"energy": 0.9}, {"rank": 3, "energy": 0.9}])
def test_one_rank_for_all_modules_leaves_the_updates(adapter, rng, tmp_path, options):
    modules = dict(adapter) | {f"x.{r}": update(rng, rank=r) for r in range(1, 5)}
    cm.save_peft(cm.Adapter(modules), tmp_path / "compact", **options)
    kept = cm.save_peft(cm.Adapter(modules), tmp_path / "out", uniform_rank=True, **options)
    compact, again = (cm.load_peft(tmp_path / name) for name in ("compact", "out"))
    (top,) = {lora.rank for lora in again.values()}
    assert top == max(lora.rank for lora in compact.values())
    for path, lora in compact.items():
        assert np.array_equal(again[path].a[: lora.rank], lora.a)
        assert np.array_equal(again[path].b[:, : lora.rank], lora.b)
        assert not again[path].a[lora.rank :].any()
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == top
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (kept is None) == (not options)
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_modules_that_are_adapted_and_saved_whole(rng, tmp_path):
    """peft cannot load a module of both kinds, but takes the weight of an adapted module."""
    modules = {"lm_head": update(rng), "layers.0.down": update(rng)}
    metadata = cm.Metadata(config={"modules_to_save": ["lm_head", "down", "score"]})
    names = "lm_head", "layers.0.down", "layers.1.down", "score"
    extras = {f"{name}.weight": rng.standard_normal((4, 4), np.float32) for name in names}
    cm.save_peft(cm.Adapter(modules, metadata=metadata, extras=extras), tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] == ["layers.1.down", "score"]
    again = cm.load_peft(tmp_path / "out")
    assert set(again) == set(modules)
    assert set(again.extras) == set(extras)
    for name, value in extras.items():
        assert np.array_equal(again.extras[name], value)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", None])
def test_keys_have_the_prefix_of_the_source(rng, tmp_path, prefix):
    modules = {
        "q": update(rng),
        **{f"moe.w[{e}]": update(rng, cm.Kind("expert")) for e in range(2)},
    }
    metadata = cm.Metadata(prefix=prefix, config={"modules_to_save": ["head"]})
    extras = {"head.weight": np.ones((2, 2), np.float32)}
    cm.save_peft(cm.Adapter(modules, metadata=metadata, extras=extras), tmp_path / "out")
    expected = "base_model.model." if prefix is None else prefix
    assert {key.removesuffix(".weight") for key, _ in files(tmp_path / "out")} == {
        f"{expected}{path}" for path in ("q.lora_A", "q.lora_B", "moe.lora_A", "moe.lora_B", "head")
    }


def test_the_card_says_where_the_adapter_comes_from(adapter, write, factors, tmp_path):
    source = write(factors({"q": (5, 4, 2)}))
    digests = hash_source(source)
    file = source / "adapter_model.safetensors"
    assert digests[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    card = {
        "rule": ["ties:density=0.2", "isotropize"],
        "scale": 0.9,
        "version": "1.2.3",
        "sources": [{"name": "a|b", "path": str(source), "sha256": digests}],
    }
    cm.save_peft(adapter, tmp_path / "out", card=card)
    provenance = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    assert provenance.items() >= card.items()
    assert provenance["dtype"] == "float32"
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "owner/base"
    assert front["library_name"] == "peft"
    for expected in ("ties:density=0.2", "0.9", "1.2.3", r"a\|b", *digests.values()):
        assert expected in text


def test_a_source_is_never_replaced(write, factors, tmp_path):
    folder = write(factors({"q": (5, 4, 2)}))
    adapter = cm.load_peft(folder)
    card = {"sources": [{"name": "a", "path": str(folder)}]}
    with pytest.raises(cm.FormatError, match="is the input"):
        cm.save_peft(adapter, folder, force=True, card=card)
    with pytest.raises(cm.FormatError, match="is the input"):
        cm.save_peft(cm.open_peft(folder), tmp_path / "x" / ".." / folder.name, force=True)


def test_an_existing_adapter_survives_all_but_force(adapter, tmp_path):
    out = tmp_path / "out"
    cm.save_peft(adapter, out)
    first = files(out)
    doubled = {path: dataclasses.replace(lora, b=2 * lora.b) for path, lora in adapter.items()}
    with pytest.raises(cm.FormatError, match="already exists"):
        cm.save_peft(adapter.replace(modules=doubled), out)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, files(out), strict=True))
    cm.save_peft(adapter.replace(modules=doubled), out, force=True)
    assert_same(doubled, cm.load_peft(out))
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("step", ["_write_groups", "model_card"])
def test_a_failure_half_way_leaves_what_was_there(adapter, tmp_path, monkeypatch, step, error):
    out = tmp_path / "out"
    cm.save_peft(adapter, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    original = getattr(writer, step)

    def fail(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    monkeypatch.setattr(writer, step, fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            cm.save_peft(adapter, target, force=True)
    assert list(tmp_path.iterdir()) == [out]
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_names_the_output(rng, small_disk):
    adapter = cm.Adapter({"q": update(rng, shape=(1000, 1000), rank=50)})
    with pytest.raises(OSError, match=re.escape(str(small_disk / "out"))) as caught:
        cm.save_peft(adapter, small_disk / "out")
    assert "No space left" in str(caught.value)
    assert not list(Path(small_disk).iterdir())
