"""Models and tokenizers of transformers, and batches of tokens for them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coremerge_jax.errors import CoreMergeError, FormatError, RecipeError, UnsupportedError
from coremerge_jax.io.folders import hub_answers, is_hub_id, split_id
from coremerge_jax.io.untrusted import check_path
from coremerge_jax.lora import Adapter

try:
    import torch
    import transformers
except ImportError as error:
    raise UnsupportedError(
        f"inputs are read by torch and transformers, and {error.name or error} is not installed: "
        "pip install 'coremerge-jax[torch]'"
    ) from error

from coremerge_jax.collecting.texts import Example

# transformers' class for PEFT's type of a task. Without one, it is that of the model's
# configuration, or the first of some that fits.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
_TRIED = ("AutoModelForCausalLM", "AutoModel")


class Language:
    """A model with its tokenizer.

    Args:
        base: a folder or Hugging Face id.
        adapters: adapters of the model, which tell of what kind it is.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or another name of torch's; by default a GPU if
            there is one.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.

    Raises:
        CoreMergeError: transformers cannot load it, or torch does not know the device.
    """

    def __init__(self, base: str, adapters: Sequence[Adapter], device: str | None = None) -> None:
        check_path(base)
        if not is_hub_id(base) and not Path(base).is_dir():
            raise FormatError(f"{base}: no such folder; expected a model of transformers")
        place = _find_device(device)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        source, options = (base, {}) if not is_hub_id(base) else split_id(base)
        options = {name: value for name, value in options.items() if value is not None}
        if is_hub_id(base) and not hub_answers():
            options["local_files_only"] = True  # type: ignore[assignment]  # else it would retry for long
        self._base = base
        self.tokenizer = self._load(transformers.AutoTokenizer, source, **options)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model = self._load_model(source, adapters, options).to(place).eval()
        self.model.config.use_cache = False
        if self.model.config.get_text_config().pad_token_id is None:  # classifiers find ends by it
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def _load_model(self, source: str, adapters: Sequence[Adapter], options: Any) -> Any:
        known = {x.metadata.task_type for x in adapters} - {None}
        names = [_CLASSES[x] for x in known if x in _CLASSES] if len(known) == 1 else []
        if not names:
            config = self._load(transformers.AutoConfig, source, **options)
            names = [x for x in config.architectures or () if _is_model(x)] or [*_TRIED]
        for name in names:
            try:
                model = getattr(transformers, name)
                # Pickle files can run code.
                return self._load(model, source, dtype="auto", use_safetensors=True, **options)
            except _NoSuchClassError:
                continue
        raise UnsupportedError(
            f"{self._base}: transformers has no {' or '.join(names)} of it; its model has to be "
            "one of language"
        )

    def _load(self, loader: Any, source: str, **options: Any) -> Any:
        """Returns what a class of transformers loads; errors are one line with the base's name."""
        try:
            return loader.from_pretrained(source, trust_remote_code=False, **options)
        except Exception as error:  # of any kind, as with broken files
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = lines[0] if lines else type(error).__name__
            if "Unrecognized configuration class" in text:
                raise _NoSuchClassError(text) from error
            raise FormatError(
                f"{self._base}: transformers cannot load it ({text:.300}); give a folder with "
                "config.json, safetensors and tokenizer files, or a Hugging Face id"
            ) from error

    def batches(
        self,
        examples: Sequence[Example],
        where: str,
        *,
        size: int = 8,
        length: int = 512,
        advance: Callable[[], None] = lambda: None,
    ) -> Iterator[dict[str, "torch.Tensor"]]:
        """Yields batches of tokens, padded on the right.

        Args:
            examples: texts, or messages of chats, for the tokenizer's template.
            where: their file, for messages.
            size: number of examples in a batch.
            length: the most tokens that are read of an example.
            advance: called for each example.

        Raises:
            UnsupportedError: there are chats, and the tokenizer has no template.
        """
        most = min(length, self._longest)
        for several in _chunks(examples, size):
            rows = [ids for x in several if (ids := self._encode(x, where)[:most])]
            for _ in several:
                advance()
            if rows:
                yield self._padded(rows)

    @property
    def _longest(self) -> int:
        """The most tokens that the model has positions for."""
        config = self.model.config.get_text_config()
        known = self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)
        return min(x for x in (*known, 2**31) if x)

    def _encode(self, example: Example, where: str) -> list[int]:
        if isinstance(example, str):
            return self.tokenizer(example, verbose=False)["input_ids"]
        try:
            text = self.tokenizer.apply_chat_template(example, tokenize=False)
        except Exception as error:  # of the template, which is anybody's
            line = " ".join(str(error).split())
            raise UnsupportedError(
                f"{where}: the tokenizer of {self._base} has no template for these messages "
                f"({line:.200}); give texts (--field)"
            ) from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, "torch.Tensor"]:
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in rows]),
        }


def _is_model(name: str) -> bool:
    """Returns True for the name of a class of models in transformers."""
    found = getattr(transformers, name, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


class _NoSuchClassError(CoreMergeError):
    """A class of transformers that has no model of this kind."""


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Yields lists of so many examples."""
    rest = iter(examples)
    while several := list(itertools.islice(rest, size)):
        yield several


def _find_device(name: str | None) -> "torch.device":
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).partition("\n")[0]
        raise RecipeError(
            f"device {name!r}: torch cannot use it ({line:.200}); give cpu"
        ) from error
    return device
