"""Statistics in files: what is written is read, sums add up, and broken folders are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.io.statistics_files import TENSORS, sum_statistics

pytestmark = pytest.mark.wide

ADAPTERS = ("math", "code", None)
SHAPES = {
    "layers.1.q": ((0, 2), (2, 3)),
    "layers.0.q": ((0, 1, 2), (2, 1, 3)),
    "é [0]": ((1,), (1,)),
}
WIDTH = 4


def statistics(seed=0, *, dtype=np.float32, source="own", model="org/base", adapters=ADAPTERS):
    rng = np.random.default_rng(seed)
    grams = {}
    for path, (tasks, ranks) in SHAPES.items():
        whole = path == "é [0]"
        z = rng.standard_normal((len(tasks), 9, WIDTH if whole else sum(ranks)))
        squares = np.random.default_rng(1).random(sum(ranks)).astype(dtype)
        grams[path] = cm.Gram(
            matrices=(z.mT @ z).astype(dtype),
            counts=np.full(len(tasks), 9, dtype),
            squares=None if whole else squares,
            tasks=tasks,
            ranks=ranks,
        )
    return cm.Statistics(grams, adapters, source=source, model=model)


def assert_equal(x, y):
    about = [(z.adapters, z.source, z.model, list(z)) for z in (x, y)]
    assert about[0] == about[1]
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("source", "model"), [("own", "org/base"), ("merged", None)])
def test_what_is_written_is_read(tmp_path, dtype, source, model):
    first = statistics(dtype=dtype, source=source, model=model)
    cm.save_statistics(first, tmp_path / "s", inputs=["a.jsonl", "b.jsonl", "c.txt"])
    found = cm.load_statistics(tmp_path / "s")
    assert_equal(found, first)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))
    record = json.loads((tmp_path / "s" / "coremerge.json").read_text())
    assert record["inputs"] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert record["counts"] == [9, 9, 9]
    assert list(record["files"]) == [TENSORS]


def test_arrays_of_other_libraries_and_dtypes(tmp_path):
    device = jax.tree.map(lambda x: jnp.asarray(x), statistics())
    cm.save_statistics(device, tmp_path / "s")
    assert_equal(cm.load_statistics(tmp_path / "s"), statistics())
    whole = jax.tree.map(lambda x: np.ceil(x).astype(np.int32), statistics())
    cm.save_statistics(whole, tmp_path / "i")
    pair = jax.tree.leaves(cm.load_statistics(tmp_path / "i")), jax.tree.leaves(whole)
    for one, other in zip(*pair, strict=True):
        np.testing.assert_array_equal(one, other)


def test_folders_add_up(tmp_path):
    for seed in range(3):
        cm.save_statistics(statistics(seed), tmp_path / f"{seed}")
    folders = [tmp_path / f"{seed}" for seed in range(3)]
    total = statistics(0) + statistics(1) + statistics(2)
    assert_equal(sum_statistics(folders), total)
    assert_equal(sum(map(cm.load_statistics, folders)), total)
    assert_equal(sum_statistics(folders[:1]), statistics(0))
    cm.save_statistics(statistics(source="base"), tmp_path / "base")
    with pytest.raises(cm.MismatchError, match=r"0 and .*base: statistics with source own"):
        sum_statistics([folders[0], tmp_path / "base"])


def test_only_statistics_are_replaced(tmp_path):
    out = tmp_path / "s"
    cm.save_statistics(statistics(0), out)
    with pytest.raises(cm.FormatError, match="already exists; choose another output, or --force"):
        cm.save_statistics(statistics(1), out)
    assert_equal(cm.load_statistics(out), statistics(0))
    held = cm.load_statistics(out)
    cm.save_statistics(statistics(1), out, force=True)
    assert_equal(cm.load_statistics(out), statistics(1))
    assert_equal(held, statistics(0))  # mapped from the file that was replaced
    (out / "notes.txt").write_text("mine")
    with pytest.raises(cm.FormatError, match="holds what coremerge did not write"):
        cm.save_statistics(statistics(1), out, force=True)
    (adapter := tmp_path / "adapter").mkdir()
    cm.save_peft(cm.Adapter({"q": cm.LoRA(np.ones((1, 2)), np.ones((2, 1)))}), adapter / "x")
    with pytest.raises(cm.FormatError, match="holds another kind of output"):
        cm.save_statistics(statistics(1), adapter / "x", force=True)
    assert [x.name for x in tmp_path.iterdir() if x.name.startswith(".")] == []


def test_refused_arguments_write_nothing(tmp_path):
    bad = statistics()
    bad["layers.0.q"].matrices[1, 0, 0] = np.nan
    refused = [
        (bad, {}, "'layers.0.q.matrices' has NaN or infinite values"),
        ({}, {}, "expected Statistics, got dict"),
        (statistics(), {"inputs": ["a"]}, "1 names of inputs for 3 adapters"),
    ]
    for found, options, message in refused:
        with pytest.raises(cm.CoreMergeError, match=message):
            cm.save_statistics(found, tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


# --- Broken folders -------------------------------------------------------------------------


def edit_record(change):
    def edit(folder):
        file = folder / "coremerge.json"
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return edit


def set_to(name, value):
    return lambda fields: fields.update({name: value})


def in_group(name, value):
    return edit_record(lambda record: record["modules"][0].update({name: value}))


Q = "layers.1.q"
BROKEN = {
    "no record": (
        lambda x: (x / "coremerge.json").unlink(),
        "no coremerge.json; expected a folder",
    ),
    "no JSON": (lambda x: (x / "coremerge.json").write_text("{"), "not valid JSON"),
    "other kind": (edit_record(set_to("kind", "model")), "kind is \"model\", not 'statistics'"),
    "newer": (edit_record(set_to("version", 2)), "version 2 of the format.*update coremerge"),
    "no adapters": (edit_record(lambda x: x.pop("adapters")), "no adapters; expected a list"),
    "adapters": (edit_record(set_to("adapters", [1])), r"adapters is \[1\]; expected a list"),
    "source": (edit_record(set_to("source", "x")), 'source is "x"; expected own or base or merged'),
    "model": (edit_record(set_to("model", 1)), "model is 1; expected a text"),
    "modules": (edit_record(set_to("modules", {})), "modules is {}; expected a list"),
    "group": (edit_record(set_to("modules", [1])), r"modules\[0\] is 1; expected an object"),
    "no ranks": (in_group("ranks", None), r"modules\[0\]: no ranks"),
    "rank 0": (in_group("ranks", [2, 0]), r"ranks is \[2, 0\]; expected a list of ranks"),
    "few ranks": (in_group("ranks", [2]), "1 ranks of 2 adapters"),
    "other ranks": (in_group("ranks", [2, 2]), r"shape \(2, 5, 5\); expected \(2, 4, 4\)"),
    "order": (in_group("tasks", [2, 0]), "no ascending places of the 3 adapters"),
    "beyond": (in_group("tasks", [0, 3]), "no ascending places of the 3 adapters"),
    "twice": (in_group("paths", [Q, Q]), f"module '{Q}' is there twice"),
    "other path": (in_group("paths", ["x"]), "no tensor 'x.matrices'"),
    "fewer paths": (in_group("paths", []), f"tensor '{Q}.*' is of no module"),
    "no tensors": (
        lambda x: (x / TENSORS).unlink(),
        "no statistics.safetensors; expected a folder",
    ),
    "cut": (lambda x: (x / TENSORS).write_bytes((x / TENSORS).read_bytes()[:-9]), "not a readable"),
    "missing": (edit_tensors(lambda x: x.pop(f"{Q}.counts")), f"no tensor '{Q}.counts'"),
    "NaN": (edit_tensors(lambda x: x[f"{Q}.matrices"].fill(np.inf)), "NaN or infinite values"),
    "negative": (edit_tensors(lambda x: x[f"{Q}.counts"].fill(-1)), "has negative values"),
    "dtype": (
        edit_tensors(set_to(f"{Q}.counts", np.ones(2, np.int32))),
        "dtype int32; expected one of float64, float32",
    ),
    "shape": (
        edit_tensors(set_to(f"{Q}.squares", np.ones(2, np.float32))),
        r"shape \(2,\); expected \(5,\) for adapters of ranks \(2, 3\)",
    ),
    "scalar": (edit_tensors(set_to("é [0].matrices", np.float32([]))), "is empty"),
    "flat": (edit_tensors(set_to("é [0].matrices", np.ones(4, np.float32))), r"shape \(4,\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(tmp_path, case):
    folder = tmp_path / "s"
    cm.save_statistics(statistics(), folder)
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(cm.CoreMergeError, match=message) as caught:
        cm.load_statistics(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "nothing: no such folder; expected a folder that coremerge collect wrote"),
        ("gs://bucket/x", "no local folder"),
    ],
)
def test_no_folder(path, message):
    with pytest.raises(cm.FormatError, match=message):
        cm.load_statistics(path)
