"""Merging in batches: nothing depends on them, and they stay within memory."""

import re

import jax
import jax.numpy as jnp
import pytest
from cases import WITHOUT_INPUTS
from helpers import assert_same, dense, narrow, plain_merge, plain_stream, random_adapters
from threadpoolctl import ThreadpoolController

import coremerge_jax as cm
from coremerge_jax.merging import batches
from coremerge_jax.merging.cost import cost
from coremerge_jax.merging.groups import group_modules
from coremerge_jax.merging.program import merge_stack
from coremerge_jax.merging.stacks import stack_factors

MODULES = {f"l.{i}.q": (8, 6) for i in range(5)} | {"o": (6, 9), "p": (9, 6)}
RULES = {
    "tsv, isotropize": cm.chain(cm.tsv(), cm.isotropize()),
    "dare, ties": cm.chain(cm.dare(), cm.ties()),
    "ties of the model": cm.ties(scope="model"),
    "mean": cm.mean(),
}
KEY = jax.random.key(0)


@pytest.fixture
def adapters():
    return random_adapters(MODULES, (2, 3))


def needed(adapters, rule, workers=None):
    """The least memory that a stream says it needs."""
    with pytest.raises(MemoryError, match=r"module .* needs .* MiB") as error:
        plain_stream(adapters, rule, key=KEY, max_memory=1)
    assert "are allowed" in str(error.value)
    chained = cm.chain(rule)
    costs = [cost(group, chained, cm.core()) for group in group_modules(adapters)]
    workers = workers or plain_stream(adapters, rule, key=KEY).workers
    return max(one.memory(workers, 1) for one in costs)


@pytest.mark.parametrize("name", narrow(RULES, ["dare, ties"], night=["tsv, isotropize"]))
def test_batches_change_nothing(adapters, name):
    rule = RULES[name]
    whole = plain_merge(adapters, rule, key=KEY)
    stream = plain_stream(adapters, rule, key=KEY, max_memory=needed(adapters, rule))
    parts = list(stream)
    assert len(parts) == len(stream) == len(MODULES)
    assert sorted(path for part in parts for path in part) == sorted(MODULES)
    merged = {path: dense(lora) for part in parts for path, lora in part.items()}
    assert_same(whole, merged, 1e-6)


@pytest.mark.wide
def test_fewer_workers_where_memory_is_short(adapters, monkeypatch):
    rule = RULES["tsv, isotropize"]
    whole = plain_merge(adapters, rule)
    monkeypatch.setattr(batches, "count_workers", lambda _: 4)
    for workers in (1, 2, 3, 4):
        limit = needed(adapters, rule, workers)
        stream = plain_stream(adapters, rule, max_memory=limit)
        assert stream.workers == workers
        assert stream.memory <= limit
        assert_same(whole, stream.collect(), 1e-6)


@pytest.mark.wide
def test_the_outline_is_that_of_the_result(adapters):
    for rule in RULES.values():
        outline = plain_stream(adapters, rule, key=KEY).outline
        merged = plain_merge(adapters, rule, key=KEY)
        assert list(outline) == list(merged)
        for path in merged:
            for found, expected in zip(
                jax.tree.leaves(outline[path]), jax.tree.leaves(merged[path]), strict=True
            ):
                assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_a_stream_goes_from_file_to_file(adapters, tmp_path):
    paths = [tmp_path / str(t) for t in range(len(adapters))]
    for adapter, path in zip(adapters, paths, strict=True):
        cm.save_peft(adapter, path)
    rule = RULES["tsv, isotropize"]
    cm.save_peft(plain_stream([cm.open_peft(path) for path in paths], rule), tmp_path / "out")
    expected = plain_merge([cm.load_peft(path) for path in paths], rule)
    assert_same(cm.load_peft(tmp_path / "out"), {p: dense(x) for p, x in expected.items()}, 1e-6)


def test_an_abandoned_stream_ends(adapters):
    for part in plain_stream(adapters, cm.mean()):
        assert part
        break


