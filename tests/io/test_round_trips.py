"""From each format to each other and back: every bit is the same, or a module is refused."""

import itertools
import re
import warnings

import numpy as np
import pytest
from kinds import update

import coremerge_jax as cm
from coremerge_jax.io.formats import find_target

FORMATS = ("peft", "orbax", "kohya", "diffusers", "original", "mlx")

LAYER, BLOCK = "model.layers.0", "attentions.0.transformer_blocks.0"
CONV = cm.Kind("conv2d", kernel=(2, 3, 1))

# Paths, kinds and ranks of modules of several models, and the formats that hold them.
ADAPTERS = {
    "language model": (
        {f"{LAYER}.self_attn.q_proj": (cm.Kind(), 2), "lm_head": (cm.Kind(), 3)},
        {"peft", "orbax", "mlx"},
    ),
    "language model with an embedding": (
        {
            f"{LAYER}.self_attn.q_proj": (cm.Kind(), 2),
            "model.embed_tokens": (cm.Kind("embedding"), 2),
        },
        {"peft", "mlx"},
    ),
    "language model with experts": (
        {f"{LAYER}.mlp.experts.down_proj[{e}]": (cm.Kind("expert"), 2) for e in range(2)},
        {"peft"},
    ),
    "UNet and text encoder": (
        {
            f"unet.down_blocks.0.{BLOCK}.attn1.to_q": (cm.Kind(), 2),
            "unet.down_blocks.0.resnets.0.conv1": (CONV, 3),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (cm.Kind(), 4),
        },
        {"peft", "kohya", "diffusers"},
    ),
    "diffusion transformer": (
        {
            "transformer.transformer_blocks.0.attn.to_q": (cm.Kind(), 2),
            "transformer.single_transformer_blocks.0.proj_out": (cm.Kind(), 3),
        },
        {"peft", "orbax", "kohya", "diffusers"},
    ),
    "diffusion transformer, by its authors' names": (
        {
            "diffusion_model.blocks.0.self_attn.q": (cm.Kind(), 2),
            "diffusion_model.blocks.0.ffn.0": (cm.Kind(), 3),
        },
        {"peft", "orbax", "kohya", "original"},
    ),
}


@pytest.fixture
def through(tmp_path):
    """Writes an adapter in a format and reads it; None if it refuses a module by its name."""

    def write_and_read(adapter, to):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        try:
            find_target(to).save(adapter, out, to=to)
        except (cm.UnsupportedError, cm.FormatError) as error:
            refusal = str(error)
        else:
            return cm.open_adapter(out)
        assert set(re.findall("'([^']*)'", refusal)) & set(adapter), refusal
        assert not out.exists()
        return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.errors.CoreMergeWarning)  # ranks differ
        yield write_and_read


def assert_same(ours, theirs):
    """The same updates bit by bit, but for zeros that fill up a rank."""
    assert set(ours) == set(theirs)
    for path, lora in theirs.items():
        a, b = ours[path].a, ours[path].b
        rank = min(lora.rank, len(a))
        assert np.array_equal(a[:rank], lora.a[:rank])
        assert np.array_equal(b[:, :rank], lora.b[:, :rank])
        assert not any(x.any() for x in (a[rank:], b[:, rank:], lora.a[rank:], lora.b[:, rank:]))
        assert ours[path].kind == lora.kind


def pairs():
    """All ordered pairs; checkpoints, which take longest, with each format by night only."""
    for first, other in itertools.permutations(FORMATS, 2):
        by_night = "orbax" in (first, other) and "peft" not in (first, other)
        yield pytest.param(first, other, marks=[pytest.mark.nightly] * by_night)


@pytest.mark.parametrize(("first", "other"), list(pairs()))
@pytest.mark.parametrize("model", ADAPTERS)
def test_there_and_back(rng, through, model, first, other):
    paths, holds = ADAPTERS[model]
    modules = {path: update(rng, kind, rank=rank) for path, (kind, rank) in paths.items()}
    start = through(cm.Adapter(modules), first)
    there = None if start is None else through(start, other)
    back = None if there is None else through(there, first)
    assert start is not None or first not in holds
    assert back is not None or not {first, other} <= holds
    if back is not None:
        assert_same(back, start)
