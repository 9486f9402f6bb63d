"""The benchmark of generative tasks: its texts and steps, on a tiny model, and its real model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from common.progress import Progress
from flax import nnx
from helpers import distance
from smollm import command, decoding, encoding, quick, scoring, study, tasks, training
from smollm import model as smollm
from smollm.encoding import Encoded

import coremerge_jax as cm

TINY = quick.Tiny()


@pytest.fixture(autouse=True)
def _lenient():
    """optax and flax promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


PREFIXES = [np.arange(3, 3 + n, dtype=np.int32) for n in (0, 2, 5)]


def random_examples(count, seed=0, prefixes=PREFIXES[:1]):
    rng = np.random.default_rng(seed)

    def tokens(most):
        return rng.integers(3, TINY.config.vocabulary, rng.integers(1, most)).astype(np.int32)

    found = []
    for i in range(count):
        prefix = prefixes[i % len(prefixes)]
        prompt = np.concatenate([prefix, tokens(18)])
        found.append(Encoded(prompt, tokens(8), len(prefix)))
    return found


def find(name):
    (found,) = (task for task in tasks.TASKS if task.name == name)
    return found


def write(folder, files):
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def calendar(language, days, months):
    wide = [{"wide": dict(enumerate(x))} for x in (days, months)]
    formats = {x: {"format": y} for x, y in zip(("days", "months"), wide, strict=True)}
    dates = {"dates": {"calendars": {"gregorian": formats}}}
    return json.dumps({"main": {language: dates}})


def test_dates_and_lists_are_made_from_files(tmp_path):
    months = [f"m{i}" for i in range(12)]
    counts = "".join(
        f"wo{chr(97 + i)}{chr(97 + j)}%1:0:: 1 5\n" for i in range(9) for j in range(9)
    )
    write(
        tmp_path,
        {
            "usr/share/wordnet/cntlist.rev": counts + "verb%2:0:: 1 9\nrare%1:0:: 1 1\n",
            "package/main/en/ca-gregorian.json": calendar("en", ["Sunday", "Monday"], months),
            "package/main/fr/ca-gregorian.json": calendar("fr", ["dimanche", "lundi"], months),
        },
    )
    parts = tasks.splits(find("dates"), tmp_path, lambda *_: 0)
    assert all({text.split()[-1] for text, _ in parts[x]} == set(months) for x in ("train", "test"))
    dates = list(find("dates").parse(tmp_path))
    assert len(dates) == 12 * 28
    assert dates[29] == [("Sunday 2 m1", "dimanche 2 m1"), ("Monday 2 m1", "lundi 2 m1")]
    lists = list(find("reverse").parse(tmp_path))
    assert len(lists) == 81 // tasks.POOL
    for group in lists:
        assert all(text.split()[::-1] == answer.split() for text, answer in group)
    first, second = ({word for text, _ in group for word in text.split()} for group in lists)
    assert not first & second
    assert not {"verb", "rare"} & (first | second)


def test_sums_are_right_and_no_pair_of_numbers_is_in_two_splits(tmp_path):
    task = find("sums")
    found = tasks.splits(task, tmp_path, lambda text: 10 * len(text))
    assert not any(found.values())  # these are longer than the task allows
    found = tasks.splits(task, tmp_path, lambda *_: 0)
    assert found == tasks.splits(task, tmp_path, lambda *_: 0)
    assert {name: len(x) for name, x in found.items()} == tasks.SIZES
    pairs = {}
    for name, examples in found.items():
        for text, answer in examples:
            assert eval(text) == int(answer)
            first, _, second = text.split()
            pairs.setdefault(frozenset((first, second)), set()).add(name)
    assert all(len(names) == 1 for names in pairs.values())


def test_numbers_have_their_words():
    expected = {0: "zero", 17: "seventeen", 40: "forty", 305: "three hundred five"}
    expected[9021] = "nine thousand twenty one"
    assert {number: tasks.words_of(number) for number in expected} == expected
    found = [group[0] for group in find("numbers").parse(None)]
    assert len({text for text, _ in found}) == len(found) == 9900
    assert ("one hundred", "100") in found


