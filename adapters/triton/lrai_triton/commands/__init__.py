"""`lrai triton …`: install the backend, add and compile models, serve and watch a Triton."""

from __future__ import annotations

from collections.abc import Sequence

from lrai_triton.commands import install, repository, serve, watch
from lrai_triton.commands.app import app

__all__ = ["install", "main", "repository", "serve", "watch"]


def main(arguments: Sequence[str]) -> None:
    """Run `lrai triton ARGUMENTS`."""
    app(args=list(arguments), prog_name="lrai triton")
