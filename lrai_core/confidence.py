"""Exact binomial bounds: one copy for the gate, the certificates and the monitor.

Source: Clopper and Pearson 1934, Biometrika 26(4). Tails are summed term by term from the largest,
which is found in the log domain, so a million samples are no harder than ten; no library beyond
`math` is needed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate, takewhile
from operator import mul


def upper_bound(failures: int, n: int, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson upper bound of a failure rate.

    With probability `confidence` or more over the sample the true rate is at most the result.

    Args:
        failures: Failures seen, 0 to n.
        n: Independent trials, fixed beforehand, at least 1.
        confidence: Inside (0, 1).
    """
    if n < 1 or not 0 <= failures <= n or not 0 < confidence < 1:
        raise ValueError(f"there is no {failures} failures of {n} trials, confidence {confidence}")
    low, high = 0.0, 1.0
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(failures, n, middle) > 1 - confidence else (low, middle)
    return high


def lower_bound(successes: int, n: int, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson lower bound of a success rate."""
    return 1 - upper_bound(n - successes, n, confidence)


def paired_loss_bound(lost: int, won: int, n: int, confidence: float = 0.95) -> float:
    """Return an upper bound of the loss in a 0/1 metric between two models on the same rows.

    The loss is the rate of rows that only the first model gets right less the rate of rows that
    only the second does. Both rates are bounded at half the error, so the bound holds for any
    dependence between them (Bonferroni); it is conservative, never optimistic.

    Args:
        lost: Rows that the reference gets right and the other does not.
        won: Rows that the other gets right and the reference does not.
        n: Rows in all.
        confidence: Inside (0, 1).
    """
    each = 1 - (1 - confidence) / 2
    return upper_bound(lost, n, each) - lower_bound(won, n, each)


def percent(bound: float, up: int) -> str:
    """Return a bound in per cent with two decimals, rounded to the side on which it still holds.

    Args:
        bound: As a share.
        up: 1 of an upper bound, -1 of a lower one.
    """
    near = round(bound, 4)
    return f"{near + up * 1e-4 * (up * near < up * bound):.2%}"


def rows_needed(delta: float, confidence: float = 0.95, failure_rate: float = 0.0) -> int:
    """Return about the least n at which the bound is `delta` when `failure_rate` of rows fail.

    Exactly where none do: else a failure more, or less, makes that go up and down with n.

    Returns -1 where `failure_rate` is `delta` or more, or so near that a billion do not suffice.
    """
    if failure_rate >= delta:
        return -1

    def reached(n: int) -> bool:  # one tail instead of solving for the bound
        failures = math.ceil(failure_rate * n)
        return failures < n and _cdf(failures, n, delta) <= 1 - confidence

    # Without failures the tail is a single term, however many there are.
    high = next((1 << n for n in range(1, 31 if failure_rate else 61) if reached(1 << n)), 0)
    return bisect_left(range(high), 1, lo=high // 2, key=reached) if high else -1


def _cdf(k: int, n: int, p: float) -> float:
    """Return P(X <= k) for X ~ Binomial(n, p), 0 < p < 1."""
    # Sums outwards from the largest term until what follows is below what a double can hold.
    top = min(k, int((n + 1) * p))
    odds = p / (1 - p)
    log_choose = math.lgamma(n + 1) - math.lgamma(top + 1) - math.lgamma(n - top + 1)
    log_top = log_choose + top * math.log(p) + (n - top) * math.log1p(-p)
    down = (i / ((n - i + 1) * odds) for i in range(top, 0, -1))
    up = ((n - i + 1) * odds / i for i in range(top + 1, k + 1))
    parts = (takewhile(lambda term: term >= 1e-20, accumulate(each, mul)) for each in (down, up))
    return min(1.0, math.exp(log_top) * (1.0 + sum(map(sum, parts))))
