import os

# Before NumPy and JAX start: LAPACK calls of parallel test processes must not fight for cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=8,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    yield
    jax.clear_caches()
