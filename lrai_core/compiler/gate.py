"""The gate: what a form of the model must show on rows that chose nothing before it may serve.

Every condition is judged twice, for rows run alone and for the same rows shuffled into padded
batches, and the worse counts. Failing is a normal result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from lrai_core import confidence, fairness
from lrai_core.artifact import GateResult
from lrai_core.engine.batching import run_together, shuffled_batches
from lrai_core.engine.engine import Session
from lrai_core.errors import CalibrationError, UsageError, shorten
from lrai_core.executor import on_all_cpus
from lrai_core.protocol import Array, OutputMap, Signature, Specs
from lrai_core.verifier.sample import Rows
from lrai_core.verifier.spec import FAR, MEASURES, agreement, difference, raw_as, round_up

Metric = Literal["top1", "top5"]
AGREEMENT: Final = 0.98
LEVEL: Final = 0.95
_SENSELESS: Final = 0.05  # share of rows that a model is right on, of labels that are not its own
_BEST: Final[dict[Metric, int]] = {"top1": 1, "top5": 5}
# What outputs may be that nobody says anything of.
_KINDS: dict[OutputMap, str] = {"softmax": "scores of classes", "l2_normalised": "embeddings"}
# fp32 sums in another order: two GEMM shapes of one engine differ by less.
EFFECT_FLOOR: Final = 1e-4
_EFFECT_MARGIN: Final = 2.0  # over the largest effect seen, for the rows that were not seen

_QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))

Outputs = list[list[Array]]
Runs = Sequence[Outputs]
_Scores = NDArray[np.float64]
Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What must hold.

    Attributes:
        metric: Judged where there are labels.
        max_accuracy_loss: Share of rows.
        epsilon: With `delta`, a bound on closeness, which of outputs compared as `raw` decides in
            place of their agreement; None for none.
        delta: Largest share of inputs that may differ by more than epsilon.
        groups: Columns of groups between which no difference may widen.
        max_disparity: By how much it may, as a share.
    """

    metric: Metric = "top1"
    max_accuracy_loss: float = 0.01
    epsilon: float | None = None
    delta: float = 0.01
    groups: tuple[str, ...] = ()
    max_disparity: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.metric not in _BEST:
            raise UsageError(f"metric {self.metric!r} is unknown; known: {', '.join(_BEST)}")
        for name in ("max_accuracy_loss", "delta", "max_disparity"):
            if not 0 < (share := getattr(self, name)) < 1:
                raise UsageError(f"{name} is {share}, it must lie between 0 and 1")
        if self.epsilon is not None and not 0 < self.epsilon < FAR:
            raise UsageError(f"epsilon is {self.epsilon}, it must be above 0, and finite")


class Judged(NamedTuple):
    """The gate's result for one form, with what certificates are made of.

    Attributes:
        gaps: Per gate row the largest difference to the source model, alone, after the output maps.
        batch_effect: Twice the largest element difference that batch-mates made, at least 1e-4.
    """

    result: GateResult
    gaps: list[float]
    batch_effect: float


def run_alone(session: Session, rows: Rows, threads: int, tick: Tick) -> Outputs:
    """Return the outputs of every row, each run by itself without padding."""
    outputs = []
    for own in on_all_cpus(lambda i: session.run(rows.inputs[i]), range(len(rows)), threads):
        outputs.append(own)
        tick()
    return outputs


def run(session: Session, rows: Rows, signature: Signature, threads: int, tick: Tick) -> Runs:
    """Return the outputs of every row alone and, where rows coalesce, among batch-mates.

    Those are of other lengths and in shuffled order, and some in the shapes of the signature's
    `calls`. The session has `threads`.
    """
    runs = [run_alone(session, rows, threads, tick)]
    if signature.coalescible:
        batched: Outputs = [[]] * len(rows)
        batches = list(shuffled_batches(rows.inputs, signature))

        def together(batch: tuple[list[int], int]) -> Outputs:
            return run_together(session, [rows.inputs[i] for i in batch[0]], signature, batch[1])

        for (batch, _), own in zip(batches, on_all_cpus(together, batches, threads), strict=True):
            for index, outputs in zip(batch, own, strict=True):
                batched[index] = outputs
                tick()
        runs.append(batched)
    return runs


def worst_gaps(reference: Outputs, runs: Runs, specs: Specs) -> list[float]:
    """Return per row the largest difference to the source's outputs of any run, after the maps."""
    return [max(row) for row in zip(*(_gaps(reference, run, specs) for run in runs), strict=True)]


