"""The site's pages: examples run; links, and options that are named, lead to what exists."""

import ast
import inspect
import itertools
import json
import re
from urllib.parse import urlsplit

import pytest
import typer.main
from pages import DOCS, ROOT, assert_alike, blocks, folder, read, run_page

import coremerge_jax as cm
from coremerge_jax.cli import app

__all__ = ["folder"]  # a fixture

PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
# In files of their own.
ELSEWHERE = {ROOT / "README.md", DOCS / "language-model.md", *DOCS.glob("howto/*.md")}


def name(page):
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE], ids=name)
@pytest.mark.usefixtures("folder")
def test_examples_run(page):
    run_page(page)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("folder")
def test_a_language_model_is_trained_and_merged():
    """On other machines, its page prints slightly other numbers."""
    pytest.importorskip("gguf")
    try:
        found = run_page(DOCS / "language-model.md", compare=False)
    except RuntimeError as error:  # no download
        pytest.skip(str(error))
    models = found["load"](found["base"]), found["model"], found["plain"]
    for batch in found["tests"].values():
        before, merged, folded = (found["accuracy"](model, batch) for model in models)
        assert before < 0.3
        assert merged > 0.8
        assert folded == pytest.approx(merged, abs=0.02)


def inline(page):
    return [part for token in read(page) for part in token.children or []]


def anchors(page):
    pairs = itertools.pairwise(read(page))
    titles = [text.content for heading, text in pairs if heading.type == "heading_open"]
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    for part in inline(page):
        target = part.attrs.get("href") or part.attrs.get("src")
        if not target:
            continue
        url = urlsplit(target)
        if url.scheme or url.netloc:
            assert url.scheme == "https", target
            assert "." in url.netloc, target
            continue
        file = page.parent / url.path if url.path else page
        assert file.exists(), target
        assert not url.fragment or url.fragment in anchors(file), target


OPTIONS = {
    option
    for command in typer.main.get_command(app).commands.values()
    for parameter in command.params
    for option in [*parameter.opts, *parameter.secondary_opts]
} | {"--version", "--install-completion"}


@pytest.mark.parametrize("page", sorted(ELSEWHERE), ids=name)
def test_options_that_are_named_exist(page):
    for part in inline(page):
        if part.type == "code_inline" and part.content.startswith("--"):
            assert re.match(r"[^ =]+", part.content)[0] in OPTIONS, part.content


@pytest.mark.parametrize(
    ("name", "page"), [("tour", "tutorial"), ("language-tour", "language-model")]
)
def test_a_notebook_is_its_page(name, page):
    """Its code is that of the page, it has run in order, and printed the same."""
    notebook = json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    python = [block for block in blocks(DOCS / f"{page}.md") if block.language == "python"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(python) + 1)]
    for cell, block in zip(cells, python, strict=True):
        assert "".join(cell["source"]) == block.code.rstrip()
        assert "error" not in {output["output_type"] for output in cell["outputs"]}
        printed = ["".join(output.get("text", "")) for output in cell["outputs"]]
        assert_alike("".join(printed), block.output or "")


NAMESPACES = [found for name in dir(cm) if inspect.ismodule(found := getattr(cm, name))]


def is_of(module, name):
    """Returns whether a namespace lists a name, or defines it if it has no list."""
    if hasattr(module, "__all__"):
        return name in module.__all__
    return getattr(getattr(module, name), "__module__", None) == module.__name__


PUBLIC = {f"coremerge_jax.{name}" for name in dir(cm)} | {
    f"{module.__name__}.{name}"
    for module in NAMESPACES
    for name in dir(module)
    if is_of(module, name)
}


def documented(page):
    """Returns the paths that a page of the reference shows."""
    return set(re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))


def named(page):
    """Yields the paths in a page's prose, and those that its code imports."""
    for part in inline(page):
        if part.type == "code_inline":
            yield from re.findall(r"\bcoremerge_jax(?:\.\w+)+", part.content)
    for block in blocks(page):
        if block.language == "python":
            yield from imported(block.code)


def imported(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        else:
            continue
        yield from (path for path in paths if path.startswith("coremerge_jax."))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=name
)  # which names what has moved
def test_documented_paths_are_public(page):
    assert documented(page) | set(named(page)) <= PUBLIC


def test_the_reference_has_every_public_name():
    paths = set().union(*map(documented, DOCS.glob("api/*.md")))
    assert set(cm.__all__) <= {path.rpartition(".")[2] for path in paths}
