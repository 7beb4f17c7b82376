"""The group of commands that the modules beside this one add theirs to."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    help="Serve compiled models in SageMaker: the container, the model's tar, a check of both.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # else the last line of an error is that of a box around it
    pretty_exceptions_enable=False,
)
# What comes out of files and servers is shown as it is: never read as markup.
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
