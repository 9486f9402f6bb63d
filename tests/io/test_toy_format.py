"""A new format is one class: once registered, all of the library and of the command line has it."""

import hashlib
import json

import numpy as np
import pytest
from helpers import random_adapters
from hostile import run

import coremerge_jax as cm
from coremerge_jax.io import formats
from coremerge_jax.io.atomic import atomic_folder
from coremerge_jax.io.outputs import write_record

MODULES = {"layers.0.q": (4, 6), "layers.0.v": (3, 6)}


class ToyFormat:
    """A folder with one NumPy archive, ``factors.toy.npz``."""

    name = "toy adapter"
    description = "a toy folder (factors.toy.npz)"
    targets = {"toy": ("dtype",)}  # noqa: RUF012
    options = ("alpha",)

    def recognises(self, source):
        return self._file(source).exists()

    def open(self, source, *, name=None, alpha=1.0):
        with np.load(self._file(source)) as arrays:
            paths = [key.removesuffix("/a") for key in arrays if key.endswith("/a")]
            modules = {p: cm.LoRA(arrays[f"{p}/a"], alpha * arrays[f"{p}/b"]) for p in paths}
        return cm.Adapter(modules, metadata=cm.Metadata(name=name or "toy"))

    def save(self, adapter, out, *, to, force=False, dtype="float32"):
        arrays = {f"{p}/{x}": getattr(adapter[p], x) for p in adapter for x in "ab"}
        with atomic_folder(out, kind=self.name, inputs=adapter.folders, force=force) as folder:
            np.savez(self._file(folder), **{k: np.asarray(x, dtype) for k, x in arrays.items()})
            write_record(folder, self.name, {"to": to})

    def hash(self, source):
        file = self._file(source)
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}

    def _file(self, folder):
        return formats.Path(folder) / "factors.toy.npz"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", list(formats.FORMATS))
    formats.register_format(ToyFormat())


@pytest.fixture
def adapter():
    (adapter,) = random_adapters(MODULES, [2], dtype="float32")
    return adapter


@pytest.fixture
def folder(adapter, tmp_path):
    ToyFormat().save(adapter, tmp_path / "a", to="toy")
    return tmp_path / "a"


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for path in ours:
        assert np.array_equal(ours[path].dense(), theirs[path].dense())


def test_it_is_opened_with_its_options_and_hashed(folder, adapter):
    assert_same(cm.open_adapter(folder), adapter)
    doubled = cm.open_adapter(folder, name="x", alpha=2.0)
    assert np.allclose(doubled["layers.0.q"].b, 2 * adapter["layers.0.q"].b)
    assert doubled.metadata.name == "x"
    assert list(cm.io.hash_source(folder)) == ["factors.toy.npz"]
    with pytest.raises(cm.RecipeError, match=r"no orbax adapter; item can be given for these only"):
        cm.open_adapter(folder, item="x")
    with pytest.raises(cm.RecipeError, match=r"a: unknown option colour"):
        cm.open_adapter(folder, colour="red")


def test_the_commands_read_and_write_it(folder, adapter, tmp_path):
    shown = run("inspect", folder, "--json")
    assert list(json.loads(shown.out)["adapters"][0]["modules"]) == list(MODULES)
    merged = run("merge", folder, folder, "--rule", "mean", "-o", tmp_path / "merged")
    assert merged.code == 0, merged.err
    expected = cm.merge([adapter, adapter], cm.mean())
    found = cm.load_peft(tmp_path / "merged")
    for path in MODULES:
        assert np.allclose(found[path].dense(), expected[path].dense(), atol=1e-5)
    there = run("convert", folder, "-o", tmp_path / "peft")
    back = run("convert", tmp_path / "peft", "--to", "toy", "-o", tmp_path / "back")
    assert (there.code, back.code) == (0, 0), there.err + back.err
    assert_same(cm.open_adapter(tmp_path / "back"), adapter)


def test_outputs_of_other_formats_are_not_replaced(folder, tmp_path):
    assert run("convert", folder, "-o", tmp_path / "peft").code == 0
    refused = run("convert", folder, "--to", "toy", "-o", tmp_path / "peft", "--force")
    assert refused.code == 1
    assert "another kind of output (PEFT adapter, not toy adapter)" in refused.err
    assert run("convert", tmp_path / "peft", "--to", "toy", "-o", folder, "--force").code == 0


def test_messages_list_it(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(cm.FormatError, match=r"no adapter in this folder; expected .*a toy folder"):
        cm.open_adapter(tmp_path / "empty")
    unknown = run("convert", "x", "--to", "other", "-o", tmp_path / "out")
    assert unknown.code == 2
    assert "toy" in unknown.err
    like = run("convert", "x", "--to", "toy", "--like", "y", "-o", tmp_path / "out")
    assert like.err == "error: --like is for --to orbax\n"


def test_a_name_is_taken_once():
    with pytest.raises(cm.FormatError, match=r"'toy' is another format's already"):
        formats.register_format(ToyFormat())
