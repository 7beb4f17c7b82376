"""`lrai config`: every setting, its value, and where that came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from lrai_core import explain_config
from lrai_report.terminal import out

app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai config")


@app.command()
def config(
    file: Annotated[Path | None, typer.Option(help="lrai.toml; by default the one here.")] = None,
) -> None:
    """Print every setting and where its value came from: as a table, or in a pipe one per line."""
    table = Table()
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for setting in explain_config(file=file):
        table.add_row(setting.key, str(setting.value), setting.origin)
        if not out.is_terminal:
            out.print(f"{setting.key} = {setting.value}  ({setting.origin})", soft_wrap=True)
    if out.is_terminal:
        out.print(table)
