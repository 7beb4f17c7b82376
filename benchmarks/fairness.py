"""What int8 does to groups of people, and what the gate makes of it.

Networks trained on Adult (income, by sex and race) and on COMPAS (recidivism) are compiled with
groups: the gate compares the variant with float32 on the same rows, group by group, and neither
demographic parity nor equalised odds may widen by more than the margin, at 95 % confidence. On rows
that the compiler never sees, those of the training, both are compared again, here: with confidence
where groups have rows enough for it, and where they have not that is said, of every measure.

The third network is made to fail: in int8 its smaller group loses what decides about it. Compiled
without groups it is taken for its accuracy; compiled with groups that form is refused.

    python benchmarks/fairness.py --quick
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
from numpy.typing import NDArray  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import datasets, harness, models  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from lrai_core import fairness  # noqa: E402
from lrai_core.engine.engine import find_engine  # noqa: E402

Rows = dict[str, NDArray[Any]]
Told = list[fairness.Disparity]  # of each measure

SEED: Final = 0
CONFIDENCE: Final = 0.95
LEAST_ROWS: Final = 150  # of a group and kind, to be compared on unseen rows without a bound
HIDDEN: Final = (1024, 1024)  # so that int8 is worth it on any CPU


@dataclass(frozen=True, slots=True)
class Case:
    """A network, rows of it, and by how much what may widen.

    Attributes:
        rows: For the compiler, `features`, `label` and groups; it was not trained with them.
        unseen: The same, which the compiler does not get.
        told: Those of the groups of which rows tell both measures.
    """

    name: str
    source: Path
    rows: Rows
    unseen: Rows
    groups: tuple[str, ...]
    told: tuple[str, ...]
    margin: float
    max_accuracy_loss: float = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compile, compare, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="lrai-fairness-") as scratch:
        folder = Path(scratch)
        for name, read, margin, told in (
            ("compas", datasets.compas, 0.02, ("race",)),  # it has few women
            ("adult", datasets.adult, 0.01, ("sex", "race")),
        )[: 1 if arguments.quick else 2]:
            case = _trained(folder, name, read(), margin, told)
            fair = _compile(case, folder / f"{name}.lrai", case.groups)
            rows += _show(case, fair)
            checks += _widened(case, fair)
        checks += _refused(folder)
    environment = harness.environment(1, ["lrai", "onnxruntime", "numpy"])
    return harness.conclude(
        "fairness", arguments.out, environment, rows, checks, quick=arguments.quick
    )


def _trained(
    folder: Path, name: str, data: datasets.Data, margin: float, told: tuple[str, ...]
) -> Case:
    with console.status(f"{name}: training"):
        train = data.features[data.train], data.labels[data.train]
        source = models.train_mlp(folder / f"{name}.onnx", *train, HIDDEN)
    every: Rows = {"features": data.features, "label": data.labels, **data.groups}
    rows, unseen = (
        {name: values[of] for name, values in every.items()} for of in (~data.train, data.train)
    )
    return Case(name, source, rows, unseen, tuple(data.groups), told, margin)


def _compile(case: Case, out: Path, groups: tuple[str, ...]) -> lrai.Artifact:
    given = {name: case.rows[name] for name in ("features", "label", *groups)}
    with console.status(f"{case.name}: lrai compiles, groups: {', '.join(groups) or 'none'}"):
        return lrai.compile(
            case.source,
            out=out,
            evaluation=given,
            output_map="softmax",
            max_accuracy_loss=case.max_accuracy_loss,
            groups=groups,
            max_disparity=case.margin,
            threads=1,
            seed=SEED,
        )


def _gate(artifact: lrai.Artifact, variant: str) -> Any:
    return artifact.manifest.variant(variant).gate


def _show(case: Case, artifact: lrai.Artifact) -> list[dict[str, Any]]:
    """Print every group's rates with fp32 and with the chosen variant; return them."""
    manifest = artifact.manifest
    chosen, fp32 = _gate(artifact, manifest.chosen), _gate(artifact, "fp32")
    names = ("selection_rate", "accuracy", "false_positive_rate", "false_negative_rate")
    lines, rows = [], []
    for column, groups in chosen.groups.items():
        for group, own in groups.items():
            before = fp32.groups[column][group]
            pairs = [(before.get(name), own.get(name)) for name in names]
            cells = ["" if a is None or b is None else f"{a:.3f} {b - a:+.4f}" for a, b in pairs]
            lines.append([column, group, f"{own['rows']:.0f}", *cells])
            rows.append({"case": case.name, "column": column, "group": group, **own})
    harness.show(
        f"{case.name}: {manifest.chosen}, {manifest.variant(manifest.chosen).speedup:.2f} x fp32",
        ["column", "group", "rows", *(name.replace("_", " ") for name in names)],
        lines,
        "fp32, and what the variant changes, on rows that chose nothing",
    )
    for one in chosen.disparities:
        bound = one.widened_bound
        said = "insufficient data" if bound is None else f"wider by at most {bound:.4f}"
        between = ", ".join(one.groups) or "no group"
        console.print(
            f"{one.attribute}: {one.measure} {one.source:.4f}, then {one.variant:.4f}: {said} "
            f"(judged between {between})"
        )
        rows.append(
            {
                "case": case.name,
                "column": one.attribute,
                "measure": one.measure,
                "fp32": one.source,
                "variant": one.variant,
                "widened_bound": bound,
                "judged": list(one.groups),
            }
        )
    return rows


