"""The command line: thin over the Python API; what it prints is for a person.

Exit codes: 0 ok, 1 bug, 2 usage, 3 condition not met, 4 bad input file, 5 environment, 130 Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lrai_core.artifact import Artifact
from lrai_core.errors import ConditionNotMet, LraiError, shorten
from lrai_core.verifier.certificate import Spec
from lrai_core.verifier.check import check as check_certificate
from lrai_core.verifier.verifier import verify as verify_artifact

app = typer.Typer(
    help="Coalesced, compiled and certified inference inside the serving stack you already run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
certificate_app = typer.Typer(help="Work with certificates.", no_args_is_help=True)
app.add_typer(certificate_app, name="certificate")
# What comes out of files is shown as it is: never read as markup, and without control characters.
out = Console(highlight=False, markup=False, emoji=False)
_CTRL_C = 130
_COMMANDS = "lrai.commands"  # entry points: more commands, each with its own package

ArtifactPath = Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")]
Slim = Annotated[bool, typer.Option("--slim", help="Only what serves here, see lrai slim.")]


@app.command()
def compile(
    model: Annotated[Path, typer.Argument(help="ONNX file, or a .toml that describes one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, NAME.lrai.")],
    evaluation: Annotated[
        Path | None, typer.Option(help=".npz with an array per input, and 'label' where known.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Rows that forms are made for.")] = None,
    metric: Annotated[str, typer.Option(help="With labels: top1 or top5.")] = "top1",
    output_map: Annotated[
        str, typer.Option(help="How outputs are compared: raw, softmax or l2_normalised.")
    ] = "raw",
    max_accuracy_loss: Annotated[float, typer.Option(help="Largest loss, as a share.")] = 0.01,
    epsilon: Annotated[float | None, typer.Option(help="Closeness to demand and certify.")] = None,
    delta: Annotated[float, typer.Option(help="Share of inputs that may exceed epsilon.")] = 0.01,
    group: Annotated[
        list[str] | None, typer.Option(help="Array of groups to treat alike; repeatable.")
    ] = None,
    max_disparity: Annotated[float, typer.Option(help="Most by which groups may part.")] = 0.01,
    axes: Annotated[Path | None, typer.Option(help="TOML that states the axes.")] = None,
    keep: Annotated[int, typer.Option(help="Variants to keep, fp32 too; 3: two serve.")] = 2,
    engine: Annotated[
        list[str] | None, typer.Option(help="Another engine to try, openvino; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Engine threads; 0: all CPUs allowed.")] = 0,
    keep_evaluation: Annotated[int | None, typer.Option(help="Gate rows to keep in it.")] = None,
    slim: Slim = False,  # noqa: FBT002 - typer's way
) -> None:
    """Compile MODEL: fp32, and the fastest forms that pass the gate on the evaluation rows."""
    from lrai_core.compiler.compiler import Step
    from lrai_core.compiler.compiler import compile as compile_model  # it brings onnx along

    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), console=out, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("load", total=None)

        def show(step: Step) -> None:
            if step.name == "note":
                _say(step.detail, style="dim")
            else:
                words = shorten(f"{step.name} {step.detail}".strip())
                bar.update(task, description=words, completed=step.done, total=step.total or None)

        artifact = compile_model(
            model,
            out=output,
            calibration=calibration,
            evaluation=evaluation,
            metric=metric,  # type: ignore[arg-type] # checked where it is used
            output_map=output_map,  # type: ignore[arg-type] # likewise
            max_accuracy_loss=max_accuracy_loss,
            epsilon=epsilon,
            delta=delta,
            groups=group or (),
            max_disparity=max_disparity,
            axes=axes,
            keep=keep,
            engines=engine or (),
            threads=threads,
            keep_evaluation=keep_evaluation,
            progress=show,
        )
    if slim:
        _plugin("slim", [str(output)])
    _plugin("inspect", [str(output)])
    if evaluation is not None and artifact.manifest.chosen == "fp32" and keep > 1:
        raise ConditionNotMet(
            "no form but fp32 passed the gate and was faster; quantization.jsonl tells why"
        )


@app.command()
def verify(
    path: ArtifactPath,
    epsilon: Annotated[float, typer.Option(help="Largest difference after the output maps.")],
    variant: Annotated[str, typer.Option(help="Variant; the chosen one by default.")] = "",
    radius: Annotated[float, typer.Option(help="Box around evaluation rows; 0: the rows.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Draws from the box.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Certify statistically how far a variant is from the source model; keep the certificate."""
    spec = Spec(epsilon=epsilon, variant=variant, radius=radius, samples=samples, seed=seed)
    for certificate in verify_artifact(Artifact.open(path), spec):
        _say(f"certificate {certificate.id}: {certificate.statement()}")


@certificate_app.command("check")
def certificate_check(
    file: Annotated[Path, typer.Argument(help="Certificate, a JSON file.")],
    artifact: Annotated[Path, typer.Option(help="The artifact it speaks of.")],
    source: Annotated[
        Path | None, typer.Option(help="The original model; by default the artifact's copy.")
    ] = None,
) -> None:
    """Validate every field of a certificate and run its sample, or part of it, again."""
    verdict = check_certificate(file, artifact, source=source)
    for line in verdict.confirmed:
        _say(line, mark=("ok", "green"))
    for line in verdict.objections:
        _say(line, mark=("no", "red"))
    if not verdict.holds:
        raise ConditionNotMet(f"certificate {verdict.certificate} does not hold here")
    _say(f"certificate {verdict.certificate} holds")


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _interrupt)  # cleans up like Ctrl-C
    error_console = Console(stderr=True, soft_wrap=True)
    try:
        names = sorted(entry_points(group=_COMMANDS).names)
        app.info.epilog = f"More commands: {', '.join(names)}"
        if sys.argv[1:2] and sys.argv[1] in names:
            _plugin(sys.argv[1], sys.argv[2:])
        else:
            app()
    except LraiError as error:
        words = shorten(f"lrai: {error}", 2000)
        error_console.print(words, style="red", markup=False, highlight=False, emoji=False)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _CTRL_C:
            error_console.print("lrai: interrupted; nothing was left behind")
        raise
    sys.exit(0)


def _plugin(command: str, arguments: list[str]) -> None:
    """Run a command that is not the core's; return where it ends well."""
    for entry in entry_points(group=_COMMANDS, name=command):
        try:
            entry.load()(arguments)
        except SystemExit as end:
            if end.code:
                raise


def _say(line: str, *, mark: tuple[str, str] | None = None, style: str = "") -> None:
    """Print a line, behind a mark in its style where one is given."""
    words = shorten(line, 2000)
    out.print(Text.assemble(mark, f"  {words}") if mark else words, style=style)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
