"""What forms of a model say of rows that nothing else has seen, beside what the reference says."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import lrai_core as lrai
from benchmarks.compiler_models import Array, Feed, Model
from lrai_core import fairness
from lrai_core.confidence import paired_loss_bound, upper_bound
from lrai_core.executor import on_all_cpus
from lrai_core.verifier.spec import agreement, difference

Run = Callable[[Feed], list[Array]]

EPSILON: Final = 0.01
MOST_DISPARITY: Final = 0.01  # the default of `lrai.compile`
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_RIDGE: Final = 1.0  # of the probe; embeddings have length one


@dataclass(frozen=True, slots=True)
class Said:
    """What a form says of unseen rows.

    Attributes:
        accuracy: Share of labels that it is right on, by itself or by the probe; NaN without.
        loss: Accuracy of the reference less its own.
        loss_bound: One-sided 95 % upper bound of that, as the gate has it.
        agrees: Share of rows on which it says what the reference says.
        widened: Bound of what lies between groups, wider than the reference's, as the gate has it.
        gaps: Of the differences to the reference after the output map, by `QUANTILES`.
        beyond: Share of rows that differ by more than epsilon.
        beyond_bound: One-sided 95 % upper bound of that.
    """

    accuracy: float = math.nan
    loss: float = 0.0
    loss_bound: float = 0.0
    agrees: float = 1.0
    widened: float = 0.0
    gaps: tuple[float, ...] = (0.0,) * len(QUANTILES)
    beyond: float = 0.0
    beyond_bound: float = 0.0


class Judge:
    """Runs every form on the unseen rows of a model, once in calls of each size it is given."""

    def __init__(self, model: Model) -> None:
        """Judge forms of a model; the first that is asked about is the reference."""
        self._model = model
        self._known: dict[Hashable, Said] = {}
        self._right: list[Array] = []  # the reference's first output, by row
        self._probe: NDArray[np.float64] | None = None  # weights of the probe
        output = lrai.TensorSpec(
            name="y",
            datatype="FP32",
            shape=("batch",),
            output_map=model.output_map,  # type: ignore[arg-type] # one of the three
        )
        self._outputs = [output]

    def said(
        self, forms: Sequence[tuple[Hashable, Run, Sequence[int]]], threads: int
    ) -> list[Said]:
        """Return what each form says in calls of so many rows, of several sizes the worst.

        Those of one key say the same, and the first of them runs. As many at once as there are
        CPUs for, on `threads` each: nothing is timed here.
        """
        if not self._model.trained:
            return [Said()] * len(forms)
        new = dict[Hashable, tuple[Run, Sequence[int]]]()
        for key, run, sizes in forms:
            if key not in self._known:
                new.setdefault(key, (run, sizes))
        for key, own in zip(new, on_all_cpus(self._answers, new.values(), threads), strict=True):
            if not self._right:
                self._right, self._probe = own[0], self._trained(new[key][0])
                self._known[key] = replace(Said(), accuracy=_share(self._hits(own[0])))
            else:
                self._known[key] = _worst([self._compared(one) for one in own])
        return [self._known[key] for key, _, _ in forms]

    def _answers(self, asked: tuple[Run, Sequence[int]]) -> list[list[Array]]:
        """Return what a form says of each row, by size of the calls."""
        (run, sizes), probe = asked, self._model.probe
        rows = [*self._model.unseen, *(probe.rows if probe else ())]
        return [_in_calls(run, rows, size) for size in sizes]

    def _compared(self, own: list[Array]) -> Said:
        """Return what a form says by its answers."""
        count = len(self._model.unseen)  # behind them lie the probe's
        pairs = [([f], [g]) for f, g in zip(self._right[:count], own[:count], strict=True)]
        gaps = [difference(f, g, self._outputs) for f, g in pairs]
        far = sum(gap > EPSILON for gap in gaps)
        said = Said(
            agrees=float(np.mean([agreement(f, g, self._outputs) for f, g in pairs])),
            gaps=tuple(float(np.quantile(gaps, q, method="higher")) for q in QUANTILES.values()),
            beyond=far / count,
            beyond_bound=upper_bound(far, count),
        )
        before, after = self._hits(self._right), self._hits(own)
        if before is None or after is None:
            return said
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        return replace(
            said,
            accuracy=_share(after),
            loss=(lost - won) / len(before),
            loss_bound=paired_loss_bound(lost, won, len(before)),
            widened=widened(self._model, self._right, own) if self._model.unseen_groups else 0.0,
        )

    def _hits(self, answers: Sequence[Array]) -> NDArray[np.bool_] | None:
        """Return which labelled rows it is right on, None where there are no labels."""
        if self._model.labels is not None:
            says = np.array([row.argmax() for row in answers])
            return np.asarray(says == self._model.labels)
        if (probe := self._model.probe) is None or self._probe is None:
            return None
        embedded = np.concatenate(answers[len(self._model.unseen) :])
        return np.asarray((_with_one(embedded) @ self._probe > 0) == (probe.labels == 1))

    def _trained(self, reference: Run) -> NDArray[np.float64] | None:
        """Return the weights of a linear classifier on what the reference makes of sentences."""
        if (probe := self._model.probe) is None:
            return None
        x = _with_one(np.concatenate([reference(feed)[0] for feed in probe.train]))
        signs = np.where(probe.train_labels == 1, 1.0, -1.0)
        weights: NDArray[Any] = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ signs)
        return weights


def widened(model: Model, right: Sequence[Array], own: Sequence[Array]) -> float:
    """Return by how much what lies between groups may be wider than the reference's, as gated."""
    labels = np.asarray(model.labels) == 1
    source, variant = (np.array([row.argmax() == 1 for row in of]) for of in (right, own))
    least, worst = fairness.rows_needed(MOST_DISPARITY, 0.95), 0.0
    for column, values in model.unseen_groups.items():
        members = {str(group): values == group for group in np.unique(values)}
        told = fairness.disparities(column, members, labels, source, variant, least, 0.95)
        worst = max(worst, *(one.widened_bound or 0.0 for one in told))
    return worst


def _in_calls(run: Run, rows: Sequence[Feed], size: int) -> list[Array]:
    """Return what is said of each row in calls of so many rows of one shape."""
    alike, said = dict[Hashable, list[int]](), dict[int, Array]()
    for at, row in enumerate(rows):
        alike.setdefault(tuple(array.shape for array in row.values()), []).append(at)
    for places in alike.values():
        for first in range(0, len(places), size):
            part = places[first : first + size]
            call = [rows[at] for at in np.resize(part, size)]  # a smaller one others may serve
            answer = run({name: np.concatenate([row[name] for row in call]) for name in call[0]})[0]
            said |= {at: answer[index : index + 1] for index, at in enumerate(part)}
    return [said[at] for at in range(len(rows))]


def _worst(said: Sequence[Said]) -> Said:
    """Return the worst of each figure."""
    return Said(
        accuracy=min(one.accuracy for one in said),
        loss=max(one.loss for one in said),
        loss_bound=max(one.loss_bound for one in said),
        agrees=min(one.agrees for one in said),
        widened=max(one.widened for one in said),
        gaps=tuple(max(gap) for gap in zip(*(one.gaps for one in said), strict=True)),
        beyond=max(one.beyond for one in said),
        beyond_bound=max(one.beyond_bound for one in said),
    )


def _share(hits: NDArray[np.bool_] | None) -> float:
    return math.nan if hits is None else float(hits.mean())


def _with_one(rows: Array) -> NDArray[np.float64]:
    return np.hstack([rows, np.ones((len(rows), 1))]).astype(np.float64)
