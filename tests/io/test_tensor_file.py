import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.tensors import LazyTensor, TensorEditor, TensorReader, TensorWriter

DTYPES = [f"{kind}{bits}" for bits in (64, 32, 16) for kind in ("float", "int", "uint")]
DTYPES += ["bfloat16", "int8", "uint8", "bool"]
NAMES = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda x: x != "__metadata__")


@st.composite
def tensors(draw):
    """Tensors of all dtypes, any bits, the widest first."""
    shapes = draw(st.dictionaries(NAMES, array_shapes(min_dims=0, min_side=0, max_side=3)))
    rng = np.random.default_rng(0)
    values = {}
    for name, shape in shapes.items():
        dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
        if dtype == np.bool_:
            values[name] = np.asarray(rng.random(shape) < 0.5)
        else:
            size = int(np.prod(shape)) * dtype.itemsize
            values[name] = rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)
    return dict(sorted(values.items(), key=lambda item: -item[1].itemsize))


def write(file, values, names=None):
    with TensorWriter(file, names or values, {"format": "pt"}) as writer:
        for name, value in values.items():
            writer.write(name, value)


def assert_same(ours, theirs):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.tobytes() == theirs.tobytes()


@given(tensors())
def test_safetensors_reads_what_we_write(values):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        write(file, values)
        with safe_open(file, framework="numpy") as stream:
            assert stream.metadata() == {"format": "pt"}
            assert set(stream.keys()) == set(values)
            for name, value in values.items():
                assert_same(stream.get_tensor(name), value)
        size = int.from_bytes(file.read_bytes()[:8], "little")
        assert size % 8 == 0


@given(tensors())
def test_we_read_what_safetensors_writes(values):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        save_file(values, file)
        reader = TensorReader(file)
        with reader.opened() as tensor:
            assert set(reader.tensors) == set(values)
            for name, value in values.items():
                assert (reader.tensors[name].shape, reader.tensors[name].dtype) == (
                    value.shape,
                    value.dtype,
                )
                assert_same(tensor(name), value)


def test_any_memory_layout_and_byte_order(tmp_path):
    values = {
        "big-endian": np.arange(6, dtype=">i4"),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "strided": np.arange(6, dtype=np.float32)[::2],
    }
    write(tmp_path / "x", values)
    with safe_open(tmp_path / "x", framework="numpy") as stream:
        for name, value in values.items():
            assert np.array_equal(stream.get_tensor(name), value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"other": np.zeros(2)}, "'other' was not announced"),
        ({"a": np.zeros(2)}, "'b' was announced, but not written"),
        ({"a": np.zeros(1, np.int8), "b": np.zeros(2)}, "'b': float64 must come before"),
        ({"a": np.zeros(2, np.complex64)}, "'a': cannot write complex64"),
        ({"a": np.zeros((1,) * 9)}, "'a': cannot write float64 of shape"),
    ],
)
def test_what_cannot_be_written(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x", values, names=["a", "b"])
    with pytest.raises(SafetensorError), safe_open(tmp_path / "x", framework="numpy"):
        pass


def test_a_tensor_is_written_once(tmp_path):
    with TensorWriter(tmp_path / "x", ["a"]) as writer:
        writer.write("a", np.zeros(2))
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", np.zeros(2))


def test_a_full_disk_names_the_file(small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        write(small_disk / "x", {"a": np.zeros(100_000)})
    assert caught.value.filename == str(small_disk / "x")


def test_dtypes_that_numpy_does_not_know(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(FormatError, match="tensor 'a' has dtype F8_E4M3; expected one of F64"):
        TensorReader(tmp_path / "x")
    reader = TensorReader(tmp_path / "x", strict=False)
    assert (reader.tensors, reader.foreign) == ({}, {"a": "F8_E4M3"})
    assert reader.shape("a") == (2,)


@given(tensors(), tensors())
def test_a_copy_with_more_tensors(values, more):
    more = {f"{name}+": value for name, value in more.items()}
    with TemporaryDirectory() as folder:
        file, copy = Path(folder) / "x", Path(folder) / "y"
        save_file({"wide": np.ones(3), **values}, file, {"format": "pt"})
        reader = TensorReader(file)
        width = max((value.itemsize for value in more.values()), default=1)
        if (file.stat().st_size - reader.position("wide")) % width:
            with pytest.raises(UnsupportedError, match="would not be aligned"):
                reader.copy_with(copy, more)
            return
        reader.copy_with(copy, more)
        with safe_open(copy, framework="numpy") as stream:
            assert stream.metadata() == {"format": "pt"}
            assert set(stream.keys()) == {"wide", *values, *more}
            for name, value in {**values, **more}.items():
                assert_same(stream.get_tensor(name), value)


def test_tensors_are_changed_in_place(tmp_path):
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(4, dtype=jnp.bfloat16)}
    write(tmp_path / "x", values)
    size = (tmp_path / "x").stat().st_size
    with TensorEditor(tmp_path / "x") as file:
        assert list(file.tensors) == ["a", "b"]
        assert np.array_equal(file.read("a", 2, 5), [2, 3, 4])
        file.write("a", 4, np.array([7.0, 8.0]))
        assert np.array_equal(file.read("a", 3, 6), [3, 7, 8])
        for value, start in ((np.ones(2), 5), (np.ones(1), -1), (np.ones(1, np.float32), 0)):
            with pytest.raises(ValueError, match="tensor 'a': cannot write"):
                file.write("a", start, value)
    with TensorReader(tmp_path / "x").opened() as tensor:
        assert np.array_equal(tensor("a"), [[0, 1, 2], [3, 7, 8]])
        assert_same(tensor("b"), values["b"])
    assert (tmp_path / "x").stat().st_size == size


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    file = tmp_path / "x"
    save_file({"a": np.zeros(3)}, file)
    reader = TensorReader(file)
    save_file({"a": np.ones(4)}, tmp_path / "other")
    (tmp_path / "other").rename(file)
    with pytest.raises(FormatError, match="x: has changed"), reader.opened():
        pass


def test_a_file_that_is_cut_while_it_is_open(tmp_path):
    file = tmp_path / "x"
    save_file({"a": np.zeros(3), "b": np.zeros(100_000)}, file)
    reader = TensorReader(file)
    with reader.opened() as tensor:
        os.truncate(file, 1000)
        with pytest.raises(FormatError, match="ends in the middle of tensor 'b'"):
            tensor("b")


def test_what_does_not_fit_into_memory_is_named(tmp_path):
    save_file({"x": np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(MemoryError, match=r"x\.safetensors: 1073741824.0 GiB of tensor 'x'"):
        TensorReader(tmp_path / "x.safetensors").read_part("x", 0, 2**58)


def test_a_lazy_tensor_is_read_when_an_array_is_made_of_it():
    reads = []
    values = np.arange(6, dtype=np.int8)
    read = lambda *part: reads.append(part) or values[slice(*part)]  # noqa: E731
    lazy = LazyTensor((2, 3), np.dtype(np.int8), read)
    assert (lazy.shape, lazy.dtype, reads) == ((2, 3), np.int8, [])
    assert np.array_equal(np.asarray(lazy), values.reshape(2, 3))
    assert np.asarray(lazy).dtype == np.int8
    assert np.asarray(lazy, np.float64).dtype == np.float64
    assert reads == [(0, 6)] * 3
    with pytest.raises(ValueError, match="copy"):
        np.asarray(lazy, copy=False)
