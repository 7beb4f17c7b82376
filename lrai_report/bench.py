"""`lrai bench TRACE ARTIFACT`: would sharing calls help on your traffic, on this machine?"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from lrai_core import (
    ActorError,
    Artifact,
    ArtifactError,
    QueueFull,
    RequestError,
    UsageError,
    __version__,
    load_config,
)
from lrai_core.verifier.verifier import evaluation
from lrai_report.chart import MARGIN, bar_line, load_line, panel
from lrai_report.figures import Figures, figures, load_over_time, median, p95_over_time, verdict
from lrai_report.plan import Plan, check_size, parse_range, sized, suggest_deadline
from lrai_report.replay import (
    CALLERS,
    POLICIES,
    MadeUp,
    Outcome,
    Server,
    capacity,
    is_told,
    precise_loop,
    replay,
)
from lrai_report.terminal import out, share_done, write
from lrai_report.trace import Arrivals, part, read_trace, slices
from lrai_report.words import FEW, check_numbers, figure

_ALONE: Final = "one-by-one"
_SHARE_OF_CAPACITY: Final = 0.7
_CAPACITY_SECONDS: Final = 2.1
_WARM_UP_SECONDS: Final = 0.6
_SAMPLE: Final = 500  # requests whose sizes these two use
_BUSY: Final = 0.5  # of the CPUs
_LAG_SHARE: Final = 0.1  # of the deadline; what is sent later than that tells of the sender

_WIDEST: Final = 96

Kept = Sequence[Sequence[NDArray[Any]]]  # rows that the artifact was judged on

app = typer.Typer(add_completion=False, rich_markup_mode=None)


_HELP: Final = """Replay the traffic of TRACE against ARTIFACT, and compare policies, here.

TRACE is a CSV file with a column timestamp or time (ISO 8601, or seconds as a number) and, if you
have them, length (or tokens, ContextTokens) and rows; or with a single column, requests per second.
Times and sizes of the requests are the trace's, scaled to the rate and the lengths you ask for. The
contents are made up, except for texts, and sizes that the trace does not tell: these are taken from
the rows that the artifact kept. The answers are really computed.

The policies take turns at the same requests, round by round:

\b
{policies}

A request without an answer at its deadline is late, whatever the reason. A difference between two
policies counts if every round shows it. answers/s are over --seconds, or up to the last answer if
that comes later. rows/call are the rows of answered requests over all calls of the model, those
that came too late for their callers included.

\b
Example: would it help this log, at 50 requests a second, with 100 ms for each?
  lrai bench requests.csv model.lrai --rate 50 --deadline-ms 100
