"""Adapters with modules of every kind that is read and written."""

import numpy as np

import coremerge_jax as cm

KINDS = {
    "layers.0.q": cm.Kind(),
    "conv1d": cm.Kind(transposed=True),
    "embed": cm.Kind("embedding", transposed=True),
    "conv": cm.Kind("conv2d", kernel=(2, 3, 1)),
    "attention": cm.Kind(),
    "attention.base_layer.out_proj": cm.Kind(),
    **{f"moe.experts.gate_up_proj[{e}]": cm.Kind("expert") for e in range(3)},
    **{f"moe.experts.down_proj[{e}]": cm.Kind("expert") for e in range(3)},
    "moe.gate.weight[0]": cm.Kind("expert"),
}
SHAPES = {"gate_up_proj": (10, 4), "down_proj": (4, 5)}

LINEAR = cm.Kind()


def update(rng, kind=LINEAR, shape=(4, 6), rank=2):
    m, n = shape
    return cm.LoRA(
        a=rng.standard_normal((rank, n), np.float32),
        b=rng.standard_normal((m, rank), np.float32),
        kind=kind,
    )


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for path in ours:
        assert ours[path].kind.name == theirs[path].kind.name
        assert ours[path].kind.kernel == theirs[path].kind.kernel
        assert np.array_equal(ours[path].a, theirs[path].a)
        assert np.array_equal(ours[path].b, theirs[path].b)
