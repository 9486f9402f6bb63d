"""Statistics from PyTorch models: those of inputs that plain hooks see in peft's own model."""

import copy
import warnings

import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch and transformers themselves.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

from coremerge_jax.collecting.torch_models import agreement_torch, collect_torch  # noqa: E402

torch.set_num_threads(1)  # more wait for each other where cores are busy

VOCAB, WIDTH, LENGTH = 40, 32, 7
SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"vocab_size": VOCAB, "num_attention_heads": 4}


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.5)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"),
    "bert": (bert, ["query", "dense"], "SEQ_CLS"),
    "gpt2": (gpt2, ["c_attn", "c_proj"], "CAUSAL_LM"),
}
RANKS = 2, 3


def batches(seed, count=3, *, padding=True):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(1, VOCAB, (4, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (4, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long() if padding else torch.ones_like(tokens)
        yield {"input_ids": tokens, "attention_mask": mask}


class Case:
    """A model, peft's of it with two adapters, and these as files."""

    def __init__(self, name, folder):
        make, targets, task_type = MODELS[name]
        torch.manual_seed(0)
        self.base = make().eval()
        self.model = None
        for t, rank in enumerate(RANKS):
            modules = targets if t == 0 else targets[:2]
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=modules,
                task_type=task_type,
                fan_in_fan_out=name == "gpt2",
            )
            if self.model is None:
                self.model = peft.get_peft_model(copy.deepcopy(self.base), config, f"task{t}")
            else:
                self.model.add_adapter(f"task{t}", config)
        for name, value in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
            elif "modules_to_save" in name:
                torch.nn.init.normal_(value, std=1.0)
        self.model.eval()
        self.model.save_pretrained(folder)
        self.adapters = [cm.load_peft(folder / f"task{t}") for t in range(len(RANKS))]

    def inputs(self, t, read, source="own"):
        """The inputs of each adapted module that count, by path, as plain hooks see them."""
        seen, mask = {}, None

        def hook(path):
            def keep(_, args):
                x = args[0].reshape(-1, args[0].shape[-1])
                if len(x) == mask.numel():
                    x = x[mask.flatten().bool()]
                seen.setdefault(path, []).append(x)

            return keep

        modules = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if hasattr(module, "base_layer")
        }
        handles = [
            module.register_forward_pre_hook(hook(path))
            for path, module in modules.items()
            if any(path in adapter for adapter in self.adapters)
        ]
        self.model.set_adapter(f"task{t}")
        with torch.no_grad():
            for batch in read:
                mask = batch["attention_mask"]
                if source == "own":
                    self.model(**batch)
                else:
                    with self.model.disable_adapter():
                        self.model(**batch)
        for handle in handles:
            handle.remove()
        return {path: torch.cat(x).numpy() for path, x in seen.items()}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("adapters"))


def read(**options):
    return [batches(t, **options) for t in range(len(RANKS))]


