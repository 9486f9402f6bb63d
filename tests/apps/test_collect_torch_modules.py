"""PyTorch models of all kinds: where adapters' modules are in them, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.nightly,
    # Warnings of torch and transformers themselves.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

from coremerge_jax.collecting import collect  # noqa: E402
from coremerge_jax.collecting.torch_models import agreement_torch, collect_torch  # noqa: E402

torch.set_num_threads(1)  # more wait for each other where cores are busy

nn = torch.nn
WIDTH, HIDDEN, VOCAB = 6, 10, 11


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(2, WIDTH, HIDDEN))


class Routed(nn.Module):
    """Experts in layers, of which each sees some of the tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        rows, first = x.reshape(-1, WIDTH), x[..., 0].reshape(-1) > 0
        out = torch.zeros_like(rows)
        out[first], out[~first] = self.experts[0](rows[first]), self.experts[1](rows[~first])
        return out.reshape(x.shape)


class Model(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.routed = Routed()
        self.experts = Experts()
        self.pool = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None, fail=False):
        del attention_mask
        x = self.embed(input_ids)
        x = x + self.down(torch.tanh(self.up(input=x)))  # an argument by name
        x = x + self.qkv_proj(x)[..., :WIDTH] + self.conv(x.mT).mT + self.routed(x)
        if fail:
            raise KeyError("fail")
        return self.pool(x[:, 0])


def model():
    torch.manual_seed(0)
    return Model().eval()


def adapter(shapes, rank=2, *, seed=0, name="task", **options):
    rng = np.random.default_rng(seed)
    loras = {}
    for path, (m, n) in shapes.items():
        kind = cm.Kind(options.get(path, "linear"))
        a, b = rng.normal(size=(rank, n)), rng.normal(size=(m, rank))
        loras[path] = cm.LoRA(a.astype(np.float32), b.astype(np.float32), kind)
    return cm.Adapter(loras, metadata=cm.Metadata(name=name), extras=options.get("extras"))


UP, DOWN = {"up": (HIDDEN, WIDTH)}, {"down": (WIDTH, HIDDEN)}
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
BATCH, PADDED = {"input_ids": TOKENS}, {"input_ids": TOKENS, "attention_mask": MASK}


def gram(found, path):
    return found[path].matrices[0], found[path].counts[0]


def test_a_chain_of_layers_by_hand():
    """The own adapter changes what later modules see, in NumPy as in PyTorch."""
    base, own = model(), adapter(UP | DOWN)
    weights = {name: x.detach().double().numpy() for name, x in base.named_parameters()}
    x = weights["embed.weight"][TOKENS.numpy()][MASK.numpy() == 1]
    for source in ("own", "base"):
        found = collect_torch(base, [own], [[PADDED]], source=source)
        update = own["up"].dense() if source == "own" else 0
        y = np.tanh(x @ (weights["up.weight"] + update).T + weights["up.bias"])
        for path, inputs in (("up", x), ("down", y)):
            z = inputs @ own[path].a.T
            matrix, count = gram(found, path)
            assert count == len(z) == 5
            assert distance(matrix, z.T @ z) < 1e-5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("source", ["own", "base"])
def test_as_a_jax_model_of_the_same_weights(source, full):
    base = model()
    weights = {name: x.detach().numpy() for name, x in base.named_parameters()}
    tree = {name: {"kernel": weights[f"{name}.weight"].T} for name in ("up", "down")}
    several = [adapter(UP | DOWN, rank, seed=rank, name=f"task{rank}") for rank in (1, 2)]

    def forward(tree, x):
        return (
            jnp.tanh(x @ tree["up"]["kernel"] + weights["up.bias"][None]) @ tree["down"]["kernel"]
        )

    x = weights["embed.weight"][TOKENS.numpy()]
    rows = {id(BATCH): x.reshape(-1, WIDTH), id(PADDED): x[MASK.numpy() == 1]}
    read = [[PADDED], [BATCH, PADDED]]
    inputs = [[rows[id(batch)] for batch in batches] for batches in read]
    expected = collect(tree, several, inputs, forward, source=source, full=full)
    found = collect_torch(base, several, read, source=source, full=full)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert distance(one, np.asarray(other)) < 1e-5


