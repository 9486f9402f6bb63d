"""What we read is what peft computes, and what we write is what peft reads."""

import copy
import warnings

import numpy as np
import pytest

import coremerge_jax as cm

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch and transformers themselves, none of them about the adapter.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.vera.layer import VeraLayer
    from transformers.pytorch_utils import Conv1D

nn = torch.nn
VOCAB, WIDTH, HIDDEN, EXPERTS = 11, 6, 10, 3


class Experts(nn.Module):
    def __init__(self, *, transposed=False):
        super().__init__()
        shapes = (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
        if transposed:
            self.is_transposed = True
            shapes = tuple((e, n, m) for e, m, n in shapes)
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))
        self.transposed = transposed

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if self.transposed:
            up, down = up.mT, down.mT
        gate, up = torch.einsum("emn,...n->e...m", up, x).chunk(2, -1)
        return torch.einsum("emn,e...n->...m", down, gate * up)


class Model(nn.Module):
    """One layer of every kind that we read."""

    def __init__(self, *, transposed_experts=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.ModuleDict(
            {
                "up": nn.Linear(WIDTH, HIDDEN),
                "down": nn.Linear(HIDDEN, WIDTH),
                "square": nn.Linear(WIDTH, WIDTH),
                "conv1d": Conv1D(HIDDEN, WIDTH),
                "attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True),
                "experts": Experts(transposed=transposed_experts),
            }
        )
        self.conv = nn.Conv2d(2, 4, (3, 2))
        self.head = nn.Linear(WIDTH, 5)
        self.up = nn.Linear(WIDTH, WIDTH)  # its path is the end of another one

    def forward(self, tokens, image):
        x = self.embed(tokens)
        block = self.block
        y = block["down"](torch.tanh(block["up"](x))) + block["square"](x) + self.up(x)
        y = y + block["down"](block["conv1d"](x)) + block["experts"](x)
        y = y + block["attention"](x, x, x, need_weights=False)[0]
        return self.head(y), self.conv(image)


INPUTS = torch.arange(8).reshape(2, 4) % VOCAB, torch.linspace(-1, 1, 40).reshape(1, 2, 5, 4)
PAIR = ["experts.gate_up_proj", "experts.down_proj"]

CASES = {
    "linear": {"target_modules": ["block.up", "block.down"]},
    "rslora": {"target_modules": ["square"], "use_rslora": True},
    "patterns": {
        "target_modules": ["up", "block.down", "square", "embed", "conv"],
        "rank_pattern": {"^up": 2, "block.up": 5, "conv": 1},
        "alpha_pattern": {"down|square": 11, ".*up": 3},
    },
    "rslora patterns": {
        "target_modules": ["up", "down"],
        "use_rslora": True,
        "rank_pattern": {"down": 4},
        "alpha_pattern": {"down": 2.5},
    },
    "conv1d": {"target_modules": ["conv1d"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed"]},
    "conv2d": {"target_modules": ["conv"]},
    "lora_bias": {"target_modules": ["up", "conv"], "lora_bias": True},
    "attention": {"target_modules": ["attention"]},
    "attention and more": {
        "target_modules": ["attention", "embed", "down"],
        "rank_pattern": {"attention": 2},
    },
    "experts": {"target_modules": [], "target_parameters": PAIR},
    "experts and more": {
        "target_modules": ["embed", "down"],
        "target_parameters": PAIR,
        "rank_pattern": {"down": 4, "embed": 1},
    },
    "one parameter": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "experts of several ranks": {
        "target_modules": ["square"],
        "target_parameters": PAIR,
        "rank_pattern": {"gate_up_proj": 2},
    },
    "bias": {"target_modules": ["up", "conv"], "bias": "all"},
    "bias of its layers": {"target_modules": ["up", "attention"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["up", "embed"], "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["up"], "trainable_token_indices": {"embed": [0, 3, 4]}},
}
# What peft's forward adds to the base is more than our updates.
MORE = (
    "bias",
    "bias of its layers",
    "modules_to_save",
    "tokens",
    "lora_bias",
    # peft up to 0.21 adds the update of out_proj twice: github.com/huggingface/peft/pull/3774
    "attention",
    "attention and more",
)


def base_model(**options):
    torch.manual_seed(0)
    return Model(**options).eval()


def trained(config, **options):
    """A peft model whose trainable parameters are random."""
    model = peft.get_peft_model(base_model(**options), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def lora(case):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **CASES[case]})


def peft_delta(layer):
    return layer.get_delta_weight("default").detach().numpy()


def our_deltas(adapter):
    """Updates by path, each in the layout of the base model's weight."""
    deltas, stacks = {}, {}
    for path, module in adapter.items():
        dense = np.asarray(module.dense())
        if module.kind.name == "expert":
            stacks.setdefault(path.partition("[")[0], []).append(dense)
        elif module.kind.name == "conv2d":
            deltas[path] = dense.reshape(len(dense), *module.kind.kernel)
        else:
            deltas[path] = dense.T if module.kind.transposed else dense
    return deltas | {path: np.stack(parts) for path, parts in stacks.items()}


def add_deltas(model, adapter):
    """The base model plus our updates."""
    for path, delta in our_deltas(adapter).items():
        path = path.replace(".base_layer", "")
        owner = model.get_submodule(path.rpartition(".")[0])
        target = getattr(owner, path.rpartition(".")[2])
        if not isinstance(target, nn.Parameter):
            target = target.in_proj_weight if "attention" in path[-9:] else target.weight
        with torch.no_grad():
            target += torch.from_numpy(delta.mT if target.shape != delta.shape else delta.copy())
    return model


def assert_close(ours, theirs, tolerance=1e-6):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def loaded(folder, model):
    """`PeftModel.from_pretrained`; a missing key would be a warning, hence an error."""
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    state = peft.utils.load_peft_weights(folder, device="cpu")
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    adapter_keys = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(adapter_keys) <= set(state)
    return model


@pytest.fixture
def _quiet():
    """Known remarks of peft on these configurations; the factors are not concerned."""
    with warnings.catch_warnings():
        for message in (
            r"The following (rank|alpha)_pattern keys did not match any targeted module",
            r"fan_in_fan_out is set to (True|False) but the target module",
            r"Unsupported layer type",
            r"lora with eva initialization used with low_cpu_mem_usage=False",
            r"Could not find a config file",
            r"Model has `tie_word_embeddings",
            r"Setting `save_embedding_layers`",
            r"Could not identify embedding layer",
            r"Adapter .default.: \d+ LoRA tensor\(s\) have invalid shape.*lora_B.bias",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("case", CASES)
def test_our_update_is_pefts(case, tmp_path):
    model = trained(lora(case))
    model.save_pretrained(tmp_path)
    ours = our_deltas(cm.load_peft(tmp_path))
    seen = set()
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, ParamWrapper):
            path = path.removesuffix(".base_layer") + f".{layer.parameter_name}"
        if isinstance(layer, LoraLayer):
            assert_close(ours[path], peft_delta(layer))
            seen.add(path)
    assert seen == set(ours)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case, tmp_path):
    original = trained(lora(case))
    original.save_pretrained(tmp_path / "in")
    adapter = cm.open_peft(tmp_path / "in")
    cm.save_peft(adapter, tmp_path / "out")
    model = loaded(tmp_path / "out", base_model())
    with torch.no_grad():
        outputs = model(*INPUTS)
        expected = original(*INPUTS)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert_close(ours, theirs, 2e-6)
        if case not in MORE:
            for ours, theirs in zip(
                add_deltas(base_model(), adapter)(*INPUTS), outputs, strict=True
            ):
                assert_close(ours, theirs, 2e-6)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("targets", [PAIR, PAIR[:1], PAIR[1:]], ids=["both", "up", "down"])
def test_experts_that_are_stored_transposed(targets, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    original = trained(config, transposed_experts=True)
    original.save_pretrained(tmp_path / "in")
    adapter = cm.load_peft(tmp_path / "in")
    for path, delta in our_deltas(adapter).items():
        layer = next(
            layer
            for layer in original.modules()
            if isinstance(layer, ParamWrapper) and path.endswith(layer.parameter_name)
        )
        assert_close(delta.mT, peft_delta(layer))
    cm.save_peft(adapter, tmp_path / "out")
    model = loaded(tmp_path / "out", base_model(transposed_experts=True))
    with torch.no_grad():
        assert_close(model(*INPUTS)[0], original(*INPUTS)[0], 2e-6)


@pytest.mark.usefixtures("_quiet")
def test_vera_becomes_lora(tmp_path):
    config = peft.VeraConfig(r=5, target_modules=["square", "block.up"], d_initial=0.3)
    original = trained(config)
    original.save_pretrained(tmp_path / "in")
    adapter = cm.load_peft(tmp_path / "in")
    for path, layer in original.base_model.model.named_modules():
        if isinstance(layer, VeraLayer):
            assert_close(adapter[path].dense(), peft_delta(layer))
    cm.save_peft(adapter, tmp_path / "out")
    model = loaded(tmp_path / "out", base_model())
    with torch.no_grad():
        assert_close(model(*INPUTS)[0], original(*INPUTS)[0], 2e-6)
        assert_close(add_deltas(base_model(), adapter)(*INPUTS)[0], original(*INPUTS)[0], 2e-6)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica"])
def test_initializations_that_keep_the_base_weights(init, tmp_path):
    base = base_model()
    options = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(r=4, target_modules=["square"], init_lora_weights=init, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    weight = model.base_model.model.block["square"].base_layer.weight
    assert torch.equal(weight, base.block["square"].weight)
    model.save_pretrained(tmp_path)
    cm.load_peft(tmp_path)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    model = trained(lora("linear")).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    adapter = cm.load_peft(tmp_path / "in")
    assert adapter.metadata.dtype == dtype
    for path, layer in model.float().base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            assert_close(adapter[path].dense(), peft_delta(layer))
    cm.save_peft(adapter, tmp_path / "out", dtype=dtype)
    state = peft.utils.load_peft_weights(tmp_path / "out", device="cpu")
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
