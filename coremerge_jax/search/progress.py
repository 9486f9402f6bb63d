"""Line of progress on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from coremerge_jax.foreign_text import printable, shortened


@contextmanager
def progress_line(text: str, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Shows a line, where stderr is a terminal; the given function changes its text."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    hidden = not (wanted and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(text)
        yield lambda text: bar.update(task, description=shortened(printable(text), 200))
