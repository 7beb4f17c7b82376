"""How many requests the planner answers in time, against peers' rules and a clairvoyant.

An event simulation. One server under four arrival processes, at loads up to twice what the
clairvoyant answers, with and without noise on what calls take; a wrong or changing machine that the
latency model has to learn; eight models on one processor; two unequal actors of one model; and what
a decision costs with 10,000 requests queued. The scheduler itself is asked, from its door to the
end of a call, with one setting for all of it; nothing takes time on its way, so no call is handed
over ahead. Of two unequal actors, its planner.

    python benchmarks/scheduler.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Final, NoReturn

_ROOT = Path(__file__).resolve().parents[1]
# The folder of this file has a `mlflow.py`; the one above it has our own packages.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the work is shared out by process

import numpy as np  # noqa: E402 - after the lines above
from rich.progress import Progress  # noqa: E402

from benchmarks import harness, sharing, simulation  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.simulation import Actual, Flags, Policy, Server, Times, arrivals_of  # noqa: E402
from lrai_core.artifact import LatencyPoint  # noqa: E402
from lrai_core.config import SchedulerConfig  # noqa: E402
from lrai_core.engine.batching import MEASURED_ELEMENTS  # noqa: E402
from lrai_core.scheduler.latency import LatencyModel  # noqa: E402
from lrai_core.scheduler.planner import Bounds, plan  # noqa: E402
from lrai_core.scheduler.waiting import Queue, Waiting  # noqa: E402

Row = dict[str, Any]

SERVER: Final = Server()
SYNTHETIC, TRACES = ("poisson", "mmpp"), ("azure", "twitter")
BURSTY: Final = ("mmpp", "azure", "twitter")
LOADS: Final = (0.5, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)  # of the clairvoyant rate
NOISES: Final = (0.0, 0.05, 0.15)
MOST_BEHIND: Final = {0.0: 3.0, 0.05: 5.0}  # points behind the clairvoyant, by noise
DEFAULT_STATIC: Final = (32, 0.1)  # rows, and seconds that the first one waits
STATIC_ROWS: Final = (8, 16, 32, 64, 128)
STATIC_DELAYS: Final = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03)
STATIC_DRAWS: Final = 2  # that the best setting is chosen by; there are many
PEERS: Final[dict[str, Callable[[Server], Policy]]] = {
    "greedy": simulation.Greedy,
    "nexus": simulation.Nexus,
    "bentoml": simulation.Bento,
}

LEARNING: Final = ("2x high", "2x low", "1 ms more", "30 % slower")
LEARNING_SECONDS: Final = 10.0
CHANGE_AT_SECONDS: Final = 20.0
LEAST_LOSS: Final = 1.0  # points; of less, the share that is recovered means nothing
LEAST_RECOVERED: Final = 0.8

KINDS: Final = ("equal", "mixed", "linear")
SKEWS: Final = (0.0, 1.0, 2.0)
MIX_LOADS: Final = (0.6, 0.9, 1.1, 1.5)
ACTOR_CLIENTS: Final = (256, 1024)
LEAST_CAPACITY: Final = 0.95

QUEUED: Final = 10_000
MOST_MICROSECONDS: Final = 20.0
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is simulated."""

    requests: int  # of a process; what the figures' stability comes from
    draws: int  # of noise, for the same arrivals
    low_load_draws: int  # the same below load 1, where so few are late that luck needs averaging
    rate_steps: int  # halvings of the interval in which the clairvoyant rate is looked for
    learning: Sequence[str]  # processes; the trace of Azure is too short for it
    learning_loads: Sequence[float]
    learning_seconds: float  # measured, after those that learning may take
    learning_draws: int  # of noise: of one point that is lost, luck is a tenth or two in one draw
    mix_seeds: int
    mix_seconds: float
    cost_repeats: int

    def draws_at(self, load: float) -> int:
        """Return how many draws of noise a load needs."""
        return self.draws if load >= 1 else self.low_load_draws


