"""`lrai inspect NAME.lrai`: what an artifact holds, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from lrai_core import Artifact, Variant, certificates
from lrai_core.confidence import percent
from lrai_core.errors import shorten
from lrai_report.log import fused, logged
from lrai_report.terminal import out
from lrai_report.words import distance, figure

app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)
_LINE, _CELL = 2000, 400


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai inspect")


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")]) -> None:
    """Show an artifact: its variants, what was measured, its certificates; check its files."""
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    best = manifest.variant(manifest.chosen)
    made_for = f"{manifest.made_for(best)}, {manifest.target.threads} thread(s)"
    _say(f"  version {artifact.version}, for {made_for}", name=manifest.name)
    _say(f"made {manifest.created} by lrai {manifest.lrai_version}")
    if told := fused(logged(artifact)):
        _say(told)
    for side, specs in (("in", manifest.signature.inputs), ("out", manifest.signature.outputs)):
        for spec in specs:
            axes = "" if spec.batch_axis is None else f"  batch axis {spec.batch_axis}"
            axes += "" if spec.length_axis is None else f"  length axis {spec.length_axis}"
            _say(f"  {side:>3} {spec.name} {spec.datatype} {list(spec.shape)}{axes}")
    serving = {manifest.chosen: "chosen"} | dict.fromkeys(manifest.together, "beside it")
    columns = [_column(v, serving.get(v.id, "")) for v in manifest.variants]
    table = Table("", *(variant.id for variant in manifest.variants))
    for label in columns[0]:
        table.add_row(label, *(shorten(column.get(label, ""), _CELL) for column in columns))
    out.print(table)
    for c in certificates(artifact):
        said = f"issued {c.created} by {c.issuer}, says (lrai certificate check finds out)"
        _say(f"certificate {c.id}, {said}: {c.statement()}")


def _column(variant: Variant, serves: str) -> dict[str, str]:
    """Return what the table says of a variant, by row."""
    alone = sorted((p for p in variant.latency if p.rows == 1), key=lambda p: p.length)
    named = [point for point in variant.latency if point.named]
    largest = max(variant.latency, key=lambda p: (p.rows * max(p.length, 1), p.rows), default=None)
    points = {
        (p.rows, p.length): p
        for p in (*alone[:1], *alone[-1:], *named, *([largest] if largest else []))
    }
    column = {
        "": serves,
        "engine": variant.engine,
        "precision": variant.precision,
        "size": f"{variant.size_bytes / 1e6:.1f} MB",
    }
    for (rows, length), point in points.items():
        label = f"{rows} row{'s' * (rows > 1)}" + (f" x {length}" if length else "")
        column[label] = f"{figure(point.median_ms)} ms ± {figure(point.spread_ms / 2, 2)}"
    column["speed"] = f"{variant.speedup:.2f} x fp32"
    if gate := variant.gate:
        if gate.accuracy_loss is not None and gate.accuracy_loss_bound is not None:
            bound = f"at most {percent(gate.accuracy_loss_bound, 1)}"
            column["accuracy"] = f"loss {gate.accuracy_loss:.2%} ({bound}), {gate.measure}"
        elif gate.agreement is not None and gate.agreement_bound is not None:
            bound = f"at least {percent(gate.agreement_bound, -1)}"
            column["agreement"] = f"{gate.agreement:.2%} ({bound}) {gate.measure}"
        for one in gate.disparities:
            said = "insufficient data"  # then nothing was measured either
            if (widened := one.widened_bound) is not None:
                said = f"{one.variant:.2%}, wider by {percent(widened, 1)} at most"
            left = ", ".join(gate.groups.get(one.attribute, {}).keys() - set(one.groups))
            said += f"; too few rows of {left}" if left else ""
            column[f"{one.measure} by {one.attribute}"] = said
        column["differs by"] = ", ".join(
            f"{name} {distance(gate.difference[name])}" for name in ("p50", "p99")
        )
    column["batch effect"] = f"{variant.batch_effect:g}" if gate else "not measured"
    column["why"] = variant.why
    return column


def _say(line: str, *, name: str = "") -> None:
    words = shorten(line, _LINE)
    out.print(Text.assemble((shorten(name, _CELL), "bold"), words) if name else words)
