import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import coremerge_jax as cm
from coremerge_jax import demo
from coremerge_jax.demo.data import DATA, questions
from coremerge_jax.demo.model import forward

METHODS = [("mean", "core"), ("ties", "core"), ("tsv", "core"), ("tsv + isotropize", "core")]


@pytest.fixture(scope="module")
def adapters():
    return {path.name: cm.load_peft(path) for path in demo.adapters()}


@pytest.fixture(scope="module")
def alone(adapters):
    return {task: demo.evaluate(adapter)[task] for task, adapter in adapters.items()}


@pytest.fixture(scope="module")
def records():
    return demo.run(METHODS)


def test_splits_are_disjoint_and_hold_all_classes():
    validation, test = demo.images("validation"), demo.images("test")
    assert validation[0].shape == (297, 8, 8)
    assert test[0].shape == (500, 8, 8)
    for images, labels in (validation, test):
        assert 0 <= images.min() < images.max() <= 1
        assert set(labels.tolist()) == set(range(10))
    distinct = {image.tobytes() for image in np.concatenate([validation[0], test[0]])}
    assert len(distinct) == 797


def test_shipped_files_are_small():
    sizes = [path.stat().st_size for path in DATA.rglob("*") if path.is_file()]
    assert max(sizes) < 300_000
    assert sum(sizes) < 500_000


def test_adapters_have_mixed_ranks_and_scalings(adapters):
    assert list(adapters) == list(demo.TASKS)
    assert len({adapter.metadata.rank for adapter in adapters.values()}) > 1
    for adapter in adapters.values():
        assert adapter.metadata.alpha != adapter.metadata.rank
        assert {lora.rank for lora in adapter.values()} == {adapter.metadata.rank}


def test_each_adapter_masters_its_task_and_the_base_model_does_not(alone):
    base = demo.evaluate()
    assert all(accuracy > 0.9 for accuracy in alone.values()), alone
    assert all(base[task] < alone[task] - 0.2 for task in demo.TASKS), base


def test_base_model_reads_plain_digits():
    images, labels = demo.images("test")
    assert jnp.mean(forward(demo.base(), images).argmax(axis=-1) == labels) > 0.95


def test_data_may_be_asked_for_first_inside_jit():
    for ask in (demo.base, demo.images, questions):
        ask.cache_clear()
        jax.jit(lambda ask=ask: jax.tree.leaves(ask())[0] * 1)()
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(ask()))


def test_transforms_keep_shape_and_dtype():
    images, _ = demo.images("test")
    for task, transform in demo.TASKS.items():
        shown = transform(images)
        assert (shown.shape, shown.dtype) == (images.shape, images.dtype), task
        assert np.abs(shown - images).max() > 0.3, task


def test_evaluating_an_adapter_equals_folding_its_dense_updates(adapters):
    adapter = adapters["tilt"]
    weights = dict(demo.base())
    for path, lora in adapter.items():
        update = np.asarray(lora.b, np.float64) @ np.asarray(lora.a, np.float64)
        kernel = np.asarray(weights[f"{path}.kernel"], np.float64) + 0.7 * update.T
        weights[f"{path}.kernel"] = jnp.asarray(kernel, jnp.float32)
    images, labels = demo.images("test")
    found = demo.evaluate(adapter, scale=0.7)
    for task, transform in demo.TASKS.items():
        expected = jnp.mean(forward(weights, transform(images)).argmax(axis=-1) == labels)
        assert found[task] == pytest.approx(float(expected), abs=0.0041)  # two images of 500


def test_run_gives_a_finite_record_for_each_method(records, alone):
    assert [r.name for r in records] == [
        "base model",
        "one adapter per task",
        *(rule for rule, _ in METHODS),
    ]
    for record in records:
        assert list(record.accuracy) == list(demo.TASKS)
        assert np.isfinite([*record.accuracy.values(), record.average, record.normalized]).all()
    assert records[1].accuracy == alone
    assert records[1].normalized == 1.0


def test_good_rules_in_core_space_beat_the_mean(records):
    mean, *others = [record for record in records if record.space]
    assert all(record.average > mean.average + 0.05 for record in others)
    assert max(record.average for record in others) > mean.average + 0.15


def test_run_reports_progress_and_unlisted_methods_have_scale_one():
    seen = []
    records = demo.run([("ties:density=0.5 + isotropize", "core")], progress=seen.append)
    assert seen == [record.name for record in records]
    assert records[-1].scale == 1.0


def test_shipped_scales_are_those_of_the_methods():
    scales = json.loads((DATA / "scales.json").read_text())
    assert list(scales) == [f"{rule} in {space}" for rule, space in demo.METHODS]
    assert scales["mean in core"] == 1.0


def test_table_shows_every_record(records):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(demo.table(records))
    text = capture.get()
    for word in ("base model", "one adapter per task", "tsv + isotropize", *demo.TASKS, "core"):
        assert word in text
    assert demo.table(records[:2]).row_count == 2
