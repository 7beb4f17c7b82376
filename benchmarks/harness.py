"""What every benchmark does alike: environment, intervals, checks, one table, JSON and chart."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lrai_core.artifact import Manifest
from lrai_core.engine.engine import isa_class

_RESAMPLES: Final = 10_000
_LEVEL: Final = 0.95
_ENOUGH: Final = 6  # rounds, below which the interval is from the least of them to the most
# Below the tables of what is measured beside ONNX Runtime as people open it.
ON_HUGE_PAGES: Final = (
    "lrai asks for huge pages for its sessions, which it gets where the kernel has them by "
    "madvise; peers do not ask"
)
_CPUS: Final = len(os.sched_getaffinity(0))  # before any process is put on one of them
_LOAD_AVERAGE: Final = os.getloadavg()  # before a benchmark adds to it
_COLOURS: Final = ("#9aa5b1", "#e0a458", "#2a6f97", "#7a4f9a")

_WIDTH: Final = None if Console().is_terminal else 160  # of a pipe, which would cut tables at 80

console: Final = Console(highlight=False, soft_wrap=_WIDTH is not None, width=_WIDTH)


class Interval(NamedTuple):
    """A median over rounds with its 95 % bootstrap interval; of fewer than six, from end to end."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as tables show it."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Check:
    """One condition that a benchmark puts to its own figures."""

    name: str
    value: float
    goal: str
    holds: bool


def int8_check(manifest: Manifest) -> Check:
    """Return whether what is measured as int8 is that: where no form passes, fp32 is chosen."""
    holds = manifest.variant(manifest.chosen).precision == "int8"
    return Check(f"the chosen variant, {manifest.chosen}, is a form of int8", holds, "1", holds)


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of one value per round, and how far it moves when rounds are redrawn."""
    rounds = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(rounds, (_RESAMPLES, len(rounds)))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(np.median(drawn, axis=1), (tail, 1 - tail))
    return Interval(float(np.median(rounds)), float(low), float(high))


def environment(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """Return what figures depend on: processor, engine threads, versions of `packages` and LRAI."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "isa": isa_class(),
        "processor": _processor(),
        "cpus": _CPUS,
        "threads": threads,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": _huge_pages(),
        "load_average": _LOAD_AVERAGE,
        "commit": _commit(),
        "versions": {name: version(name) for name in dict.fromkeys(["lrai", *packages])},
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table; columns but the first are figures."""
    table = Table(
        title=title,
        caption=caption,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for previous, row in zip([(), *rows], rows, strict=False):
        if previous and previous[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    console.print(table)


def conclude(
    name: str,
    out: Path,
    environment: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
    *,
    quick: bool = False,
    **more: Any,
) -> int:
    """Print the checks, write `NAME.json` into `out`, return the exit status: 1 where one fails.

    `quick` is written, too: a quick look takes no whole run's place.
    """
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
        console.print(f"{mark}  {check.name:{width}}  {check.value:.4g} (goal: {check.goal})")
    content = {
        "environment": environment,
        "quick": quick,
        **more,
        "rows": list(rows),
        "checks": [asdict(check) for check in checks],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    if quick:
        console.print(f"a quick look: intervals of fewer than {_ENOUGH} rounds are from end to end")
    console.print(f"figures: {path}")
    return 0 if all(check.holds for check in checks) else 1


def _finite(value: Any) -> Any:
    """Return it with None for what is no number, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bar_chart(
    path: Path,
    title: str,
    groups: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    note: str,
) -> None:
    """Draw grouped bars into a PNG.

    Args:
        path: File to write; its folder is made.
        title: What is compared.
        groups: Labels along the horizontal axis.
        panels: Per panel its heading, and per series one value a group.
        note: One line below, what was measured on what.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6 * len(panels), 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (heading, series) in zip(axes, panels.items(), strict=True):
            places = np.arange(len(groups), dtype=np.float64)
            width = 0.8 / len(series)
            for index, (label, values) in enumerate(series.items()):
                shift = (index - (len(series) - 1) / 2) * width
                bars = axis.bar(
                    places + shift, values, width * 0.94, label=label, color=_COLOURS[index]
                )
                texts = [f"{value:.0f}" for value in values]
                axis.bar_label(bars, texts, padding=2, fontsize=9, color="#444444")
            axis.set_title(heading, loc="left", fontsize=11.5)
            axis.set_xticks(places, list(groups))
            axis.yaxis.grid(visible=True, color="#e6e8eb")
            axis.set_axisbelow(True)
            axis.locator_params(axis="y", nbins=6)
            axis.tick_params(length=0)
            axis.margins(y=0.12)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.suptitle(title, x=0.012, ha="left", fontsize=13.5, fontweight="bold")
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=len(labels),
            frameon=False,
            title=note,
            title_fontsize=9,
            alignment="left",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _huge_pages() -> str:
    """Return who has pages of 2 MB, as the kernel says it: the one in brackets."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.read_text(encoding="ascii").strip() if file.exists() else "none"


def _commit() -> str:
    """Return which commit is measured, with a plus where files differ; empty without one."""
    if not (commit := _git("rev-parse", "HEAD")):
        return ""
    return commit + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *words]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
