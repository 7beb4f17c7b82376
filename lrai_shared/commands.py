"""`lrai runtime …`, `lrai freeze`, `lrai unfreeze`: the shared runtime and its models."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table

from lrai_core import ConditionNotMet, EnvironmentProblem, LraiConfig, Runtime, load_config
from lrai_shared.client import Attached
from lrai_shared.keys import make_keys, server_end
from lrai_shared.starting import is_running, shared_folder

_CHANGES: Final = ("load", "unload", "swap", "route", "rollback", "freeze", "unfreeze")
_GOES_ON: Final = ("start", "drain", "stop", *_CHANGES)  # though whoever asked for it is gone
_END_SECONDS: Final = 30.0  # beside draining: a load may be under way

app = typer.Typer(help="The shared runtime.", no_args_is_help=True, add_completion=False)
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
_WHERE: Final = "by default as LRAI_RUNTIME says, or this user's (auto)"
Folder = Annotated[str, typer.Option("--address", help=f"Runtime's folder; {_WHERE}.")]
Address = Annotated[str, typer.Option(help=f"Its folder or tcp://HOST:PORT?keys=FOLDER; {_WHERE}.")]
Listen = Annotated[
    str,
    typer.Option(help="tcp://HOST:PORT for other machines, with --keys and runtime.model_roots."),
]
Keys = Annotated[Path | None, typer.Option(help="Folder that lrai runtime keys has made.")]
Client = Annotated[str, typer.Option(help="Name of a client to make keys for.")]
Name = Annotated[str, typer.Option(help="Model name; by default the artifact's.")]
Share = Annotated[
    float | None,
    typer.Option(help="Share of the requests to take beside what serves, 0 to 1: a canary."),
]
Variant = Annotated[str, typer.Option(help="Variant of the artifact; by default the chosen one.")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="What its certificate has to meet: tier, sampler, epsilon, delta, confidence.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="KEY=VALUE", help="For this model, as actor.replicas=2."),
]
Model = Annotated[str, typer.Argument(help="Name, as lrai runtime status shows it.")]
Version = Annotated[str, typer.Option(help="Version to unload; by default all.")]
By = Annotated[str, typer.Option(help="Who decides it.")]
Reason = Annotated[str, typer.Option(help="Why.")]
Shares = Annotated[list[str], typer.Argument(help="VERSION=SHARE …, which add up to 1.")]
Shadow = Annotated[str, typer.Option(help="VERSION=SHARE: copy this share of requests to it.")]
Relief = Annotated[str, typer.Option(help="VERSION that takes what the others are too late for.")]


@app.command()
def start(address: Folder = "", listen: Listen = "", keys: Keys = None) -> None:
    """Start the runtime, and have it stay until it is stopped; one that runs already stays, too."""
    if keys and not listen:
        raise typer.BadParameter("--keys goes with --listen")
    config, folder = _place(address)
    how = listen + (f"?keys={keys.absolute()}" if keys else "") or "stay"
    if how != "stay":
        server_end(how, config)  # what is wrong is told at once
    there = is_running(folder)
    with closing(Attached(config, str(folder), stay=how)) as client:
        client.call("stay", {"how": how}, type(None))  # also one that a client has started
    out.print(f"the runtime {'runs already' if there else 'was started'} in {folder}")


@app.command()
def keys(folder: Path, client: Client = "") -> None:
    """Make the keys of a runtime that other machines reach, and those of a client, in FOLDER."""
    files = make_keys(folder.absolute(), client)
    out.print(f"{folder} holds the keys, for lrai runtime start --listen tcp://… --keys")
    if files:
        out.print("the client needs these, the second is secret:", *files, sep="\n")


@app.command()
def status(address: Address = "") -> None:
    """Show what is loaded, how it is, and what has happened so far.

    Exit status: 0 ready, 3 not ready, 5 there is none.
    """
    with _running(address) as runtime:
        columns = "model", "version", "variant", "certificate", "state", "pids"
        table = _table(*columns, title=(state := runtime.ready()))
        for one in runtime.models():
            pids, known = " ".join(map(str, one.actor_pids)), one.certificate or ""
            table.add_row(one.name, one.version, one.variant, known, one.state, pids)
        out.print(table, soft_wrap=False)
        for event, count in sorted(runtime.stats().items()):
            out.print(f"{count:>12,} {event}")
    if state not in ("ok", "idle"):
        raise ConditionNotMet(f"the runtime is not ready: it is {state}")


@app.command()
def load(
    artifact: Path,
    name: Name = "",
    share: Share = None,
    variant: Variant = "",
    require: Require = None,
    setting: Settings = None,
    address: Address = "",
) -> None:
    """Load ARTIFACT, a directory NAME.lrai, into the runtime that runs."""
    how = _how(variant, require, setting)
    with _running(address) as runtime:
        out.print(f"{runtime.load(artifact, name=name, share=share, **how)} is loaded")


@app.command()
def unload(model: Model, version: Version = "", address: Address = "") -> None:
    """Stop serving MODEL, or one version of it.

    A version beside others answers what it has accepted first.
    """
    with _running(address) as runtime:
        runtime.unload(model, version)


@app.command()
def swap(
    model: Model,
    artifact: Path,
    variant: Variant = "",
    require: Require = None,
    setting: Settings = None,
    address: Address = "",
) -> None:
    """Have ARTIFACT serve as MODEL in place of what does now, without losing a request.

    What --require and --setting do not say stays as it is.
    """
    how = _how(variant, require, setting)
    with _running(address) as runtime:
        out.print(f"{model} is served by {runtime.swap(model, artifact, **how)}")


@app.command()
def route(
    model: Model, shares: Shares, shadow: Shadow = "", relief: Relief = "", address: Address = ""
) -> None:
    """Divide the requests for MODEL among versions that are loaded."""
    with _running(address) as runtime:
        copies = dict([_share(shadow)] if shadow else [])
        runtime.route(model, dict(map(_share, shares)), copies, relief)


@app.command()
def rollback(model: Model, address: Address = "") -> None:
    """Go back to the version that served as MODEL before; take back a canary if there is one."""
    with _running(address) as runtime:
        out.print(f"{model} is served by {runtime.rollback(model)}")


@app.command()
def freeze(model: Model, by: By, reason: Reason, address: Address = "") -> None:
    """Keep the deployment of MODEL as it is until it is unfrozen."""
    with _running(address) as runtime:
        runtime.freeze(model, by, reason)


@app.command()
def unfreeze(model: Model, by: By, reason: Reason, address: Address = "") -> None:
    """Allow the deployment of MODEL to be changed again."""
    with _running(address) as runtime:
        runtime.unfreeze(model, by, reason)


@app.command()
def deployments(address: Address = "") -> None:
    """Show every name with its versions, and what is frozen."""
    table = _table("model", "version", "share", "shadow", "goes back to", "frozen")
    with _running(address) as runtime:
        for found in runtime.deployments():
            frozen = f"by {found.frozen.by}: {found.frozen.reason}" if found.frozen else ""
            for version, share in found.shares.items():
                copies = f"{found.shadow.get(version, 0):.2%}"
                part = "made room" if found.away else f"{share:.2%}"
                table.add_row(found.name, version, part, copies, found.previous, frozen)
    out.print(table, soft_wrap=False)


@app.command()
def drain(address: Address = "") -> None:
    """Refuse new requests from now on, and wait for the accepted ones to be answered."""
    if not _call(address, "drain"):
        raise ConditionNotMet("not all requests have ended in time")


@app.command()
def stop(address: Folder = "") -> None:
    """Refuse new requests, wait for the accepted ones to be answered, and end the runtime."""
    config, folder = _place(address)
    program = f"/proc/{_call(address, 'stop')}/exe"
    seen = os.path.lexists(program)  # it may run in another container
    deadline = time.monotonic() + config.runtime.drain_seconds + _END_SECONDS
    while is_running(folder) and (not seen or os.path.lexists(program)):  # else the next one runs
        if time.monotonic() > deadline:
            raise ConditionNotMet(f"the runtime in {folder} was told to end, and has not ended yet")
        time.sleep(0.01)


def _table(*columns: str, title: str = "") -> Table:
    """Return a table that cuts no name off: commands take the whole ones."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title)


