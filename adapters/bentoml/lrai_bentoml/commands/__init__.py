"""`lrai bentoml …`: write a service around a model, to be built into a Bento."""

from __future__ import annotations

from collections.abc import Sequence

from lrai_bentoml.commands import project as project
from lrai_bentoml.commands.app import app


def main(arguments: Sequence[str]) -> None:
    """Run `lrai bentoml ARGUMENTS`."""
    app(args=list(arguments), prog_name="lrai bentoml")
