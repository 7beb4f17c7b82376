"""`lrai mlflow …`: models of other flavors of MLflow, compiled and logged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from mlflow import MlflowException, artifacts, end_run, get_run, start_run
from rich.console import Console

from lrai_core import Artifact, ConditionNotMet, EnvironmentProblem, LraiError, UsageError
from lrai_mlflow.commands.convert import convert as convert_model
from lrai_mlflow.commands.convert import options_of
from lrai_mlflow.flavor import load_model
from lrai_mlflow.serving import FLAVOR_NAME

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# In the compiler's log a form beside fp32 but for what nobody could make of the model, here.
_MOOT: Final = "nothing to quantise|openvino cannot read|this CPU has no"
_MADE: Final = re.compile(rf'"form":"(?!fp32).*"why":"(?!{_MOOT})')
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@app.callback()
def main_options() -> None:
    """Models of MLflow."""


@app.command()
def convert(
    model_uri: Annotated[str, typer.Argument(help="runs:/…, models:/… or a folder.")],
    name: Annotated[str, typer.Option(help="Name of the logged model.")] = "",
    registered_model_name: Annotated[
        str, typer.Option(help="Log it as a version of this; by default of the one in MODEL_URI.")
    ] = "",
    evaluation: Annotated[
        Path | None, typer.Option(help=".npz with an array per input, and 'label' where known.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What labels judge: top1 or top5.")] = "top1",
    output_map: Annotated[str, typer.Option(help="raw, softmax or l2_normalised.")] = "raw",
    threads: Annotated[int, typer.Option(min=0, max=4096, help="As of lrai compile.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="Another of lrai compile's, KEY=VALUE; repeatable.")
    ] = None,
    run_id: Annotated[str, typer.Option(help="Run to log to; by default a new one.")] = "",
    *,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open what could run code, after picklescan.")
    ] = False,
) -> None:
    """Compile the model of onnx, pytorch, sklearn, lightgbm or xgboost at MODEL_URI, and log it.

    Exit status 3: no form but fp32 passed the gate and was faster; fp32 is logged all the same.
    If nothing can be quantised, as in trees, the status is 0.
    """
    how = {"metric": metric, "output_map": output_map, "threads": threads, **options_of(option)}
    try:
        # A run that was there is as it was, where this comes to nothing.
        status = get_run(run_id).info.status if run_id else "FAILED"
        start_run(run_id=run_id or None)
        try:
            logged = convert_model(
                model_uri, name=name, registered_model_name=registered_model_name, options=how,
                evaluation=evaluation, allow_pickle=allow_pickle,
            )  # fmt: skip
            version, status = logged.registered_model_version, "FINISHED"
            known = f"version {version}" if version is not None else "not registered"
            out.print(logged.model_uri, known)  # before MLflow says where the run is
        finally:
            end_run(status)
        alone = logged.flavors[FLAVOR_NAME]["variant"] == "fp32" and how.get("keep") != 1
        if evaluation is not None and alone:
            file = f"runs:/{logged.run_id}/lrai/{logged.model_id}/quantization.jsonl"
            if _MADE.search(artifacts.load_text(file)):
                why = f"no form but fp32 passed the gate and was faster; {file} tells why"
                raise ConditionNotMet(why)
            out.print("nothing in it can be quantised: fp32 serves, batched where that pays")
    except MlflowException as error:
        raise _ours(error) from None
    except OSError as error:  # of what MLflow writes
        first, *_ = error.args or [""]
        said = first[0][-1] if isinstance(first, list) else error.strerror or error  # of a folder's
        where = f"{error.filename}: " if error.filename else ""  # of a full disk it is not known
        raise EnvironmentProblem(f"{where}{said}") from None


def artifact_of(model_uri: str) -> Artifact:
    """Return the artifact in a model of the lrai flavor; an entry point of `lrai.artifacts`."""
    try:
        return load_model(model_uri)
    except MlflowException as error:
        raise _ours(error) from None


def _ours(error: MlflowException) -> LraiError:
    """Return what it was made of, with its exit status; of MLflow's own by that of HTTP."""
    if isinstance(cause := error.__cause__, LraiError):
        return cause
    asked = error.get_http_status_code() < 500
    return UsageError(error.message) if asked else EnvironmentProblem(error.message)


def main(arguments: Sequence[str]) -> None:
    """Run `lrai mlflow ARGUMENTS`; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai mlflow")
