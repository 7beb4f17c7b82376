"""Group measures of decisions between two classes: what the gate compares between two forms.

Sources: demographic parity, Calders, Kamiran and Pechenizkiy 2009; equalised odds, Hardt, Price and
Srebro 2016. Differences are the largest rate of any group less the smallest, as in fairlearn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from lrai_core.confidence import paired_loss_bound

Bools = NDArray[np.bool_]


class Disparity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A difference between groups, in the source model and in a variant.

    Attributes:
        attribute: Column of the groups.
        measure: `demographic_parity` or `equalised_odds`.
        source: Difference in the source model, between the groups judged.
        variant: Difference in the variant.
        widened_bound: One-sided 95 % upper bound of what the variant adds; None: insufficient data.
        groups: Those judged, each with enough rows of every kind that the measure needs.
    """

    attribute: str
    measure: str
    source: float
    variant: float
    widened_bound: float | None
    groups: tuple[str, ...]


def rates(selected: Bools, labels: Bools) -> dict[str, float]:
    """Return how a group fares whose rows have these decisions and labels.

    A rate that no row tells is left out.
    """
    seen = {
        "accuracy": selected == labels,
        "selection_rate": selected,
        "false_positive_rate": selected[~labels],
        "false_negative_rate": ~selected[labels],
    }
    return {"rows": len(labels)} | {name: float(r.mean()) for name, r in seen.items() if len(r)}


def rows_needed(margin: float, confidence: float) -> int:
    """Return how many rows a group needs for two groups to show that nothing widened the margin."""
    return math.ceil(math.log((1 - confidence) / 4) / math.log1p(-margin / 2))


def disparities(
    attribute: str,
    members: Mapping[str, Bools],
    labels: Bools,
    source: Bools,
    variant: Bools,
    least_rows: int,
    confidence: float,
) -> list[Disparity]:
    """Return what a variant does to each measure between groups, on the same rows.

    A variant widens a difference by no more than what it moves one group up and another down, so
    two paired bounds, each at half the error, bound it, however many groups there are.

    Args:
        attribute: Column of the groups.
        members: By group which rows are its own.
        labels: Of all rows.
        source: Decisions of the source model.
        variant: Decisions of the variant.
        least_rows: Of a group to be judged, of each kind that the measure needs.
        confidence: Of the bound.
    """
    each = 1 - (1 - confidence) / 2
    measures = {"demographic_parity": [np.ones_like(labels)], "equalised_odds": [labels, ~labels]}
    found = []
    for measure, kinds in measures.items():
        judged = {
            group: rows
            for group, rows in members.items()
            if all((rows & kind).sum() >= least_rows for kind in kinds)
        }
        before, after, bound = 0.0, 0.0, 0.0
        for kind in kinds if len(judged) > 1 else ():
            own = [(source[rows & kind], variant[rows & kind]) for rows in judged.values()]
            before = max(before, float(np.ptp([was.mean() for was, _ in own])))
            after = max(after, float(np.ptp([now.mean() for _, now in own])))
            moves = [(int((now > was).sum()), int((was > now).sum()), len(was)) for was, now in own]
            up = [paired_loss_bound(new, gone, n, each) for new, gone, n in moves]
            down = [paired_loss_bound(gone, new, n, each) for new, gone, n in moves]
            bound = max(bound, max(up) + max(down))
        widened = bound if len(judged) > 1 else None
        found.append(Disparity(attribute, measure, before, after, widened, tuple(judged)))
    return found