def test_every_task_has_a_source_a_licence_and_an_instruction_of_its_own():
    assert len({task.name for task in tasks.TASKS}) == len(tasks.TASKS) == 6
    assert len({task.instruction for task in tasks.TASKS}) == len(tasks.TASKS)
    assert all(tasks.licences()[task.source] for task in tasks.TASKS)
    task = find("sums")
    assert "".join(task.prompt("1 + 2")) == (
        f"<|im_start|>user\n{task.instruction}\n1 + 2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_examples_of_like_lengths_come_together_and_all_come_once():
    examples, places = random_examples(50, prefixes=PREFIXES), []
    for at, batch in encoding.batches(examples, 8):
        assert batch.tokens.shape[0] <= 8
        assert batch.tokens.shape[1] % encoding.STEP == 0
        assert batch.answers.shape[1] in encoding.ANSWERS
        for row, i in enumerate(at):
            example = examples[i]
            np.testing.assert_array_equal(batch.prefix, example.prefix)
            whole = np.concatenate([batch.prefix, batch.tokens[row]])
            n = len(example.tokens)
            np.testing.assert_array_equal(whole[:n], example.tokens)
            assert not whole[n:].any()
            np.testing.assert_array_equal(batch.answers[row][batch.mask[row]], example.answer)
            read = batch.tokens[row][batch.places[row]]  # each token follows the one before
            whole = np.concatenate([example.prompt, example.answer])
            np.testing.assert_array_equal(
                read[batch.mask[row]], whole[len(example.prompt) - 1 : -1]
            )
        places += at.tolist()
    assert sorted(places) == list(range(50))


LENGTH = 32
"""One length for all examples: programs are compiled once."""


def fill(tokens):
    """Tokens ``(1, LENGTH)`` with padding."""
    return np.pad(tokens, (0, LENGTH - len(tokens)))[None]


def greedy(program, prompt, count):
    """The likeliest tokens, one after the other."""
    tokens = fill(prompt)
    for place in range(len(prompt), len(prompt) + count):
        tokens[0, place] = np.argmax(program(tokens)[0, place - 1])
    return tokens[0, len(prompt) : len(prompt) + count]


def test_one_pass_over_right_answers_finds_what_greedy_decoding_gets_right():
    model = smollm.load(TINY)
    program = jax.jit(lambda tokens: model(tokens))
    examples, expected = [], []
    for i, example in enumerate(random_examples(24)):
        said = greedy(program, example.prompt, len(example.answer))
        answer = said.copy()
        if i % 3 == 1:  # one token is another
            place = i % len(answer)
            answer[place] = (answer[place] + 1) % TINY.config.vocabulary
        if i % 3 == 2:
            answer = example.answer
        examples.append(Encoded(example.prompt, answer))
        expected.append(np.array_equal(said, answer))
    exam = scoring.Exam(TINY, {"task": {"test": examples}}, jnp.float32)
    found = exam.answer(None, "test", ["task"])
    np.testing.assert_array_equal(found.correct["task"], expected)
    assert 8 <= sum(expected) < 16


def test_answers_in_form_begin_as_a_right_one():
    examples = random_examples(24)
    exam = scoring.Exam(TINY, {"task": {"test": examples}}, jnp.float32)
    starts = {x.answer[0] for x in examples}
    expected = [said[0] in starts for said in exam.decode(None, examples)]
    found = exam.answer(None, "test", ["task"]).in_form["task"]
    np.testing.assert_array_equal(found, expected)
    assert 0 < sum(expected) < 24


def test_own_answers_are_those_of_a_greedy_loop_over_single_tokens():
    model = smollm.load(TINY)
    program = jax.jit(lambda tokens: model(tokens))
    examples = random_examples(20)
    whole = [greedy(program, x.prompt, decoding.LONGEST) for x in examples]
    end = int(np.bincount(np.concatenate(whole)).argmax())  # so that many answers end
    expected = [decoding.until(end, x) for x in whole]
    lengths = {len(x) for x in expected}
    assert len(lengths) > 1
    assert {x[-1] == end for x in expected} == {True, False}
    exam = scoring.Exam(dataclasses.replace(TINY, end=end), {}, jnp.float32)
    for given in (examples, [Encoded(x.prompt, x.prompt[:1]) for x in examples]):
        found = exam.decode(None, given)  # right answers do not matter
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert end not in ours[:-1]


def test_uniform_batches_have_one_shape_and_their_masks_are_of_what_is_read():
    examples = random_examples(21)
    found = encoding.uniform(examples, 8)
    assert len({x.tokens.shape for x in found}) == 1
    assert [len(x.tokens) for x in found] == [8, 8]
    mask = np.concatenate([encoding.read_mask(x) for x in found])
    tokens = np.concatenate([x.tokens for x in found])
    for row, weights, example in zip(tokens, mask, examples[:16], strict=True):
        np.testing.assert_array_equal(row[weights], example.tokens)


def test_likelihoods_are_those_of_single_examples_without_padding():
    model = smollm.load(TINY)
    examples = random_examples(20, prefixes=PREFIXES)
    exam = scoring.Exam(TINY, {"task": {"test": examples}}, jnp.float32)
    found = exam.answer(None, "test", ["task"]).likelihood["task"]
    program, losses = jax.jit(lambda tokens: model(tokens)), []
    for example, mean in zip(examples, found, strict=True):
        logits = np.asarray(program(fill(example.tokens)), np.float64)[0]
        first, n = len(example.prompt) - 1, len(example.answer)
        rows = logits[first : first + n]
        own = rows[np.arange(n), example.answer] - scipy.special.logsumexp(rows, axis=1)
        np.testing.assert_allclose(mean, own.mean(), rtol=1e-4, atol=1e-5)
        losses.append(-own)
    batch = encoding.pad(examples, LENGTH, 12)
    mean = np.concatenate(losses).mean()
    np.testing.assert_allclose(encoding.answer_loss(model, batch), mean, rtol=1e-5)


def test_training_draws_each_example_once_before_any_twice():
    examples = random_examples(40, prefixes=PREFIXES[2:])
    drawn = list(training.batches(examples, 5, seed=1))
    assert len({batch.tokens.shape for batch in drawn}) == 1
    tokens = np.concatenate([batch.tokens for batch in drawn])[:40]
    length, shared = 5 + drawn[0].tokens.shape[1], 5
    rows = {encoding.pad([x], length, 12, shared).tokens.tobytes() for x in examples}
    assert {row.tobytes() for row in tokens} == rows
    again = list(training.batches(examples, 5, seed=1))
    np.testing.assert_array_equal(drawn[3].tokens, again[3].tokens)


def trained(adapted, rank=3, seed=0, dtype=None):
    model = smollm.load(TINY, rank, adapted, seed, dtype)
    return training.train(model, random_examples(64), seed, steps=6, rate=0.03)


@pytest.mark.parametrize("adapted", [smollm.ATTENTION, smollm.LINEAR])
def test_an_adapter_has_the_names_of_the_parameters_and_folds_into_them(adapted, tmp_path):
    adapter = trained(adapted)
    assert {path.split(".")[-1] for path in adapter} == set(adapted)
    assert len(adapter) == TINY.config.layers * len(adapted)
    cm.save_peft(adapter, tmp_path / "peft")
    adapter = cm.load_peft(tmp_path / "peft")
    model = smollm.load(TINY, 3, adapted)
    tokens = fill(random_examples(1)[0].tokens)
    base = np.asarray(model(tokens))
    cm.update_nnx(model, adapter)
    expected = np.asarray(model(tokens))
    assert distance(base, expected) > 0.01
    graph, state = nnx.split(smollm.load(TINY))
    folded = nnx.merge(graph, cm.fold_tree(state, adapter))
    assert distance(folded(tokens), expected) < 1e-5


def test_other_seeds_give_other_factors():
    first, second = (smollm.load(TINY, 3, seed=seed) for seed in (1, 2))
    one, two = (nnx.state(x, nnx.LoRAParam) for x in (first, second))
    different = jax.tree.map(lambda x, y: bool((x != y).any()), one, two)
    assert sum(jax.tree.leaves(different)) == len(jax.tree.leaves(one)) / 2  # B is 0


def test_products_in_bfloat16_have_the_derivatives_of_float32():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 16), (16, 8)))

    def total(x, w):
        return jnp.sum(jnp.sin(smollm.matmul(x, w)))

    expected = jax.grad(total, argnums=(0, 1))(x, w)
    found = jax.grad(total, argnums=(0, 1))(x, w.astype(jnp.bfloat16))
    plain = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))(x, w)
    for ours, low, theirs in zip(expected, found, plain, strict=True):
        assert distance(ours, theirs) < 1e-6
        assert 1e-6 < distance(low, theirs) < 0.02


