"""Groups of modules that share their coefficients."""

import fnmatch
import re
from collections.abc import Sequence

from coremerge_jax.errors import MismatchError

# A number that is a whole part of a path, as in blocks.0 or blocks[0].
_NUMBER = re.compile(r"(?:(?<=[./_\[])|^)\d+\]?(?=[./_]|$)")


def groups_of(paths: Sequence[str], per: str | Sequence[str]) -> dict[str, str]:
    """Returns the name of each module's group.

    Args:
        paths: of the modules.
        per: ``"adapter"``: all modules are one group; ``"layer"``: those whose paths are equal up
            to the first number, where paths without a number form one group; ``"module"``: each by
            itself; or patterns of paths (as in `fnmatch`), of which the first that matches decides,
            and modules that match none form a group of their own.

    Raises:
        MismatchError: a pattern matches no module.
    """
    if per == "module":
        return {path: path for path in paths}
    if per == "adapter":
        return dict.fromkeys(paths, "*")
    if per == "layer":
        found = {path: _NUMBER.search(path) for path in paths}
        return {path: path[: x.end()] if x else "*" for path, x in found.items()}
    patterns = [per] if isinstance(per, str) else list(per)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise MismatchError(
                f"pattern {pattern!r} matches no module; module paths look like {paths[0]!r}"
            )
    return {
        path: next((x for x in patterns if fnmatch.fnmatchcase(path, x)), "*") for path in paths
    }
