"""`coremerge collect`, and the judge of `coremerge sweep` that reads unlabelled inputs."""

import csv
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm
from coremerge_jax.collecting.texts import read_examples

TEXTS = {"math": ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"], "code": ["w9 w8", "w7 w6 w5"]}


@pytest.fixture
def files(tmp_path):
    """A file of JSON lines for each of two adapters."""
    for name, texts in TEXTS.items():
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines))
    return [tmp_path / f"{name}.jsonl" for name in TEXTS]


# --- Files of inputs ------------------------------------------------------------------------


def test_plain_text_and_json_lines(tmp_path, files):
    (tmp_path / "math.txt").write_text("\ufeff\n" + "\r\n".join(TEXTS["math"]))
    assert read_examples(tmp_path / "math.txt") == TEXTS["math"] == read_examples(files[0])
    chat = [{"role": "user", "content": "w1"}]
    lines = [{"id": 1, "messages": chat, "prompt": "w2"}, {"messages": chat, "prompt": "w3"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_examples(tmp_path / "chat.jsonl") == [chat, chat]
    assert read_examples(tmp_path / "chat.jsonl", field="prompt") == ["w2", "w3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: is empty"),
        ("x.txt", b"\n \n", "x.txt: is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not valid JSON"),
        ("x.jsonl", b'\n"a"', 'x.jsonl, line 2: is "a"; expected an object on each'),
        ("x.jsonl", b'{"texts": "a"}', "no field 'text'; nearest is 'texts'; name the one"),
        ("x.jsonl", b'{"text": 3}', "line 1: text is 3; expected a text, or messages"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}', "expected a text, or messages"),
        ("x.jsonl", b"[" * 99_999, "line 1: nested more than"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: has half of a character"),
        ("x.txt", b"a\n\xff", "x.txt, after line 0: not a text in UTF-8"),
        ("none.txt", None, "no such file"),
    ],
)
def test_broken_inputs_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(cm.FormatError) as caught:
        read_examples(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_has_no_fields(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(cm.CoreMergeError, match="plain text has no field 'prompt'"):
        read_examples(tmp_path / "x.txt", field="prompt")


# --- Usage ----------------------------------------------------------------------------------


def test_refusals_before_a_model_is_loaded(coremerge, save, files, tmp_path):
    math, code = save("math"), save("code")
    other, out = save("chat", base_model="org/other"), tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    base = ["--base", "org/base", "-o", out]
    inputs = ["--inputs", *files]
    for args, code_, message in (
        ([math, code, *inputs], 2, "Missing option '--base'"),
        (["--base", "x", *inputs], 2, "Missing argument 'ADAPTER...'"),
        ([math, code, "--base", "x", *inputs], 2, "no output: give -o OUT"),
        ([math, code, *base], 2, "no inputs: give --inputs FILE..."),
        ([math, *base, *inputs], 2, "got 2 files for 1 adapters; expected one for each"),
        ([code, math, *base, *inputs], 2, "in the order math, code, and the adapters code, math"),
        ([math, code, *base, *inputs, "--tokens", 0], 2, "'--tokens'"),
        ([math, other, *base, *inputs], 1, "--allow-other-base"),
        ([math, code, "--base", "org/large", "-o", out, *inputs], 1, "not on 'org/large'"),
        ([math, code, *base, "--inputs", files[0], math], 1, "not a regular file"),
        ([math, code, *base, *inputs, "--source", "nothing"], 1, "nothing: no such folder"),
        ([math, tmp_path / "none", *base, *inputs], 1, "none: no such folder"),
        ([math, code, "--base", "x", *inputs, "-o", tmp_path / "mine"], 1, "already exists"),
        ([math, code, "--base", "x", *inputs, "-o", math, "--force"], 1, "is the input"),
        ([math, code, *base, *inputs, "--field", "words"], 1, "no field 'words'"),
        (
            [math, f"--inputs={files[0]}", files[1], "--base", "x", "-o", out],
            2,
            "got 2 files for 1",
        ),
    ):
        result = coremerge("collect", *args)
        assert (result.code, result.out) == (code_, ""), result.err
        assert message in result.err
        assert result.err.count("\n") == 1
    assert not out.exists()


def test_refusals_of_a_sweep(coremerge, adapters, files, tmp_path):
    sweep = ["sweep", *adapters[:2], "-o", tmp_path / "out", "--values", "scale=1,2"]
    inputs = ["--inputs", *files]
    for args, code, message in (
        (inputs, 2, "by --evaluate, or by --inputs and --base together"),
        (["--base", "x"], 2, "by --evaluate, or by --inputs and --base together"),
        ([*inputs, "--base", "x", "--evaluate", "x.py:f"], 2, "--evaluate"),
        (["--inputs", files[0], "--base", "x"], 2, "got 1 files for 2 adapters"),
    ):
        result = coremerge(*sweep, *args)
        assert (result.code, result.out) == (code, "")
        assert message in result.err
    assert not (tmp_path / "out").exists()


def test_without_torch_one_line_says_what_to_install(save, files, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from coremerge_jax.cli import main; main()"
    args = ["collect", save("math"), save("code"), "--base", "org/base", "-o", tmp_path / "out"]
    command = [sys.executable, "-c", code, *args, "--inputs", *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("torch is not installed: pip install 'coremerge-jax[torch]'\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- With a model ---------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(20))]
PROJECTIONS = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}
SHAPES = {f"model.layers.{i}.{name}": x for i in range(2) for name, x in PROJECTIONS.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a small random Llama with a tokenizer."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {word: i for i, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(WORDS),
            max_position_embeddings=16,
        )
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models")
        for place in (folder / "llama", folder / "bare"):
            transformers.LlamaForCausalLM(config).save_pretrained(place)
        fast.save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def given(save, models, files):
    """The arguments for two adapters, their inputs and their base."""
    adapters = [save(name, rank, SHAPES) for name, rank in (("math", 2), ("code", 3))]
    return [*adapters, "--base", models / "llama", "--inputs", *files]


oracle = pytest.mark.oracle


@oracle
@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")
def test_collects_what_a_merge_can_use(coremerge, given, models, tmp_path):
    import transformers

    from coremerge_jax.collecting.torch_models import collect_torch

    result = coremerge("collect", *given, "-o", tmp_path / "stats")
    assert (result.code, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert ["math", str(given[-2]), "3", "9"] in lines
    assert ["code", str(given[-1]), "2", "5"] in lines
    assert "collected modules 4: down_proj, q_proj in" in result.out
    found = cm.load_statistics(tmp_path / "stats")
    assert (found.adapters, found.source, set(found)) == (("math", "code"), "own", set(SHAPES))

    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "llama")
    batches = [
        [{"input_ids": torch.tensor([[WORDS.index(word) for word in text.split()]])}]
        for text in (" ".join(TEXTS["math"][:1]), TEXTS["code"][0])
    ]
    alone = collect_torch(model, [cm.load_peft(path) for path in given[:2]], batches)
    options = ["--tokens", 1, "--batch-size", 1, "-o", tmp_path / "first", "--json"]
    result = coremerge("collect", *given, *options)
    report = json.loads(result.out)
    assert [(x["texts"], x["tokens"]) for x in report["tasks"]] == [(1, 3), (1, 2)]
    for path, gram in cm.load_statistics(tmp_path / "first").items():
        assert distance(gram.matrices, alone[path].matrices) < 1e-5


@oracle
def test_sources_and_sizes(coremerge, given, tmp_path):
    assert coremerge("merge", *given[:2], "-o", tmp_path / "merged", "--rule", "mean").code == 0
    found = {}
    for source in ("own", "base", tmp_path / "merged"):
        options = ["--source", source, "-o", tmp_path / "out", "--force", "--full"]
        result = coremerge("collect", *given, *options)
        assert (result.code, result.err) == (0, "")
        statistics = cm.load_statistics(tmp_path / "out")
        found[statistics.source] = statistics
    assert list(found) == ["own", "base", "merged"]
    last = list(SHAPES)[-1]
    grams = [np.asarray(x[last].matrices) for x in found.values()]
    assert grams[0].shape == (2, 48, 48)
    assert min(distance(grams[0], grams[1]), distance(grams[2], grams[1])) > 1e-3
    result = coremerge("collect", *given, "--length", 2, "--json", "-o", tmp_path / "short")
    assert [x["tokens"] for x in json.loads(result.out)["tasks"]] == [5, 4]


@oracle
def test_chats_and_plain_text(coremerge, given, files, tmp_path):
    files[0].write_text(json.dumps({"messages": [{"role": "user", "content": "w1 w2"}] * 2}))
    files[1].with_suffix(".txt").write_text("w1 w2 " * 20)  # longer than the model can read
    result = coremerge(
        "collect", *given[:-1], tmp_path / "code.txt", "-o", tmp_path / "s", "--json"
    )
    assert [x["tokens"] for x in json.loads(result.out)["tasks"]] == [4, 16]


@oracle
def test_refusals_with_a_model(coremerge, save, given, models, files, tmp_path):
    out = ["-o", tmp_path / "out"]
    strange = save("strange", 3, {"model.layers.0.self_attn.wrong": (32, 32)})
    small = save("small", 2, {"model.layers.0.self_attn.q_proj": (32, 16)})
    inputs = ["--inputs", *files]
    for args, message in (
        ([*given[:3], models / "none", *inputs], "none: no such folder; expected a model"),
        ([*given[:3], models / "bare", *inputs], "bare: transformers cannot load it ("),
        ([*given, "--device", "gpu9"], "device 'gpu9': torch cannot use it"),
        ([given[0], strange, *given[2:]], "'model.layers.0.self_attn.wrong', nearest to '"),
        ([small, given[1], *given[2:]], "has 32 inputs and 32 outputs, and the adapter 16 and 32"),
    ):
        result = coremerge("collect", *args, *out)
        assert result.code in (1, 2)
        assert message in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@oracle
def test_a_sweep_without_labels(coremerge, given, tmp_path):
    out = tmp_path / "out"
    tried = ["--values", "scale=0,1,3", "--rule", "task_arithmetic"]
    result = coremerge("sweep", *given[:2], "-o", out, *tried, *given[2:])
    assert (result.code, result.err) == (0, "")
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["scale"] for row in rows] == ["0", "1", "3"]
    assert all(0 <= float(row["agreement"]) <= 1 and float(row["kl"]) > 0 for row in rows)
    best = max(rows, key=lambda row: float(row["agreement"]))
    assert json.loads((out / "best" / "coremerge.json").read_text())["recipe"]["scale"] == float(
        best["scale"]
    )
