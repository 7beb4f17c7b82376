"""Statistical closeness: run both models on a sample fixed beforehand, count, bound.

The bound is exact (Clopper-Pearson) under one assumption, which the certificate states: future
inputs are exchangeable with the sample. Nothing here is proved about any other input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np

from lrai_core import confidence
from lrai_core.artifact import EVALUATION, Artifact, Variant, check_files
from lrai_core.engine.engine import Session, find_engine
from lrai_core.protocol import Array, Signature
from lrai_core.verifier.sample import Rows, load_rows
from lrai_core.verifier.spec import difference

CONFIDENCE: Final = 0.95
EVALUATION_ASSUMPTION: Final = "future inputs are exchangeable with the evaluation rows"
BOX_ASSUMPTION: Final = (
    "future inputs are an evaluation row with uniform noise of at most the radius on each "
    "floating-point element; this says nothing about other inputs"
)


def evaluation(artifact: Artifact) -> tuple[Rows, list[bytes]]:
    """Return the rows that the artifact kept, and the hashes of all; nothing where it has none.

    Raises:
        VerificationError: They cannot be read.
        ArtifactError: They are not those of the manifest.
    """
    entry = artifact.manifest.files.get(EVALUATION)
    if entry is None:
        return Rows([], None, []), []
    check_files(artifact.path, {EVALUATION: entry})
    return load_rows(artifact.path / EVALUATION, artifact.manifest.signature)


def source_session(artifact: Artifact, source: str | Path | None = None) -> Session:
    """Return the source model, by default the artifact's copy, as it is: no optimisation."""
    copy = artifact.file(artifact.manifest.source.file)
    return find_engine("onnxruntime").load(copy if source is None else Path(source))


def variant_session(artifact: Artifact, variant: Variant) -> Session:
    """Return a variant as the actors run it."""
    weights = artifact.path / variant.weights if variant.weights else None
    return find_engine(variant.engine).load(artifact.file(variant.model), weights=weights)


def draw(
    kind: Literal["evaluation", "box"], rows: Rows, index: int, seed: int, radius: float
) -> list[Array]:
    """Return draw `index` of a sampler; the same arguments give the same bits."""
    if kind == "evaluation":
        return rows.inputs[index]
    random = np.random.default_rng([seed, index])
    row = rows.inputs[int(random.integers(len(rows)))]
    return [
        (array + random.uniform(-radius, radius, array.shape)).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for array in row
    ]


def differences(
    f: Session, g: Session, inputs: Iterable[list[Array]], signature: Signature
) -> Iterator[float]:
    """Yield, input by input, the largest difference after the output maps, each run alone."""
    for row in inputs:
        yield difference(f.run(row), g.run(row), signature.outputs)


def failing(gaps: Sequence[float], epsilon: float) -> tuple[int, ...]:
    """Return the indices of the draws whose difference exceeds epsilon."""
    return tuple(index for index, gap in enumerate(gaps) if not gap <= epsilon)


def bound(failures: int, n: int, level: float, comparisons: int) -> float:
    """Return the upper bound of the failure rate, paying for all candidates (Bonferroni)."""
    return confidence.upper_bound(failures, n, 1 - (1 - level) / comparisons)


def round_up(value: float, digits: int = 2) -> float:
    """Return `value` rounded up to `digits` significant digits."""
    if not 0 < value < 1e300:
        return value
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(max(value, 1e-290))))
    return max(value, math.ceil(value * scale) / scale)
