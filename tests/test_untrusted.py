"""Whatever is in a file, the outcome is data or one line."""

import json
import os
import socket

import pytest
from hostile import broken, contents, make_inputs, nested, run
from hypothesis import given, settings
from hypothesis import strategies as st

from coremerge_jax.errors import CoreMergeError, FormatError
from coremerge_jax.untrusted import is_regular, parse_json, parse_yaml, read_json, read_text
from coremerge_jax.verification.sources import read_record


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "here")


# Of each, the files that are broken, and the commands that read them.
READERS = {
    "adapter": (["adapter/*"], [["inspect", "adapter", "--json"]]),
    "base": (["base/*"], [["apply", "adapter", "base", "--dry-run"]]),
    "recipe": (["recipe.yaml"], [["merge", "--recipe", "recipe.yaml", "--dry-run"]]),
}


def assert_one_line(result):
    assert result.code in (0, 1, 2)
    if result.code:
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert len(result.err) < 3000
        assert result.out == ""


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=15 * settings.default.max_examples)
@given(data=st.data())
def test_a_broken_file_is_read_or_refused_in_one_line(inputs, monkeypatch_module, kind, data):
    patterns, commands = READERS[kind]
    files = sorted(file for pattern in patterns for file in inputs.glob(pattern))
    file = data.draw(st.sampled_from(files))
    valid = file.read_bytes()
    file.write_bytes(data.draw(broken(file)))
    try:
        before = contents(inputs)
        for command in commands:
            assert_one_line(run(*command))
        assert contents(inputs) == before
    finally:
        file.write_bytes(valid)


@settings(max_examples=15 * settings.default.max_examples)
@given(data=st.data())
def test_a_broken_record_is_read_or_refused_in_one_line(inputs, data):
    file = inputs / "merged" / "coremerge.json"
    valid = file.read_bytes()
    file.write_bytes(data.draw(broken(file)))
    try:
        read_record(inputs / "merged")
    except CoreMergeError as error:
        assert "\n" not in str(error)
        assert "coremerge.json" in str(error)
    finally:
        file.write_bytes(valid)


@pytest.fixture(scope="module")
def monkeypatch_module(inputs):
    """Commands run in the folder of the inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        patch.delenv("COREMERGE_DEBUG", raising=False)
        patch.setenv("COLUMNS", "200")
        yield
