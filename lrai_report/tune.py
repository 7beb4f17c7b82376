"""`lrai tune TARGET`: try faster forms of a model on the requests that it was really asked."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lrai_core import (
    Artifact,
    ConditionNotMet,
    NotReady,
    Signature,
    UsageError,
    explain_config,
    load_config,
)
from lrai_core import compile as compile_model
from lrai_core.errors import shorten
from lrai_core.verifier.verifier import environment, evaluation
from lrai_report.compare import Worst, answered, differing, measure, measure_of, requests_of, sides
from lrai_report.compile import closest
from lrai_report.live import command, compare_live, switch
from lrai_report.target import Target, find
from lrai_report.terminal import only_mine, out, progress, say, share_done, write
from lrai_report.words import FEW, check_numbers, distance, figure

_GAIN: Final = 1.05  # times as many requests per second, and more in every round
_WORST: Final = 20
_DECIDE: Final = ("actor.replicas", "actor.threads", "scheduler.deterministic")  # which is faster


Apply = Annotated[bool, typer.Option("--apply", help="Switch over to it, if it is better.")]
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def tune(
    target: Annotated[
        str,
        typer.Argument(
            help="Name of what the runtime serves (or its folder, or MLflow's models:/…); or an "
            "artifact, a model file, the folder of a Triton model."
        ),
    ],
    *,
    requests: Annotated[
        Path | None,
        typer.Option(help=".npz of rows to tune for; by default what the runtime captured."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artifact to write, NAME.lrai.")
    ] = None,
    output_map: Annotated[
        str, typer.Option(help="How answers are compared: raw, softmax, l2_normalised.")
    ] = "",
    engine: Annotated[
        list[str] | None, typer.Option(help="Another to try (openvino); by default as what serves.")
    ] = None,
    callers: Annotated[
        int, typer.Option(min=1, max=512, help="Concurrent requests while it measures.")
    ] = 8,
    seconds: Annotated[
        float, typer.Option(min=0.2, max=600, help="Length of a round of measuring.")
    ] = 3.0,
    rounds: Annotated[
        int, typer.Option(min=3, max=99, help="Rounds of measuring for each side, in turns.")
    ] = 5,
    minutes: Annotated[
        float, typer.Option(min=0, max=1440, help="How long to copy live requests to it; 0: not.")
    ] = 1.0,
    price_per_hour: Annotated[
        float, typer.Option(min=0, max=1e9, help="Price of a machine, to say what requests cost.")
    ] = 0.0,
    apply: Apply = False,
    file: Annotated[
        Path | None, typer.Option("--json", help="File to write all figures to.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Runtime to ask; by default as LRAI_RUNTIME says, or auto.")
    ] = "",
) -> None:
    """Try faster forms of TARGET on its own requests; say what is gained, and what changes.

    Requests are captured if runtime.capture_rows says how many (LRAI_RUNTIME_CAPTURE_ROWS=2000): a
    random sample of real ones, kept in the runtime's state_dir. Forms are made for a part of them,
    and judged on another part, by agreement with fp32. The share of answers that change is counted
    over distinct requests, however often each was asked.

    Without --apply callers get the answers of before, though live requests are copied to the new
    form for --minutes. With --apply it is compared on at least 30 rows of live requests (none with
    --minutes 0) before it serves, and one command goes back. If nothing is gained, the exit status
    is 3, and nothing is left behind.

    Where it runs, compiling and measuring take the CPUs meanwhile, and two more copies of the model
    lie in memory, outside runtime.memory_mib. It measures under the settings of this shell and
    folder: give it the LRAI_ACTOR_THREADS, LRAI_ACTOR_REPLICAS and LRAI_SCHEDULER_DETERMINISTIC of
    the host.

    The artifact that is written keeps the requests that it was judged on (up to 65,536, and 256 MiB
    of them): it is as private as they are.
    """
    check_numbers(seconds=seconds, minutes=minutes, price_per_hour=price_per_hour)
    found = find(target, requests, address)
    _refuse_at_once(found, minutes, file, apply=apply)
    plain = found.served.manifest.name if found.served else Path(target).stem
    stem = found.name.partition(":")[0] or plain
    written = output or Path(f"{stem}-tuned.lrai".replace("/", "-"))
    if os.path.lexists(written):
        remedy = "leave it where it is if it serves" if found.name else "or remove it"
        raise UsageError(f"{written} exists; choose another name (-o), {remedy}")
    roots = [Path(one).resolve() for one in load_config().runtime.model_roots.split(":") if one]
    if found.name and roots and not any(map(written.resolve().is_relative_to, roots)):
        raise UsageError(f"{written} lies in none of the folders to load from: choose -o")
    if found.requests is None:
        if found.served:
            raise UsageError(f"{target} is not served, so nothing is captured: give --requests")
        _without_requests(found, written, output_map, address)
        return
    say("requests", f"{found.requests}, each row as a request")
    judged = [variant.gate for variant in found.served.variants] if found.served else []
    if any(gate and gate.disparities for gate in judged):
        why = "captured requests do not tell groups of people, by which what serves was judged"
        raise ConditionNotMet(f"{why}: compile it anew with --group, and swap")
    artifact = _compile(found, written, output_map, engine or _engines(found))
    better, applied, figures = False, False, dict[str, Any]()
    try:
        try:
            _judge(found, artifact, callers, seconds, rounds, price_per_hour, figures)
            better = True
        finally:
            if file is not None and figures:
                _write(file, figures, private=_is_private(found))
        if found.name:
            compare_live(found.name, found.shares, written, minutes, address, apply=apply)
            applied = apply
            if found.several:
                say("beware", "swap ends the versions beside; rollback brings one of them back")
            switch(found.name, found.shares, written, address, apply=apply)
        _say_use(found, written, target, address)
    except BaseException as error:
        _leave(written, error, better=better, applied=applied)
        if applied and type(error) in (KeyboardInterrupt, NotReady):  # it may go on there
            # Where the new one does not serve, this would bring back what served before what does.
            say("left", f"it may come: go back if lrai runtime deployments says {artifact.version}")
            say("switch back", command("rollback", found.name, address=address))
        raise


def _leave(written: Path, error: BaseException, *, better: bool, applied: bool) -> None:
    """Say what an error leaves, and remove what is of no use: it was not judged to be better."""
    if better and not isinstance(error, KeyboardInterrupt):
        say("kept", f"{written}, which is faster on the requests that it was judged by")
    elif not applied:  # it is not to be taken for what is better, nor in the way of the next one
        shutil.rmtree(written, ignore_errors=True)
        say("removed", str(written))


def _refuse_at_once(found: Target, minutes: float, file: Path | None, *, apply: bool) -> None:
    """Refuse what would be refused when all is made and measured.

    Raises:
        ConditionNotMet: What serves may not be changed, or not be copied to another.
        UsageError: Nothing serves that could be switched, or the figures have no place.
    """
    if found.frozen and (apply or minutes):
        how = "lrai unfreeze ends that; --minutes 0 without --apply compares all the same"
        raise ConditionNotMet(f"{found.name!r} is frozen: {how}")
    if apply and not found.name:
        raise UsageError("--apply is for a model that the runtime serves")
    if apply and found.several:
        several = f"several versions of {found.name!r} answer, by their shares or as relief"
        why = "--apply would end them, and rollback not bring them back"
        raise ConditionNotMet(f"{several}: {why}")
    if minutes and found.copied:
        raise ConditionNotMet(f"{found.copied}; or compare no live requests (--minutes 0)")
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"--json {file}: it is a folder, or lies in none that exists")
    if file is not None and found.requests is None:
        raise UsageError("--json: nothing is measured without requests (--requests)")


def _judge(
    found: Target,
    artifact: Artifact,
    callers: int,
    seconds: float,
    rounds: int,
    price_per_hour: float,
    figures: dict[str, Any],
) -> None:
    """Compare what was made with what serves, and leave what was found in `figures`.

    Raises:
        ConditionNotMet: It is no faster, or there is nothing to compare them with.
    """
    if artifact.manifest.chosen == "fp32":
        none = "no gain: no form was faster and right on these requests"
        why = f"lrai compile --evaluation tells why of each{closest(artifact)}"
        raise ConditionNotMet(f"{none}; {why}")
    # So many tell whether more than delta are farther than epsilon, and others take their time.
    most = max(2_000, round(20 / (artifact.manifest.demanded or (0, 0.01))[1]))
    rows = requests_of(evaluation(artifact), artifact)[:most]
    if not rows:
        raise ConditionNotMet("one row has over 256 MiB: the artifact keeps none to measure with")
    # What it is to be better than is what serves, which need not be fp32.
    before = (found.served, found.variant) if found.served else (artifact, "fp32")
    with sides((before, (artifact, ""))) as both:
        if both[0].variant == both[1].variant:
            both[0].variant += " (serves)"
        with progress("measure", 2 * rounds) as tick:
            measure(both, rows, callers=callers, seconds=seconds, rounds=rounds, tick=tick)
        with progress("compare", len(rows)) as tick:
            changed = differing(both, rows, artifact, tick)
        gains = [b / a for a, b in zip(*(s.requests_per_second for s in both), strict=True)]
        told = {side.variant: side.figures(price_per_hour) for side in both}
    # Those of what serves are its host's, which nobody tells.
    under = [f"{one.key} = {one.value}" for one in explain_config() if one.key in _DECIDE]
    figures |= {"gains": gains, "settings": under, "sides": told}
    figures["changed"] = [one._asdict() for one in changed[:_WORST]]
    some, of = sum(not one.agrees for one in changed), len(changed)
    figures |= {"share_changed": some / of, "distinct_changed": some, "distinct_compared": of}
    _show(told, priced=price_per_hour > 0)
    say("measured", f"with {', '.join(under)}, as set here; a host of others may gain less")
    if any(answers < FEW for side in both for answers in side.answers):
        say("note", f"under {FEW} answers in a round say little of p95: more --seconds would help")
    _show_changed(changed, artifact, both[0].variant)
    gain = statistics.median(gains)
    if gain < _GAIN or min(gains) <= 1:
        worst = f", {min(gains):.2f} in the worst of {len(gains)} rounds"
        raise ConditionNotMet(f"no gain: {gain:.2f} times as many requests per second{worst}")
    say("gain", f"{gain:.2f} times as many requests per second", style="bold")


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai tune")


def _engines(found: Target) -> list[str]:
    """Return the engines, but for the one that is always there, that what serves has forms for."""
    variants = found.served.variants if found.served else ()
    there = [one.engine for one in variants if not environment(one).endswith(" none")]
    return [name for name in dict.fromkeys(there) if name != "onnxruntime"]


def _say_use(found: Target, written: Path, target: str, address: str) -> None:
    """Say how it serves for good, and how to go back."""
    commands = found.commands(written, address)
    labels = ("to keep it", "and back") if found.name else ("switch on", "switch back")
    for label, words in zip(labels, commands, strict=False):
        say(label, words)
    if not (commands or found.name):
        say("use it", f"serve {written}; to go back, serve {target}")


def _without_requests(found: Target, written: Path, output_map: str, address: str) -> None:
    _compile(found, written, output_map, ())
    say("no requests", "fp32, optimised, is all that can be made without any (--requests)")
    _say_use(found, written, str(found.model), address)


def _compile(found: Target, written: Path, output_map: str, engines: Sequence[str]) -> Artifact:
    with share_done() as bar:
        task = bar.add_task("load", total=None)

        def show(step: Any) -> None:
            if step.name != "note":
                words = shorten(f"{step.name} {step.detail}".strip())
                bar.update(task, description=words, completed=step.done, total=step.total or None)
            elif found.requests:  # else all there is to say is said below
                say("note", step.detail)

        evaluation: Any = found.requests
        if found.served and found.captured and found.requests:
            asked = list[None]()
            evaluation = answered(found.served, found.requests, lambda: asked.append(None))
            if not (count := len(next(iter(evaluation.values())))):
                raise ConditionNotMet("the model answers none of the requests that were captured")
            if count < len(asked):
                left = f"{len(asked) - count} of {len(asked)} captured rows were not answered"
                say("note", f"{left}, and are left out")
        served = found.served.manifest if found.served else None
        signature = served.signature if served else None
        epsilon, delta = (served and served.demanded) or (None, 0.01)
        with _axes(signature, maps=not output_map) as axes, only_mine(on=_is_private(found)):
            return compile_model(
                found.model,
                out=written,
                evaluation=evaluation,
                output_map=output_map or "raw",  # type: ignore[arg-type] # checked where it is used
                axes=axes,
                engines=engines,
                keep_evaluation=1 << 16,  # all that one may have: who judges it anew needs them
                epsilon=epsilon,  # what serves may have been made to be so close, or so small
                delta=delta,
                objective=served.objective if served else "latency",
                threads=load_config().actor.threads,
                progress=show,
            )


def _is_private(found: Target) -> bool:
    """Return whether the requests are this user's alone."""
    try:
        shared = found.requests is None or bool(found.requests.stat().st_mode & 0o077)
    except OSError:
        shared = True  # there are none that could be read
    return found.captured or not shared


