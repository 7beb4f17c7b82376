"""`lrai triton …`: install the backend, add and compile models, serve and watch a Triton."""

from __future__ import annotations

from collections.abc import Sequence

from lrai_triton.commands import install as install
from lrai_triton.commands import repository as repository
from lrai_triton.commands import supervise as supervise
from lrai_triton.commands.app import app


def main(arguments: Sequence[str]) -> None:
    """Run `lrai triton ARGUMENTS`."""
    app(args=list(arguments), prog_name="lrai triton")
