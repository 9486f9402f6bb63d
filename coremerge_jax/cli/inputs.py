"""Options for unlabelled inputs, and the models that read them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from coremerge_jax.errors import CoreMergeError, MismatchError
from coremerge_jax.io.outputs import fingerprint

if TYPE_CHECKING:
    from coremerge_jax.collecting.texts import Example
    from coremerge_jax.lora import Adapter
    from coremerge_jax.run import Progress

INPUTS = "--inputs"

inputs_option = partial(typer.Option, show_default=False, rich_help_panel="Inputs")

Inputs = Annotated[
    list[str] | None,
    inputs_option(
        INPUTS,
        metavar="FILE...",
        help="Unlabelled examples, one file for each adapter, in the same order: JSON lines with a "
        "text or a chat's messages (.jsonl), or plain text, one a line.",
    ),
]
Field = Annotated[
    str | None,
    inputs_option(
        "--field", metavar="NAME", help="Field of JSON lines. Default: text, or messages."
    ),
]
Tokens = Annotated[
    int | None,
    inputs_option(
        "--tokens",
        metavar="N",
        min=1,
        help="Read no further batch of a task after so many tokens. Default: all.",
    ),
]
BatchSize = Annotated[
    int, inputs_option("--batch-size", metavar="N", min=1, help="Examples at once. Default: 8.")
]
Length = Annotated[
    int,
    inputs_option("--length", metavar="N", min=1, help="Most tokens of an example. Default: 512."),
]
AllowMissing = Annotated[
    bool,
    inputs_option(
        "--allow-missing",
        help="Leave out modules whose inputs cannot be collected: all but linear layers.",
    ),
]
Device = Annotated[
    str | None,
    inputs_option(
        "--device",
        metavar="DEVICE",
        help="Device of torch, such as cpu or cuda:1. Default: a GPU if there is one.",
    ),
]


class TakesInputs(TyperCommand):
    """A command whose ``--inputs`` takes all that follows up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses arguments, in which each value has got an option of its own."""
        return super().parse_args(ctx, list(_repeated(args)))


def _repeated(args: Sequence[str]) -> Iterator[str]:
    """Yields arguments, with the option again before each of its further values."""
    option, values = "", 0
    for arg in args:
        if arg.startswith("-"):
            option, given, _ = arg.partition("=")
            values = len(given)
        else:
            values += 1
            if option == INPUTS and values > 1:
                yield INPUTS
        yield arg


@dataclasses.dataclass(frozen=True)
class Reading:
    """Unlabelled inputs that a base model is to read, and how.

    Attributes:
        base: a folder or Hugging Face id.
        files: the inputs, one file for each adapter.
        field: of JSON lines.
        tokens: the most of a task.
        length: the most tokens of an example.
        batch_size: number of examples at once.
        device: torch's.
        allow_missing: leave out modules that are no linear layers.
    """

    base: str
    files: Sequence[str]
    field: str | None
    tokens: int | None
    length: int
    batch_size: int
    device: str | None
    allow_missing: bool

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the inputs: contents of files, and what is read of them."""
        numbers = {x: getattr(self, x) for x in ("field", "tokens", "length", "allow_missing")}
        files = [fingerprint(Path(file).resolve()) for file in self.files]
        return {"base": self.base, "inputs": files, **numbers}

    def examples(self, adapters: "Sequence[Adapter]") -> "list[list[Example]]":
        """Returns the examples for each adapter.

        Raises:
            CoreMergeError: a file is broken; or they are more or fewer than adapters, or in another
                order.
        """
        from coremerge_jax.collecting.texts import check_order, read_examples

        check_order(self.files, [adapter.metadata.name for adapter in adapters])
        return [read_examples(file, field=self.field) for file in self.files]

    def run(
        self,
        function: str,
        adapters: "Sequence[Adapter]",
        examples: "Sequence[Sequence[Example]]",
        stage: "Progress",
        **options: Any,
    ) -> tuple[Any, Sequence[int]]:
        """Returns the result of a function of `torch_models`, and the number of texts it has read.

        Args:
            function: its name.
            adapters: the adapters.
            examples: for each of them.
            stage: display of the stages.
            **options: of the function.
        """
        with stage("load the model"):
            from coremerge_jax.collecting.torch_loading import Language

            language = Language(self.base, adapters, self.device)
            from coremerge_jax.collecting import torch_models

        texts = [0] * len(examples)
        with stage("read", total=sum(map(len, examples))) as advance, located_errors(self.base):

            def count(t: int) -> None:
                texts[t] += 1
                advance()

            sizes = {"size": self.batch_size, "length": self.length}
            batches = [
                language.batches(several, self.files[t], **sizes, advance=partial(count, t))
                for t, several in enumerate(examples)
            ]
            common = {"limit": self.tokens, "allow_missing": self.allow_missing}
            call = getattr(torch_models, function)
            return call(language.model, adapters, batches, **common, **options), texts


def load_agreement(reading: Reading, sources: Sequence[str]) -> "Callable[[Adapter], Any]":
    """Returns the function that compares a merge with its adapters, on unlabelled inputs.

    Args:
        reading: the inputs, and the model.
        sources: the adapters.
    """
    # JAX would take most of a GPU's memory, which the model needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.run import silent

    adapters = [open_adapter(source) for source in sources]
    examples = reading.examples(adapters)
    import coremerge_jax.collecting.torch_loading  # noqa: F401  # raises without torch

    @functools.cache
    def judge() -> "Callable[[Adapter], Any]":
        return reading.run("agreement_torch", adapters, examples, silent)[0]

    def run(merged: "Adapter") -> Any:
        own = judge()  # when all else has been checked
        with located_errors(reading.base):
            return own(merged)

    return run


def check_base(base: str, adapters: "Sequence[Adapter]") -> None:
    """Checks that a base model by its Hugging Face id can be that of adapters.

    Of a local folder, shapes and names of modules have to show it.

    Raises:
        MismatchError: an adapter names another.
    """
    from coremerge_jax.merging.base_names import is_local, same_base

    for adapter in adapters:
        named = adapter.metadata.base_model
        if named and not is_local(base) and not is_local(named) and not same_base(base, named):
            raise MismatchError(
                f"adapter {adapter.metadata.name!r} was trained on base model {named!r}, not on "
                f"{base!r}; if they are the same model, say so with --allow-other-base"
            )


@contextmanager
def located_errors(base: str) -> Iterator[None]:
    """Turns errors of a model, on inputs that it cannot read, into one line."""
    try:
        yield
    except CoreMergeError:
        raise
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise CoreMergeError(
            f"{base}: the model cannot read the inputs ({type(error).__name__}: {line:.300}); give "
            "its own tokenizer's files with it, or a smaller --length (COREMERGE_DEBUG=1 shows the "
            "traceback)"
        ) from error