def judge(
    runs: Runs, reference: Outputs, rows: Rows, specs: Specs, conditions: Conditions, level: float
) -> Judged:
    """Return what the gate says of a form, by its `run` of the rows and the source's outputs.

    Labels judge the first output with scores, or with one a row (`_scored`); the other numbers with
    fractions have to agree, all of them where rows are too few to tell; without labels all outputs
    have to. Of those compared as `raw` epsilon decides where it is demanded, if they are finite.
    """
    labels, effect = rows.labels, 0.0
    if len(runs) > 1:
        unmapped = [replace(spec, output_map="raw") for spec in specs]
        effect = max(difference(a, b, unmapped) for a, b in zip(*runs, strict=True))
    alike = specs if conditions.epsilon is None else raw_as("derived", specs)
    if labels is None:
        found = _agreement_result(reference, runs, alike, level)
    else:
        first, above = _scored(reference)
        scores = [_scores(one, first, above) for one in (reference, *runs)]
        rule = "" if above is None else f"; a score above {above:g} is 1"
        found = _label_result(scores, labels, rule, conditions, level)
        others = [i for i, a in enumerate(reference[0]) if a.dtype.kind == "f" and i != first]
        if found.passed and others:  # no label speaks of them
            parts = [[[row[i] for i in others] for row in one] for one in (reference, *runs)]
            rest = _agreement_result(parts[0], parts[1:], [alike[i] for i in others], level)
            why = f"{found.why}; other outputs than {specs[first].name}: {rest.why}"
            best = confidence.lower_bound(rest.rows, rest.rows, level)
            passed = rest.passed or (rest.agreement_bound or 0) >= best
            found = replace(found, passed=passed, why=why)
        if rows.groups:
            found = _fair_enough(found, scores, rows, conditions.max_disparity)
    gaps = _gaps(reference, runs[0], specs)
    if found.passed and (epsilon := conditions.epsilon) is not None:
        worst = worst_gaps(reference, runs, specs)
        beyond = sum(not gap <= epsilon for gap in worst)
        bound = confidence.upper_bound(beyond, len(worst), level)
        why = f"{found.why}; {beyond} of {len(worst)} rows differ by more than epsilon {epsilon:g}"
        why += f", at most {confidence.percent(bound, 1)}; delta {conditions.delta:.2%} allowed"
        found = replace(found, passed=bound <= conditions.delta, why=why)
    far = {name: float(np.quantile(gaps, q, method="higher")) for name, q in _QUANTILES}
    found = replace(found, difference=far)
    return Judged(found, gaps, round_up(max(EFFECT_FLOOR, min(_EFFECT_MARGIN * effect, FAR))))


def check_row_count(rows: Rows, asked: Conditions, split_off: int, signature: Signature) -> None:
    """Refuse an evaluation set with which nothing could ever pass.

    Raises:
        CalibrationError: Too few rows; says how many are there and how many are needed. Or for
            one of the signature's calls, which would not be judged.
    """
    if rows.groups and (rows.labels is None or set(rows.labels.tolist()) != {0, 1}):
        raise CalibrationError("evaluation: groups are judged with labels, 0 and 1")
    least = fairness.rows_needed(asked.max_disparity, LEVEL)
    for column, values in rows.groups.items():
        sizes = Counter(values.tolist()).most_common()
        if len(sizes) < 2 or sizes[1][1] < least:
            seen = shorten(", ".join(f"{size} of {group}" for group, size in sizes), 200)
            lacks = f"insufficient data in {column!r}: two groups need {least} rows each"
            held = f"{split_off} of all rows are the search's, the gate has {seen}"
            raise CalibrationError(f"evaluation: {lacks}, {held}")
    if len(rows) < (needed := _rows_needed(rows, asked)):
        there = f"evaluation: {len(rows) + split_off} distinct rows, {split_off} for the search"
        needs = f"is left with {len(rows)} and needs {needed} even for a form without a fault"
        raise CalibrationError(f"{there}; the gate {needs}")
    batches = shuffled_batches(rows.inputs, signature) if signature.calls else ()
    for count, length in set(signature.calls) - {(len(batch), to) for batch, to in batches}:
        raise CalibrationError(f"calls: {count}x{length}: too few rows that judge are as short")


