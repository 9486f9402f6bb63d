"""Paths of an adapter's modules to names of a base model's tensors."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.checkpoint.peft.keys import unwrapped
from coremerge_jax.errors import MismatchError, nearest
from coremerge_jax.lora import Kind

_SHOWN = 3
_TRIED = 100  # prefixes; of real models, a few


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The name of the inner model, which a checkpoint may lack, or have in addition.

    Attributes:
        lacking: what the checkpoint's names lack, with its point.
        added: what they have in addition.
    """

    lacking: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint."""
        return self.added + name.removeprefix(self.lacking)

    def __str__(self) -> str:
        if self.added or self.lacking:
            return f"with {self.added!r}" if self.added else f"without {self.lacking!r}"
        return "as they are"


def find_tensors(
    modules: Mapping[str, Kind], tensors: Collection[str], where: str
) -> tuple[Prefix, dict[str, str]]:
    """Returns the tensor that each module adapts.

    As in transformers, the checkpoint may lack the name of the inner model (``transformer.``), or
    have it where the adapted model does not: in the same way for all modules.

    Args:
        modules: kind of each module, by path.
        tensors: names of the base model's tensors.
        where: the base model, for messages.

    Returns:
        What happens to the names, and the tensor of each module.

    Raises:
        MismatchError: some modules have no tensor, or there are several ways to find them.
    """
    found = {prefix: _find(modules, tensors, prefix) for prefix in _prefixes(modules, tensors)}
    whole = [prefix for prefix, names in found.items() if len(names) == len(modules)]
    if Prefix() in whole or len(whole) == 1:
        prefix = whole[0]
        return prefix, found[prefix]
    if whole:
        ways = ", or ".join(map(str, whole))
        raise MismatchError(
            f"{where}: the adapter's modules fit there in {len(whole)} ways ({ways}); "
            "train the adapter on the whole model, whose names are certain"
        )
    prefix = max(found, key=lambda prefix: len(found[prefix]))
    missing = [path for path in modules if path not in found[prefix]]
    expected = {path: prefix(_candidates(path, modules[path])[0]) for path in missing[:_SHOWN]}
    named = [
        f"{path!r}, nearest to {nearest_tensors(expected[path], tensors)}" for path in expected
    ]
    if len(missing) == len(modules):
        raise MismatchError(
            f"{where}: none of the adapter's {len(modules)} modules is in this model; the first "
            f"is {named[0]}; is it the right base?"
        )
    raise MismatchError(
        f"{where}: {len(missing)} of the adapter's {len(modules)} modules are not in this model: "
        f"{'; '.join(named)}; is it the right base?"
    )


def nearest_tensors(name: str, tensors: Iterable[str]) -> str:
    """Returns the tensors whose names are most like this one, for messages."""
    return ", ".join(map(repr, nearest(name, tensors, _SHOWN))) or "nothing: it has no tensors"


def _prefixes(modules: Iterable[str], tensors: Iterable[str]) -> list[Prefix]:
    """Ways in which names may differ, the most likely first."""
    firsts = dict.fromkeys(path.partition(".")[0] for path in modules if "." in path)
    tops = dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name)
    lacking = [Prefix(lacking=f"{first}.") for first in firsts]
    return [Prefix(), *lacking, *(Prefix(added=f"{top}.") for top in tops)][:_TRIED]


def _find(modules: Mapping[str, Kind], tensors: Collection[str], prefix: Prefix) -> dict[str, str]:
    found = {}
    for path, kind in modules.items():
        for name in _candidates(path, kind):
            if prefix(name) in tensors:
                found[path] = prefix(name)
                break
    return found


def _candidates(path: str, kind: Kind) -> tuple[str, ...]:
    if kind.name == "expert":
        return (experts.split_path(path)[0],)
    path = unwrapped(path)
    if kind.name == "linear":  # of a torch.nn.MultiheadAttention, whose weight is a parameter
        return f"{path}.weight", f"{path}.in_proj_weight"
    return (f"{path}.weight",)
