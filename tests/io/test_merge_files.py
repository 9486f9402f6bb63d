"""Compiled merges in files: what is written is read, for the adapters that were merged alone."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance, random_adapters
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm

SHAPES = {"q": (9, 8), "é [0]": (7, 11)}


@pytest.fixture(scope="module")
def pack():
    first, second, third = random_adapters(SHAPES, (2, 3, 1), dtype="float32")
    return cm.pack([first, second.replace(modules={"q": second["q"]}), third])


@pytest.fixture
def merge(pack):
    return cm.compile_merge([pack[2], pack[1]], cm.tsv())


@pytest.fixture
def file(merge, tmp_path):
    cm.save_merge(merge, tmp_path / "merge.safetensors")
    return tmp_path / "merge.safetensors"


def test_what_is_written_is_read(pack, merge, file):
    found = cm.load_merge(file, pack)
    assert list(found.cores) == list(merge.cores)
    for path, core in merge.cores.items():
        np.testing.assert_array_equal(found.cores[path], core)
    expected = cm.merge([pack[2], pack[1]], cm.tsv())
    for path, lora in found.adapter().items():
        assert distance(lora.dense(), expected[path].dense()) < 1e-6
    assert file.stat().st_size < merge.nbytes + 2000


def _rounded(lora):
    """As a program keeps it that serves in bfloat16."""
    a, b = (x.astype(jnp.bfloat16).astype(np.float32) for x in (lora.a, lora.b))
    return lora.replace(a=a, b=b)


def test_other_adapters_are_refused(pack, file):
    with pytest.raises(
        cm.errors.MismatchError, match=r"is a merge of task2, task1, and 'task1' is"
    ):
        cm.load_merge(file, pack[2:])
    other = random_adapters(SHAPES, (2, 3, 1), seed=1, dtype="float32")
    with pytest.raises(cm.errors.MismatchError, match="though the names are the same"):
        cm.load_merge(file, [other[2], other[1].replace(modules={"q": other[1]["q"]})])
    with pytest.raises(cm.errors.MismatchError, match="expected"):
        cm.load_merge(file, random_adapters(SHAPES, (2, 2, 1)))
    with pytest.raises(cm.errors.MismatchError, match="no adapter has the module"):
        cm.load_merge(file, [x.replace(modules={"q": x["q"]}) for x in pack])
    for change in (
        lambda x: x.replace(b=2 * x.b),
        lambda x: x.replace(b=-x.b),
        lambda x: x.replace(b=x.b[::-1]),
        lambda x: x.replace(a=x.a[:, ::-1]),
    ):
        same = [*pack[:1], pack[1], pack[2].replace(modules={**pack[2], "q": change(pack[2]["q"])})]
        with pytest.raises(cm.errors.MismatchError, match="though the names are the same"):
            cm.load_merge(file, same)
    rounded = [x.replace(modules={p: _rounded(y) for p, y in x.items()}) for x in pack]
    cm.load_merge(file, rounded)
    nameless = [x.replace(metadata=cm.Metadata()) for x in other]
    with pytest.raises(cm.errors.RecipeError, match="a name of its own"):
        cm.save_merge(cm.compile_merge(nameless, cm.mean()), file.with_name("other"))


def test_extras_are_not_left_out_silently(tmp_path):
    (adapter,) = random_adapters(SHAPES, (2,), dtype="float32")
    given = [adapter.replace(extras={"head.weight": np.ones((2, 2), np.float32)})]
    with pytest.raises(cm.errors.UnsupportedError, match="extras='drop'"):
        cm.save_merge(cm.compile_merge(given, cm.mean(), extras="first"), tmp_path / "x")
    cm.save_merge(cm.compile_merge(given, cm.mean(), extras="drop"), tmp_path / "x")
    assert not cm.load_merge(tmp_path / "x", given).adapter().extras


def test_broken_files_are_refused(pack, merge, file):
    tensors = load_file(file)
    names = {"version": 1, "adapters": ["task2", "task1"]}
    for header, changes, message in (
        ({}, {}, "no compiled merge"),
        ({**names, "version": 2}, {}, "version 2"),
        ({**names, "adapters": "x"}, {}, "expected a list of texts"),
        ({**names, "adapters": []}, {}, "no adapters"),
        (names, {"q.core": np.full((4, 4), np.nan, np.float32)}, "NaN or infinite"),
        (names, {"q.core": np.ones((4, 4), np.int32)}, "int32"),
        (names, {"q.core": np.ones((3, 3), np.float32)}, r"\(3, 3\)"),
    ):
        text = {"coremerge_merge": json.dumps(header)} if header else {}
        save_file({**tensors, **changes}, file, text)
        with pytest.raises(cm.CoreMergeError, match=message):
            cm.load_merge(file, pack)
    file.write_bytes(b"nothing")
    with pytest.raises(cm.errors.FormatError, match="not a readable"):
        cm.load_merge(file, pack)
    with pytest.raises(cm.errors.FormatError, match="did not write"):
        cm.save_merge(merge, file, force=True)
