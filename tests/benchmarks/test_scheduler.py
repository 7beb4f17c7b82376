"""What the scheduler benchmark concludes from what its simulations found."""

from __future__ import annotations

from benchmarks.scheduler import Row, one_server_checks


def row(process: str, load: float, lrai: float, bentoml: float) -> Row:
    return {
        "process": process,
        "load": load,
        "noise": 0.0,
        "lrai": lrai,
        "bentoml": bentoml,
        "greedy": lrai,
        "ahead_of_greedy_error": 0.0,
        "clairvoyant": lrai,
    }


def test_bursty_cases_count_at_every_load() -> None:
    found = one_server_checks(
        [
            *(dict(row("mmpp", 0.5, 0.8, 0.95), noise=noise) for noise in (0.0, 0.05)),
            row("mmpp", 1.5, 0.8, 0.7),
            row("poisson", 1.5, 0.8, 0.1),  # not bursty
        ]
    )
    ahead = {check.name: check for check in found if "BentoML" in check.name}
    assert [check.holds for check in ahead.values()] == [False, True]
    assert [name.partition("mean of ")[2] for name in ahead] == [
        "3 bursty cases",
        "1 bursty cases at load 1 and above",
    ]