def snapshot(model):
    """All that might be changed in a model."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    about = [
        (x.training, len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()
    ]
    return state, about, [x.requires_grad for x in model.parameters()]


def assert_unchanged(model, before):
    state, *about = snapshot(model)
    assert about == list(before[1:])
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())


def assert_alike(x, y, tolerance=1e-5):
    assert (list(x), x.adapters, x.source) == (list(y), y.adapters, y.source)
    for path, gram in x.items():
        np.testing.assert_array_equal(gram.counts, y[path].counts)
        assert distance(gram.matrices, y[path].matrices) <= tolerance, path


@pytest.mark.parametrize("source", ["own", "base"])
@pytest.mark.parametrize("full", [False, True])
def test_are_those_of_the_inputs_in_pefts_model(case, source, full):
    before = snapshot(case.base)
    found = collect_torch(case.base, case.adapters, read(), source=source, full=full)
    assert_unchanged(case.base, before)
    assert (found.adapters, found.source) == (("task0", "task1"), source)
    assert set(found) == {path for adapter in case.adapters for path in adapter}
    inputs = [case.inputs(t, batches(t), source) for t in range(len(RANKS))]
    for path, gram in found.items():
        tasks = [t for t, adapter in enumerate(case.adapters) if path in adapter]
        a = np.concatenate([case.adapters[t][path].a for t in tasks])
        assert (gram.tasks, gram.ranks) == (tuple(tasks), tuple(RANKS[t] for t in tasks))
        for i, t in enumerate(tasks):
            z = inputs[t][path] if full else inputs[t][path] @ a.T
            assert gram.counts[i] == len(z)
            assert distance(gram.matrices[i], z.T @ z) < 1e-5, (path, t)
        assert gram.matrices.dtype == gram.counts.dtype == np.float32
        if full:
            assert gram.squares is None
        else:
            np.testing.assert_allclose(gram.squares, (a**2).sum(1), rtol=1e-6)


def test_pefts_own_model_is_read_without_its_adapters(case):
    expected = collect_torch(case.base, case.adapters, read())
    case.model.train()
    before = snapshot(case.model)
    found = collect_torch(case.model, case.adapters, read())
    assert_unchanged(case.model, before)
    case.model.eval()
    assert_alike(found, expected)


def test_own_and_base_differ(case):
    own, base = (collect_torch(case.base, case.adapters, read(), source=x) for x in ("own", "base"))
    last = list(own)[-1]
    assert distance(own[last].matrices, base[last].matrices) > 1e-2
    with pytest.raises(cm.MismatchError, match="source"):
        own + base


def test_padding_has_no_effect(case):
    def padded(read):
        for batch in read:
            more = {"input_ids": 5, "attention_mask": 0}
            yield {
                name: torch.nn.functional.pad(x, (0, 3), value=more[name])
                for name, x in batch.items()
            }

    expected = collect_torch(case.base, case.adapters, read())
    found = collect_torch(case.base, case.adapters, [padded(x) for x in read()])
    assert_alike(found, expected)


def test_parts_add_up(case):
    whole = [list(x) for x in read()]
    parts = [
        collect_torch(case.base, case.adapters, [x[part] for x in whole])
        for part in (slice(0, 1), slice(1, None))
    ]
    assert_alike(sum(parts), collect_torch(case.base, case.adapters, whole))


def test_a_merge_of_one_adapter_is_that_adapter(case):
    first, *_ = case.adapters
    own = collect_torch(case.base, [first], [batches(0)])
    merged = collect_torch(case.base, [first], [batches(0)], source=first)
    assert merged.source == "merged"
    for path in own:
        np.testing.assert_allclose(merged[path].matrices, own[path].matrices, rtol=1e-5)


def test_a_limit_ends_with_the_batch_that_reaches_it(case):
    first = [next(x) for x in read()]
    expected = collect_torch(case.base, case.adapters, [[batch] for batch in first])
    for limit in (1, int(first[0]["attention_mask"].sum())):
        found = collect_torch(case.base, [case.adapters[0]], [batches(0)], limit=limit)
        assert found.counts[0] == expected.counts[0]


def test_agrees_with_itself(case):
    evaluate = agreement_torch(case.base, case.adapters, read())
    scores = [evaluate(adapter) for adapter in case.adapters]
    alone = [agreement_torch(case.base, [x], [batches(t)]) for t, x in enumerate(case.adapters)]
    for t, adapter in enumerate(case.adapters):
        assert alone[t](adapter) == {"agreement": 1.0, "kl": pytest.approx(0, abs=1e-6)}
        assert scores[t]["agreement"] < 1
        assert scores[t]["kl"] > 1e-3


def test_divergence_of_predictions(case, monkeypatch):
    """Also of a vocabulary of which the least likely tokens count as one."""
    monkeypatch.setattr("coremerge_jax.collecting.torch_models._ROWS", 5)
    first, second = case.adapters

    def logits(t):
        case.model.set_adapter(f"task{t}")
        for module in case.model.modules():
            if hasattr(module, "original_module"):
                module.set_adapter("task0")  # the head of the task at hand
        with torch.no_grad():
            parts = []
            for batch in batches(0):
                x = case.model(**batch).logits
                parts.append(x[batch["attention_mask"].bool()] if x.ndim == 3 else x)
        return torch.cat(parts)

    own, other = logits(0), logits(1)
    found = agreement_torch(case.base, [first], [batches(0)])(second)
    assert found["agreement"] == pytest.approx(
        (own.argmax(1) == other.argmax(1)).float().mean().item(), abs=1e-6
    )
    kl = torch.nn.functional.kl_div(
        other.log_softmax(1), own.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4)
    monkeypatch.setattr("coremerge_jax.collecting.torch_models._KEPT", 2)
    assert 0 < agreement_torch(case.base, [first], [batches(0)])(second)["kl"] <= kl.item() + 1e-6
