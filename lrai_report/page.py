"""`lrai report NAME.lrai`: what was tried, kept and measured, as one HTML page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lrai_core import Artifact, EnvironmentProblem, UsageError, Variant, certificates
from lrai_core.confidence import percent
from lrai_report.log import Event, logged, models
from lrai_report.template import PAGE
from lrai_report.terminal import out, write
from lrai_report.times import times
from lrai_report.words import distance, figure

_WIDTH, _HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 16.0, 44.0
_LEAST_GAP, _MOST_GAP = 1e-7, 1e3  # what is closer, or farther, is drawn there
_TICKS: Final = 5
_MOST_DOTS: Final = 200
_LINE: Final = 13.0
_FILES: Final = {"calibration": "SAMPLE.npz", "axes": "AXES.toml"}  # which nobody else has

app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(slots=True)
class Dot:
    """A form in the picture: how fast it is, how close, and where that is drawn."""

    form: str
    speedup: float
    gap: float
    x: float
    y: float
    label_y: float  # apart from those of others
    role: str  # chosen, kept, front (none is as fast and closer), or other


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis."""

    text: str
    at: float


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai report")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; NAME.html by default.")
    ] = None,
) -> None:
    """Write an HTML page: forms tried, the Pareto front, operators, accuracy, groups, environment.

    Where the time goes, by kind of operator, is measured now, if the artifact was made for a
    machine like this one.
    """
    path = path.resolve()
    artifact = Artifact.open(path)
    target = output or Path(f"{path.name.removesuffix('.lrai')}.html")
    if target.resolve().is_relative_to(path):
        raise UsageError(f"{target} would lie in the artifact, which holds its own files only: -o")
    write(target, page(artifact))
    out.print(f"written: {target}")


def page(artifact: Artifact) -> str:
    """Return the page of an artifact.

    Raises:
        ArtifactError: Its log cannot be read.
        EnvironmentProblem: The library that makes it is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise EnvironmentProblem("the page needs jinja2: pip install 'lrai[report]'") from None
    events = list(logged(artifact))
    manifest = artifact.manifest
    chosen = manifest.variant(manifest.chosen)
    dots = _dots(events, [v.id for v in manifest.variants], manifest.chosen)
    across, upward = _ticks(events)
    source = next((v.gate for v in manifest.variants if v.id == "fp32"), None)
    both = tuple(dict.fromkeys((manifest.variants[-1].id, chosen.id)))
    spent, unknown = times(artifact, tuple(map(manifest.variant, both)))
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    engine.filters.update(quote=shlex.quote, figure=figure, distance=distance, percent=percent)
    return engine.from_string(PAGE).render(
        artifact=artifact,
        manifest=manifest,
        chosen=chosen,
        before=source.groups if source and source is not chosen.gate else {},
        serving=[variant.id for variant in manifest.serving()],
        kept=[variant.id for variant in manifest.variants],
        made_for=manifest.made_for(chosen),
        certificates=[(c.id, c.statement()) for c in certificates(artifact)],
        tried=[event for event in events if event.event == "candidate"],
        notes=[event.why for event in events if event.event == "note"],
        operators=[event for event in events if event.event == "operator"],
        both=both,
        spent=spent,
        unknown=unknown,
        points=list(_points(manifest.variants)),
        dots=dots,
        frame={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT}
        | {"top": _TOP, "bottom": _HEIGHT - _BOTTOM},
        across=across,
        upward=upward,
        command=_command(artifact, events),
    )


def _points(variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Yield per shape that was measured the latency of each variant, and the bars to draw."""
    shapes = dict.fromkeys((p.rows, p.length) for v in variants for p in v.latency)
    for rows, length in sorted(shapes, key=lambda shape: shape[::-1]):
        found = {
            variant.id: point
            for variant in variants
            for point in variant.latency
            if (point.rows, point.length) == (rows, length)
        }
        most = max(point.median_ms for point in found.values())
        bars = [(name, point, 100 * point.median_ms / most) for name, point in found.items()]
        yield {"rows": rows, "length": length, "bars": bars}