def test_whole_inputs_where_ranks_add_up_to_more():
    several = [adapter(UP | DOWN, 3, seed=t, name=f"task{t}") for t in range(3)]
    found = collect_torch(model(), several, [[BATCH]] * 3)
    assert found["up"].matrices.shape == (3, WIDTH, WIDTH)
    assert found["up"].squares is None
    assert found["down"].matrices.shape == (3, 9, 9)
    assert found["down"].squares.shape == (9,)


def test_modules_that_see_one_row_for_each_example():
    found = collect_torch(model(), [adapter({"pool": (WIDTH, WIDTH)})], [[PADDED]])
    assert gram(found, "pool")[1] == len(TOKENS)


def test_experts_see_some_tokens():
    shapes = {f"routed.experts.{i}": (WIDTH, WIDTH) for i in range(2)}
    found = collect_torch(model(), [adapter(shapes)], [[BATCH]])
    assert sum(gram(found, path)[1] for path in shapes) == TOKENS.numel()
    with pytest.raises(cm.MismatchError, match=r"which are padding is not certain.*--batch-size 1"):
        collect_torch(model(), [adapter(shapes)], [[PADDED]])


def test_names_of_other_releases_and_of_parts_of_models():
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    torch.manual_seed(0)
    inner = transformers.BertModel(config).eval()
    outer = transformers.BertForSequenceClassification(config).eval()
    outer.bert.load_state_dict(inner.state_dict(), strict=False)
    path, batch = "encoder.layer.0.attention.self.query", [{"input_ids": TOKENS}]
    plain = collect_torch(inner, [adapter({path: (8, 8)})], [batch])
    for base, name in (
        (inner, f"bert.{path}"),
        (outer, path),
        (outer, f"bert.{path}"),
        (torch.compile(inner), path),
        (nn.ModuleDict({"x": inner})["x"], "encoder.layer.0.attention.attention.query"),
    ):
        found = collect_torch(base, [adapter({name: (8, 8)})], [batch])
        assert list(found) == [name]
        np.testing.assert_allclose(found[name].matrices, plain[path].matrices, rtol=1e-5)


def test_adapters_of_two_namings_are_aligned():
    paths = [f"encoder.layer.0.attention.{x}.query" for x in ("self", "attention")]
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    several = [adapter({path: (8, 8)}, name=f"task{t}") for t, path in enumerate(paths)]
    batches = [[{"input_ids": TOKENS}]] * 2
    with pytest.warns(cm.errors.CoreMergeWarning, match="names the same modules in another way"):
        found = collect_torch(transformers.BertModel(config), several, batches)
    assert [x.tasks for x in found.values()] == [(0, 1)]


KINDS = {
    "an embedding": ({"embed": (WIDTH, VOCAB)}, "embedding", "'embed' is of class Embedding"),
    "a convolution": ({"conv": (WIDTH, WIDTH)}, "conv2d", "'conv' is of class Conv1d"),
    "attention": (
        {"attention": (3 * WIDTH, WIDTH)},
        "linear",
        "'attention' is computed inside of 'MultiheadAttention', not by a layer",
    ),
    "its output": ({"attention.out_proj": (WIDTH, WIDTH)}, "linear", "inside of 'attention'"),
    "experts": (
        {f"experts.down_proj[{i}]": (WIDTH, HIDDEN) for i in range(2)},
        "expert",
        r"'experts.down_proj\[0\]' is an expert in the parameter 'experts.down_proj'",
    ),
    "a part": ({"q_proj": (WIDTH, WIDTH)}, "linear", "'q_proj' is a part of 'qkv_proj'"),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_no_linear_layer_is_refused_or_left_out(case):
    shapes, kind, message = KINDS[case]
    whole = adapter(shapes | DOWN, **dict.fromkeys(shapes, kind))
    with pytest.raises(cm.UnsupportedError, match=message) as caught:
        collect_torch(model(), [whole], [[BATCH]])
    assert "--allow-missing" in str(caught.value)
    with pytest.warns(cm.errors.CoreMergeWarning, match="left out"):
        found = collect_torch(model(), [whole], [[BATCH]], allow_missing=True)
    assert set(found) == {"down"}


def test_trained_weights_beside_the_updates():
    """The own model uses those that it has; a note names the others."""
    base, bias = model(), np.full(HIDDEN, 3, np.float32)
    plain = collect_torch(base, [adapter(DOWN)], [[BATCH]])
    own = adapter(DOWN, extras={"up.bias": bias})
    found = collect_torch(base, [own], [[BATCH]])
    assert distance(found["down"].matrices, plain["down"].matrices) > 0.1
    assert not (base.up.bias == 3).any()
    with torch.no_grad():
        base.up.bias.fill_(3)
    expected = collect_torch(base, [adapter(DOWN)], [[BATCH]])
    np.testing.assert_allclose(found["down"].matrices, expected["down"].matrices, rtol=1e-5)
    strange = adapter(DOWN, extras={"score.weight": bias})
    with pytest.warns(cm.errors.CoreMergeWarning, match="without the adapter's score.weight"):
        collect_torch(base, [strange], [[BATCH]])


def injected():
    base = model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), base)
    return base


