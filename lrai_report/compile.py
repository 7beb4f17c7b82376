"""`lrai compile`: make the fastest form of a model that agrees with it on your rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import typer

import lrai_core
from lrai_core import ConditionNotMet, UsageError
from lrai_core.errors import shorten
from lrai_report.inspect import inspect
from lrai_report.terminal import out, share_done

app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)
Fuse = Annotated[bool, typer.Option("--fuse", help="Several ONNX files as one, see lrai fuse.")]
Feed = Annotated[
    list[str] | None, typer.Option("--feed", help="With --fuse, see lrai fuse; repeatable.")
]
Slim = Annotated[bool, typer.Option("--slim", help="Only what serves here, see lrai slim.")]
_CALL: Final = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?")
# Why a form was not made that nobody could make of the model, here.
_MOOT: Final = ("nothing to quantise", "openvino cannot read", "this CPU has no")


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai compile")


@app.command()
def compile(
    models: Annotated[list[Path], typer.Argument(help="Model: a file, or a SavedModel.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, NAME.lrai.")],
    evaluation: Annotated[
        Path | None, typer.Option(help=".npz with an array per input, and 'label' where known.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Rows to make forms with.")] = None,
    metric: Annotated[str, typer.Option(help="What labels judge: top1 or top5.")] = "top1",
    output_map: Annotated[
        str, typer.Option(help="How outputs are compared: raw, softmax or l2_normalised.")
    ] = "raw",
    max_accuracy_loss: Annotated[float, typer.Option(help="As a share, judged by labels.")] = 0.01,
    epsilon: Annotated[float | None, typer.Option(help="Difference to allow and certify.")] = None,
    delta: Annotated[float, typer.Option(help="Share of inputs that may exceed it.")] = 0.01,
    group: Annotated[
        list[str] | None, typer.Option(help="Array that says who is in which group; repeatable.")
    ] = None,
    max_disparity: Annotated[
        float, typer.Option(help="By how much, as a share, groups may differ more than before.")
    ] = 0.01,
    axes: Annotated[
        Path | None, typer.Option(help="TOML that states the axes; see docs/architecture.md.")
    ] = None,
    calls: Annotated[
        str | None,
        typer.Option(
            help="Rows and length of the calls that come most, as 1x16,8x128; rows alone, as 1,8, "
            "where there is no length. OpenVINO is compiled for each: faster where calls are "
            "short, for the memory of the weights once more."
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="Choose by latency or memory.")] = "latency",
    keep: Annotated[
        int | None,
        typer.Option(
            help="How many variants to keep, counting fp32; with 3, two can share the calls. By "
            "default 2, with --engine 3.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Another engine to try: openvino; repeatable.")
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            max=4096,
            help="Engine threads to measure with; 0: as many as this machine would serve with.",
        ),
    ] = 0,
    keep_evaluation: Annotated[
        int | None,
        typer.Option(
            help="How many of the rows that judge to keep in the artifact, with labels and groups, "
            "in 256 MiB at most; 0: none. By default as many as 16 MiB hold."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Then stop, with the best so far.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows judge.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder to keep forms in, and to take them from after an interrupt or to judge by "
            "other conditions. Timings are always taken anew.",
        ),
    ] = None,
    fuse: Fuse = False,  # noqa: FBT002 - typer's way
    feed: Feed = None,
    slim: Slim = False,  # noqa: FBT002 - likewise
) -> None:
    """Compile a model to the fastest form that agrees with it on the evaluation rows.

    MODELS: an ONNX file; trees (.json, .ubj, .txt) or .skops; the folder of a SavedModel; a
    description (.toml); with --fuse, several ONNX files. Without --evaluation it is fp32 that you
    get, optimised.

    Exit status 3: no form but fp32 passed the gate and was faster. The artifact is written all the
    same, and serves fp32; its quantization.jsonl says why of each form. With --fuse, the status is
    3 where one model is no faster than several; then nothing is written.
    """
    if fuse == (len(models) == 1):
        several = f"{len(models)} models are given: --fuse makes one of them"
        raise UsageError("--fuse needs two models or more" if fuse else several)
    if feed and not fuse:
        raise UsageError("--feed goes with --fuse")
    with ExitStack() as stack:
        model = models[0]
        if fuse:
            model = Path(stack.enter_context(TemporaryDirectory(prefix="lrai-")), "fused.onnx")
            fed = [f"--feed={one}" for one in feed or ()]
            _run("fuse", *map(str, models), "-o", str(model), *fed)
        artifact = _compiled(
            model,
            output,
            calibration=calibration,
            evaluation=evaluation,
            metric=metric,
            output_map=output_map,
            max_accuracy_loss=max_accuracy_loss,
            epsilon=epsilon,
            delta=delta,
            groups=group or (),
            max_disparity=max_disparity,
            axes=axes,
            calls=_shapes(calls or ""),
            objective=objective,
            keep=keep,
            engines=engine or (),
            threads=threads or lrai_core.load_config().actor.threads,
            keep_evaluation=keep_evaluation,
            minutes=minutes,
            seed=seed,
            cache=cache,
        )
    if slim:
        _run("slim", str(output))
        artifact = lrai_core.Artifact.open(output, verify=False)  # with certificates of its own
    inspect(output)
    gate = artifact.manifest.variant(artifact.manifest.chosen).gate
    for one in lrai_core.certificates(artifact)[:1]:
        if gate is not None and one.samples < gate.rows:
            few = f"certified on {one.samples} of the {gate.rows} rows that judged it"
            out.print(f"{few}: those are kept; --keep-evaluation says how many", style="dim")
    if evaluation is not None and artifact.manifest.chosen == "fp32" and keep != 1:
        if all(event["why"].startswith(_MOOT) for event in _tried(artifact)):
            out.print("nothing in it can be quantised: fp32 serves, batched where that pays")
            return
        none = "no form but fp32 passed the gate and was faster; quantization.jsonl tells why"
        raise ConditionNotMet(none + closest(artifact))


def closest(artifact: lrai_core.Artifact) -> str:
    """Return what the gate said of the form that failed it by least, nothing if none was judged."""
    failed = [one for one in _tried(artifact) if "difference" in one and not one["kept"]]
    best = min(failed, key=lambda event: event["difference"]["p50"], default=None)
    return f"; closest was {best['form']}: {best['why']}" if best else ""


def _tried(artifact: lrai_core.Artifact) -> list[dict[str, Any]]:
    """Return what the compiler's log says of each form but fp32."""
    lines = artifact.file("quantization.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for line in lines if (event := json.loads(line))["event"] == "candidate"]
    return [event for event in events if event["form"].partition(" ")[0] != "fp32"]


def _shapes(told: str) -> list[tuple[int, int]]:
    """Return rows and length of each call."""
    found = [_CALL.fullmatch(one.strip()) for one in told.split(",") if one.strip()]
    if None in found:
        raise UsageError(f"--calls {shorten(told)!r}: rows and length are needed, as 1x16,8x128")
    return [(int(one[1]), int(one[2] or 0)) for one in found if one]


def _compiled(model: Path, output: Path, **options: Any) -> lrai_core.Artifact:
    """Compile, and show how far it is."""
    with share_done() as bar:
        task = bar.add_task("load", total=None)

        def show(step: lrai_core.Step) -> None:
            if step.name == "note":
                out.print(shorten(step.detail, 2000), style="dim")
            else:
                words = shorten(f"{step.name} {step.detail}".strip())
                bar.update(task, description=words, completed=step.done, total=step.total or None)

        return lrai_core.compile(model, out=output, progress=show, **options)


def _run(command: str, *arguments: str) -> None:
    """Run a command of another package; return where it ends well."""
    for entry in entry_points(group="lrai.commands", name=command):
        try:
            entry.load()(arguments)
        except SystemExit as end:
            if end.code:
                raise
