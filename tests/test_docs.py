"""The site's pages: their examples run, and their links and the options that they name are there."""

import re
from urllib.parse import urlsplit

import pytest
import typer.main
from pages import DOCS, ROOT, folder, read, run_page

from coremerge_jax.cli import app

__all__ = ["folder"]  # a fixture

PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
ELSEWHERE = {ROOT / "README.md", *DOCS.glob("howto/*.md")}  # in files of their own


def name(page):
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE], ids=name)
def test_examples_run(folder, page):
    run_page(page)


def inline(page):
    return [part for token in read(page) for part in token.children or []]


def anchors(page):
    tokens = read(page)
    titles = [
        y.content for x, y in zip(tokens, tokens[1:], strict=False) if x.type == "heading_open"
    ]
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
