"""Adapters, base models and records that are broken on purpose: each refused by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hostile import write_tensors

import coremerge_jax as cm
from coremerge_jax.io.base_model.folder import BaseModel
from coremerge_jax.io.peft.writer import save_peft
from coremerge_jax.io.untrusted import read_text
from coremerge_jax.record import read_record

PATHS = {"q": (5, 4, 2)}


def refused(call, *parts, error=cm.FormatError):
    """The call fails with one line that has all of these parts in it."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 3000


# --- adapter_config.json --------------------------------------------------------------------

TRUE = "expected true or false"
FIELDS = [
    *((name, value, TRUE) for name in ("use_rslora", "fan_in_fan_out") for value in ("false", 1)),
    ("lora_bias", "true", TRUE),
    ("inference_mode", [], TRUE),
    ("use_dora", "false", TRUE),
    ("use_qalora", {}, TRUE),
    ("ensure_weight_tying", "", TRUE),
    ("base_model_name_or_path", 3, "expected a text"),
    ("base_model_name_or_path", {}, "expected a text"),
    ("task_type", [], "expected a text"),
    ("revision", False, "expected a text"),
    ("peft_version", 0.18, "expected a text"),
    ("bias", {}, "expected a text"),
    ("bias", True, "expected a text"),
    ("modules_to_save", 3, "expected a list of texts"),
    ("modules_to_save", "head", "expected a list of texts"),
    ("modules_to_save", ["head", 3], "expected a list of texts"),
    ("target_parameters", True, "expected a list of texts"),
    ("target_modules", {"q": 1}, "expected a text or a list of texts"),
    ("init_lora_weights", 3, "expected true or false or a text"),
    ("rank_pattern", [], "expected an object"),
    ("rank_pattern", {"q": 0}, "rank_pattern['q'] is 0; expected a positive integer"),
    ("rank_pattern", {"q": True}, "rank_pattern['q'] is true; expected a positive integer"),
    ("rank_pattern", {"q": 1e400}, "expected a positive integer"),
    ("rank_pattern", {"(": 2}, "rank_pattern has a broken pattern '('"),
    ("alpha_pattern", "q", "expected an object"),
    ("alpha_pattern", {"q": None}, "alpha_pattern['q'] is null; expected a finite number"),
    ("alpha_pattern", {"q": float("nan")}, "expected a finite number"),
    ("alpha_pattern", {"(a){e<=1}": 1}, "a brace that is no count"),
    ("r", 2.5, "expected a positive integer"),
    ("r", True, "expected a positive integer"),
    ("r", 10**9, "expected a positive integer up to 1048576"),
    ("r", [2], "expected a positive integer"),
    ("lora_alpha", "6", "expected a finite number"),
    ("lora_alpha", True, "expected a finite number"),
    ("lora_alpha", float("-inf"), "expected a finite number"),
    ("lora_alpha", 10**200, "a number of 201 digits"),
    ("lora_dropout", "0.1", "expected a finite number"),
    ("loftq_config", "x", "expected an object"),
    ("auto_mapping", ["x"], "expected an object"),
    ("layers_to_transform", "all", "expected a whole number or a list of them"),
    *(
        ("trainable_token_indices", value, "expected a list of whole numbers from 0 on")
        for value in (3, "1", [True], [-1], [1.0], [10**30], {"embed": 1}, {"embed": [None]})
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), FIELDS)
def test_fields_of_another_kind(write, factors, field, value, message):
    folder = write(factors(PATHS), **{field: value})
    refused(
        lambda: cm.open_peft(folder), "adapter_config.json", field * (value != 10**200), message
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("future", False), ("future", []), ("use_bdlora", {}), ("lora_alpha", -3), ("r", 2.0)]
    + [(name, None) for name in ("use_rslora", "task_type", "rank_pattern", "bias", "revision")]
    + [("trainable_token_indices", {"embed": [0, 5]}), ("layers_to_transform", [0])],
)
def test_fields_that_pass(write, factors, field, value):
    folder = write(factors(PATHS))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    assert set(cm.open_peft(folder)) == {"q"}


def test_patterns_that_take_exponential_time_do_not_hang(write, factors, monkeypatch):
    monkeypatch.setattr("coremerge_jax.io.patterns._SECONDS", 0.1)
    folder = write(factors({"a" * 60: (5, 4, 2)}), rank_pattern={"(a|a)+x": 3})
    refused(lambda: cm.open_peft(folder), "rank_pattern", "takes too long")


# --- adapter_model.safetensors --------------------------------------------------------------

A, B = "q.lora_A.weight", "q.lora_B.weight"


def entry(start, *shape, dtype="F32", size=4):
    return {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [start, start + size * int(np.prod(shape))],
    }


def text(*entries):
    return b"{" + b",".join(f"{json.dumps(k)}:{json.dumps(v)}".encode() for k, v in entries) + b"}"


