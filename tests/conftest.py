import gc
import itertools
import os
import zlib
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # more wait for each other where cores are busy
# Tests compile much and compute little. Each process compiles with one thread: there are as many
# processes as processors.
# Eight devices, for tests of meshes: `all_devices` shows them, all other tests see one.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.9."),
)
# One cache of compiled programs for this process, xdist's others, and the commands they start.
if "COREMERGE_TEST_CACHE" not in os.environ:
    _cache = TemporaryDirectory(prefix="coremerge-tests-")
    os.environ["COREMERGE_TEST_CACHE"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["COREMERGE_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Commands, and pages of the documentation, use all devices that there are.
SEEN = {name: getattr(jax, name) for name in ("devices", "local_devices", "device_count")}
jax.devices = lambda *args: SEEN["devices"](*args)[:1]
jax.local_devices = lambda *args, **options: SEEN["local_devices"](*args, **options)[:1]
jax.device_count = lambda *_: 1

TESTS = itertools.count()

# Tracing allocates much and leaves few cycles: default thresholds have it searched all the time.
gc.set_threshold(50_000)

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=8,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# Of `bash .ci/nightly`.
hypothesis.settings.register_profile(
    "nightly",
    hypothesis.settings.get_profile("default"),
    derandomize=False,
    database=None,
    max_examples=200,
    print_blob=True,
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items):
    for item in items:
        if "seed" in item.fixturenames or hypothesis.is_hypothesis_test(item.obj):
            item.add_marker("draws")


@pytest.fixture
def seed(request):
    """Another one for each test; and for each COREMERGE_TEST_SEED, which nightly runs set."""
    name = f"{os.environ.get('COREMERGE_TEST_SEED', 0)} {request.node.nodeid}"
    return zlib.crc32(name.encode())


@pytest.fixture
def all_devices(monkeypatch):
    """Eight devices, simulated by the processor."""
    for name, function in SEEN.items():
        monkeypatch.setattr(jax, name, function)


@pytest.fixture(autouse=True)
def _compiled_programs_do_not_pile_up():
    """Linux gives a process 65530 memory maps; JAX takes 50 to 170 for each program it compiles."""
    yield
    maps = Path("/proc/self/maps")
    looks = next(TESTS) % 8 == 0  # to read 20,000 lines takes as long as a small test
    if looks and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