def test_progress_says_what_is_left(monkeypatch):
    clock = iter([0, 10, 30, 40, 100])
    monkeypatch.setattr("common.progress.time.monotonic", lambda: next(clock))
    lines = []
    progress = Progress("work", lines.append)
    for done in (1, 3, 4, 10):
        progress(done, 10, ", fine")
    assert lines == ["work: 3 of 10, fine, 1.2 min left", "work: 10 of 10, fine, 0 s left"]


def test_the_command_trains_evaluates_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    quickly = ["--folder", str(tmp_path), "--quick"]
    assert command.main([*quickly, "train", "one", "--trainings", "1"]) == 0
    assert command.main([*quickly, "evaluate", "one", "--trainings", "1"]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["one"])
    _, _, base, own, *_ = row.split()
    assert float(own) > float(base) + 50

    def never(*_, **__):
        raise AssertionError("done twice")

    monkeypatch.setattr(study, "train", never)
    monkeypatch.setattr(scoring.Exam, "answer", never)
    assert command.main([*quickly, "evaluate", "one", "--trainings", "1"]) == 0
    assert row in capsys.readouterr().out
    assert command.main([*quickly, "train", "other"]) == 2


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_all_steps_are_done_once_and_published(tmp_path, monkeypatch, capsys):
    quickly = ["--folder", str(tmp_path), "--output", str(tmp_path / "out"), "--quick"]
    for step in command.STEPS:
        trainings = "0 1" if step in ("unlabelled", "retrained", "tables") else "0"
        assert command.main([*quickly, step, "--trainings", *trainings.split()]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out/smollm.json").read_text())
    sections = {"tasks", "paper", "differences", "small", "learned", "mixed", "spaces", "curve"}
    sections |= {"unlabelled", "variants", "inputs", "cuts", "scales", "own adapters", "retrained"}
    assert {name for name, rows in found.items() if rows} == sections | {"machine"}
    assert [len(row["trainings"]) for row in found["unlabelled"]] == 8 * [2]
    assert [len(row["trainings"]) for row in found["mixed"]] == [1, 1]
    assert [len(row["trainings"]) for row in found["retrained"]] == [2, 2, 2]
    (own,) = found["own adapters"]
    assert own["test"] == pytest.approx(np.mean(own["trainings"]), abs=1e-3)
    assert all(row["own adapter"] > row["base"] + 0.5 for row in found["tasks"])
    ways = {row["merge"]: row["test"] for x in ("unlabelled", "variants") for row in found[x]}
    assert ways["regmean"] > ways["inputs of another task"] + 0.2
    assert ways["regmean, distilled"] > ways["regmean"]
    text = (tmp_path / "out/smollm.md").read_text()
    assert "| regmean | core | scale 0.8 |" in text
    assert "tasks merged" in (tmp_path / "out/smollm.svg").read_text()

    def never(*_, **__):
        raise AssertionError("done twice")

    monkeypatch.setattr(study, "train", never)
    monkeypatch.setattr(scoring.Exam, "answer", never)
    monkeypatch.setattr(scoring.Exam, "decode", never)
    for step in command.STEPS:
        assert command.main([*quickly, step]) == 0
    assert json.loads((tmp_path / "out/smollm.json").read_text())["paper"] == found["paper"]


def test_ranks_are_mixed_over_all_linear_modules(tmp_path):
    mixed = quick.quick(tmp_path).mixed()
    mixed.steps = 2
    ranks = {
        name: {x.rank for x in cm.load_peft(mixed.adapter(name)).values()}
        for name in mixed.names[:2]
    }
    assert ranks == {"one": {16}, "two": {4}}
