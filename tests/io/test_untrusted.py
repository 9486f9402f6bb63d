"""Whatever is in a file, the outcome is data or one line."""

import json
import os
import socket

import pytest
from hostile import broken, contents, make_inputs, nested, run
from hypothesis import given, settings
from hypothesis import strategies as st

from coremerge_jax.errors import CoreMergeError, FormatError
from coremerge_jax.io.untrusted import is_regular, parse_json, parse_yaml, read_json, read_text
from coremerge_jax.recipe import Recipe
from coremerge_jax.record import read_record


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "here")


# Of each, the files that are broken, a command that reads them, and how often, times the profile's.
READERS = {
    "adapter": ("adapter/*", ["inspect", "adapter", "--json"], 5),
    "base": ("base/*", ["apply", "adapter", "base", "--dry-run"], 5),
    "recipe": ("recipe.yaml", ["merge", "--recipe", "recipe.yaml", "--dry-run"], 1),
    "pack": ("pack/*", ["inspect", "pack", "--json"], 1),
    "orbax": ("orbax/**/*", ["inspect", "orbax", "--json"], 1),
}


def assert_one_line(result):
    assert result.code in (0, 1, 2)
    if result.code:
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert len(result.err) < 3000
        assert result.out == ""


# Orbax leaves reads behind that fail; the command line hides what is said of these.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("in_the_folder")
@pytest.mark.parametrize("kind", READERS)
def test_a_broken_file_is_read_or_refused_in_one_line(inputs, kind):
    pattern, command, times = READERS[kind]
    files = sorted(file for file in inputs.glob(pattern) if file.is_file())

    @settings(max_examples=times * settings.default.max_examples)
    @given(data=st.data())
    def check(data):
        file = data.draw(st.sampled_from(files))
        valid = file.read_bytes()
        file.write_bytes(data.draw(broken(file)))
        try:
            before = contents(inputs)
            assert_one_line(run(*command))
            assert contents(inputs) == before
        finally:
            file.write_bytes(valid)

    check()


LOADERS = {
    "merged/coremerge.json": lambda file: read_record(file.parent),
    "recipe.yaml": lambda file: Recipe.load(file).resolve(),
}


@pytest.mark.parametrize("name", LOADERS)
@settings(max_examples=12 * settings.default.max_examples)
@given(data=st.data())
def test_a_broken_text_is_read_or_refused_in_one_line(inputs, name, data):
    file = inputs / name
    valid = file.read_bytes()
    file.write_bytes(data.draw(broken(file)))
    try:
        message = message_of(lambda: LOADERS[name](file))
    finally:
        file.write_bytes(valid)
    assert "\n" not in message
    assert len(message) < 3000


def message_of(call):
    """Returns the message of the error, nothing if there is none."""
    try:
        call()
    except CoreMergeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def in_the_folder(inputs):
    """Commands run in the folder of the inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        patch.delenv("COREMERGE_DEBUG", raising=False)
        patch.setenv("COLUMNS", "200")
        yield


# --- The reader -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"r": 2, "r": 3}', '"r" is given twice'),
        ('{"x": {"y": 1, "y": 1}}', '"y" is given twice'),
        ("9" * 400, "a number of 400 digits"),
        ("-" + "9" * 5000, "a number of 5001 digits"),
        ("[" * 50_000, "nested more than"),
        ("[" * 50_000 + "]" * 50_000, "nested more than"),
        ('{"a":' * 90 + "1" + "}" * 90, "nested more than"),
        (r'{"name": "\ud800"}', r"half of a character ('\ud800')"),
        (r'{"\udfff": 1}', r"half of a character ('\udfff')"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(FormatError) as caught:
        parse_json(text, "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_that_is_read():
    nesting = json.dumps(nested(60))
    for text in ("{}", r'{"a": "\ud83d\ude00"}', '{"time_step_limit": [0.0, Infinity]}', nesting):
        assert parse_json(text, "x") == json.loads(text)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "an alias"),
        ("a: &a {b: *a}", "an alias"),
        ("- " * 5000 + "x", "nested more than"),
        ("[" * 100_000, "nested more than"),
        ("{a: " * 300, "nested more than"),
        ("[" * 70 + "]" * 70, "nested more than"),
        ("x" * 300_000, "300,000 characters"),
        ("seed: " + "9" * 5000, "a number of 5000 digits"),
        ("seed: " + "1:" * 400 + "1", "a number of"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("!!int x", "not valid YAML"),
        ("!!bool x", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("day: 2001-99-99", "not valid YAML"),
        ("a: 1\n---\na: 2", "found another document"),
        ("{[a]: 1}", "unhashable key"),
        ("<<: {seed: 1}", "could not determine a constructor"),
        ("1: 2\n1: 3", "1 is given twice"),
        (r'name: "\ud800"', "half of a character"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(FormatError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith("x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_of_many_keys():
    assert len(parse_yaml("".join(f"k{i}: 1\n" for i in range(1000)), "x")) == 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}".encode("utf-16"), "not a text file in UTF-8 (byte 0)"),
        (b'{"a": "\xff"}', "not a text file in UTF-8 (byte 7)"),
        (b"{}" + b" " * 100, "larger than 100 bytes"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\x00", "not valid JSON"),
    ],
)
def test_files_that_are_refused(tmp_path, data, message):
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_json(file, "a folder", limit=100)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json", "a folder") == {"a": 1}


@pytest.fixture(params=["pipe", "socket", "device", "folder", "loop", "dangling link"])
def no_file(request, tmp_path):
    """Something that is no regular file, and what is said of it."""
    file = tmp_path / "adapter_config.json"
    match request.param:
        case "pipe":
            os.mkfifo(file)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                folder = os.open(tmp_path, os.O_RDONLY)  # addresses are short
                made.bind(f"/proc/self/fd/{folder}/{file.name}")
                os.close(folder)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
        case "loop":
            file.symlink_to(file)
            return file, "oo many levels of symbolic links"
        case "dangling link":
            file.symlink_to("nowhere")
            return file, "a link to a file that is not there"
    return file, f"not a regular file; expected a file, not a {request.param}"


def test_only_regular_files_are_read(no_file):
    file, message = no_file
    with pytest.raises(FormatError) as caught:
        read_text(file, 100)
    assert message in str(caught.value)
    for command in (("inspect", file.parent), ("merge", "--recipe", file, "--dry-run")):
        result = run(*command)
        assert_one_line(result)
        assert message in result.err


def test_names_that_no_file_can_have(tmp_path):
    assert not is_regular(tmp_path / "nothing")
    assert not is_regular(tmp_path / "nothing" / "x")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(FormatError):
            is_regular(tmp_path / name)
