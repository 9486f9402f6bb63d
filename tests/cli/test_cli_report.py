"""`coremerge report`."""

import json
import sys

import numpy as np
import pytest

from coremerge_jax.io.peft.reader import load_peft
from coremerge_jax.merging.cost import Machine


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """Times nothing."""
    monkeypatch.setattr(Machine, "measure", lambda _: Machine(1e9, 1e9, 1e9, 0.0))


def test_writes_a_page_and_the_numbers(coremerge, save, tmp_path):
    adapters = [save(name, modules={"layer.0.query": (6, 8)}) for name in ("math", "code", "chat")]
    merged, out = tmp_path / "merged", tmp_path / "report.html"
    assert coremerge("merge", *adapters, "-o", merged, "--rule", "mean").code == 0
    result = coremerge("report", *adapters, "--merged", merged, "-o", out, "--json")
    assert (result.code, result.err) == (0, "")
    numbers = json.loads(result.out)
    assert (numbers["adapters"], numbers["merged"]) == (["math", "code", "chat"], "merged")
    norms = [module["measures"]["norms"] for module in numbers["modules"]]
    lora = load_peft(adapters[0])[numbers["modules"][0]["path"]]
    assert norms[0][0] == pytest.approx(np.linalg.norm(lora.dense()), rel=1e-5)
    assert numbers["mean"]["unexplained"] == pytest.approx(0, abs=1e-5)
    assert all(cost["seconds"] > 0 for cost in numbers["costs"])
    page = out.read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert sorted(x.name for x in tmp_path.iterdir() if x.is_file()) == ["report.html"]
    again = coremerge("report", adapters[0], "-o", out)
    assert (again.code, again.out) == (1, "")
    assert "already exists; choose another output, or --force it" in again.err
    assert out.read_text() == page
    forced = coremerge("report", adapters[0], "-o", out, "--force")
    assert forced.out.startswith(f"wrote {out} (")
    assert out.read_text() != page


def test_refusals_write_nothing(coremerge, save, tmp_path):
    paths = [save("math", base_model="org/a"), save("code", base_model="org/b")]
    out = tmp_path / "report.html"
    for args, code, message in (
        ([*paths], 2, "no output: give -o OUT.html, or --json"),
        ([*paths, "-o", tmp_path], 1, "is a folder; give the name of a file"),
        ([*paths, "-o", out], 1, "--allow-other-base"),
        ([*paths, "-o", tmp_path / "none" / "x.html"], 1, "there is no such folder"),
        ([*paths, "-o", tmp_path / "x.pdf"], 2, "give a name that ends in .html"),
        ([tmp_path / "none", "-o", out], 1, "none"),
        (["-o", out], 2, "Missing argument 'ADAPTER...'"),
    ):
        result = coremerge("report", *args)
        assert (result.code, result.out) == (code, "")
        assert message in result.err
    assert not out.exists()


def test_needs_matplotlib_for_a_page_only(coremerge, save, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("diagnosis.page", "diagnosis.plots", "figures"):
        monkeypatch.delitem(sys.modules, f"coremerge_jax.{name}", raising=False)
    result = coremerge("report", save("math"), "-o", tmp_path / "report.html")
    assert result.code == 1
    assert "pip install 'coremerge-jax[plot]'" in result.err
    assert coremerge("report", tmp_path / "math", "--json").code == 0
