"""The group of commands that the modules beside this one add theirs to."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    help="Serve models with BentoML, through LRAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# What comes out of files is shown as it is: never read as markup. Lines hold commands to copy.
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@app.callback()
def group() -> None:
    """Have typer ask for the name of the command, though there is only one."""