GOOD = {A: entry(0, 2, 4), B: entry(32, 5, 2)}
HUGE = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
HEADERS = {
    "a key twice": (text((A, GOOD[A]), (B, GOOD[B]), (A, GOOD[A])), f'"{A}" is given twice'),
    "a field twice": (
        text((B, GOOD[B]))[:-1]
        + f',"{A}":{{"dtype":"F32","shape":[2,4],"shape":[8,1],'.encode()
        + b'"data_offsets":[0,32]}}',
        "shape",
    ),
    "more elements than bytes": ({A: HUGE, B: GOOD[B]}, "not a readable safetensors file"),
    "negative": ({**GOOD, A: {**GOOD[A], "shape": [-2, 4]}}, "not a readable"),
    "overflow": ({**GOOD, A: {**GOOD[A], "shape": [2**63, 2**63]}}, "not a readable"),
    "shape is text": ({**GOOD, A: {**GOOD[A], "shape": "2,4"}}, "not a readable"),
    "dtype is a number": ({**GOOD, A: {**GOOD[A], "dtype": 3}}, "not a readable"),
    "overlap": ({A: GOOD[A], B: entry(16, 5, 2)}, "not a readable"),
    "backwards": ({**GOOD, A: {**GOOD[A], "data_offsets": [32, 0]}}, "not a readable"),
    "metadata": ({"__metadata__": 3, **GOOD}, "not a readable"),
    "metadata of numbers": ({"__metadata__": {"r": 2}, **GOOD}, "not a readable"),
    "a list": ([], "not a readable"),
    "deep": (b'{"a":' * 50_000, "not a readable"),
    "half a character": (b'{"\\ud800":1}', "not a readable"),
    "a long name": ({**GOOD, "x" * 5000: entry(72, 0)}, "has a name of 5000 characters"),
    "many dimensions": ({**GOOD, "x": entry(72, *[0] * 100)}, "that is too large"),
    "empty, and large": ({**GOOD, "x": entry(72, 0, 2**60)}, "that is too large"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(write, factors, case):
    header, message = HEADERS[case]
    folder = write(factors(PATHS))
    write_tensors(folder / "adapter_model.safetensors", header, bytes(72))
    refused(lambda: cm.open_peft(folder), "adapter_model.safetensors", message)


def test_a_header_that_is_longer_than_the_file(write, factors):
    folder = write(factors(PATHS))
    for size in (2**63, 10**9, 73):
        (folder / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        refused(lambda: cm.open_peft(folder), "adapter_model.safetensors", "not a readable")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("I8", 1), ("U8", 1), ("I32", 4), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8)],
)
@pytest.mark.parametrize("key", [A, B])
def test_factors_that_are_no_floats(write, factors, dtype, size, key):
    folder, other = write(factors(PATHS)), A if key == B else B
    first = entry(0, *GOOD[key]["shape"], dtype=dtype, size=size)
    second = entry(first["data_offsets"][1], *GOOD[other]["shape"])
    data = bytes(second["data_offsets"][1])
    write_tensors(folder / "adapter_model.safetensors", {key: first, other: second}, data)
    refused(
        lambda: cm.open_peft(folder), key, "has dtype", "quantized", error=cm.errors.CoreMergeError
    )


@pytest.mark.parametrize("shape", [(0,), (0, 0)])
def test_empty_factors_tell_of_sharded_models(write, shape):
    folder = write({A: np.zeros(shape, np.float32), B: np.zeros(shape, np.float32)})
    refused(lambda: cm.open_peft(folder), "module 'q'", "empty", "ZeRO-3", "gather the weights")


@pytest.mark.parametrize("name", [f"x{'.base_layer' * 80}", ".".join("x" * 400), "x" * 900])
def test_long_names_take_no_time(write, factors, name):
    tensors = factors({name: (5, 4, 2)}) | {f"{name}.weight": np.ones(3, np.float32)}
    refused(lambda: cm.open_peft(write(tensors, modules_to_save=["a", "b"])), "does not account")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_block(write, factors, file):
    folder = write(factors(PATHS))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    refused(lambda: cm.open_peft(folder), file, "not a pipe")


# --- Base models ----------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """Writes a base of one tensor, in one shard."""

    def make(config, index=None):
        folder = tmp_path / "base"
        folder.mkdir()
        write_tensors(folder / "model-0.safetensors", {"q.weight": entry(0, 5, 4)}, bytes(80))
        index = {"weight_map": {"q.weight": "model-0.safetensors"}, **(index or {})}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_config", "x"),
        ("text_config", [1]),
        ("vocab_size", "many"),
        ("vocab_size", True),
        ("vocab_size", 10**60),
        ("architectures", 3),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [None]),
        ("quantization_config", []),
        ("quantization_config", "int8"),
        ("compression_config", 0),
        ("tie_word_embeddings", "yes"),
        ("is_encoder_decoder", 1),
    ],
)
def test_configurations_of_another_kind(base, field, value):
    refused(lambda: BaseModel(base({field: value})), "config.json", field, "expected")


