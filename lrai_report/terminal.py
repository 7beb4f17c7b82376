"""What commands say and write, and how far they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lrai_core import EnvironmentProblem
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


def write(file: Path, text: str, *, private: bool = False) -> None:
    """Write a text, to be this user's alone if it is `private`.

    Raises:
        EnvironmentProblem: The disk is full, read-only or not permitted.
    """
    try:
        place = file.resolve()  # a link stays one
        # A pipe, too, and so does what nothing may take the place of.
        bound = place.is_mount() or not os.access(place.parent, os.W_OK)
        if file.exists() and (not file.is_file() or (bound and not private)):
            file.write_text(text, encoding="utf-8")
            return
        with tempfile.TemporaryDirectory(prefix=".lrai-", dir=place.parent) as folder:
            new = Path(folder, place.name)
            with only_mine(on=private):
                new.write_text(text, encoding="utf-8")
            if place.exists() and not private:  # else it may be anybody's to read
                shutil.copymode(place, new)
            new.replace(place)  # somebody may have it open
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be written: {error.strerror}") from None


@contextmanager
def only_mine(*, on: bool) -> Iterator[None]:
    """Have what is written be this user's alone, as where it keeps some of the captured rows."""
    mask = os.umask(0o077) if on else None
    try:
        yield
    finally:
        if mask is not None:
            os.umask(mask)
