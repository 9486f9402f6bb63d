"""PyTorch models, whose modules are found by the names that adapters have for them."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from coremerge_jax.errors import CoreMergeWarning, MismatchError, RecipeError, UnsupportedError
from coremerge_jax.io.base_model.tensor_names import Names, Site, find_tensors
from coremerge_jax.io.module_paths import unwrapped
from coremerge_jax.lora import AdapterSource, LoRA
from coremerge_jax.text import short

# What peft adds to a model: parameters of adapters, trained copies, and the names of originals.
_ADDED = re.compile(r"\.(lora_|modules_to_save\b|trainable_tokens_)")
_ORIGINAL = re.compile(r"\.original_module(?=\.|$)")

_SHOWN = 3

# Gets a module, its arguments, and its output; what it returns, if anything, becomes the output.
Hook = Callable[[torch.nn.Module, tuple, dict, Any], Any]


class TorchModel:
    """A model to read inputs, without the adapters that peft has put into it.

    Args:
        model: a module that is called with the fields of a batch; or a `peft.PeftModel` of one.

    Attributes:
        module: the module to call.
        label: name of its class, for messages.

    Raises:
        RecipeError: it is no module.
        UnsupportedError: its weights have an adapter in them, or it has LoRA layers in a way that
            does not let them be turned off.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, torch.nn.Module):
            raise RecipeError(f"model: expected a torch.nn.Module, got {short(model)}")
        self._given = getattr(model, "_orig_mod", model)  # torch.compile's hooks are those at first
        self._is_peft = hasattr(self._given, "disable_adapter")
        self.module: torch.nn.Module = (
            self._given.get_base_model() if self._is_peft else self._given  # type: ignore[operator]  # of peft
        )
        self.label = type(self.module).__name__
        layers = [x for x in self.module.modules() if hasattr(x, "base_layer")]
        if any(getattr(layer, "merged", False) for layer in layers):
            raise UnsupportedError(
                f"{self.label}: an adapter is merged into its weights; call unmerge_adapter(), or "
                "load the base model again"
            )
        if layers and not self._is_peft:
            raise UnsupportedError(
                f"{self.label}: has layers of an adapter; give the base model without it, or the "
                "PeftModel"
            )
        self._tensors = dict(self._named_tensors())

    def _named_tensors(self) -> Iterator[tuple[str, tuple[torch.nn.Module, str]]]:
        """Yields the base model's parameters, by their names without peft."""
        for path, owner in self.module.named_modules(remove_duplicate=False):
            if _ADDED.search(f".{path}"):
                continue
            place = _ORIGINAL.sub("", unwrapped(f".{path}"))[1:]
            for name, _ in owner.named_parameters(recurse=False):
                yield f"{place}.{name}".removeprefix("."), (owner, f"{path}.{name}".strip("."))

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, to which inputs go."""
        return next(self.module.parameters()).device

    @property
    def name(self) -> str | None:
        """The name of the model that its configuration has, if any."""
        return getattr(getattr(self.module, "config", None), "name_or_path", None) or None

    @property
    def has_decoder_inputs(self) -> bool:
        """True for encoder-decoder models, whose modules do not all see the same inputs."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Turns off dropout, gradients and adapters while the context lasts."""
        modes = {module: module.training for module in self._given.modules()}
        gradients = {x: x.requires_grad for x in self._given.parameters()}
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if self._is_peft:
                    stack.enter_context(self._given.disable_adapter())  # type: ignore[operator]  # of peft
                self.module.eval()
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, needed in gradients.items():
                parameter.requires_grad_(needed)

    def run(self, batch: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
        """Returns the output for a batch.

        Args:
            batch: arguments by name; tensors are moved to the model's device.
            weights: values of parameters to use in place of the model's, by name.
        """
        device = self.device
        fields = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()
        }
        if weights:
            return torch.func.functional_call(self.module, dict(weights), (), fields)
        return self.module(**fields)

    def find(self, adapters: Sequence[AdapterSource], *, allow_missing: bool = False) -> "Found":
        """Returns the module of each module of adapters that have common names.

        Args:
            adapters: the adapters; factors are not read.
            allow_missing: leave out what is no linear layer.

        Raises:
            MismatchError: a module is not in the model, or has another shape there.
            UnsupportedError: a module is no linear layer, unless such are left out.

        Warns:
            CoreMergeWarning: some are left out.
        """
        loras = {path: lora for adapter in adapters for path, lora in adapter.outline.items()}
        kinds = {path: lora.kind for path, lora in loras.items()}
        names, sites = find_tensors(kinds, self._tensors, self.label)
        obstacles = {path: self._obstacle(lora, sites[path]) for path, lora in loras.items()}
        if others := {path: text for path, text in obstacles.items() if text}:
            self._leave_out(others, len(loras), allow_missing)
        found = {path: self._tensors[sites[path][0].tensor][0] for path in loras.keys() - others}
        for adapter in adapters:
            for path, lora in adapter.outline.items():
                self._check_shape(path, lora, found.get(path))
        there = {path: found[path] for path in loras if path in found}
        return Found(self, there, frozenset(loras), names)

    def _obstacle(self, lora: LoRA, sites: Sequence[Site]) -> str | None:
        """Returns why hooks do not see a module's inputs and outputs; None if they do."""
        site, (owner, name) = sites[0], self._tensors[sites[0].tensor]
        tensor = site.tensor.rpartition(".")[0]
        if site.index is not None:
            return f"is an expert in the parameter {site.tensor!r}"
        if len(sites) > 1:
            return f"is several modules, as {tensor!r}"
        if site.part != (0, 1):
            return f"is a part of {tensor!r}"
        layer = type(owner).__name__
        inside = isinstance(owner, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
        if name.rpartition(".")[2] != "weight" or inside:
            return f"is computed inside of {tensor.rpartition('.')[0] or layer!r}, not by a layer"
        if lora.kind.name in ("embedding", "conv2d") or _sizes(owner) is None:
            return f"is of class {layer}"
        return None

    def _leave_out(self, others: Mapping[str, str], total: int, allowed: bool) -> None:
        path, text = next(iter(others.items()))
        told = f"{len(others)} of {total} modules: {path!r} {text} in {self.label}"
        if not allowed:
            raise UnsupportedError(
                f"inputs cannot be collected of {told}; only those of linear layers can: leave the "
                "others out with allow_missing (--allow-missing)"
            )
        warnings.warn(f"left out {told}", CoreMergeWarning, stacklevel=4)

    def _check_shape(self, path: str, lora: LoRA, module: torch.nn.Module | None) -> None:
        sizes = None if module is None else _sizes(module)
        if sizes is not None and sizes != lora.shape:
            raise MismatchError(
                f"{self.label}: module {path!r} has {sizes[1]} inputs and {sizes[0]} outputs, and "
                f"the adapter {lora.shape[1]} and {lora.shape[0]}; is it the right base?"
            )

    def weights(
        self, names: Names, extras: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Returns an adapter's trained weights that replace parameters, and names of other extras.

        Args:
            names: those in the model, from `find`.
            extras: the adapter's. Those of a head may be of more or fewer labels.
        """
        found: dict[str, torch.Tensor] = {}
        others = []
        for name, value in extras.items():
            owner, place = self._tensors.get(names(name), (None, ""))
            there = None if owner is None else getattr(owner, place.rpartition(".")[2])
            if there is None or there.shape[1:] != value.shape[1:] or there.ndim != value.ndim:
                others.append(name)
            else:
                found[place] = as_tensor(value).to(there.device, there.dtype)
        return found, others


@dataclasses.dataclass(frozen=True)
class Found:
    """Modules of a model that adapters change, and those adapters' effect on them.

    Attributes:
        model: the model.
        modules: by the adapters' paths.
        paths: all modules of the adapters, also those that are left out.
        names: names of the model's tensors.
    """

    model: TorchModel
    modules: Mapping[str, torch.nn.Module]
    paths: frozenset[str]
    names: Names

    @contextlib.contextmanager
    def adapted(self, adapter: AdapterSource | None) -> Iterator[Mapping[str, torch.Tensor]]:
        """Adds an adapter's update to the outputs of its modules, while the context lasts.

        Yields:
            Values of parameters that the adapter replaces, for `TorchModel.run`.

        Warns:
            CoreMergeWarning: the adapter has trained weights that the model has no place for.
        """
        if adapter is None:
            yield {}
            return
        weights, others = self.model.weights(self.names, adapter.extras)
        if others:
            shown = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
            warnings.warn(
                f"adapter {adapter.metadata.name!r}: {self.model.label} reads inputs without the "
                f"adapter's {shown}",
                CoreMergeWarning,
                stacklevel=4,
            )
        loras = adapter.read(path for path in adapter if path in self.modules)
        with self.hooked((self.modules[path], _update(lora)) for path, lora in loras.items()):
            yield weights

    @contextlib.contextmanager
    def hooked(self, hooks: Iterable[tuple[torch.nn.Module, Hook]]) -> Iterator[None]:
        """Calls hooks after their modules, in order, while the context lasts."""
        with contextlib.ExitStack() as stack:
            for module, hook in hooks:
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def _sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """Returns the outputs and inputs of a linear layer; None for any other."""
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):  # Conv1D of GPT-2
        if hasattr(module, outputs) and hasattr(module, inputs):
            return getattr(module, outputs), getattr(module, inputs)
    return None


def _update(lora: LoRA) -> Hook:
    """Returns the hook that adds B A x to the output of a module."""
    a, b = as_tensor(lora.a), as_tensor(lora.b)

    def add(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        nonlocal a, b
        del module
        x = first_input(args, kwargs)
        a, b = a.to(x.device), b.to(x.device)
        return output + (x.float() @ a.T @ b.T).to(output.dtype)

    return add


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the input of a linear layer, from the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


def as_tensor(value: Any) -> torch.Tensor:
    """Returns an array of NumPy or JAX as a tensor in float32, on the host."""
    return torch.tensor(np.asarray(jax.device_get(value), np.float32))
