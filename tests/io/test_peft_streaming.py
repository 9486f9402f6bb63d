"""Adapters that are opened lazily, and adapters that are written as their modules come."""

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest
from kinds import assert_same, update

import coremerge_jax as cm
from coremerge_jax.io.tensors import TensorReader
from coremerge_jax.lora import ModuleStream


class Stream(ModuleStream):
    """Parts of an adapter."""

    def __init__(self, outline: cm.Adapter, parts: Iterable[dict[str, cm.LoRA]]):
        self._outline, self._parts = outline, parts

    @property
    def outline(self):
        return self._outline

    def __iter__(self):
        return iter(self._parts)


@pytest.fixture
def everything(adapter, rng):
    """One module of every kind, and extras of several dtypes."""
    extras = {
        "layers.0.q.lora_B.bias": rng.standard_normal(4, np.float32),
        "head.weight": rng.standard_normal((3, 3), np.float32),
        "head.mask": np.array([True, False, True]),
        "head.steps": np.array(7),
        "head.codes": np.arange(5, dtype=np.uint8),
    }
    metadata = dataclasses.replace(adapter.metadata, config={"modules_to_save": ["head"]})
    return adapter.replace(extras=extras, metadata=metadata)


@pytest.fixture
def vera(write, rng):
    tensors = {
        "base_model.vera_A": rng.standard_normal((2, 4), np.float32),
        "base_model.vera_B": rng.standard_normal((5, 2), np.float32),
    }
    for path, rows in {"q": 3, "v": 5, "o": 4}.items():
        tensors[f"base_model.model.{path}.vera_lambda_b"] = rng.standard_normal(rows, np.float32)
        tensors[f"base_model.model.{path}.vera_lambda_d"] = rng.standard_normal(2, np.float32)
    return write(tensors, "vera", peft_type="VERA")


@pytest.fixture(params=["float32", "bfloat16", "vera"])
def folder(request, everything, tmp_path):
    """An adapter's folder."""
    if request.param == "vera":
        return request.getfixturevalue("vera")
    cm.save_peft(everything, tmp_path / "adapter", dtype=request.param)
    return tmp_path / "adapter"


def assert_equal(ours, theirs):
    assert_same(ours, theirs)
    assert set(ours.extras) == set(theirs.extras)
    for name, value in theirs.extras.items():
        assert np.asarray(ours.extras[name]).dtype == np.asarray(value).dtype
        assert np.array_equal(ours.extras[name], value)


def test_an_opened_adapter_is_the_loaded_one(folder):
    opened, loaded = cm.open_peft(folder), cm.load_peft(folder)
    assert list(opened) == list(loaded)
    assert list(opened.extras) == list(loaded.extras)
    assert opened.metadata == loaded.metadata
    assert opened.metadata.config == loaded.metadata.config
    assert repr(opened) == repr(loaded)
    assert_equal(opened, loaded)
    for path, lora in opened.outline.items():
        assert (lora.kind, lora.shape, lora.rank, lora.dtype) == (
            loaded[path].kind,
            loaded[path].shape,
            loaded[path].rank,
            loaded[path].dtype,
        )
    for name, value in opened.outline.extras.items():
        assert (value.shape, value.dtype) == (loaded.extras[name].shape, loaded.extras[name].dtype)


def test_modules_are_the_same_however_they_are_read(folder, rng):
    opened, loaded = cm.open_peft(folder), cm.load_peft(folder)
    for count in range(len(loaded) + 1):
        paths = [str(path) for path in rng.permutation(list(loaded))[:count]]
        modules = opened.read(paths)
        assert list(modules) == paths
        assert_same(modules, {path: loaded[path] for path in paths})


def test_threads_read_at_once(folder):
    opened, loaded = cm.open_peft(folder), cm.load_peft(folder)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for path, lora in pool.map(lambda path: (path, opened[path]), 50 * list(loaded)):
            assert np.array_equal(lora.a, loaded[path].a)
            assert np.array_equal(lora.b, loaded[path].b)