def _dots(events: Sequence[Event], kept: Sequence[str], chosen: str) -> list[Dot]:
    """Return every form whose closeness was looked at, where it is drawn."""
    searched = _searched(events)
    right, (low, high) = _right(searched), _decades(searched)
    found = []
    for event in searched:
        better = any(other.speedup > event.speedup and other.gap <= event.gap for other in searched)
        form = event.form.partition(" ")[0]  # without the passes that were left out
        role = "other" if better else "front"
        role = "kept" if form in kept else role
        role = "chosen" if form == chosen else role
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * event.speedup / right
        up = max(_decade(event) - low, 0) / (high - low)
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * up
        found.append(Dot(event.form, event.speedup, event.gap, x, y, y + 4, role))
    line = 0.0
    for dot in sorted(found, key=lambda dot: dot.y):
        line = dot.label_y = max(dot.label_y, line + _LINE)
    return found


def _ticks(events: Sequence[Event]) -> tuple[list[Tick], list[Tick]]:
    """Return the marks of the axes, across and upward."""
    searched = _searched(events)
    right, (low, high) = _right(searched), _decades(searched)
    wide, tall = (_WIDTH - _LEFT - _RIGHT) / _TICKS, (_HEIGHT - _TOP - _BOTTOM) / (high - low)
    return (
        [Tick(f"{right * n / _TICKS:.3g}", _LEFT + wide * n) for n in range(_TICKS + 1)],
        [Tick(f"1e{n}", _HEIGHT - _BOTTOM - tall * (n - low)) for n in range(low, high + 1)],
    )


def _searched(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.event == "searched"][:_MOST_DOTS]


def _right(searched: Sequence[Event]) -> float:
    """Return the end of the axis: a multiple of what the marks part it by, 0.1 or more."""
    most = max((event.speedup for event in searched), default=1.0)
    return math.ceil(max(most, 1.0) * 1.05 * 10 / _TICKS) * _TICKS / 10


def _decades(searched: Sequence[Event]) -> tuple[int, int]:
    """Return the ends of the axis: one below the closest form but fp32, which is at the bottom."""
    decades = [_decade(event) for event in searched if event.form.partition(" ")[0] != "fp32"]
    low = math.floor(min(decades, default=0.0)) - 1
    return low, max(low + 2, math.ceil(max(decades, default=0.0)))


def _decade(event: Event) -> float:
    return math.log10(min(max(event.gap, _LEAST_GAP), _MOST_GAP))


def _command(artifact: Artifact, events: Sequence[Event]) -> str:
    """Return the command that makes such an artifact, as far as it tells."""
    manifest = artifact.manifest
    words = ["lrai", "compile", *models(events), "-o", f"{manifest.name}.lrai"]
    judged = [variant.gate for variant in manifest.variants if variant.gate]
    if judged:
        words += ["--evaluation", "ROWS.npz"]
        words += ["--metric", "top5"] if judged[0].measure.startswith("top5") else []
    told = (spec.output_map for spec in manifest.signature.outputs)
    maps = [one for one in told if one not in ("raw", "derived")]
    if maps:
        words += ["--output-map", maps[0]]
    if manifest.objective == "memory":
        words += ["--objective", "memory"]
    if calls := manifest.signature.calls:
        words += ["--calls", ",".join(f"{n}" + f"x{length}" * bool(length) for n, length in calls)]
    if manifest.demanded:
        words += ["--epsilon", f"{manifest.demanded[0]:g}", "--delta", f"{manifest.demanded[1]:g}"]
    for group in judged[0].groups if judged else ():
        words += ["--group", group]
    usual = Event("asked")
    asked = next((event for event in events if event.event == usual.event), usual)
    engines = [one for one in asked.engines or artifact.engines if one != "onnxruntime"]
    words += [word for engine in engines for word in ("--engine", engine)]
    numbers = ("max_accuracy_loss", "max_disparity", "keep_evaluation", "minutes", "seed")
    for name in (*_FILES, *numbers):
        if (value := getattr(asked, name)) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", _FILES.get(name, f"{value}")]
    least = 3 if engines else 2
    if (keep := asked.keep or max(least, len(manifest.variants))) != least:
        words += ["--keep", str(keep)]
    return shlex.join([*words, "--threads", str(manifest.target.threads)])
