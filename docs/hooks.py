"""MkDocs hooks of this site: pages from outside of docs/, help of the commands, equations."""

import functools
import html
import posixpath
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import typer.main
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from coremerge_jax.cli import app

ROOT = Path(__file__).parents[1]
# By their path in the repository, where links lead to, their path in the site.
OUTSIDE = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.txt",
} | {
    (path := file.relative_to(ROOT).as_posix()): path
    for file in sorted(ROOT.glob("benchmarks/results/*/*"))
}
FONT = Path(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf"))
LINK = re.compile(r"(\]\()(?!#|[a-z]+:)([^)#\s]+)")
EQUATION = re.compile(r'<(div|span) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that are not in docs/, and a font for equations."""
    for file, uri in [*OUTSIDE.items(), (FONT, f"assets/{FONT.name}")]:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Puts the commands' help into its page, and makes links those of the site."""
    return _with_site_links(markdown.replace("<!-- help of each command -->", _help()), page)


@functools.cache
def _help() -> str:
    def of(command: str) -> str:
        shown = CliRunner().invoke(
            app, [command, "--help"], prog_name="coremerge", env={"COLUMNS": "88"}
        )
        return f"## `{command}`\n\n```text\n{shown.output.strip()}\n```"

    return "\n\n".join(map(of, typer.main.get_command(app).commands))


def _with_site_links(markdown: str, page: Page) -> str:
    inside = {uri: path for path, uri in OUTSIDE.items()}
    folder = posixpath.dirname(inside.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def in_site(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        uri = OUTSIDE.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(in_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Converts LaTeX to MathML, which browsers display without scripts."""

    def to_mathml(match: re.Match) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    return EQUATION.sub(to_mathml, content)
