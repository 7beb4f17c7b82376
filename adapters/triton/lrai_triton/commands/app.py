"""The group of commands that the modules beside this one add theirs to."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

app = typer.Typer(
    help="Serve models of a Triton model repository through LRAI, or no longer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PROGRAM = (sys.executable, "-P", "-c", "from lrai_core.cli import main; main()")
END_SECONDS = 30.0  # for a program of ours that is told to end
BACKENDS = "/opt/tritonserver/backends"  # of NVIDIA's images
# What comes out of files is shown as it is: never read as markup. Lines hold paths and commands to
# copy, so they are not broken.
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