def _widened(case: Case, artifact: lrai.Artifact) -> list[Check]:
    manifest = artifact.manifest
    checks, enough = list[Check](), fairness.rows_needed(case.margin, CONFIDENCE)
    for attribute in case.groups:
        seen, sure = (_unseen(case, artifact, attribute, rows) for rows in (LEAST_ROWS, enough))
        gated = [
            d for d in _gate(artifact, manifest.chosen).disparities if d.attribute == attribute
        ]
        checks += widened(case, attribute, seen, sure, gated)
    faster = manifest.variant(manifest.chosen).speedup
    goal = "> 1: a form was found that keeps it"
    return [*checks, Check(f"{case.name}: times as fast as fp32", faster, goal, faster > 1)]


def widened(case: Case, attribute: str, seen: Told, sure: Told, gated: Told) -> Iterator[Check]:
    """Yield what is checked of both measures.

    Args:
        case: Whose margin is kept.
        attribute: Column of the groups.
        seen: Between groups of which unseen rows show how they fare.
        sure: Between those of which as many are unseen as a bound needs to be within the margin.
        gated: What the gate says; it has more rows, so its bound counts where `sure` has none.
    """
    goal, judged, missing = f"<= {case.margin}", 0, list[str]()
    for one, bounded, gate in zip(seen, sure, gated, strict=True):
        name = f"{case.name}: {one.measure} by {attribute}"
        if one.widened_bound is None:
            missing.append(one.measure)
        else:
            judged, wider = judged + 1, one.variant - one.source
            said = (
                f"{name}, unseen: wider by (at {CONFIDENCE:.0%} by {one.widened_bound:.4f} at most)"
            )
            yield Check(said, wider, goal, wider <= case.margin)
        who, bound = "unseen", bounded.widened_bound
        if bound is None:
            who, bound = "the gate's rows, as too few are unseen", gate.widened_bound
        if bound is None:
            console.print(f"{name}: insufficient data for a bound {goal}")
        else:
            yield Check(f"{name}, {who}: wider by at most", bound, goal, bound <= case.margin)
    words, least = f"{case.name}, {attribute}: measures judged on unseen rows", 1
    if attribute in case.told:
        least = len(seen)
    if missing:
        why = f"two groups need {LEAST_ROWS} rows of each kind"
        words += f", insufficient data for {' and '.join(missing)}: {why}"
    yield Check(words, judged, f">= {least}", judged >= least)


def _unseen(case: Case, artifact: lrai.Artifact, attribute: str, least_rows: int) -> Told:
    """Return what lies between groups, of fp32 and of the chosen variant, on unseen rows."""
    labels, values = case.unseen["label"] == 1, case.unseen[attribute]
    before, after = (
        np.concatenate([row.argmax(axis=1) for row in _logits(artifact, variant, case)]) == 1
        for variant in ("fp32", artifact.manifest.chosen)
    )
    members = {str(group): values == group for group in np.unique(values)}
    return fairness.disparities(attribute, members, labels, before, after, least_rows, CONFIDENCE)


def _logits(artifact: lrai.Artifact, variant: str, case: Case) -> Iterator[NDArray[np.float32]]:
    chosen = artifact.manifest.variant(variant)
    weights = artifact.path / chosen.weights if chosen.weights else None
    session = find_engine(chosen.engine).load(
        artifact.file(chosen.model), weights=weights, threads=1
    )
    features = case.unseen["features"]
    for first in range(0, len(features), 64):
        yield session.run([features[first : first + 64]])[0]


def _refused(folder: Path) -> list[Check]:
    """Compile the network that int8 wrongs, with groups and without."""
    source, rows = models.unequal(folder / "unequal.onnx", 9_000)
    seen, unseen = (
        {name: values[of] for name, values in rows.items()}
        for of in (slice(6_000), slice(6_000, None))
    )
    case = Case("unequal", source, seen, unseen, ("group",), ("group",), 0.05, 0.2)
    free = _compile(case, folder / "free.lrai", ())
    fair = _compile(case, folder / "fair.lrai", ("group",))
    chosen, kept = free.manifest.chosen, {variant.id for variant in fair.variants}
    log = (fair.path / "quantization.jsonl").read_text(encoding="utf-8").splitlines()
    console.print(f"unequal: without groups {chosen}, with them {fair.manifest.chosen}; refused:")
    for line in log:
        if "by group goes from" in line:
            console.print(line)
    enough = fairness.rows_needed(case.margin, CONFIDENCE)
    worst_free = max(one.variant - one.source for one in _unseen(case, free, "group", LEAST_ROWS))
    bounds = [one.widened_bound for one in _unseen(case, fair, "group", enough)]
    worst_fair = max(1.0 if bound is None else bound for bound in bounds)
    better = fair.manifest.variant(fair.manifest.chosen).speedup
    return [
        Check(
            f"unequal: {chosen}, chosen without groups, is kept with them",
            float(chosen in kept),
            "0",
            chosen not in kept and chosen != "fp32",
        ),
        Check(
            f"unequal: {chosen}, on unseen rows wider by",
            worst_free,
            f"> {case.margin}",
            worst_free > case.margin,
        ),
        Check(
            f"unequal: {fair.manifest.chosen}, chosen with groups, on unseen rows wider by at most",
            worst_fair,
            f"<= {case.margin}",
            worst_fair <= case.margin,
        ),
        Check(f"unequal: {fair.manifest.chosen}, times as fast as fp32", better, "> 1", better > 1),
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="not needed: the data come with packages")
    parser.add_argument("--quick", action="store_true", help="without Adult")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