COSTLY = {name: make() for name, make in WITHOUT_INPUTS.items()} | {
    "tsv, isotropize": RULES["tsv, isotropize"],
    "dare, ties": RULES["dare, ties"],
    "tsv of a rank": cm.tsv(rank=4),
    "flatten, tsv": cm.chain(cm.flatten(), cm.tsv()),
    "pico, tsv, svc": cm.chain(cm.pico(), cm.tsv(), cm.svc()),
    "dare, tsv, svc": cm.chain(cm.dare(), cm.tsv(), cm.svc()),
    "prune, dare, cart": cm.chain(cm.prune(), cm.dare(), cm.cart()),
    "prune, iso_cts": cm.chain(cm.prune(), cm.iso_cts()),
    "prune, dc_merge": cm.chain(cm.prune(), cm.dc_merge()),
    "a function": cm.from_function(lambda cores: jnp.median(cores, axis=0)),
}
BY_DAY = ("mean", "ties", "tsv", "svc")
SPACES = {
    "balanced": cm.core(gauge="balanced"),
    "tucker": cm.tucker(rank=8),
    "knots": cm.knots(),
    "full": cm.full(),
}


@pytest.mark.parametrize(
    ("rule", "space"),
    [
        *(
            pytest.param(rule, cm.core(), marks=[] if name in BY_DAY else [pytest.mark.nightly])
            for name, rule in COSTLY.items()
        ),
        *(
            pytest.param(COSTLY[name], space, marks=pytest.mark.nightly)
            for space in SPACES.values()
            for name in ("ties", "sce", "tsv")
        ),
    ],
    ids=[*COSTLY, *(f"{name} in {space}" for space in SPACES for name in ("ties", "sce", "tsv"))],
)
@pytest.mark.parametrize(
    "shape",
    [(300, 200), *(pytest.param(x, marks=pytest.mark.nightly) for x in ((40, 50), (70, 80)))],
    ids=["tall", "saturated", "just saturated"],
)
def test_memory_is_not_underestimated(rule, space, shape):
    """Against what XLA says that the compiled program takes."""
    adapters = random_adapters({"q": shape}, (16,) * 6, dtype="float32")
    (group,) = group_modules(adapters)
    stream = plain_stream(adapters, rule, space=space, key=KEY)
    with stream._job.prepared(group, *stack_factors(group, adapters)) as (arrays, settings):
        lowered = merge_stack.lower(stream._job.rule, arrays, KEY, settings)
        used = lowered.compile().memory_analysis()
    (expected,) = stream.costs()
    assert used.temp_size_in_bytes <= expected.work
    assert used.argument_size_in_bytes + used.output_size_in_bytes <= expected.held + 1000


# --- What keeps programs on CPU from waiting for each other, and precise -----------------------


def program(shape=(5, 70, 50)):
    """Of a user who maps a module's merge over a stack, in float64."""
    ranks = (8, 8)

    def merge(a, b):
        return cm.core().project(a, b, ranks).merge(RULES["tsv, isotropize"]).dense()

    length, m, n = shape
    a, b = jnp.ones((length, 16, n)), jnp.ones((length, m, 16))
    return jax.jit(jax.vmap(merge)).lower(a, b)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of LAPACK")
def test_no_lapack_call_is_batched_even_under_vmap():
    with jax.enable_x64(True):
        text = program().compile().as_text()
    calls = [line for line in text.splitlines() if "lapack_" in line and "custom-call(" in line]
    assert calls
    for call in calls:
        shapes = [tuple(map(int, s.split(","))) for s in _shapes(call.split("custom-call(")[0])]
        assert all(len(shape) <= 2 or set(shape[:-2]) == {1} for shape in shapes), call


def _shapes(text):
    return re.findall(r"f(?:32|64)\[([\d,]+)\]", text)


def test_products_are_in_full_precision():
    products = [line for line in program().as_text().splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_lapack_has_one_thread():
    calls = ThreadpoolController().select(user_api="blas").info()
    own = [x["num_threads"] for x in calls if "scipy.libs" in x["filepath"]]
    assert set(own) <= {1}  # none where NumPy and SciPy share one copy