""".format(
    policies="\n".join(
        textwrap.fill(f"{name:<11} {what}", 76, initial_indent="  ", subsequent_indent=" " * 14)
        for name, what in POLICIES.items()
    )
)


@app.command(help=_HELP)
def bench(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="CSV file.")],
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory NAME.lrai.")],
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1e5,
            help="Mean requests per second. By default 0.7 of what one by one can answer here, "
            "which is measured first.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=3600, help="Of the trace, for each policy and round.")
    ] = 20,
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e9,
            help="How soon an answer is needed. By default ten times what a large request of "
            "this trace (the 95th percentile) takes alone by the artifact's profile, at least 10.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="How many; each takes the next part of the trace.")
    ] = 3,
    policies: Annotated[
        str, typer.Option(help="Separated by commas; the first is compared with the others.")
    ] = ",".join(POLICIES),
    lengths: Annotated[
        str,
        typer.Option(
            metavar="LOW..HIGH",
            help="Scale the trace's lengths to this range, or draw them from it if there are none. "
            "By default the range of the artifact's profile, if they are not within it.",
            show_default=False,
        ),
    ] = "",
    file: Annotated[
        Path | None,
        typer.Option("--json", help="File to write all figures to.", show_default=False),
    ] = None,
) -> None:
    """Compare the policies; `_HELP` is what a person reads."""
    check_numbers(rate=rate, seconds=seconds, deadline_ms=deadline_ms)
    names = _names(policies)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"--json {file}: it is a folder, or lies in none that exists")
    check_size(rate or 0, seconds, rounds)
    opened = Artifact.open(artifact)
    kept = evaluation(opened).inputs
    traffic, drawn, words = sized(read_trace(trace), opened, parse_range(lengths))
    _say("trace", f"{trace.name}: {words}")
    minutes = len(names) * rounds * seconds / 60
    parts_of = f"{len(names)} policies, {rounds} rounds of {seconds:g} s each; --seconds, --rounds"
    _say("takes", f"about {figure(minutes, 2)} minutes: {parts_of}")
    if not kept and not all(map(is_told, opened.manifest.signature.inputs)):
        _say("note", "texts of one letter and small sizes are asked: the artifact kept no rows")
    cpus, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if busy > _BUSY * cpus:
        _say("note", f"other work is going on (load {busy:.1f} on {cpus} CPUs), and will tell")
    with ExitStack() as stack:
        bar = stack.enter_context(share_done())
        task = bar.add_task("load", total=None)
        servers = {}
        for name in dict.fromkeys([*names, *([_ALONE] if rate is None else [])]):
            servers[name] = Server.open(name, opened)
            stack.callback(servers[name].close)
        runner = stack.enter_context(asyncio.Runner(loop_factory=precise_loop))
        bar.update(task, description="warm up")
        whole = seconds * rounds
        sample = part(traffic, _SAMPLE / whole, whole, lengths=drawn)  # seconds may be silent
        measured = runner.run(_measure(servers, sample, opened, kept, wanted=rate is None))
        rate = rate or _SHARE_OF_CAPACITY * measured
        check_size(rate, seconds, rounds)
        arrivals = part(traffic, rate, whole, lengths=drawn)
        parts = slices(arrivals, seconds, rounds)
        deadline_is = "as asked"
        if deadline_ms is None:
            deadline_ms, deadline_is = suggest_deadline(opened, arrivals)
        plan = Plan(
            artifact=opened,
            rate=rate,
            capacity=measured,
            deadline_ms=deadline_ms,
            deadline_is=deadline_is,
            seconds=seconds,
            rounds=parts,
        )
        _say_plan(plan)
        chosen = {name: servers[name] for name in names}
        results = runner.run(_play(chosen, plan, kept, bar, task))
        one = next(iter(servers.values())).runtime
        served = one.models()[0].variant if one.stats().get("variant_refused") else ""
    found = {
        name: [figures(outcome, plan.deadline_ms / 1e3, plan.seconds) for outcome in outcomes]
        for name, outcomes in results.items()
    }
    said = verdict(found, plan.rate, plan.deadline_ms)
    try:  # who reads what is printed may be gone
        if file is not None:
            _write(file, trace, plan, found, said)
    finally:
        _show(results, found, plan)
        if served:
            made = f"{opened.manifest.chosen} was made for another processor or engine version"
            _say("note", f"{made}: {served} served")
        out.print(Text(said, style="bold"))


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai bench")


def _names(policies: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in policies.split(",")))
    for name in names:
        if name not in POLICIES:
            allowed = ", ".join(POLICIES)
            raise UsageError(f"--policies: {name[:40]!r} is none; allowed: {allowed}")
    return names


async def _measure(
    servers: Mapping[str, Server], sample: Arrivals, artifact: Artifact, kept: Kept, *, wanted: bool
) -> float:
    """Warm the servers up, and return how many requests per second one by one answers.

    0 where it is not wanted.

    Raises:
        ArtifactError: Made-up requests are not answered, be it for the model or for a limit.
        UsageError: They do not fit the queue.
    """
    made_up = _made_up(artifact, kept, sample)
    try:
        for server in servers.values():
            await capacity(server, sample, made_up, _WARM_UP_SECONDS)
        if wanted:
            return await capacity(servers[_ALONE], sample, made_up, _CAPACITY_SECONDS)
    except QueueFull as error:
        full = f"{CALLERS} requests like these at once, to warm up, are too many: {error}"
        more = "a larger scheduler.max_queue_rows, or max_queue_bytes, lets them wait"
        raise UsageError(f"{full}; {more}") from None
    except (RequestError, ActorError) as error:
        raise ArtifactError(f"made-up requests like these are not answered: {error}") from None
    return 0.0


async def _play(
    servers: Mapping[str, Server], plan: Plan, kept: Kept, bar: Progress, task: TaskID
) -> dict[str, list[Outcome]]:
    """Return what became of each round under each policy; they take turns, and in going first."""
    results: dict[str, list[Outcome]] = {name: [] for name in servers}
    names, limit, over = list(servers), plan.deadline_ms / 1e3, 0.0
    bar.update(task, total=len(plan.rounds) * len(names) * plan.seconds)
    for index, arrivals in enumerate(plan.rounds):
        made_up = _made_up(plan.artifact, kept, arrivals)
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            bar.update(task, description=f"round {index + 1} of {len(plan.rounds)}: {name}")
            advance = functools.partial(_advance, bar, task, over)
            outcome = await replay(servers[name], arrivals, made_up, limit, advance)
            results[name].append(outcome)
            over += plan.seconds
    return results


def _advance(bar: Progress, task: TaskID, before: float, seconds: float) -> None:
    bar.update(task, completed=before + seconds)


def _made_up(artifact: Artifact, kept: Kept, arrivals: Arrivals) -> MadeUp:
    most_bytes = load_config().limits.request_bytes
    return MadeUp(artifact.manifest.signature, arrivals, most_bytes, kept)


def _say(label: str, words: str) -> None:
    out.print(Text.assemble((f"{label:<10}", "bold"), words))


def _say_plan(plan: Plan) -> None:
    rate = f"{figure(plan.rate, 4)} requests/s"
    if plan.capacity:
        alone = figure(plan.capacity, 4)
        rate += f": {_SHARE_OF_CAPACITY} of the {alone} that one by one answers here"
    _say("rate", rate)
    _say("deadline", f"{figure(plan.deadline_ms)} ms: {plan.deadline_is}")
    if min(len(arrivals.seconds) for arrivals in plan.rounds) < FEW:
        _say("note", f"under {FEW} requests in a round say little: more --seconds would help")


def _show(
    results: Mapping[str, Sequence[Outcome]], found: Mapping[str, Sequence[Figures]], plan: Plan
) -> None:
    medians = {name: median(rounds) for name, rounds in found.items()}
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for column in ("on time", "p50 ms", "p95 ms", "p99 ms", "answers/s", "refused", "rows/call"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in medians.items():
        spread = (each.p50_ms, each.p95_ms, each.p99_ms)
        times = (figure(value) if math.isfinite(value) else "never" for value in spread)
        more = figure(each.answered_per_second, 4), f"{each.refused:.1%}"
        table.add_row(name, f"{each.on_time:.1%}", *times, *more, f"{each.rows_per_call:.2f}")
    out.print(table)
    width = max(10, min(out.width, _WIDEST) - MARGIN)
    _heading(
        f"on time, within {figure(plan.deadline_ms)} ms (medians of {len(plan.rounds)} rounds)"
    )
    for name, each in medians.items():
        out.print(Text.assemble(*bar_line(name, each.on_time, width - 8)))
    seconds = plan.seconds * len(plan.rounds)
    _heading(f"p95 latency over the {seconds:g} s, {figure(seconds / width, 2)} s a column")
    out.print(Text.assemble(*load_line(load_over_time(plan.rounds, plan.seconds, width))))
    for name, outcomes in results.items():
        heights = p95_over_time(plan.rounds, outcomes, plan.seconds, width) * 1e3
        for line in panel(name, heights, plan.deadline_ms):
            out.print(Text.assemble(*line))
    words = "above the line: late; to the top: twice the deadline or more, or no answer"
    out.print(f"{'':{MARGIN}}{words}\n", style="dim")
    lag = max(outcome.lag_seconds for outcomes in results.values() for outcome in outcomes)
    if lag * 1e3 > _LAG_SHARE * plan.deadline_ms:
        late = f"up to {figure(lag * 1e3)} ms late (p99)"
        _say("note", f"requests were sent {late}: the machine was too busy")


def _heading(words: str) -> None:
    out.print(f"\n{words}", style="bold")


def _write(
    file: Path, trace: Path, plan: Plan, found: Mapping[str, Sequence[Figures]], said: str
) -> None:
    content = {
        "lrai_version": __version__,
        "trace": trace.name,
        "artifact": plan.artifact.path.name,
        "model_version": plan.artifact.version,
        "capacity_per_second": plan.capacity or None,
        "rate_per_second": plan.rate,
        "deadline_ms": plan.deadline_ms,
        "seconds": plan.seconds,
        "requests": [len(arrivals.seconds) for arrivals in plan.rounds],
        "policies": {
            name: {"median": _plain(median(rounds)), "rounds": [_plain(each) for each in rounds]}
            for name, rounds in found.items()
        },
        "verdict": said,
    }
    write(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _plain(each: Figures) -> dict[str, Any]:
    told = asdict(each).items()  # JSON has no infinity
    return {key: value if math.isfinite(value) else None for key, value in told}