def _how(variant: str, require: list[str] | None, setting: list[str] | None) -> dict[str, Any]:
    terms = {key: _number(value) for key, value in map(_pair, require or [])}
    own = dict(map(_pair, setting or []))
    return {"variant": variant, "require": terms or None, "settings": own or None}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text[:80]!r}: KEY=VALUE is needed")
    return key, value


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _share(text: str) -> tuple[str, float]:
    version, _, share = text.partition("=")
    try:
        return version, float(share)
    except ValueError:
        raise typer.BadParameter(f"{text[:80]!r}: VERSION=SHARE is needed") from None


def _place(address: str) -> tuple[LraiConfig, Path]:
    config, meant = _meant(address)
    if "://" in meant:
        own = "" if address else " (runtime.address); give --address auto"
        words = "a runtime is started and stopped on its own machine"
        raise typer.BadParameter(f"{words}, not at {meant[:200]!r}{own}")
    return config, shared_folder(config, meant)


def _meant(address: str) -> tuple[LraiConfig, str]:
    """Return the settings, and the address that is meant where none is given."""
    config = load_config()
    own = config.runtime.address
    return config, address or ("auto" if own == "embedded" else own)


def _find(address: str) -> tuple[LraiConfig, str]:
    """Return where a runtime runs; none is started to be asked."""
    config, address = _meant(address)
    if "://" in address:
        return config, address
    config, folder = _place(address)
    if not is_running(folder):
        raise EnvironmentProblem(f"no runtime runs in {folder}; lrai runtime start starts one")
    return config, str(folder)


def _running(address: str) -> Runtime:
    config, where = _find(address)
    return Runtime(config, address=where)


def _call(address: str, operation: str) -> object:
    config, where = _find(address)
    with closing(Attached(config, where)) as client:
        return client.call(operation, {}, object)


def main(arguments: Sequence[str]) -> None:
    """Run a command; what `lrai` says of errors is its own business."""
    try:
        app(args=list(arguments), prog_name="lrai runtime")
    except SystemExit as end:
        if end.code == 130 and arguments[0] in _GOES_ON:  # Ctrl-C
            see = "deployments" if arguments[0] in _CHANGES else "status"
            out.print(f"the runtime goes on with it, see lrai runtime {see}")
        raise


def main_freeze(arguments: Sequence[str]) -> None:
    """`lrai freeze`: keep a deployment as it is until it is unfrozen."""
    main(["freeze", *arguments])


def main_unfreeze(arguments: Sequence[str]) -> None:
    """`lrai unfreeze`: allow a deployment to be changed again."""
    main(["unfreeze", *arguments])