def test_a_module_in_memory_owns_its_factors(folder):
    opened, loaded = cm.open_peft(folder), cm.load_peft(folder)
    for lora in opened.read(opened).values():
        lora.a[:], lora.b[:] = 0, 0
    assert_same(opened, loaded)
    for lora in loaded.values():
        for factor in (lora.a, lora.b):
            assert factor.base is None or factor.base.nbytes <= factor.nbytes


def test_opening_reads_no_tensor(folder, monkeypatch):
    expected = cm.load_peft(folder)

    def fail(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorReader, "opened", fail)
    opened = cm.open_peft(folder)
    assert list(opened.outline) == list(opened) == list(opened.keys()) == list(expected)
    assert len(opened) == len(expected)
    assert next(iter(expected)) in opened
    assert "nothing" not in opened
    assert jax.tree.leaves(opened) == [opened]
    with pytest.raises(AssertionError, match="a tensor was read"):
        opened[next(iter(expected))]


def test_an_unknown_path_is_a_key_error(folder):
    with pytest.raises(KeyError, match="nothing"):
        cm.open_peft(folder)["nothing"]


def test_an_opened_adapter_is_written_as_it_is(folder, tmp_path):
    loaded = cm.load_peft(folder)
    cm.save_peft(cm.open_peft(folder), tmp_path / "out")
    assert_equal(cm.load_peft(tmp_path / "out"), loaded)


def test_an_opened_adapter_is_not_written_onto_itself(folder):
    with pytest.raises(cm.FormatError, match="is the input"):
        cm.save_peft(cm.open_peft(folder), folder, force=True)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"energy": 0.8}, {"rank": 1}])
def test_parts_in_any_order_give_the_same_adapter(everything, tmp_path, rng, options):
    kept = cm.save_peft(everything, tmp_path / "whole", **options)
    whole = cm.load_peft(tmp_path / "whole")
    paths = list(everything)
    for out in map(tmp_path.joinpath, "abcd"):
        rng.shuffle(paths)
        cuts = sorted(rng.choice(len(paths), 3))
        parts = [paths[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)]
        stream = Stream(everything.outline, map(everything.read, parts))
        assert cm.save_peft(stream, out, **options) == kept
        assert_equal(cm.load_peft(out), whole)
        ours, theirs = (
            json.loads((path / "adapter_config.json").read_text())
            for path in (out, tmp_path / "whole")
        )
        assert ours == theirs


@pytest.mark.parametrize(
    ("parts", "message"),
    [("q", "ended without 1 modules"), ("qvq", "came twice"), ("qvx", "not in the stream's")],
)
def test_a_stream_that_is_not_its_outline(rng, tmp_path, parts, message):
    modules = {path: update(rng) for path in "qvx"}
    outline = cm.Adapter({path: modules[path] for path in "qv"}).outline
    with pytest.raises(cm.MismatchError, match=message):
        cm.save_peft(Stream(outline, ({p: modules[p]} for p in parts)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def fail_after(parts, error):
    yield from parts
    raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), OSError("gone"), cm.FormatError("broken")]
)
@pytest.mark.parametrize("count", [0, 3, 13])
def test_a_stream_that_fails_leaves_nothing_and_destroys_nothing(adapter, tmp_path, count, error):
    out = tmp_path / "out"
    cm.save_peft(adapter, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    parts = [{path: adapter[path]} for path in list(adapter)[:count]]
    for target in (out, tmp_path / "new"):
        with pytest.raises(type(error)):
            cm.save_peft(Stream(adapter.outline, fail_after(parts, error)), target, force=True)
    assert list(tmp_path.iterdir()) == [out]
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_peak_memory_does_not_grow_with_the_number_of_modules(tmp_path):
    script = Path(__file__).with_name("peak_memory.py")
    run = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    peaks = json.loads(run.stdout)
    size = (tmp_path / "big" / "adapter_model.safetensors").stat().st_size / 2**20
    assert size > 150
    assert peaks.pop("load at once") > 0.9 * size
    assert max(peaks.values()) < 32, peaks
