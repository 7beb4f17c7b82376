"""`lrai runtime …`: the runtime that the processes of a user share, from the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from lrai_core import ConditionNotMet, EnvironmentProblem, LraiConfig, Runtime, load_config
from lrai_shared.client import Attached, is_running, shared_folder

T = TypeVar("T")
_END_SECONDS: Final = 30.0  # beside draining: a load may be under way

app = typer.Typer(
    help="The runtime that processes share.", no_args_is_help=True, add_completion=False
)
out = Console(highlight=False, markup=False, emoji=False)
Address = Annotated[str, typer.Option(help="Folder of its socket; auto: this user's.")]
Name = Annotated[str, typer.Option(help="Model name; by default the artifact's.")]


@app.command()
def start(address: Address = "auto") -> None:
    """Start the runtime, to stay until it is stopped; do nothing where one runs."""
    config, folder = _place(address)
    there = is_running(folder)
    Attached(config, str(folder), stay=True).close()  # it answers
    out.print(f"the runtime {'runs already' if there else 'was started'} in {folder}")


@app.command()
def status(address: Address = "auto") -> None:
    """Show what is loaded, how it is, and what has happened so far."""
    with _running(address) as runtime:
        table = Table("model", "version", "variant", "state", "pid", title=runtime.ready())
        for model in runtime.models():
            pid = str(model.actor_pid or "")
            table.add_row(model.name, model.version, model.variant, model.state, pid)
        out.print(table)
        for event, count in sorted(runtime.stats().items()):
            out.print(f"{count:>12,} {event}")


@app.command()
def load(artifact: Path, name: Name = "", address: Address = "auto") -> None:
    """Load ARTIFACT, a directory NAME.lrai, into the runtime that runs."""
    with _running(address) as runtime:
        out.print(f"{runtime.load(artifact, name=name)} is loaded")


@app.command()
def unload(model: str, address: Address = "auto") -> None:
    """Stop serving MODEL; its unanswered requests end with an error."""
    with _running(address) as runtime:
        runtime.unload(model)


@app.command()
def drain(address: Address = "auto") -> None:
    """Refuse new requests for good, and wait for the accepted ones."""
    if not _call(address, "drain", bool):
        raise ConditionNotMet("not all requests have ended in time")


@app.command()
def stop(address: Address = "auto") -> None:
    """Refuse new requests, wait for the accepted ones, and end."""
    _call(address, "stop", type(None))
    config, folder = _place(address)
    deadline = time.monotonic() + config.runtime.drain_seconds + _END_SECONDS
    while is_running(folder):
        if time.monotonic() > deadline:
            raise ConditionNotMet(f"the runtime in {folder} was told to end, and has not ended yet")
        time.sleep(0.01)


def _place(address: str) -> tuple[LraiConfig, Path]:
    config = load_config()
    return config, shared_folder(config, "" if address == "auto" else address)


def _find(address: str) -> tuple[LraiConfig, Path]:
    """Return where a runtime runs; none is started to be asked."""
    config, folder = _place(address)
    if not is_running(folder):
        raise EnvironmentProblem(f"no runtime runs in {folder}; lrai runtime start starts one")
    return config, folder


def _running(address: str) -> Runtime:
    config, folder = _find(address)
    return Runtime(config, address=str(folder))


def _call(address: str, operation: str, kind: type[T]) -> T:
    config, folder = _find(address)
    with closing(Attached(config, str(folder))) as client:
        return client.call(operation, {}, kind)


def main(arguments: Sequence[str]) -> None:
    """Run a command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai runtime")
