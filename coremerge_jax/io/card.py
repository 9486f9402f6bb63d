"""README.md and coremerge.json: where a merged adapter comes from."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from coremerge_jax.merging.base_names import is_local
from coremerge_jax.text import printable

# What Markdown acts on within a line: emphasis, links, images, code, cells, math.
_MARKUP = re.compile(r"[\\`*{}\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|(?<=www)\.")

# As `huggingface_hub.utils.validate_repo_id`, whose import would take as long as a small merge.
_HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)


def model_card(
    base_model: str | None, card: Mapping[str, Any], library: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Returns the text of README.md and the content of coremerge.json.

    Args:
        base_model: the model that is adapted.
        card: fields to write; ``"recipe"`` are the options of a merge, ``"sources"`` its adapters.
        library: the library that loads the adapter.
    """
    content = {"base_model": base_model, **card}
    fields = {
        "base_model": _hub_name(base_model),
        "library_name": library,
        "tags": ["lora", "merge", "coremerge"],
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    sources = content.get("sources", ())
    details = [
        f"| {_cell(name.replace('_', ' '))} | {_cell(value)} |"
        for name, value in content.items()
        if name not in ("recipe", "sources") and value is not None
    ]
    text = [
        "---",
        yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {'Merged LoRA adapter' if sources else 'LoRA adapter'}",
        "",
        "Written by coremerge-jax, which merges LoRA adapters in core space "
        "([arXiv 2509.17786](https://arxiv.org/abs/2509.17786)).",
        "",
        "| | |",
        "|---|---|",
        *details,
    ]
    if recipe := content.get("recipe"):
        # The sources below name the adapters; local paths are private.
        options = {name: value for name, value in recipe.items() if name != "adapters"}
        dumped, fence = yaml.safe_dump(options, sort_keys=False), "```"
        while fence in dumped:
            fence += "`"
        text += ["", "## Recipe", "", fence + "yaml", dumped + fence]
    if sources:
        text += ["", "## Sources", "", "| adapter | file | SHA-256 |", "|---|---|---|"]
        for source in sources:
            for file, digest in source.get("sha256", {"": ""}).items():
                text.append(f"| {_cell(source.get('name'))} | {_cell(file)} | {_cell(digest)} |")
    return "\n".join(text) + "\n", content


def _hub_name(base_model: str | None) -> str | None:
    """Returns a name ``owner/name``, else None: the hub refuses a card with a local path."""
    if not base_model or not base_model.isprintable():
        return None
    if "/" in base_model and is_local(base_model):
        return None
    return base_model if _HUB_NAME.fullmatch(base_model) else None


def _cell(value: Any) -> str:
    """Returns text of one line that Markdown shows as it is."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _MARKUP.sub(r"\\\g<0>", html.escape(printable(text), quote=False))
