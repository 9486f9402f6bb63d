"""The README's examples run, on the adapters of the demo."""

from pages import ROOT, folder, run_page

__all__ = ["folder"]  # a fixture


def test_examples_run(folder):
    run_page(ROOT / "README.md")
    assert (folder / "out" / "adapter_model.safetensors").is_file()
