"""What a merge costs: operations and memory, from shapes alone."""

from coremerge_jax.rules import Chain, Equivariance
from coremerge_jax.rules.base import Function
from coremerge_jax.spaces import Space
from coremerge_jax.spaces.full import Full
from coremerge_jax.stack import Group

# Beyond this, a batch gains nothing: what it works on should stay in a cache or near it.
_BATCH_BYTES = 64 * 2**20


def module_bytes(group: Group, rule: Chain, space: Space) -> tuple[int, int]:
    """Memory that a module takes while it is merged.

    Returns:
        Bytes of its factors and its result, which all modules of a batch take at once, and of
        the work on it, which only one at a time takes (on CPU).
    """
    (m, n), total, tasks = group.shape, sum(group.ranks), len(group.ranks)
    stays = 2 * 4 * total * (m + n)
    p, q = (m, n) if isinstance(space, Full) else (min(m, total), min(n, total))
    dense = rule.equivariance != Equivariance.LINEAR and _is_dense(rule)
    work = 8 * (3 * total * (m + n) + (3 * tasks if dense else 0) * p * q + 24 * p * q)
    return stays, work


def _is_dense(rule: Chain) -> bool:
    """Whether the dense cores of all adapters are needed at once."""
    return bool(rule.before) or isinstance(rule.reducer, Function)


def batch_size(
    group: Group, rule: Chain, space: Space, workers: int, max_memory: int | None
) -> int:
    """How many modules of a group to merge at once.

    Raises:
        MemoryError: one module does not fit.
    """
    stays, work = module_bytes(group, rule, space)
    fair = -(-len(group.paths) // (2 * workers))
    if max_memory is None:
        return max(1, min(_BATCH_BYTES // stays, fair))
    each = max_memory // (workers + 1) - work
    if each < stays:
        raise MemoryError(f"needs {stays + work}")
    return max(1, min(each // stays, _BATCH_BYTES // stays, fair))