@contextmanager
def _axes(signature: Signature | None, *, maps: bool) -> Iterator[Path | None]:
    """Yield a file that states the axes, and maps, that the artifact has which serves now."""
    if signature is None:
        yield None
        return
    lines = []
    for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        for spec in specs:
            lines.append(f"[{side}.{json.dumps(spec.name, ensure_ascii=False)}]")
            lines += [f"batch = {spec.batch_axis}"] * (spec.batch_axis is not None)
            lines += [f"length = {spec.length_axis}"] * (spec.length_axis is not None)
            lines.append(f"pad = {spec.pad_value}")
            lines += [f'map = "{spec.output_map}"'] * (maps and side == "outputs")
    with tempfile.TemporaryDirectory(prefix="lrai-tune-") as folder:
        path = Path(folder, "axes.toml")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield path


def _show(told: Mapping[str, Any], *, priced: bool) -> None:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for variant in told:
        table.add_column(variant, justify="right", no_wrap=True)
    lines: dict[str, Callable[[Any], str]] = {
        "requests/s": lambda one: figure(statistics.median(one["requests_per_second"]), 4),
        "p95 ms": lambda one: figure(statistics.median(one["p95_ms"])),
        "memory MB": lambda one: f"{one['memory_mb']:.0f}",
    }
    if priced:
        lines["cost of a million"] = lambda one: figure(one["cost_per_million"], 4)
    for label, said in lines.items():
        table.add_row(label, *map(said, told.values()))
    out.print(table)


def _show_changed(changed: Sequence[Worst], artifact: Artifact, before: str) -> None:
    count = sum(not one.agrees for one in changed)
    # However often each was asked: repeated rows are left out where they are read.
    told = f"changed to {count} of {len(changed)} distinct requests ({count / len(changed):.2%})"
    say("answers", f"{told}; alike is {measure_of(artifact)}")
    table = Table("differs by", "", before, "tuned", box=SIMPLE_HEAD, pad_edge=False)
    for one in changed[:_WORST]:
        said = "" if one.agrees else "changed"
        table.add_row(distance(one.gap, 3), said, one.first, one.second)
    out.print(Text(f"the {min(_WORST, len(changed))} farthest apart", style="bold"))
    out.print(table)


def _write(file: Path, figures: Mapping[str, Any], *, private: bool) -> None:
    text = json.dumps(figures, indent=1, default=float, allow_nan=False) + "\n"
    write(file, text, private=private)
