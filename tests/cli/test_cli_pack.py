"""``coremerge pack``: other commands take packs, and parts of them, wherever they take adapters."""

import json

import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm


@pytest.fixture
def folder(coremerge, adapters, tmp_path):
    assert coremerge("pack", *adapters, "-o", tmp_path / "pack").code == 0
    return tmp_path / "pack"


def largest(found, expected):
    found, expected = cm.load_peft(found), cm.load_peft(expected)
    assert list(found) == list(expected)
    return max(distance(found[x].dense(), expected[x].dense()) for x in expected)


def test_merges_of_packs_are_those_of_the_adapters(coremerge, adapters, folder, tmp_path):
    math, code, chat = adapters
    out, expected = tmp_path / "out", tmp_path / "expected"
    for given, same, options in (
        ([folder], adapters, ["--weights", "1,2,3"]),
        ([folder / "chat", folder / "math"], [chat, math], ["--rule", "ties"]),
        ([folder / "math", code], [math, code], ["--rule", "tsv"]),
    ):
        assert coremerge("merge", *given, "-o", out, "--force", *options).code == 0
        assert coremerge("merge", *same, "-o", expected, "--force", *options).code == 0
        assert largest(out, expected) < 1e-6
        found = coremerge("verify", out)
        assert found.code == 0, found.out + found.err
    assert coremerge("verify", out, "--sources", folder / "math", code).code == 0


def test_a_recipe_may_name_a_pack(coremerge, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("adapters: [pack]\nweights: [1, 0.5, 2]\nrules: [tsv]\n")
    assert coremerge("merge", "--recipe", recipe, "-o", tmp_path / "out").code == 0
    record = json.loads((tmp_path / "out/coremerge.json").read_text())
    assert [x["name"] for x in record["sources"]] == ["math", "code", "chat"]
    assert record["sources"][0]["path"] == str(folder / "math")
    recipe.write_text("adapters: [pack]\nweights: [1, 0.5]\n")
    result = coremerge("merge", "--recipe", recipe, "-o", tmp_path / "other")
    assert result.code == 2
    assert "weights: got 2 for 3 adapters" in result.err


def test_adapters_are_added_and_removed(coremerge, save, folder):
    result = coremerge("pack", "remove", folder, "code", "--json")
    assert json.loads(result.out)["adapters"] == ["math", "chat"]
    assert coremerge("pack", "add", folder, save("new", 4), save("more", 1)).code == 0
    assert cm.open_pack(folder).names == ("math", "chat", "new", "more")
    result = coremerge("pack", "remove", folder, "chta")
    assert result.code == 2
    assert "did you mean 'chat'?" in result.err
    assert cm.open_pack(folder).names == ("math", "chat", "new", "more")


def test_packs_are_inspected_swept_and_reported_on(coremerge, folder, tmp_path):
    found = json.loads(coremerge("inspect", folder, "--json").out)
    assert [x["name"] for x in found["adapters"]] == ["math", "code", "chat"]
    assert found["can_be_merged"]
    report = json.loads(coremerge("report", folder, "--json").out)
    assert len(report["adapters"]) == 3
    sweep = ["sweep", folder, "-o", tmp_path / "sweep", "--values", "scale=0.5,1"]
    assert coremerge(*sweep).code == 0
    assert np.isfinite(cm.load_peft(tmp_path / "sweep/scale=1")["layer.0.query"].a).all()


def test_compiled_merges_are_lifted_to_those_of_merge(coremerge, folder, tmp_path):
    out, expected, file = tmp_path / "out", tmp_path / "expected", tmp_path / "iso.safetensors"
    options = ["--rule", "ties", "--rule", "isotropize", "--weights", "1,2,0.5"]
    found = coremerge("pack", "compile", folder, *options, "-o", file, "--json")
    assert found.code == 0, found.err
    report = json.loads(found.out)
    assert report["bytes"] == file.stat().st_size
    assert report["adapters"] == ["math", "code", "chat"]
    assert coremerge("pack", "lift", file, folder, "-o", out).code == 0
    assert coremerge("merge", folder, *options, "-o", expected).code == 0
    assert largest(out, expected) < 1e-5
    assert coremerge("pack", "lift", file, folder, "-o", out, "--force").code == 0

    again = coremerge("pack", "compile", folder, "-o", file)
    assert again.code == 1
    assert "already exists" in again.err
    assert coremerge("pack", "compile", folder / "chat", "-o", file, "--force").code == 0
    assert "coremerge pack lift makes an adapter" in coremerge("inspect", file).err
    other = coremerge("pack", "lift", file, folder / "math", "-o", tmp_path / "other")
    assert other.code == 1
    assert "'chat' is not among the adapters" in other.err


def test_a_pack_whose_replacement_was_killed_comes_back(coremerge, save, folder, tmp_path):
    folder.rename(tmp_path / f".{folder.name}.0123456789ab.old")
    result = coremerge("merge", folder, "-o", tmp_path / "out")
    assert "a run that was killed has moved it to" in result.err
    with pytest.raises(cm.FormatError, match="rename it back"):
        cm.open_pack(folder)
    assert coremerge("pack", "add", folder, save("new", 4)).code == 0
    assert cm.open_pack(folder).names == ("math", "code", "chat", "new")


def test_mistakes_with_packs_have_messages(coremerge, adapters, folder, tmp_path):
    out = tmp_path / "out"
    for args, message in (
        (["merge", folder / "mth", "-o", out], "did you mean 'math'?"),
        (["merge", folder, "-o", folder / "x"], "is inside the input"),
        (["pack", "compile", folder, "-o", folder / "x"], "is inside the input"),
        (["pack", "compile", folder, "--rank", "8", "-o", out], "coremerge pack lift"),
        (["pack", "compile", folder, "--space", "full", "-o", out], "core"),
        (["pack", "lift", folder / "coordinates.safetensors", folder, "-o", out], "save_merge"),
        (["merge", folder, "-o", folder, "--force"], "is the input"),
        (["pack", folder, "-o", folder, "--force"], "is the input"),
        (["convert", folder, "-o", out], "a pack of 3 adapters (math, code, chat)"),
        (["pack", *adapters], "no output: give -o PACK"),
        (["pack", *adapters, "-o", out, "--names", ""], "names: got 1 for 3 adapters"),
        (["pack", *adapters, "-o", out, "--names", "a,b"], "names: got 2 for 3 adapters"),
        (["pack", adapters[0], adapters[0], "-o", out], "two adapters are named 'math'"),
        (["pack", "add", tmp_path, adapters[0]], "no pack; expected a folder that"),
        (["pack", "nothing", "-o", out], "nothing: no such folder"),
    ):
        result = coremerge(*args)
        assert result.code in (1, 2)
        assert message in result.err, result.err
        assert result.err.count("\n") == 1
    assert not out.exists()
    assert cm.open_pack(folder).names == ("math", "code", "chat")