def check_labels(outputs: list[Array], rows: Rows, conditions: Conditions) -> None:
    """Refuse labels, or groups, that outputs like these of one row cannot be judged by.

    Raises:
        CalibrationError: There are no scores of classes, or of others than the labels.
    """
    if rows.labels is not None:
        scores = _scores([outputs], *_scored([outputs]))
        _hits(scores, rows.labels, conditions.metric)
        if rows.groups:
            _selected(scores)


def check_search(gaps: Sequence[float], asked: Conditions) -> None:
    """Refuse a form of which the search rows show that it is not as close as is demanded.

    Raises:
        ValueError: It is not.
    """
    far = sum(not gap <= (asked.epsilon or FAR) for gap in gaps)
    if far and confidence.lower_bound(far, len(gaps)) > asked.delta:
        raise ValueError(f"{far} of {len(gaps)} search rows are beyond epsilon {asked.epsilon:g}")


def errors(rows: Rows, conditions: Conditions, forms: int) -> list[float]:
    """Return, in an order that these rows do not tell, how often each form may pass wrongly.

    They add up to 5 per cent, so no more often does any. Half of it halves from one to the next,
    half is shared equally. Where a form without a fault could not pass with the least part, or rows
    tell of groups, all of it is the first one's, and the next one's only where that passes.
    """
    parts = [(1 - LEVEL) / 2 * (0.5 ** min(i, forms - 1) + 1 / forms) for i in range(1, forms + 1)]
    if rows.groups or not parts or len(rows) < _rows_needed(rows, conditions, 1 - parts[-1]):
        return [1 - LEVEL] + [0.0] * (forms - 1)
    return parts


def _rows_needed(rows: Rows, conditions: Conditions, level: float = LEVEL) -> int:
    """Return the fewest rows with which a form without a fault passes at a level."""
    labelled = (conditions.max_accuracy_loss, 1 - (1 - level) / 2)
    terms = [(1 - AGREEMENT, level) if rows.labels is None else labelled]
    terms += [(conditions.delta, level)] * (conditions.epsilon is not None)
    return max(confidence.rows_needed(*term) for term in terms)


def _gaps(reference: Outputs, run: Outputs, specs: Specs) -> list[float]:
    return [difference(f, g, specs) for f, g in zip(reference, run, strict=True)]


def _label_result(
    scores: Sequence[_Scores], labels: Array, rule: str, conditions: Conditions, level: float
) -> GateResult:
    n, metric, allowed = len(labels), conditions.metric, conditions.max_accuracy_loss
    hits, *each = (_hits(one, labels, metric) for one in scores)
    if (share := hits.mean()) <= min(allowed, _SENSELESS):  # then there is little to lose
        words = f"the source model is right on {share:.2%} of rows; are the labels its classes?"
        raise CalibrationError(words)
    loss, bound, needed = -1.0, -1.0, 0
    for own in each:
        lost, won = int((hits & ~own).sum()), int((own & ~hits).sum())
        loss = max(loss, (lost - won) / n)
        bound = max(bound, confidence.paired_loss_bound(lost, won, n, level))
        needed = max(needed, _label_rows_needed(lost / n, won / n, allowed, level))
    measure = f"{metric} on labels{rule}"
    most = confidence.percent(bound, 1)
    why = f"{metric} loss is {loss:.2%}, at most {most}; {allowed:.2%} allowed{rule}"
    if bound > allowed and loss < allowed and needed > n:
        why += f"; at this rate about {needed} rows of the gate would show it"
    rates: dict[str, Any] = {"accuracy_loss": loss, "accuracy_loss_bound": bound}
    return GateResult(passed=bound <= allowed, why=why, rows=n, measure=measure, **rates)


def _label_rows_needed(lost: float, won: float, allowed: float, level: float) -> int:
    sizes = (int(100 * 1.25**step) for step in range(54))
    shown = ((round(lost * n), round(won * n), n) for n in sizes)
    return next((of[2] for of in shown if confidence.paired_loss_bound(*of, level) <= allowed), -1)


