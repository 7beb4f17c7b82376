"""`lrai verify` and `lrai certificate check`: certificates, made and looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

import lrai_core
from lrai_core import Artifact, ConditionNotMet, Spec
from lrai_core.errors import shorten
from lrai_report.terminal import out

app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)
certificate_app: Final = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
_LINE: Final = 2000
_BEFORE: Final = " Choose it before you look: the bound holds only then."


def main(arguments: Sequence[str]) -> None:
    """`lrai verify`: issue a certificate of an artifact, on the rows that it keeps."""
    app(args=list(arguments), prog_name="lrai verify")


def main_certificate(arguments: Sequence[str]) -> None:
    """`lrai certificate`: check a certificate again, on any machine."""
    certificate_app(args=list(arguments), prog_name="lrai certificate")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")],
    epsilon: Annotated[float, typer.Option(help="Largest difference, after the output map.")],
    variant: Annotated[str, typer.Option(help="Variant; by default the chosen one.")] = "",
    radius: Annotated[float, typer.Option(help="Noise around each row; 0: the rows.")] = 0.0,
    samples: Annotated[int, typer.Option(help=f"Draws of noise.{_BEFORE}")] = 1000,
    seed: Annotated[int, typer.Option(help=f"Of the draws.{_BEFORE}")] = 0,
) -> None:
    """Certify statistically how far a variant is from the source model, on kept rows.

    The certificate is kept in the artifact, beside those that are there.
    """
    spec = Spec(epsilon=epsilon, variant=variant, radius=radius, samples=samples, seed=seed)
    for certificate in lrai_core.verify(Artifact.open(path), spec):
        _say(f"certificate {certificate.id}: {certificate.statement()}")


@certificate_app.callback()
def _certificate() -> None:
    """Work with certificates."""


@certificate_app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Certificate, a JSON file.")],
    artifact: Annotated[Path, typer.Option(help="The artifact it speaks of.")],
    source: Annotated[
        Path | None, typer.Option(help="The original model; by default the artifact's copy.")
    ] = None,
) -> None:
    """Check a certificate: every field, and its sample, or a part of it, run again.

    Exit status 3: it does not hold here.
    """
    verdict = lrai_core.check(file, artifact, source=source)
    for line in verdict.confirmed:
        _say(line, mark=("ok", "green"))
    for line in verdict.objections:
        _say(line, mark=("no", "red"))
    if not verdict.holds:
        raise ConditionNotMet(f"certificate {verdict.certificate} does not hold here")
    _say(f"certificate {verdict.certificate} holds")


def _say(line: str, *, mark: tuple[str, str] | None = None) -> None:
    """Print a line, behind a mark in its style where one is given."""
    words = shorten(line, _LINE)
    out.print(Text.assemble(mark, f"  {words}") if mark else words)
