"""`lrai triton …`: install the backend, add and compile models, serve and watch a Triton."""

from __future__ import annotations

from collections.abc import Sequence

from lrai_core import EnvironmentProblem
from lrai_triton.commands import install, repository, serve, watch
from lrai_triton.commands.app import app

__all__ = ["install", "main", "repository", "serve", "watch"]


def main(arguments: Sequence[str]) -> None:
    """Run `lrai triton ARGUMENTS`."""
    try:
        app(args=list(arguments), prog_name="lrai triton")
    except (PermissionError, IsADirectoryError) as error:  # what is read may be anybody's
        raise EnvironmentProblem(str(error)) from None