def _agreement_result(reference: Outputs, runs: Runs, specs: Specs, level: float) -> GateResult:
    n, counts = len(reference), _agreeing(reference, runs, specs)
    share, worst = counts[0] / n, min(counts) / n
    bound = confidence.lower_bound(min(counts), n, level)
    maps = dict.fromkeys(spec.output_map for spec in specs)
    measure = ", ".join(MEASURES[one] for one in maps if one in MEASURES) or "finite"
    beside = "" if worst == share else f" ({worst:.2%} in batches)"
    least = confidence.percent(bound, -1)
    why = f"{measure} on {share:.2%} of rows{beside}, at least {least}; {AGREEMENT:.0%} needed"
    if bound < AGREEMENT:
        needed = confidence.rows_needed(1 - AGREEMENT, level, 1 - worst)
        why += f"; at this rate about {needed} rows of the gate would show it" if needed > n else ""
        for one, kind in _KINDS.items() if "raw" in maps else ():
            better = min(_agreeing(reference, runs, raw_as(one, specs))) / n
            told = f"; {MEASURES[one]} on {better:.2%}: --output-map {one}, if these are {kind}"
            why += told if better > worst else ""
    rates: dict[str, Any] = {"agreement": share, "agreement_bound": bound}
    return GateResult(passed=bound >= AGREEMENT, why=why, rows=n, measure=measure, **rates)


def _agreeing(reference: Outputs, runs: Runs, specs: Specs) -> list[int]:
    pairs = [zip(reference, run, strict=True) for run in runs]
    return [sum(agreement(f, g, specs) for f, g in each) for each in pairs]


def _fair_enough(found: GateResult, scores: list[_Scores], rows: Rows, most: float) -> GateResult:
    (source, *chosen), least = map(_selected, scores), fairness.rows_needed(most, LEVEL)
    labels = np.asarray(rows.labels) == 1
    groups, worst = {}, list[fairness.Disparity]()
    for column, values in rows.groups.items():
        members = {str(group): values == group for group in np.unique(values)}
        groups[column] = {n: fairness.rates(chosen[0][m], labels[m]) for n, m in members.items()}
        told = (column, members, labels, source)
        each = [fairness.disparities(*told, one, least, LEVEL) for one in chosen]
        worst += [max(same, key=lambda d: d.widened_bound or 0) for same in zip(*each, strict=True)]
    reasons = [
        f"{one.measure} by {one.attribute} goes from {one.source:.2%} to {one.variant:.2%}, "
        f"wider by {confidence.percent(one.widened_bound or 0, 1)} at most; {most:.2%} allowed"
        for one in worst
        if found.passed and (one.widened_bound or 0.0) > most
    ]
    unsure = [f"{d.measure} by {d.attribute}" for d in worst if d.widened_bound is None]
    why = "; ".join(reasons or [found.why])
    why += f"; insufficient data for {', '.join(unsure)}" if unsure else ""
    found = replace(found, passed=found.passed and not reasons, why=why)
    return replace(found, groups=groups, disparities=tuple(worst))


def _scored(reference: Outputs) -> tuple[int, float | None]:
    """Return which output labels speak of, and above what its score says 1 where it has but one.

    It is the first output with scores of classes, or else the first with one score a row. That says
    1 above 0.5 where all of the source model's lie between 0 and 1, as probabilities do, and above
    0 where they do not, as of logits.

    Raises:
        CalibrationError: There is none.
    """
    sizes = [a.size * (a.dtype.kind == "f") for a in reference[0]]
    first = next((i for least in (2, 1) for i, size in enumerate(sizes) if size >= least), None)
    if first is None or len({row[first].size for row in reference}) > 1:
        raise CalibrationError("labels need a float output with one score per class, or per row")
    if sizes[first] > 1:
        return first, None
    values = np.array([row[first].item() for row in reference])
    return first, 0.0 if ((values < 0) | (values > 1)).any() else 0.5


def _scores(outputs: Outputs, first: int, above: float | None) -> _Scores:
    """Return the scores of every row's classes, of which a single score makes two."""
    scores = np.stack([row[first].reshape(-1) for row in outputs]).astype(np.float64)
    return scores if above is None else np.hstack([2 * above - scores, scores])


def _selected(scores: _Scores) -> NDArray[np.bool_]:
    if scores.shape[1] != 2:
        raise CalibrationError(f"groups are judged between 2 classes, not {scores.shape[1]}")
    return np.asarray(scores[:, 1] > scores[:, 0])


def _hits(scores: _Scores, labels: Array, metric: Metric) -> NDArray[np.bool_]:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= scores.shape[1]:
        raise CalibrationError(f"labels are {low} to {high}, classes 0 to {scores.shape[1] - 1}")
    if scores.shape[1] <= _BEST[metric]:
        raise CalibrationError(f"metric {metric} says nothing of {scores.shape[1]} classes")
    best = np.argsort(-scores, axis=1, kind="stable")[:, : _BEST[metric]]
    return np.asarray((best == labels[:, None]).any(axis=1) & ~np.isnan(scores).any(axis=1))
