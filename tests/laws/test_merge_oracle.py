"""Merging as peft does it, where it does the same."""

import warnings

import numpy as np
import pytest
from helpers import dense, distance, plain_merge

import coremerge_jax as cm

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

RANKS = {"first": (4, 12.0), "second": (6, 3.0)}
WEIGHTS = (0.7, 1.6)


@pytest.fixture
def trained(tmp_path):
    """A peft model with two adapters of other ranks and alphas, and their folders."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(9, 14), torch.nn.ReLU(), torch.nn.Linear(14, 8))
    model = None
    for name, (rank, alpha) in RANKS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "2"])
        if model is None:
            model = peft.PeftModel(layers, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, value in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path)
    return model, [tmp_path / name for name in RANKS]


def deltas(model, name):
    layers = model.base_model.model.named_modules()
    return {
        path: layer.get_delta_weight(name).detach().numpy()
        for path, layer in layers
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def test_task_arithmetic_is_pefts_concatenation(trained):
    model, folders = trained
    model.add_weighted_adapter(list(RANKS), list(WEIGHTS), "cat", combination_type="cat")
    merged = plain_merge([cm.load_peft(f) for f in folders], cm.task_arithmetic(), weights=WEIGHTS)
    expected = deltas(model, "cat")
    assert set(expected) == set(merged) == {"0", "2"}
    for path, update in expected.items():
        assert distance(dense(merged[path]), update) < 1e-6


@pytest.mark.parametrize("energy", [None, 0.8])
def test_peft_computes_with_the_merged_adapter(trained, energy, tmp_path):
    """Its output is that of the base model with our updates, also where ranks differ."""
    model, folders = trained
    merged = plain_merge([cm.load_peft(f) for f in folders], cm.tsv(), space=cm.core())
    if energy:
        merged, _ = cm.truncate(merged, energy=energy)
    cm.save_peft(merged, tmp_path / "merged")
    layers = model.unload()
    x = inputs = torch.randn(5, 9)
    with torch.no_grad():
        for path, layer in layers.named_children():
            update = x @ torch.from_numpy(dense(merged[path])).float().T if path in merged else 0
            x = layer(x) + update
    loaded = peft.PeftModel.from_pretrained(layers, tmp_path / "merged")
    with torch.no_grad():
        np.testing.assert_allclose(loaded(inputs), x, rtol=1e-5, atol=1e-4)
    for path, update in deltas(loaded, "default").items():
        assert distance(update, dense(merged[path])) < 1e-6