def merged():
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["up"]))
    wrapped.merge_adapter()
    return wrapped


OWN = adapter(UP)
REFUSED = {
    "no module": (lambda: 3, {}, "model: expected a torch.nn.Module, got 3"),
    "injected": (injected, {}, "Model: has layers of an adapter; give the base model without"),
    "merged": (merged, {}, "Model: an adapter is merged into its weights"),
    "no adapters": (model, {"adapters": [], "batches": []}, "0 tasks for 0 adapters"),
    "fewer batches": (model, {"adapters": [OWN, OWN]}, "inputs of 1 tasks for 2 adapters"),
    "no batches": (model, {"batches": [[]]}, "adapter 'task': no inputs of its task"),
    "one batch": (model, {"batches": [BATCH]}, "batches.0.: expected batches with .*'input_ids'$"),
    "padding only": (
        model,
        {"batches": [[{**PADDED, "attention_mask": 0 * MASK}]]},
        "no inputs of its task",
    ),
    "mask": (model, {"batches": [[{**PADDED, "attention_mask": MASK[0]}]]}, r"has shape \(4,\)"),
    "source": (model, {"source": "other"}, "source='other': expected 'own', 'base' or an adapter"),
    "limit": (model, {"limit": 0}, "limit=0: expected a whole number of at least 1"),
    "shape": (model, {"adapters": [adapter({"up": (WIDTH, 4)})]}, "'up' has 6 inputs and 10 out"),
    "name": (model, {"adapters": [adapter({"uq": (3, 4)})]}, "'uq', nearest to 'up.weight'"),
    "NaN": (
        model,
        {
            "adapters": [
                adapter(UP | DOWN, seed=1).replace(
                    {"up": OWN["up"].replace(b=OWN["up"].b * np.nan), "down": adapter(DOWN)["down"]}
                )
            ]
        },
        "adapter 'task': inputs of module 'down' have NaN",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case):
    make, options, message = REFUSED[case]
    arguments = {"adapters": [OWN], "batches": [[BATCH]], **options}
    with pytest.raises(cm.CoreMergeError, match=message) as caught:
        collect_torch(make(), **arguments)
    assert "\n" not in str(caught.value)


def test_errors_of_the_model_leave_it_as_it_was():
    base = model().train()
    base.up.bias.requires_grad_(False)
    failing = {**BATCH, "fail": True}
    for function, batches in ((collect_torch, [BATCH, failing]), (agreement_torch, [failing])):
        with pytest.raises(KeyError, match="fail"):
            function(base, [adapter(UP | DOWN)], [batches])
        assert all(module.training for module in base.modules())
        assert not any(module._forward_hooks for module in base.modules())
        needed = {name for name, x in base.named_parameters() if not x.requires_grad}
        assert needed == {"up.bias"}


def test_agreement_needs_logits():
    with pytest.raises(cm.UnsupportedError, match="gives no logits; load the model with its head"):
        agreement_torch(model(), [OWN], [[BATCH]])


def test_encoder_decoder_models_read_without_padding():
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCAB
    )
    base = transformers.T5ForConditionalGeneration(config)
    path = "decoder.block.0.layer.0.SelfAttention.q"
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :2]}
    found = collect_torch(base, [adapter({path: (8, 8)})], [[batch]])
    assert gram(found, path)[1] == 4
    with pytest.raises(cm.UnsupportedError, match="encoder-decoder model, and a batch has padding"):
        collect_torch(base, [adapter({path: (8, 8)})], [[{**batch, "attention_mask": MASK}]])
