"""Packs in folders: adapters stay as they are, and what has changed or is broken is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import distance, random_adapters
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.io.packs.pack_folder import COORDINATES

SHAPES = {"q": (20, 18), "layers.0.conv": (16, 27), "é [0]": (19, 21)}
CONV = cm.Kind("conv2d", kernel=(3, 3, 3))


def rounded(lora, dtype):
    return lora.replace(a=lora.a.astype(dtype), b=lora.b.astype(dtype))


@pytest.fixture
def adapters():
    """In three dtypes, one of them known from a file only; with extras, kinds and headers."""
    first, second, third = random_adapters(SHAPES, (3, 4, 2))
    first = first.replace(
        {x: lora.replace(kind=CONV) if "conv" in x else lora for x, lora in first.items()},
        extras={"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        metadata=cm.Metadata(
            name="math",
            base_model="org/base",
            alpha=8.0,
            rank=3,
            format="peft",
            header={"note": "text"},
            lengths=(("q", (18,), (4, 5)),),
            config={"modules_to_save": ["head"]},
        ),
    )
    second = second.replace(
        {
            x: rounded(rounded(lora.replace(kind=first[x].kind), "bfloat16"), "float32")
            for x, lora in second.items()
        },
        metadata=cm.Metadata(name="code", dtype="bfloat16"),
    )
    third = third.replace(
        {
            x: rounded(lora.replace(kind=first[x].kind), "float32")
            for x, lora in third.items()
            if x != "q"
        },
        metadata=cm.Metadata(name="a b", dtype="bfloat16"),
    )
    return [first, second, third]


@pytest.fixture
def folder(adapters, tmp_path):
    cm.save_pack(cm.pack(adapters), tmp_path / "pack")
    return tmp_path / "pack"


def largest(found, expected):
    assert list(found) == list(expected)
    return max(distance(found[x].dense(), expected[x].dense()) for x in expected)


def assert_equal(found, adapter):
    assert list(found) == list(adapter)
    assert found.metadata == adapter.metadata
    for field in ("config", "header", "format", "prefix"):
        assert getattr(found.metadata, field) == getattr(adapter.metadata, field)
    for path, lora in adapter.items():
        assert found[path].kind == found.outline[path].kind == lora.kind
        for x, y, shape in zip(*map(jax.tree.leaves, (found[path], lora)), "ab", strict=True):
            assert x.dtype == y.dtype == getattr(found.outline[path], shape).dtype
            np.testing.assert_array_equal(x, y)
    assert list(found.extras) == list(adapter.extras)
    for name, value in adapter.extras.items():
        np.testing.assert_array_equal(np.asarray(found.extras[name]), value)


def test_adapters_stay_as_they_are_bit_by_bit(adapters, folder):
    found = cm.open_pack(folder)
    assert found.names == ("math", "code", "a b")
    for packed, adapter in zip(found, adapters, strict=True):
        assert_equal(packed, adapter)
        assert_equal(cm.open_adapter(folder / adapter.metadata.name), adapter)
    dtypes = {
        file.name.split(".")[0]: {x.dtype.name for x in load_file(file).values()}
        for file in folder.glob("*.adapter.safetensors")
    }
    assert dtypes == {"math": {"float64", "float32"}, "code": {"bfloat16"}, "a b": {"float32"}}


def test_merges_are_those_of_the_adapters(adapters, folder):
    options = {"extras": "drop"}
    expected = cm.merge(adapters, cm.ties(), **options)
    assert largest(cm.merge(cm.open_pack(folder), cm.ties(), **options), expected) < 1e-7
    opened = [cm.open_adapter(folder / name) for name in ("code", "math")]
    expected = cm.merge([adapters[1], adapters[0]], cm.tsv(), **options)
    assert largest(cm.merge(opened, cm.tsv(), **options), expected) < 1e-7
    compiled = cm.compile_merge(opened, cm.tsv(), **options)
    assert largest(compiled.adapter(), expected) < 1e-6


def test_compiled_merges_read_the_coordinates_alone(folder, monkeypatch):
    opened = cm.open_pack(folder)

    def never(*_):
        raise AssertionError("factors were read")

    monkeypatch.setattr("coremerge_jax.io.packs.pack_folder.PackedFile.read", never)
    assert len(cm.compile_merge(opened, cm.ties(), extras="drop").cores) == 3


def test_a_pack_is_replaced_by_one_with_more_or_fewer_adapters(adapters, folder, tmp_path):
    fewer = cm.open_pack(folder).remove("code")
    cm.save_pack(fewer, folder, force=True)
    assert cm.open_pack(folder).names == ("math", "a b")
    cm.save_pack(cm.open_pack(folder).add(adapters[1]), tmp_path / "more")
    expected = cm.merge([adapters[0], adapters[2], adapters[1]], cm.tsv(), extras="drop")
    found = cm.merge(cm.open_pack(tmp_path / "more"), cm.tsv(), extras="drop")
    assert largest(found, expected) < 1e-7
    assert_equal(cm.open_pack(tmp_path / "more")["code"], adapters[1])
    assert {x.name for x in tmp_path.iterdir()} == {"pack", "more"}


def test_files_beside_an_adapter_come_along(adapters, tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"weights")
    metadata = cm.Metadata(name="math", beside=(tmp_path / "head.safetensors",))
    cm.save_pack(cm.pack([adapters[1].replace(metadata=metadata)]), tmp_path / "pack")
    (tmp_path / "head.safetensors").unlink()
    cm.save_pack(cm.open_pack(tmp_path / "pack"), tmp_path / "again")
    (beside,) = cm.open_pack(tmp_path / "again")["math"].metadata.beside
    assert beside.read_bytes() == b"weights"
    assert beside.is_relative_to((tmp_path / "again").resolve())


def test_outputs_of_others_are_not_replaced(adapters, folder, tmp_path):
    packed = cm.open_pack(folder)
    with pytest.raises(cm.errors.FormatError, match="already exists"):
        cm.save_pack(packed, folder)
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(cm.errors.FormatError, match=r"mine\.txt"):
        cm.save_pack(packed, folder, force=True)
    cm.save_peft(adapters[1], tmp_path / "peft")
    with pytest.raises(cm.errors.FormatError, match="another kind of output"):
        cm.save_pack(packed, tmp_path / "peft", force=True)
    with pytest.raises(cm.errors.FormatError, match="is inside the input"):
        cm.save_pack(packed, folder / "more")
    named = cm.pack(adapters[:1], names=["../x"])
    with pytest.raises(cm.errors.RecipeError, match="cannot be that of a file"):
        cm.save_pack(named, tmp_path / "x")
    with pytest.raises(cm.errors.RecipeError, match="expected a Pack"):
        cm.save_pack(adapters, tmp_path / "x")


def changed(record, *keys, value):
    *first, last = keys
    place = record
    for key in first:
        place = place[key]
    place[last] = value


BROKEN = {
    'kind is "model"': (("kind",), "model"),
    "version 2 of the format": (("version",), 2),
    "adapters is []": (("adapters",), []),
    "adapters[0] is 1": (("adapters", 0), 1),
    "no modules": (("adapters", 1, "modules"), []),
    "name is 3": (("adapters", 0, "name"), 3),
    "do not fit": (("adapters", 0, "name"), "../math"),
    "is no name of a file": (("adapters", 0, "beside"), ["../../x"]),
    "a module is there twice": (("adapters", 0, "modules"), ["q", "q"]),
    "dtype is 'int8'": (("adapters", 0, "dtype"), "int8"),
    "kind of 'q'": (("adapters", 0, "kinds"), {"q": 1}),
    "unknown metadata 'x'": (("adapters", 0, "metadata"), {"x": 1}),
    "lengths is [1]": (("adapters", 0, "metadata"), {"lengths": [1]}),
    "no tensor 'k.a'": (("adapters", 0, "modules"), ["k"]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_records_are_refused(folder, message):
    record = json.loads((folder / "coremerge.json").read_text())
    keys, value = BROKEN[message]
    changed(record, *keys, value=value)
    (folder / "coremerge.json").write_text(json.dumps(record))
    with pytest.raises(cm.CoreMergeError) as error:
        cm.open_pack(folder)
    text = str(error.value)
    assert message in text or "no pack" in text
    assert "pack" in text


def test_files_that_have_changed_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert len(cm.open_pack(tmp_path / "copy")) == 3
    tensors = load_file(folder / "code.adapter.safetensors")
    tensors["q.a"] = 2 * tensors["q.a"]
    save_file(tensors, folder / "code.adapter.safetensors")
    with pytest.raises(cm.errors.FormatError, match=r"code\.adapter.*has changed since it was"):
        cm.open_pack(folder)
    (tmp_path / "copy" / COORDINATES).unlink()
    with pytest.raises(cm.errors.FormatError, match=r"coordinates.*is missing"):
        cm.open_adapter(tmp_path / "copy" / "math")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q.left", np.ones((3, 3)), "not that of coordinates"),
        ("q.right", np.full((7, 7), np.nan), "NaN or infinite"),
        ("z.left", np.ones((2, 2)), "of no module"),
    ],
)
def test_coordinates_that_cannot_be_are_refused(folder, name, value, message):
    tensors = load_file(folder / COORDINATES)
    save_file({**tensors, name: value}, folder / COORDINATES)
    record = json.loads((folder / "coremerge.json").read_text())
    del record["files"][COORDINATES]
    (folder / "coremerge.json").write_text(json.dumps(record))
    with pytest.raises(cm.errors.FormatError, match=message):
        cm.compile_merge(cm.open_pack(folder), cm.tsv(), extras="drop")


def test_changes_of_others_are_not_lost(adapters, folder):
    """The second of two that have read the same pack cannot write over the first."""
    one, two = (cm.open_pack(folder) for _ in range(2))
    new = adapters[0]
    cm.save_pack(one.add(new, name="one"), folder, force=True)
    with pytest.raises(cm.errors.FormatError, match="has changed since it was opened"):
        cm.save_pack(two.add(new, name="two"), folder, force=True)
    assert cm.open_pack(folder).names == ("math", "code", "a b", "one")


def test_names_that_would_be_other_files_are_refused(adapters, tmp_path):
    for name in ("..", "coremerge.json", "coordinates.safetensors", "x.adapter.safetensors"):
        with pytest.raises(cm.errors.RecipeError, match="cannot be that of a file"):
            cm.save_pack(cm.pack(adapters[:1], names=[name]), tmp_path / "out")


def test_a_folder_that_is_no_pack_is_refused(tmp_path):
    for name, message in (("nothing", "no such folder"), (".", "no pack")):
        with pytest.raises(cm.errors.FormatError, match=message):
            cm.open_pack(tmp_path / name)
