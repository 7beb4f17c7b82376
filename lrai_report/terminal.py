"""What commands say, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lrai_core.errors import shorten

# What comes out of files is shown as it is: never read as markup, and without control characters.
out = Console(highlight=False, markup=False, emoji=False)


@contextmanager
def progress(words: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar; what it yields is called at every step."""
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(),
        console=out, transient=True, refresh_per_second=2, disable=not out.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(words, total=total or None)
        yield lambda: bar.advance(task)


def share_done() -> Progress:
    """Return a bar with the share that is done, for who sets it; it is drawn seldom, and cheap."""
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        console=out, transient=True, refresh_per_second=2, disable=not out.is_terminal,
    )  # fmt: skip


def say(label: str, words: str, style: str = "") -> None:
    """Print a line behind its label."""
    # Commands among the words are to be pasted: no line is broken.
    out.print(
        Text.assemble((f"{label:<12}", "bold"), (shorten(words, 2000), style)), soft_wrap=True
    )
