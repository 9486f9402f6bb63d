"""`coremerge verify`: what it shows, takes and refuses."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def merged(coremerge, adapters, tmp_path):
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", "--rule", "mean").code == 0
    return tmp_path / "out"


def double(merged):
    tensors = load_file(merged / WEIGHTS)
    save_file({x: v * (1 + ("lora_B" in x)) for x, v in tensors.items()}, merged / WEIGHTS)


def test_a_right_merge(coremerge, merged, adapters):
    for given in ([], ["--sources", *adapters[::-1]], ["-s", adapters[1], *adapters[::2]]):
        result = coremerge("verify", merged, *given)
        assert (result.code, result.err) == (0, "")
        assert result.out.splitlines()[-1] == f"{merged} is the merge of 3 adapters by mean"
        for part in ("layer.0.query", "‖ΔW‖", "bfloat16 0.00", "it is in float32"):
            assert part in result.out


def test_a_defect(coremerge, merged):
    double(merged)
    result = coremerge("verify", merged)
    assert (result.code, result.err) == (1, "")
    assert "defect factor: all 3 modules are 2 times the merge" in result.out
    verdict = f"{merged} is not the merge of 3 adapters by mean: factor"
    assert result.out.splitlines()[-1] == verdict


def test_json(coremerge, merged, adapters):
    report = json.loads(coremerge("verify", merged, "--json").out)
    assert report["ok"]
    assert report["findings"] == []
    assert report["sources"] == [path.name for path in adapters]
    assert all(one["error"] <= one["tolerance"] for one in report["modules"].values())
    double(merged)
    result = coremerge("verify", merged, "--json")
    assert result.code == 1
    (finding,) = json.loads(result.out)["findings"]
    assert (finding["kind"], finding["defect"]) == ("factor", True)
    assert finding["modules"] == list(report["modules"])


def test_options_replace_the_record(coremerge, merged, tmp_path, adapters):
    assert coremerge("verify", merged, "--scale", 0.5).code == 1
    names = [path.name for path in adapters]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"adapters": names, "rules": ["mean"]}))
    for given, code in (([], 0), (["--scale", "2"], 1), (["--weights", "1,1,0.5"], 1)):
        assert (
            coremerge("verify", merged, "--recipe", tmp_path / "recipe.yaml", *given).code == code
        )


def test_a_merge_without_a_record(coremerge, merged, adapters, tmp_path):
    (merged / "coremerge.json").unlink()
    refused = coremerge("verify", merged, "--sources", *adapters)
    assert refused.code == 2
    assert "no coremerge.json with the recipe of the merge" in refused.err
    assert "no sources" in coremerge("verify", merged, "--rule", "mean").err
    assert coremerge("verify", merged, "--sources", *adapters, "--rule", "mean").code == 0
    checkpoint = tmp_path / "checkpoint"
    assert coremerge("convert", merged, "-o", checkpoint).code == 0
    assert coremerge("verify", checkpoint, "--sources", *adapters, "--rule", "mean").code == 0


def test_base(coremerge, merged, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"layer.0.query.weight": np.zeros((6, 8), np.float32)}, base / "model.safetensors")
    result = coremerge("verify", merged, "--base", base)
    assert result.code == 1
    assert "defect unmatched-base" in result.out
    assert "2 of the adapter's 3 modules are not in this model: 'layer.0.dense'" in result.out
    refused = coremerge("verify", merged, "--base", tmp_path / "nothing")
    assert (refused.code, "no such folder" in refused.err) == (1, True)


def test_refusals(coremerge, merged, adapters, tmp_path):
    assert "Missing argument 'MERGED'" in coremerge("verify").err
    few = coremerge("verify", merged, "--sources", adapters[0])
    assert few.code == 1
    assert "'code', 'chat'" in few.err
    shutil.rmtree(adapters[0])
    gone = coremerge("verify", merged)
    assert gone.code == 1
    assert "no such folder; the record says" in gone.err
    assert "no such folder" in coremerge("verify", tmp_path / "nothing").err