QUICK: Final = Extent(
    requests=8_000,
    draws=6,
    low_load_draws=20,
    rate_steps=8,
    learning=("poisson", "mmpp"),
    learning_loads=(1.2,),
    learning_seconds=10.0,
    learning_draws=4,
    mix_seeds=1,
    mix_seconds=20.0,
    cost_repeats=3,
)
FULL: Final = Extent(
    requests=40_000,
    draws=20,
    low_load_draws=100,
    rate_steps=9,
    learning=("poisson", "mmpp", "twitter"),
    learning_loads=(0.9, 1.2, 1.5),
    learning_seconds=20.0,
    learning_draws=4,
    mix_seeds=5,
    mix_seconds=60.0,
    cost_repeats=7,
)


class Workers:
    """Processes, one for each CPU, that run functions of modules; a context manager."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            mp_context=get_context("spawn"),
            initializer=signal.signal,  # an interrupt is for this process, which ends the others
            initargs=(signal.SIGINT, signal.SIG_IGN),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:  # nobody waits for what still runs
            for process in active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def map(self, what: str, function: Callable[..., Any], cases: Sequence[Any]) -> list[Any]:
        """Return `function(*case)` for each, in order, showing how far it is."""
        futures: list[Future[Any]] = [self._pool.submit(function, *case) for case in cases]
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(what, total=len(futures))
            for done in as_completed(futures):
                done.result()
                bar.advance(task)
        return [future.result() for future in futures]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a check fails."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _end)
    started = time.perf_counter()
    rows, checks = simulated(QUICK if arguments.quick else FULL, arguments.data)
    return harness.conclude(
        "scheduler",
        arguments.out,
        harness.environment(1, ["lrai", "numpy"]),
        rows,
        checks,
        quick=arguments.quick,
        seconds=time.perf_counter() - started,
    )


def simulated(extent: Extent, data: Path | None) -> tuple[list[Row], list[Check]]:
    """Return what the simulations found, and whether it is what it has to be."""
    rows: list[Row] = []
    checks: list[Check] = []

    def keep(found: tuple[list[Row], list[Check]]) -> list[Row]:
        rows.extend(found[0])
        checks.extend(found[1])
        return found[0]

    keep(decisions(extent))  # before other processes are there to disturb it
    with Workers() as workers:
        on_time = keep(one_server(extent, data, workers))
        rates = {row["process"]: row["clairvoyant_rate"] for row in on_time}
        keep(learning(extent, data, workers, rates))
        keep(several_models(extent, workers))
        keep(unequal_actors(workers))
    return rows, checks


def one_server(
    extent: Extent, data: Path | None, workers: Workers
) -> tuple[list[Row], list[Check]]:
    """Compare policies by what they answer in time."""
    processes = SYNTHETIC + (TRACES if data else ())
    if not data:
        console.print("without --data there are no traces: Azure and Twitter are left out")
    sizes = (extent.requests, data)
    found = workers.map(
        "clairvoyant rates", clairvoyant_rate, [(p, extent.rate_steps, *sizes) for p in processes]
    )
    rates = dict(zip(processes, found, strict=True))
    cases = list(itertools.product(processes, LOADS))
    best = workers.map(
        "clairvoyant", clairvoyant_share, [(p, rates[p] * load, *sizes) for p, load in cases]
    )
    clairvoyant = dict(zip(cases, best, strict=True))
    noisy = list(itertools.product(processes, LOADS, NOISES))
    shares = workers.map(
        "policies",
        policy_shares,
        [(p, rates[p] * load, noise, extent.draws_at(load), *sizes) for p, load, noise in noisy],
    )
    rows = [
        {
            "table": "one server",
            "process": process,
            "clairvoyant_rate": rates[process],
            "load": load,
            "noise": noise,
            **policies,
            "clairvoyant": clairvoyant[process, load],
        }
        for (process, load, noise), policies in zip(noisy, shares, strict=True)
    ]
    policies = ("static", "static_best", *PEERS, "lrai", "clairvoyant")
    columns = ["static", "static\nbest", "greedy", "nexus", "bento-\nml", "lrai", "clair-\nvoyant"]
    load_1 = ", ".join(f"{process} {rate:.0f}" for process, rate in rates.items())
    harness.show(
        "One server: % answered in time",
        ["process", "load", "noise", *columns],
        [
            (
                row["process"],
                f"{row['load']:g}",
                f"{row['noise']:.0%}",
                *(f"{100 * row[policy]:.2f}" for policy in policies),
            )
            for row in rows
        ],
        f"tau = 10 + .25 b ms, b <= {SERVER.most_rows}, SLO {SERVER.slo_seconds * 1e3:.0f} ms; "
        f"{extent.requests} requests (azure: at most its 19,366), {extent.draws} draws of "
        f"noise, below load 1 {extent.low_load_draws};\n"
        f"at load 1 the clairvoyant answers 99 % in time: requests/s {load_1};\n"
        "static: 32 rows or 100 ms; static best: the best size and delay for the very case, by "
        "hindsight;\nthe clairvoyant knows every arrival and meets no noise",
    )
    return rows, one_server_checks(rows)


def clairvoyant_rate(process: str, steps: int, count: int, data: Path | None) -> float:
    """Return the highest rate of which the clairvoyant answers 99 % in time."""
    share = functools.partial(clairvoyant_share, process, count=count, data=data)
    return simulation.fastest_rate(share, 500, 3_000, steps)


def clairvoyant_share(process: str, rate: float, count: int, data: Path | None) -> float:
    """Return the share that the clairvoyant answers in time."""
    return simulation.clairvoyant(arrivals_of(process, rate, count, data), SERVER)


def policy_shares(
    process: str, rate: float, noise: float, draws: int, count: int, data: Path | None
) -> Row:
    """Return what each policy answers in time, in the mean over draws of the noise."""
    arrivals = arrivals_of(process, rate, count, data)
    draws = draws if noise else 1

    def shares(make: Callable[[], Policy], draws: int = draws) -> Sequence[float]:
        actuals = [simulation.actual_of(SERVER, noise, seed) for seed in range(draws)]
        runs = [simulation.simulate(make(), arrivals, SERVER, actual) for actual in actuals]
        return [float(on_time.mean()) for on_time in runs]

    def static(setting: tuple[int, float], draws: int = draws) -> float:
        return float(np.mean(shares(functools.partial(simulation.Static, *setting), draws)))

    settings = list(itertools.product(STATIC_ROWS, STATIC_DELAYS))
    best = max(settings, key=lambda setting: static(setting, min(draws, STATIC_DRAWS)))
    found = {name: shares(functools.partial(make, SERVER)) for name, make in PEERS.items()}
    actuals = [simulation.actual_of(SERVER, noise, seed) for seed in range(draws)]
    found["lrai"] = [float(_ours(arrivals, actual).mean()) for actual in actuals]
    ahead = np.subtract(found["lrai"], found["greedy"])
    return {
        "draws": draws,
        "static": static(DEFAULT_STATIC),
        "static_best": static(best),
        "static_best_rows": best[0],
        "static_best_delay_ms": best[1] * 1e3,
        **{name: float(np.mean(each)) for name, each in found.items()},
        "ahead_of_greedy_error": float(ahead.std(ddof=1) / draws**0.5) if draws > 1 else 0.0,
    }


def _ours(
    arrivals: Times, actual: Actual, wrong: float = 1.0, more: float = 0.0, *, learns: bool = True
) -> Flags:
    """Return which arrivals the scheduler answers in time, with a profile as `Server.points`."""
    alone = sharing.Mix([SERVER], [sharing.Arrival(time, 0) for time in arrivals.tolist()])
    profile = SERVER.points(wrong, more)
    with contextlib.closing(sharing.Ours([SERVER], [profile], learns=learns)) as ours:
        return sharing.on_time(ours, alone, [actual])


def one_server_checks(rows: Sequence[Row]) -> list[Check]:
    """Return what has to hold of one server."""
    checks = []
    for noise, most in MOST_BEHIND.items():
        behind = {
            _case(row): 100 * (row["clairvoyant"] - row["lrai"])
            for row in rows
            if row["noise"] == noise
        }
        worst = max(behind, key=lambda case: behind[case])
        name = f"points behind the clairvoyant at {noise:.0%} noise, most ({worst})"
        checks.append(Check(name, behind[worst], f"<= {most:g}", behind[worst] <= most))
    least = min(rows, key=lambda row: row["lrai"] - row["greedy"])
    ahead = 100 * (least["lrai"] - least["greedy"])
    error = 100 * least["ahead_of_greedy_error"]
    name = f"points ahead of greedy, least ({_case(least)}; standard error {error:.2g})"
    checks.append(Check(name, ahead, ">= 0", ahead >= -_ROUNDING))
    bursty = [row for row in rows if row["process"] in BURSTY]
    loaded = [row for row in bursty if row["load"] >= 1]
    for which, those in (("bursty cases", bursty), ("bursty cases at load 1 and above", loaded)):
        gain = 100 * float(np.mean([row["lrai"] - row["bentoml"] for row in those]))
        name = f"points ahead of BentoML's rule, mean of {len(those)} {which}"
        checks.append(Check(name, gain, "> 0", gain > 0))
    return checks


def _case(row: Row) -> str:
    return f"{row['process']} x {row['load']:g}, {row['noise']:.0%}"


def learning(
    extent: Extent, data: Path | None, workers: Workers, rates: dict[str, float]
) -> tuple[list[Row], list[Check]]:
    """Compare a planner that learns with one that does not, and with one that knew."""
    processes = [process for process in extent.learning if process in rates]
    cases = list(itertools.product(LEARNING, processes, extent.learning_loads, NOISES[:2]))
    shares = workers.map(
        "learning",
        learning_shares,
        [
            (which, process, rates[process] * load, noise, draws, extent.learning_seconds, data)
            for which, process, load, noise in cases
            for draws in [extent.learning_draws if noise else 1]
        ],
    )
    rows = []
    for (which, process, load, noise), (frozen, learned, right) in zip(cases, shares, strict=True):
        loss = 100 * (right - frozen)
        rows.append(
            {
                "table": "learning",
                "wrong": which,
                "process": process,
                "load": load,
                "noise": noise,
                "frozen": frozen,
                "learned": learned,
                "right": right,
                "loss": loss,
                "recovered": (learned - frozen) / (right - frozen) if loss >= LEAST_LOSS else None,
            }
        )
    harness.show(
        "Learning: % answered in time, from 10 s after the start or the change",
        ["wrong", "process", "load", "noise", "learns\nnothing", "learns", "knew", "recovered"],
        [
            (
                row["wrong"],
                row["process"],
                f"{row['load']:g}",
                f"{row['noise']:.0%}",
                *(f"{100 * row[column]:.2f}" for column in ("frozen", "learned", "right")),
                "-" if row["recovered"] is None else f"{row['recovered']:.0%}",
            )
            for row in rows
        ],
        "-: the loss is under one point, so it is not checked; the trace of Azure is too short;\n"
        f"the 30 % come at {CHANGE_AT_SECONDS:g} s, the rest is wrong from the start; "
        f"{extent.learning_seconds:g} s are measured, with noise in {extent.learning_draws} draws",
    )
    checks = []
    for which in LEARNING:
        recovered = [row["recovered"] for row in rows if row["wrong"] == which]
        counted = [share for share in recovered if share is not None]
        name = f"share of the loss recovered, {which}, least of {len(counted)} cases"
        least = min(counted, default=0.0)  # of none it is not shown
        checks.append(Check(name, least, f">= {LEAST_RECOVERED}", least >= LEAST_RECOVERED))
    return rows, checks


def learning_shares(
    which: str,
    process: str,
    rate: float,
    noise: float,
    draws: int,
    seconds: float,
    data: Path | None,
) -> tuple[float, float, float]:
    """Return the shares in time of a planner that learns nothing, one that learns, one that knew.

    The last one is the better of those two, with the right prior from the start. All are means over
    the same draws of the noise.

    Args:
        which: One of `LEARNING`, what the first two do not know.
        process: Of the arrivals.
        rate: Of the arrivals.
        noise: On what calls take.
        draws: Of the noise.
        seconds: Measured, after those that learning may take.
        data: Folder of the traces.
    """
    wrong, more, slower = 1.0, 0.0, 1.0
    after = LEARNING_SECONDS
    match which:
        case "2x high" | "2x low":
            wrong = 2.0 if which == "2x high" else 0.5
        case "1 ms more":
            more = 0.001
        case _:
            slower = 1.3
            after += CHANGE_AT_SECONDS

    arrivals = arrivals_of(process, rate, round(rate * (after + seconds)), data)
    measured = arrivals >= after

    def share(
        wrong: float = 1.0,
        more_known: float = 0.0,
        *,
        learns: bool,
        slow_from: float = CHANGE_AT_SECONDS,
    ) -> float:
        def drawn(seed: int) -> float:
            tau = simulation.actual_of(SERVER, noise, seed)

            def actual(rows: int, start: float) -> float:
                return tau(rows, start) * (slower if start >= slow_from else 1.0) + more

            return float(_ours(arrivals, actual, wrong, more_known, learns=learns)[measured].mean())

        return float(np.mean([drawn(seed) for seed in range(draws)]))

    # With the right prior learning still pays, for it is what finds out how much noise there is.
    right = [share(slower, more, learns=learns, slow_from=0) for learns in (False, True)]
    return share(wrong, learns=False), share(wrong, learns=True), max(right)


def several_models(extent: Extent, workers: Workers) -> tuple[list[Row], list[Check]]:
    """Compare rules by what eight models on one processor answer in time."""
    cases = list(itertools.product(KINDS, SKEWS, MIX_LOADS, range(extent.mix_seeds)))
    found = workers.map(
        "several models", mix_shares, [(*case, extent.mix_seconds) for case in cases]
    )
    rows = [
        {"table": "several models", "kind": kind, "skew": skew, "load": load, "seed": seed, **rules}
        for (kind, skew, load, seed), rules in zip(cases, found, strict=True)
    ]
    groups: dict[tuple[str, float, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["skew"], row["load"]].append(row)
    rules = ("greedy", "edf", "edf_drops", "lrai")

    def worst_models(group: Sequence[Row]) -> str:
        return "/".join(f"{100 * min(row[f'{r}_worst_model'] for row in group):.0f}" for r in rules)

    harness.show(
        "Eight models on one processor: % answered in time",
        ["models", "skew", "load", "greedy", "edf", "edf\ndrops", "lrai", "ahead", "worst\nmodel"],
        [
            (
                kind,
                f"{skew:g}",
                f"{load:g}",
                *(f"{100 * np.mean([row[rule] for row in group]):.2f}" for rule in rules),
                f"{min(row['ahead'] for row in group):.2f}",
                worst_models(group),
            )
            for (kind, skew, load), group in groups.items()
        ],
        f"mixes each: {extent.mix_seeds}, of {extent.mix_seconds:g} s; edf: the earliest deadline "
        "first; drops: gives up what is late;\nahead: points of lrai ahead of the better of greedy "
        "and edf, in the worst of these mixes;\nworst model: % in time of the model that is worst "
        "off in any of them, in the order of the rules",
    )
    worst = min(rows, key=lambda row: row["ahead"])
    where = f"{worst['kind']}, skew {worst['skew']:g}, load {worst['load']:g}"
    name = f"eight models, points ahead of the better rule, least of {len(rows)} ({where})"
    return rows, [Check(name, worst["ahead"], ">= 0", worst["ahead"] >= -_ROUNDING)]


def mix_shares(kind: str, skew: float, load: float, seed: int, seconds: float) -> Row:
    """Return what each rule answers in time of one mix, in all and of its worst-off model."""
    mix = sharing.mix(kind, skew, load, seconds, seed)
    asked = np.bincount([arrival.model for arrival in mix.arrivals], minlength=len(mix.models))
    row: Row = {"requests": len(mix.arrivals)}
    with contextlib.closing(sharing.Ours(mix.models)) as ours:
        rules: dict[str, sharing.Rule] = {
            "greedy": sharing.InOrder(mix.models, by_deadline=False),
            "edf": sharing.InOrder(mix.models, by_deadline=True),
            "edf_drops": sharing.InOrder(mix.models, by_deadline=True, drops=True),
            "lrai": ours,
        }
        for name, rule in rules.items():
            shares = sharing.share_on_time(rule, mix)
            row[name] = float(np.dot(shares, asked) / asked.sum())
            row[f"{name}_worst_model"] = min(shares)
    row["ahead"] = 100 * (row["lrai"] - max(row["greedy"], row["edf"]))
    return row


def unequal_actors(workers: Workers) -> tuple[list[Row], list[Check]]:
    """Compare two actors of one model, one half as fast, with each of them alone."""
    fast = Server(slo_seconds=0.25)
    slow = Server(2 * fast.call_seconds, 2 * fast.row_seconds, slo_seconds=fast.slo_seconds)
    teams = ((fast,), (slow,), (fast, slow))
    rates = workers.map(
        "unequal actors",
        sharing.closed_queue,
        [(team, clients, 20.0) for clients in ACTOR_CLIENTS for team in teams],
    )
    rows, checks = [], []
    for index, clients in enumerate(ACTOR_CLIENTS):
        alone_fast, alone_slow, both = rates[3 * index : 3 * index + 3]
        share = both / (alone_fast + alone_slow)
        rows.append(
            {
                "table": "unequal actors",
                "clients": clients,
                "fast_per_second": alone_fast,
                "slow_per_second": alone_slow,
                "both_per_second": both,
                "share": share,
            }
        )
        name = f"two unequal actors, {clients} clients, share of the summed capacity"
        checks.append(Check(name, share, f">= {LEAST_CAPACITY}", share >= LEAST_CAPACITY))
    harness.show(
        "Two actors of one model, the second half as fast: answers in time per second",
        ["clients", "first alone", "second alone", "both", "of the sum"],
        [
            (
                str(row["clients"]),
                *(f"{row[f'{which}_per_second']:.0f}" for which in ("fast", "slow", "both")),
                f"{row['share']:.1%}",
            )
            for row in rows
        ],
        f"a closed queue: who has an answer asks again; SLO {fast.slo_seconds * 1e3:.0f} ms",
    )
    return rows, checks


def decisions(extent: Extent) -> tuple[list[Row], list[Check]]:
    """Measure what the planner itself costs."""
    config = SchedulerConfig()
    bounds = Bounds(config.max_batch_rows, MEASURED_ELEMENTS)
    rows: list[Row] = []
    checks: list[Check] = []
    with console.status("the planner's own cost"):
        cases = list(itertools.product(COSTS, (None, 5.0, 0.5, 0.05)))
        # Round by round: what else the machine does for some seconds is not in all of a case's.
        rounds = [
            [decision_cost(*one, bounds) for one in cases] for _ in range(extent.cost_repeats)
        ]
        for (inputs, slo), timed in zip(cases, zip(*rounds, strict=True), strict=True):
            rows.append(
                {
                    "table": "decisions",
                    "inputs": inputs,
                    "spread_slo_seconds": slo,
                    **min(timed, key=lambda row: row["microseconds"]),
                }
            )
    harness.show(
        f"What the planner costs with {QUEUED} queued",
        [
            "inputs",
            "deadlines",
            "us a\nrequest",
            "ms a\ndecision",
            "requests\na decision",
            "given up",
        ],
        [
            (
                row["inputs"],
                _deadlines(row["spread_slo_seconds"]),
                f"{row['microseconds']:.1f}",
                f"{row['milliseconds_per_decision']:.2f}",
                f"{row['requests_per_decision']:.1f}",
                f"{row['given_up']:.0%}",
            )
            for row in rows
        ],
        "`Queue.add` + `plan` + `Queue.remove`, CPU time of one thread, best of "
        f"{extent.cost_repeats}; the clock goes on by what each call takes, and as many arrive as "
        "leave",
    )
    for inputs in COSTS:
        worst = max(
            (row for row in rows if row["inputs"] == inputs), key=lambda row: row["microseconds"]
        )
        where = _deadlines(worst["spread_slo_seconds"])
        name = f"planner, us a request, {inputs}, most (deadlines: {where})"
        value = worst["microseconds"]
        checks.append(Check(name, value, f"<= {MOST_MICROSECONDS:g}", value <= MOST_MICROSECONDS))
    return rows, checks


def decision_cost(inputs: str, slo: float | None, bounds: Bounds) -> Row:
    """Return what adding, planning and removing take per request.

    Args:
        inputs: One of `COSTS`.
        slo: Deadlines are spread over its last four fifths, an overload; none: nothing is urgent.
        bounds: Of a call.
    """
    latency = COSTS[inputs]()
    lengths = range(4, 65) if inputs == "mixed lengths" else range(1)
    drawn, most = random.Random(0), 2 * QUEUED + bounds.rows + 4096  # of one decision at the end
    times = [3_600.0 if slo is None else slo * drawn.uniform(0.2, 1.0) for _ in range(most)]
    arrivals = zip(itertools.count(), times, drawn.choices(lengths, k=most), strict=False)
    queue, now = Queue(), 0.0

    def add() -> None:
        sequence, left, length = next(arrivals)
        queue.add(Waiting(0, now + left, sequence, now + left, 0, 1, length))

    for _ in range(QUEUED):
        add()
    left = calls = given_up = 0
    started = time.thread_time()
    while left < QUEUED:
        decision = plan(queue, latency, now, bounds)
        gone = (*decision.drop, *decision.dispatch)
        for sequence in gone:
            queue.remove(sequence)
        now += decision.predicted_seconds
        left, calls, given_up = left + len(gone), calls + 1, given_up + len(decision.drop)
        for _ in gone:
            add()
    seconds = time.thread_time() - started
    return {
        "microseconds": seconds / left * 1e6,
        "milliseconds_per_decision": seconds / calls * 1e3,
        "requests_per_decision": left / calls,
        "given_up": given_up / left,
    }


def _deadlines(slo: float | None) -> str:
    return "far" if slo is None else f"within {slo:g} s"


def _by_rows(call_ms: float, row_ms: float) -> LatencyModel:
    return Server(call_ms / 1e3, row_ms / 1e3).profile()


def _by_length() -> LatencyModel:
    """Return the shape of a small sentence encoder on a CPU."""
    return LatencyModel(
        [
            LatencyPoint(
                rows=rows,
                length=length,
                median_ms=0.418 + 0.0624 * rows * length + 0.000083 * rows * length**2,
                spread_ms=0,
            )
            for rows, length in itertools.product((1, 4, 16), (8, 32, 128))
        ]
    )


COSTS: Final[dict[str, Callable[[], LatencyModel]]] = {
    "affine tau": functools.partial(_by_rows, 10.0, 0.25),
    "linear tau": functools.partial(_by_rows, 0.0, 5.0),
    "mixed lengths": _by_length,
}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The planner against peers and a clairvoyant.")
    parser.add_argument("--quick", action="store_true", help="three and a half minutes")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--data", type=Path, help="folder of data sets: traces of arrivals")
    return parser.parse_args(argv)


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the workers are ended by now
        sys.exit(128 + signal.SIGINT)
