"""The README's examples run, on the adapters of the demo."""

from pages import ROOT, folder, run_page

from coremerge_jax import demo

__all__ = ["folder"]  # a fixture


def test_examples_run(folder):
    found = run_page(ROOT / "README.md")
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert found["sweep"].shape == (10, 80, 80)
    assert found["gradient"].shape == (len(demo.TASKS),)
