"""Makes and runs the tutorial as a notebook: ``python docs/notebook.py`` (extra ``docs``)."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tour.ipynb"


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


def main() -> None:
    """Writes the notebook with its outputs."""
    notebook = new_notebook(cells=cells(PAGE.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # when it ran
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
