"""Makes and runs pages as notebooks: ``python docs/notebook.py [PAGE ...]`` (extra ``docs``)."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent
NOTEBOOKS = {"tutorial": "tour", "language-model": "language-tour"}
"""Names of notebooks by those of pages."""


def cells(text: str) -> list[nbformat.NotebookNode]:
    """Returns a cell for each block of Python and for each text between, without outputs."""
    lines, found, end, above = text.splitlines(keepends=True), [], 0, None

    def add(make: Callable, source: str) -> None:
        if source.strip():
            found.append(make(source.strip(), id=f"cell-{len(found)}"))

    for token in MarkdownIt().parse(text):
        if token.type == "fence" and token.info == "python":
            add(new_markdown_cell, "".join(lines[end : token.map[0]]))
            add(new_code_cell, token.content)
            end = token.map[1]
        elif token.type == "fence" and token.info == "text" and above == "python":
            end = token.map[1]
        above = token.info
    add(new_markdown_cell, "".join(lines[end:]))
    return found


def write(page: str) -> None:
    """Writes the notebook of a page, with its outputs."""
    notebook = new_notebook(cells=cells((DOCS / f"{page}.md").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=where, coalesce_streams=True, timeout=None).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # when it ran
    nbformat.write(notebook, DOCS / f"{NOTEBOOKS[page]}.ipynb")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(DOCS.parent / "benchmarks")  # of the model
    for page in sys.argv[1:] or NOTEBOOKS:
        write(page)