@pytest.mark.parametrize("field", ["vocab_size", "tie_word_embeddings"])
def test_text_configurations_of_another_kind(base, field):
    folder = base({"text_config": {field: "x"}})
    refused(lambda: BaseModel(folder), "config.json: text_config", field, "expected")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": []}, "expected an object"),
        ({"weight_map": {"q.weight": 3}}, "no weight_map"),
        ({"weight_map": {"q.weight": None}}, "no weight_map"),
        ({"weight_map": {"q.weight": "../x.safetensors"}}, "is not the name of a file"),
        ({"weight_map": {"q.weight": "/etc/passwd"}}, "is not the name of a file"),
        ({"weight_map": {"q.weight": ".."}}, "is not the name of a file"),
        ({"weight_map": {"q.weight": ""}}, "is not the name of a file"),
        ({"weight_map": {"q.weight": "a\0b"}}, "is not the name of a file"),
        ({"weight_map": {"q.weight": "x" * 999}}, "File name too long"),
        ({"weight_map": {"q.weight": "config.json"}}, "not a readable safetensors file"),
        ({"metadata": 3}, "expected an object"),
        ({"metadata": {"total_size": "80"}}, "expected a finite number"),
    ],
)
def test_indices_that_are_refused(base, index, message):
    refused(lambda: BaseModel(base({}, index)), message)


@pytest.mark.parametrize("content", [{}, [3], [{}], [{"path": 3}], "x", [[]], None])
def test_lists_of_modules_that_are_refused(base, content):
    folder = base({})
    (folder / "modules.json").write_text(json.dumps(content))
    refused(BaseModel(folder).others, "modules.json", "expected a list of modules")


def test_infinity_passes_where_it_is_not_asked_for(base):
    assert BaseModel(base({"time_step_limit": [0.0, float("inf")]})).shard


# --- Records --------------------------------------------------------------------------------

SOURCE = {"name": "a", "path": "a", "sha256": {"x": "0"}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sources": [{**SOURCE, "sha256": None}]}, "expected sources"),
        ({"sources": [{**SOURCE, "sha256": {"x": 3}}]}, "expected sources"),
        ({"sources": [{**SOURCE, "path": 3}]}, "expected sources"),
        ({"sources": [{**SOURCE, "name": []}]}, "expected sources"),
        ({"sources": [{"name": "a"}]}, "expected sources"),
        ({"sources": ["a"]}, "expected sources"),
        ({"sources": {"a": SOURCE}}, "sources is"),
        ({"sources": "a"}, "sources is"),
        ({"recipe": "mean"}, "recipe is"),
        ({"recipe": ["mean"]}, "recipe is"),
        ({"recipe": {"rules": "mean"}}, "rules must be"),
        ({"recipe": {"rules": [{}]}}, "rules must be"),
        ({"recipe": {"from_the_future": 1}}, "unknown key"),
        ({"recipe": {"rank": 10**70}}, "rank must be"),
        ({"precision": "float128"}, "precision is"),
        ({"precision": 3}, "precision is"),
    ],
)
def test_records_that_are_refused(write, factors, tmp_path, record, message):
    adapter = cm.open_peft(write(factors(PATHS)))
    save_peft(adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "coremerge.json"
    found = {"recipe": {}, "sources": [SOURCE], "precision": "float32", **record}
    file.write_text(json.dumps(found))
    refused(
        lambda: read_record(file.parent), "coremerge.json", message, error=cm.errors.CoreMergeError
    )


def test_records_without_a_recipe_are_none(write, factors, tmp_path):
    save_peft(cm.open_peft(write(factors(PATHS))), tmp_path / "merged")
    assert read_record(tmp_path / "merged") is None
    assert read_record(tmp_path) is None


# --- Folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [cm.open_peft, cm.open_adapter, BaseModel])
def test_paths_that_no_folder_has(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "x")
    paths = {
        "loop": "oo many levels of symbolic links",
        "loop/x": "oo many levels of symbolic links",
        "a\0b": "null",
        "x" * 5000: "File name too long",
        "~/adapter": "in place of ~",
        "pipe/x": "is a file",
        "owner/\x1b[31m": "no such folder",
        "owner/name@a..b": "no such folder",
        "owner/name@\0": "null",
    }
    for path, message in paths.items():
        refused(lambda path=path: read(path), message)


@pytest.mark.parametrize("name", ["数学".encode("gbk"), b"\xff\xfe"])
@pytest.mark.parametrize("through", ["itself", "link"])
def test_names_in_another_encoding_are_refused_at_once(
    write, factors, tmp_path, monkeypatch, name, through
):
    folder = tmp_path / os.fsdecode(name)
    write(factors(PATHS)).rename(folder)
    source = folder
    if through == "link":
        source = tmp_path / "link"
        source.symlink_to(folder)
    refused(lambda: cm.open_adapter(source), "not UTF-8", "rename it")
    monkeypatch.chdir(folder)
    refused(lambda: cm.open_adapter("."), "not UTF-8", "rename it")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_file_that_cannot_be_read_is_named():
    """As of a broken disk, whose errors do not say of which file they are."""
    refused(lambda: read_text(Path("/proc/self/mem"), 10), "/proc/self/mem", error=OSError)
