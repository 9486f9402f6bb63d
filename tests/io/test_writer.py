"""The writer of safetensors files, with a layout of one's own."""

import json

import numpy as np
import pytest
from kinds import update
from safetensors import safe_open

import coremerge_jax as cm
from coremerge_jax.io.adapter_writer import write_adapter
from coremerge_jax.io.file_layout import pad
from coremerge_jax.io.tensors import TensorWriter


class PairLayout:
    """Each tensor is a pair of modules, and the header has their ranks."""

    weights = "pairs.safetensors"

    def __init__(self, outline, extras=()):
        paths = list(outline)
        self.groups = {f"{x}+{y}": [x, y] for x, y in zip(paths[::2], paths[1::2], strict=True)}
        self.extras = dict(extras)

    def keys(self, groups):
        return [f"{group}.{side}" for group in groups for side in "ab"]

    def tensors(self, group, loras, rank, dtype):
        assert dtype == np.float16
        factors = [pad(lora, rank) for lora in loras.values()]
        yield f"{group}.a", np.stack([a for a, _ in factors])
        yield f"{group}.b", np.stack([b for _, b in factors])

    def metadata(self, ranks):
        differ = len(set(ranks.values())) > 1
        return {"ranks": json.dumps(ranks) if differ else str(max(ranks.values()))}

    def files(self, ranks):
        return {"ranks.json": json.dumps(ranks)}


@pytest.fixture
def modules(rng):
    return {path: update(rng, rank=i + 1) for i, path in enumerate("uvwxyz")}


def write(modules, out, **options):
    layout = PairLayout(modules, {"steps": np.array([7])})
    return write_adapter(cm.Adapter(modules), out, layout, kind="pairs", dtype="float16", **options)


@pytest.mark.parametrize("uniform", [False, True])
def test_modules_of_a_group_come_together_with_the_final_ranks(modules, tmp_path, uniform):
    written = write(modules, tmp_path / "out", uniform_rank=uniform)
    ranks = {"u+v": 2, "w+x": 4, "y+z": 6}
    ranks = dict.fromkeys(ranks, 6) if uniform else ranks
    assert written.ranks == {path: ranks[group] for group in ranks for path in group.split("+")}
    assert not written.kept
    assert json.loads((tmp_path / "out" / "ranks.json").read_text()) == ranks
    with safe_open(tmp_path / "out" / "pairs.safetensors", "numpy") as file:
        assert file.metadata() == {"ranks": "6" if uniform else json.dumps(ranks)}
        assert file.get_tensor("steps").dtype == np.int64
        for group, rank in ranks.items():
            a = file.get_tensor(f"{group}.a")
            assert a.shape == (2, rank, 6)
            assert a.dtype == np.float16
    assert json.loads((tmp_path / "out" / "coremerge.json").read_text())["kind"] == "pairs"


def test_a_file_may_become_another(modules, tmp_path):
    def finish(file, ranks):
        assert file.name == "pairs.safetensors"
        (file.parent / "other").write_text(f"{sorted(ranks)}")
        file.unlink()

    write(modules, tmp_path / "out", finish=finish)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "coremerge.json", "other", "ranks.json"]
    record = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    assert set(record["files"]) == set(names) - {"coremerge.json"}


def test_another_kind_is_not_replaced(modules, tmp_path):
    cm.save_peft(cm.Adapter(modules), tmp_path / "out")
    with pytest.raises(cm.FormatError, match=r"another kind of output \(PEFT adapter, not pairs\)"):
        write(modules, tmp_path / "out", force=True)


def test_metadata_may_change_but_not_grow(tmp_path):
    with TensorWriter(tmp_path / "x", ["a"], {"ranks": 9 * "long"}) as file:
        file.write("a", np.ones(3, np.float32))
        file.metadata = {"ranks": "short"}
    with safe_open(tmp_path / "x", "numpy") as found:
        assert found.metadata() == {"ranks": "short"}
        assert np.array_equal(found.get_tensor("a"), np.ones(3))
    with (
        pytest.raises(ValueError, match="longer than was announced"),
        TensorWriter(tmp_path / "y", []) as file,
    ):
        file.metadata = {"ranks": 1000 * "long"}
