"""`lrai sagemaker …`: serve in a container, package a model, check a container."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Run `lrai sagemaker ARGUMENTS`."""
    # Here, so that the supervisor, which is beside them, imports none of it.
    from lrai_sagemaker.commands import check, serve
    from lrai_sagemaker.commands.app import app

    del check, serve  # they have added their commands
    app(args=list(arguments), prog_name="lrai sagemaker")
